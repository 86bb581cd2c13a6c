"""The transformer's parts, each against its definition."""

import math

import torch
from torch import nn

from fpdm.blocks import (
    Attention,
    Block,
    BlockConfig,
    GatedMlp,
    position_embedding,
    rotate,
    timestep_embedding,
    unpatchify,
)

CONFIG = BlockConfig(width=8, num_heads=2, mlp_ratio=4.0, side=3)


def test_timesteps_are_embedded_as_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0.0, 2.5, 999.0]), width=6, max_period=100.0)
    for row, t in enumerate((0.0, 2.5, 999.0)):
        angles = [t * 100.0 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(embedding[row], torch.tensor(expected), atol=1e-4, rtol=0)


def test_positions_encode_the_column_in_the_first_half_and_the_row_in_the_second():
    table = position_embedding(8, 3)[0].reshape(3, 3, 8)  # (row, column, channel)
    assert torch.equal(table[0, :, :4], table[2, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert torch.equal(table[1, 2, :4], table[2, 1, 4:])
    expected = [math.sin(2), math.sin(2 / 100), math.cos(2), math.cos(2 / 100)]
    torch.testing.assert_close(table[0, 2, :4], torch.tensor(expected))


def test_unpatchify_puts_every_patch_back_where_it_was():
    image = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = image.reshape(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    assert torch.equal(unpatchify(patches, 2), image)


def test_attention_is_softmax_of_scaled_products_over_each_heads_channels():
    attention = Attention(CONFIG)
    x = torch.linspace(-1, 1, 2 * 5 * 8).sin().reshape(2, 5, 8)
    q, k, v = (part.reshape(2, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    mixed = ((q @ k.mT) / 2).softmax(-1) @ v
    torch.testing.assert_close(attention(x)[0], attention.proj(mixed.transpose(1, 2).reshape(2, 5, 8)))


def test_a_block_whose_modulation_is_zero_is_the_identity():
    block = Block(CONFIG)
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    nn.init.zeros_(block.adaLN_modulation[1].bias)
    x = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
    assert torch.equal(block(x, block.modulation(torch.ones(2, 8)))[0], x)


def test_rope_makes_products_of_queries_and_keys_a_function_of_their_distance():
    side, width = 4, 8
    q, k = (
        torch.linspace(-1, 1, width).expand(1, 1, side**2, -1),
        torch.linspace(2, -1, width).expand(1, 1, side**2, -1),
    )
    assert torch.allclose(rotate(q, side).norm(dim=-1), q.norm(dim=-1))
    products = (rotate(q, side) @ rotate(k, side).mT).reshape(side, side, side, side)  # rows, columns of both
    torch.testing.assert_close(products[1, 1, 2, 3], products[0, 0, 1, 2])
    torch.testing.assert_close(products[3, 2, 1, 0], products[2, 3, 0, 1])
    assert (products[0, 0, 1, 2] - products[0, 0, 2, 1]).abs() > 1e-3


def test_a_gated_mlp_has_two_thirds_of_the_width_and_is_silu_of_one_half_times_the_other():
    mlp = GatedMlp(24, 96)
    assert mlp.fc2.weight.shape == (24, 64)
    x = torch.linspace(-1, 1, 48).reshape(2, 24)
    gate, value = (x @ mlp.fc1_gated.weight.T + mlp.fc1_gated.bias).split(64, dim=-1)
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * value) @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_qk_norm_bounds_the_logits_whatever_the_weights():
    attention = Attention(BlockConfig(width=8, num_heads=2, mlp_ratio=4.0, side=3, qk_norm=True))
    x = torch.linspace(-1, 1, 2 * 5 * 8).sin().reshape(2, 5, 8)
    before = attention(x)[0]
    with torch.no_grad():
        attention.qkv.weight[:16] *= 100  # queries and keys
        attention.qkv.bias[:16] *= 100
    torch.testing.assert_close(attention(x)[0], before, rtol=1e-4, atol=1e-4)

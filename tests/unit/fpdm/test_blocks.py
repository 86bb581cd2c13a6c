"""The transformer's parts, each against its definition."""

import math

import torch
from torch import nn

from fpdm.blocks import Attention, Block, position_embedding, timestep_embedding, unpatchify


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
    attention = Attention(8, 2)
    x = torch.linspace(-1, 1, 2 * 5 * 8).sin().reshape(2, 5, 8)
    q, k, v = (part.reshape(2, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    mixed = ((q @ k.mT) / 2).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(mixed.transpose(1, 2).reshape(2, 5, 8)))


def test_a_block_whose_modulation_is_zero_is_the_identity():
    block = Block(8, 2, 4.0)
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    nn.init.zeros_(block.adaLN_modulation[1].bias)
    x = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
    assert torch.equal(block(x, block.modulation(torch.ones(2, 8))), x)

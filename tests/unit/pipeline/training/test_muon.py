"""Muon's update: torch's own in bfloat16, orthogonal in fp32, and each stacked matrix apart."""

import math

import pytest
import torch
from torch import nn

from fpdm.config import DenoiserConfig
from fpdm.denoiser import build_denoiser
from pipeline.training.muon import ADAMW_RMS, Layout, MuonAdamW, muon_update, orthogonalise, takes

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    """From a tenth of the largest singular value on; the polynomial maps [0.1, 1] / sqrt(16) into [0.6, 1.3]."""
    u, _, v = torch.linalg.svd(random(*shape), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.1, 1, 16)) @ v
    values = (u.mT @ orthogonalise(matrix) @ v.mT).diagonal()
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    rest = orthogonalise(matrix) - u @ torch.diag(values) @ v
    assert float(rest.abs().max()) < 1e-4


class TwoMatrices(nn.Module):
    """Names of the network's, without stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.block_pre_projection = nn.Linear(24, 8)
        self.final_layer = nn.Linear(8, 3)


def test_in_bfloat16_an_update_is_that_of_torch() -> None:
    mine, torchs = TwoMatrices(), TwoMatrices()
    torchs.load_state_dict(mine.state_dict())
    optimizer = MuonAdamW(mine, dtype=torch.bfloat16, **SETTINGS)
    matrix, others = torchs.block_pre_projection.weight, [torchs.block_pre_projection.bias]
    muon = torch.optim.Muon([matrix], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([*others, *torchs.final_layer.parameters()], **SETTINGS)
    for step in range(4):
        for model, optimizers in ((mine, [optimizer]), (torchs, [muon, adamw])):
            model.zero_grad()
            (model.final_layer(model.block_pre_projection(random(5, 24) + step)) ** 2).mean().backward()
            for one in optimizers:
                one.step()
    for name, parameter in mine.named_parameters():
        assert torch.allclose(parameter, torchs.get_parameter(name), rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    ("name", "shape", "number", "dimension"),
    [
        ("blocks_pre.0.attn.qkv.weight", (48, 16), 3, 0),
        ("block_fixed_point.adaLN_modulation.1.weight", (96, 16), 6, 0),
        ("block_fixed_point_projection_fc1.weight", (32, 32), 2, 1),
        ("block_fixed_point.mlp.fc1.weight", (64, 16), 1, 0),
    ],
)
def test_stacked_matrices_are_orthogonalised_apart(
    name: str, shape: tuple[int, int], number: int, dimension: int
) -> None:
    pieces = muon_update(name, random(*shape), torch.float32).chunk(number, dimension)
    for piece, gradient in zip(pieces, random(*shape).chunk(number, dimension), strict=True):
        assert torch.equal(piece, ADAMW_RMS * math.sqrt(max(piece.shape)) * orthogonalise(gradient))


def test_muon_takes_the_matrices_of_blocks_and_projections() -> None:
    model = build_denoiser(DenoiserConfig(hidden_size=8, num_heads=2, input_size=4))
    others = {name for name, parameter in model.named_parameters() if not takes(name, parameter.ndim)}
    assert {name for name in others if model.get_parameter(name).ndim > 1} == {
        *("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"),
        *("y_embedder.embedding_table.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_layout_finds_every_matrix_in_the_parts_of_the_ranks(world_size: int) -> None:
    matrices = [random(3, 5), random(4, 2), random(2, 2)]
    named = [(str(number), matrix.shape) for number, matrix in enumerate(matrices)]
    shares = [-(-matrix.numel() // world_size) for matrix in matrices]
    flat = {False: [0, 15, 23], True: [0, shares[0], sum(shares[:2])]}
    part = {False: 30 // world_size, True: sum(shares)}
    for interleaved, places in flat.items():
        layout = Layout([(*one, place) for one, place in zip(named, places, strict=True)], interleaved)
        parts = torch.zeros(world_size, part[interleaved])
        for number, matrix in enumerate(matrices):
            layout.write(parts, number, matrix)
        for number, matrix in enumerate(matrices):
            assert torch.equal(layout.read(parts, number), matrix)
        computed = [layout.belongs_to(rank, parts.shape[1], world_size) for rank in range(world_size)]
        assert set().union(*computed) == {0, 1, 2}

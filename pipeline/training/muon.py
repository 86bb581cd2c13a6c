"""Muon for the matrices of the blocks, AdamW for every other parameter: one update, whatever the ranks and ZeRO stage.

Muon (Jordan et al., 2024) replaces a matrix's averaged gradient by the nearest orthogonal matrix, which is found by
Newton-Schulz iterations. Its size is scaled so that an AdamW learning rate fits (Liu et al., "Muon is scalable for LLM
training", 2025, eq. 4), which is also meant to carry the rate over widths.

ZeRO leaves each rank a flat part of the parameters, and half a matrix cannot be orthogonalised. So averaged gradients
are gathered, each matrix is computed by the ranks that hold a part of it (at stage 3, where all do, by one of them),
and every rank takes its part of the result. torch's own Muon and DeepSpeed's compute in bfloat16, where the last bit of
a sum over ranks decides the third digit of an update; here fp32 training computes in fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from pipeline.training.zero import parameter_shards

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- aX + b(XX')X + c(XX')^2 X; singular values end in 0.7..1.2
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
ADAMW_RMS = 0.2  # the usual root mean square of an AdamW update at learning rate 1
# Matrices that are several: (number, dimension along which they are stacked).
STACKED = {"attn.qkv": (3, 0), "adaLN_modulation": (6, 0), "projection_fc1": (2, 1), "mlp.fc1_gated": (2, 0)}


def takes(name: str, dimensions: int) -> bool:
    """Whether Muon updates the parameter of this name: matrices of blocks and projections, no embeddings."""
    return name.startswith("block") and dimensions == 2 and "embedder" not in name


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest (semi-)orthogonal matrix of (M, N), up to singular values of 0.7 to 1.2, computed in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    x = x.mT if len(matrix) > matrix.shape[1] else x  # the smaller Gram matrix
    x = x / x.norm().clamp_min(1e-7)  # singular values of at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if len(matrix) > matrix.shape[1] else x


def muon_update(name: str, averaged: Tensor, dtype: torch.dtype) -> Tensor:
    """The update at learning rate 1 of a parameter (M, N) from its averaged gradient: each stacked matrix apart."""
    number, dimension = next((how for part, how in STACKED.items() if part in name), (1, 0))
    pieces = averaged.chunk(number, dim=dimension)
    scaled = [ADAMW_RMS * math.sqrt(max(piece.shape)) * orthogonalise(piece, dtype).float() for piece in pieces]
    return torch.cat(scaled, dim=dimension)


@dataclass(frozen=True)
class Layout:
    """Where the matrices of a group lie in the flat parts of all ranks, seen as one tensor (world_size, part).

    matrices: name, shape and place of each. In sequence (stages 1 and 2) a place counts through all parts, one after
    another; interleaved (stage 3) each rank's part holds, from that place on, its share of the matrix.
    """

    matrices: list[tuple[str, torch.Size, int]]
    interleaved: bool

    def view(self, parts: Tensor, number: int) -> Tensor:
        """The flat elements of a matrix in `parts` (world_size, part): a view; interleaved (world_size, share)."""
        _, shape, place = self.matrices[number]
        if not self.interleaved:
            return parts.view(-1)[place : place + shape.numel()]
        share = -(-shape.numel() // len(parts))
        return parts[:, place : place + share]

    def read(self, parts: Tensor, number: int) -> Tensor:
        shape = self.matrices[number][1]
        return self.view(parts, number).reshape(-1)[: shape.numel()].view(shape)

    def write(self, parts: Tensor, number: int, matrix: Tensor) -> None:
        target = self.view(parts, number)
        padded = nn.functional.pad(matrix.flatten(), (0, target.numel() - matrix.numel()))
        target.copy_(padded.view_as(target))

    def belongs_to(self, rank: int, part: int, world_size: int) -> list[int]:
        """The matrices that a rank computes: those that its part holds any of, or where all do every world_size-th."""
        if self.interleaved:
            return list(range(rank, len(self.matrices), world_size))
        first, end = rank * part, (rank + 1) * part
        return [
            number
            for number, (_, shape, place) in enumerate(self.matrices)
            if place < end and place + shape.numel() > first
        ]


class MuonAdamW(torch.optim.Optimizer):
    """Both optimizers as one, which DeepSpeed wraps as any other.

    Whole parameters (ZeRO stage 0) are updated as they are; for flat ones `layouts` says, by tensor, what they hold.
    State by torch's names: "exp_avg" of both, "exp_avg_sq" and "step" of AdamW alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        named = dict(model.named_parameters())
        self.matrix_names = [name for name, parameter in named.items() if takes(name, parameter.ndim)]
        other_names = [name for name in named if name not in self.matrix_names]
        others = [named[name] for name in other_names]
        groups = [
            {"params": [named[name] for name in self.matrix_names], "param_names": self.matrix_names, "muon": True},
            {"params": others, "param_names": other_names, "muon": False},
        ]
        self.layouts: dict[Tensor, Layout] = {}
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay)
        for name, value in self._adamw.defaults.items():
            self.param_groups[1].setdefault(name, value)
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the groups that are in `param_groups` now: DeepSpeed puts them there one at a time."""
        assert closure is None
        for group in self.param_groups:
            if not group["muon"]:
                self._adamw.param_groups = [group]
                self._adamw.step()
                continue
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    update = self._update(parameter, group["param_names"][number])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _update(self, parameter: Tensor, name: str) -> Tensor:
        """At learning rate 1, in the parameter's shape: (M, N), or a rank's flat part, which `name` is not of."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        average = state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
        averaged = parameter.grad.lerp(average, MOMENTUM)  # Nesterov's
        layout = self.layouts.get(parameter)
        if layout is None:
            return muon_update(name, averaged, self.dtype)
        return self._update_of_part(averaged, layout)

    def _update_of_part(self, averaged: Tensor, layout: Layout) -> Tensor:
        """This rank's flat part of the updates, from its part of the averaged gradients; all ranks call it together."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        parts = averaged.new_empty(world_size, averaged.numel())
        torch.distributed.all_gather(list(parts), averaged)
        updates = torch.zeros_like(parts)
        for number in layout.belongs_to(rank, averaged.numel(), world_size):
            name = layout.matrices[number][0]
            layout.write(updates, number, muon_update(name, layout.read(parts, number), self.dtype))
        if layout.interleaved:
            torch.distributed.all_reduce(updates)  # each matrix from one rank, and zeros from the others
        return updates[rank]


def find_layouts(engine: Any, optimizer: MuonAdamW) -> None:
    """Tells the optimizer where its matrices lie in the flat tensors that DeepSpeed made of them."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return
    matrices = {id(one): name for name, one in engine.module.named_parameters() if name in optimizer.matrix_names}
    if stage == 3:
        groups = zero.fp16_groups
        places = [[0, *accumulate(one.ds_tensor.numel() for one in group)][:-1] for group in groups]
    else:
        groups, places = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
    for flat, group, starts in zip(parameter_shards(engine), groups, places, strict=True):
        if id(group[0]) in matrices:
            shapes = [one.ds_shape if stage == 3 else one.shape for one in group]
            names = [matrices[id(one)] for one in group]
            optimizer.layouts[flat] = Layout(list(zip(names, shapes, starts, strict=True)), interleaved=stage == 3)

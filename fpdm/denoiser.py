"""The networks: DiT, and FPDM, whose middle is one transformer block iterated towards a fixed point.

Peebles and Xie (ICCV 2023); Bai and Melas-Kyriazi (CVPR 2024), section 3. Parameter names and shapes as published.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpdm import rng
from fpdm.blocks import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    SelfConditionedBlock,
    TimestepEmbedder,
    VectorEmbedder,
    position_embedding,
    unpatchify,
)
from fpdm.fixed_point import Iterations, Solution, Solver, solve_implicit
from fpdm.linear import Linear, add_gelu, linear

SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "num_heads": 6, "depth": 12},
    "B": {"hidden_size": 768, "num_heads": 12, "depth": 12},
    "L": {"hidden_size": 1024, "num_heads": 16, "depth": 24},
    "XL": {"hidden_size": 1152, "num_heads": 16, "depth": 28},
}
MAX_DEPTH = 1000  # bounds the memory that a damaged or hostile config can take


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """The settings of a network: its function and parameter shapes. A ValueError names the wrong field."""

    kind: Literal["fpdm", "dit"] = "fpdm"
    input_size: int = 32  # height and width of the latents
    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    depth: int = 28  # DiT only
    self_conditioned: bool = False  # DiT only: the network that diffusers' DiTTransformer2DModel computes
    pre_depth: int = 1  # FPDM only
    post_depth: int = 1  # FPDM only
    pre_post_timestep_conditioning: bool = False  # FPDM only; False as in the paper: only the implicit layer knows t
    num_classes: int = 1000  # 1 = unconditional; the label num_classes is the null label
    condition_dim: int | None = None  # conditions are vectors of this width, not labels; the null one is zero
    learned_variance: bool = True  # the output has 2 * in_channels

    def __post_init__(self) -> None:
        if self.kind not in ("fpdm", "dit"):
            raise ValueError(f"kind: {self.kind!r} is unknown; choose 'fpdm' or 'dit'")
        positive = ("input_size", "in_channels", "patch_size", "hidden_size", "num_heads", "mlp_ratio", "num_classes")
        for field in (*positive, *(["depth"] if self.kind == "dit" else [])):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}: {getattr(self, field)} must be positive")
        for field in ("pre_depth", "post_depth"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: {getattr(self, field)} is negative; choose 0 or more")
        for field in ("depth", "pre_depth", "post_depth"):
            if getattr(self, field) > MAX_DEPTH:
                raise ValueError(f"{field}: {getattr(self, field)} blocks; at most {MAX_DEPTH} are built")
        if self.condition_dim is not None and self.condition_dim <= 0:
            raise ValueError(f"condition_dim: {self.condition_dim} must be positive, or None for class labels")
        if self.self_conditioned and (self.kind != "dit" or self.condition_dim is not None):
            raise ValueError("self_conditioned: supported for a DiT with class labels only; leave it False")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of 4, which the position table needs")

    @property
    def out_channels(self) -> int:
        """Channels of the output: the prediction's, then the variance's if it is learned."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of a latent."""
        return (self.input_size // self.patch_size) ** 2

    def blocks(self, iterations: int) -> int:
        """Block evaluations of one call, the paper's unit of compute: pre + iterations + post, or DiT's depth."""
        return self.depth if self.kind == "dit" else self.pre_depth + iterations + self.post_depth

    def null_condition(self, condition: Tensor) -> Tensor:
        """The null condition of classifier-free guidance, in the shape of `condition` (B,) or (B, dim)."""
        return torch.full_like(condition, self.num_classes if self.condition_dim is None else 0)


class Denoised(NamedTuple):
    """A network's output.

    output (B, C or 2C, H, W): prediction, then the variance's interpolation if learned.
    solution (B, T, D): where the fixed point iteration ended, or None (DiT).
    residuals (B, n + m): relative residuals of the iterations, NaN once a sample had finished; None unless asked for.
    """

    output: Tensor
    solution: Tensor | None
    residuals: Tensor | None


class InjectedLinear(Linear):
    """First linear layer on [iterate, injection], split so that the injection's half is computed once.

    The forward pass hands out the iterate's half of the weight, so that under ZeRO-3 the whole parameter is gathered
    once, by this module's hooks, however often the iteration uses it.
    """

    def forward(self, injection: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, T, D) -> weight of the iterate (2D, D), term of the injection with the bias (B, T, 2D)."""
        iterate_weight, injection_weight = self.weight.chunk(2, dim=1)
        return iterate_weight.contiguous(), linear(injection, injection_weight, self.bias)


class Denoiser(nn.Module):
    """DiT or FPDM, by its config. Build with `build_denoiser`, which also fills the parameters.

    Evaluation and training mode do the same: nothing in here is random.
    """

    pos_embed: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        if not config.self_conditioned:
            self.t_embedder = TimestepEmbedder(width)
            self.y_embedder: nn.Module = (
                LabelEmbedder(config.num_classes, width)
                if config.condition_dim is None
                else VectorEmbedder(config.condition_dim, width)
            )
        self.register_buffer("pos_embed", torch.empty(1, config.num_tokens, width))
        if config.kind == "dit":
            self.blocks = self._stack(config.depth)
        else:
            self.blocks_pre = self._stack(config.pre_depth)
            self.block_pre_projection = Linear(width, width)
            self.block_fixed_point_projection_fc1 = InjectedLinear(2 * width, 2 * width)
            self.block_fixed_point_projection_fc2 = Linear(2 * width, width)
            self.block_fixed_point = Block(width, config.num_heads, config.mlp_ratio)
            self.blocks_post = self._stack(config.post_depth)
        self.final_layer = FinalLayer(width, config.patch_size, config.out_channels)

    def _stack(self, depth: int) -> nn.ModuleList:
        config = self.config
        shape = config.hidden_size, config.num_heads, config.mlp_ratio
        if config.self_conditioned:
            return nn.ModuleList(SelfConditionedBlock(*shape, config.num_classes) for _ in range(depth))
        return nn.ModuleList(Block(*shape) for _ in range(depth))

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill every parameter as a function of (seed, its name), and the position table: adaLN-Zero as DiT, sec. 3.2.

        Linear layers are Xavier-uniform, embeddings N(0, 0.02); biases, modulations and the last layer are zero.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.zero_()
                continue
            rows = torch.arange(len(parameter))
            shape = tuple(parameter.shape[1:])
            if name.startswith(("t_embedder", "y_embedder")):
                parameter.copy_(0.02 * rng.normal(seed, name, rows, shape))
            else:
                bound = math.sqrt(6 / (len(parameter) + math.prod(shape)))
                parameter.copy_(bound * (2 * rng.uniform(seed, name, rows, shape) - 1))
        self.pos_embed.copy_(position_embedding(self.config.hidden_size, math.isqrt(self.config.num_tokens)))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        iterations: Iterations | None = None,
        start: Tensor | None = None,
        solver: Solver = "picard",
        tolerance: float | None = None,
        with_residuals: bool = False,
        activation_checkpointing: bool = False,
    ) -> Denoised:
        """Predict from noised latents.

        Args:
            x: (B, C, H, W), any float dtype; the computation runs in the parameters' dtype.
            t: (B,) timesteps, 0 to 1000, integer or continuous.
            y: (B,) class labels in 0..num_classes (the last is the null label), or (B, condition_dim) vectors.
            iterations: FPDM: (n, m) for n iterations without and m with graph, or k for (0, k). DiT ignores it.
            start: FPDM: (B, T, D) iterate to start from; by default the tokens after the pre-layers.
            solver, tolerance, with_residuals: see `fixed_point.solve_implicit`.
            activation_checkpointing: recompute each block, and each iteration, in the backward pass.

        Raises:
            ValueError: for a shape that does not fit the config, or an FPDM without iterations.
        """
        self._check(x, t, y)
        dtype = self.x_embedder.proj.weight.dtype  # not the buffer's: DeepSpeed casts parameters alone
        call = _checkpointed if activation_checkpointing else _plain
        tokens = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)  # (B, T, D)
        if self.config.self_conditioned:
            return Denoised(self._self_conditioned(tokens, t, y, dtype, call), None, None)
        label = self.y_embedder(y.to(dtype) if y.is_floating_point() else y)  # (B, D)
        timed = self.t_embedder(t, dtype) + label
        if self.config.kind == "dit":
            tokens = _run(self.blocks, tokens, timed, call)
            return Denoised(self._read_out(tokens, timed), None, None)
        outer = timed if self.config.pre_post_timestep_conditioning else label
        tokens = _run(self.blocks_pre, tokens, outer, call)
        solution = self._solve(tokens, timed, iterations, start, solver, tolerance, with_residuals, call)
        tokens = _run(self.blocks_post, solution.value, outer, call)
        return Denoised(self._read_out(tokens, outer), solution.value, solution.residuals)

    def _self_conditioned(self, tokens: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype, call: "Caller") -> Tensor:
        """Each block has a condition of its own; the final layer takes the first block's."""
        blocks = [cast(SelfConditionedBlock, block) for block in self.blocks]
        conditions = [block.t_embedder(t, dtype) + block.y_embedder(y) for block in blocks]  # (B, D) each
        for block, condition in zip(blocks, conditions, strict=True):
            tokens = call(block, tokens, block.modulation(condition))
        return self._read_out(tokens, conditions[0])

    def _solve(
        self,
        tokens: Tensor,
        c: Tensor,
        iterations: Iterations | None,
        start: Tensor | None,
        solver: Solver,
        tolerance: float | None,
        with_residuals: bool,
        call: "Caller",
    ) -> Solution:
        """Iterate x -> Block(fc2(GELU(fc1[x, injection]))). What does not depend on x is computed once, here."""
        if iterations is None:
            raise ValueError("iterations: an FPDM needs a count, k or (n, m)")
        if start is not None and start.shape != tokens.shape:
            raise ValueError(f"start: shape {tuple(start.shape)} does not fit this batch, {tuple(tokens.shape)}")
        weight, injected = self.block_fixed_point_projection_fc1(self.block_pre_projection(tokens))
        modulation = self.block_fixed_point.modulation(c)

        def step(x: Tensor, rows: Tensor | None) -> Tensor:
            term, m = (injected, modulation) if rows is None else (injected[rows], modulation.rows(rows))
            hidden = add_gelu(linear(x, weight), term)  # (b, T, 2D)
            return self.block_fixed_point(self.block_fixed_point_projection_fc2(hidden), m)

        return solve_implicit(
            lambda x, rows: call(step, x, rows),
            tokens if start is None else start.to(tokens.dtype),
            iterations,
            solver=solver,
            tolerance=tolerance,
            with_residuals=with_residuals,
        )

    def _read_out(self, tokens: Tensor, c: Tensor) -> Tensor:
        return unpatchify(self.final_layer(tokens, c), self.config.patch_size)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        config, batch = self.config, len(x)
        latents = (batch, config.in_channels, config.input_size, config.input_size)
        condition = (batch,) if config.condition_dim is None else (batch, config.condition_dim)
        for name, tensor, shape in (("x", x, latents), ("t", t, (batch,)), ("y", y, condition)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit the network, which takes {shape}")


Caller = Callable[..., Tensor]


def _plain(function: Caller, *arguments: object) -> Tensor:
    return function(*arguments)


def _checkpointed(function: Caller, *arguments: object) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _run(blocks: nn.ModuleList, tokens: Tensor, c: Tensor, call: Caller) -> Tensor:
    for block in blocks:
        tokens = call(block, tokens, cast(Block, block).modulation(c))
    return tokens


def build_denoiser(config: DenoiserConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> Denoiser:
    """A network whose parameters are a function of (config, seed), see `Denoiser.reset_parameters`."""
    with torch.device("meta"):  # torch's own initialisation would draw from its global generator
        model = Denoiser(config)
    model.to_empty(device=device)
    model.reset_parameters(seed)
    return model


def count_parameters(config: DenoiserConfig) -> int:
    """Trainable numbers of a network, exactly, without allocating them; the position table is not one of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Denoiser(config).parameters())

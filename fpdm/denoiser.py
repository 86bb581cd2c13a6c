"""The networks: DiT, and FPDM, whose middle is one transformer block iterated towards a fixed point.

Peebles and Xie (ICCV 2023); Bai and Melas-Kyriazi (CVPR 2024), section 3. Parameter names and shapes as published.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, cast

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
from fpdm.config import DenoiserConfig
from fpdm.fixed_point import Iterations, Solver, Step, growth, solve_implicit
from fpdm.linear import Linear, add_gelu, linear


class Denoised(NamedTuple):
    """A network's output.

    Attributes:
        output (B, C or 2C, H, W): prediction, then the variance's interpolation if learned.
        solution (B, T, D): where the fixed point iteration ended, or None (DiT); the start at tokens that were not
            `seen`.
        residuals (B, n + m): relative residuals of the iterations, NaN once a sample had finished; None unless asked
            for.
        intermediate (B, C or 2C, H, W): the output that an earlier iterate gives; None unless asked for.
        growth (B,): see `fixed_point.growth`; None unless asked for.
    """

    output: Tensor
    solution: Tensor | None
    residuals: Tensor | None
    intermediate: Tensor | None = None
    growth: Tensor | None = None


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
            self.blocks = self._stack(config.depth, first=True)
        else:
            self.blocks_pre = self._stack(config.pre_depth, first=True)
            self.block_pre_projection = Linear(width, width)
            if config.injection == "concat":
                self.block_fixed_point_projection_fc1 = InjectedLinear(2 * width, 2 * width)
                self.block_fixed_point_projection_fc2 = Linear(2 * width, width)
            else:
                self.block_fixed_point_decay = nn.Parameter(torch.empty(width))
            self.block_fixed_point = Block(config.block_config)
            self.blocks_post = self._stack(config.post_depth)
        self.final_layer = FinalLayer(config.block_config, config.patch_size, config.out_channels)

    def _stack(self, depth: int, *, first: bool = False) -> nn.ModuleList:
        block = self.config.block_config
        if self.config.self_conditioned:
            return nn.ModuleList(SelfConditionedBlock(block, self.config.num_classes) for _ in range(depth))
        # The network's first block has no values before its own to mix in.
        return nn.ModuleList(
            Block(replace(block, value_residual=block.value_residual and not (first and number == 0)))
            for number in range(depth)
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill every parameter as a function of (seed, its name), and the position table: adaLN-Zero as DiT, sec. 3.2.

        Linear layers are Xavier-uniform, embeddings N(0, 0.02); biases, modulations and the last layer are zero. Scales
        of queries and keys are 1, first values are mixed in by 0, and the decay is 1/2.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("q_scale", "k_scale")):
                parameter.fill_(1)
                continue
            zero = ("adaLN_modulation", "final_layer", "value_mix", "block_fixed_point_decay")
            if name.endswith("bias") or any(part in name for part in zero):
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
        relaxation: float | Tensor | None = None,
        tolerance: float | None = None,
        with_residuals: bool = False,
        activation_checkpointing: bool = False,
        intermediate: int = 0,
        seen: Tensor | None = None,
        with_growth: bool = False,
    ) -> Denoised:
        """Predict from noised latents.

        Args:
            x: (B, C, H, W), any float dtype; the computation runs in the parameters' dtype.
            t: (B,) timesteps of the process, 0 to num_timesteps, integer or continuous.
            y: (B,) class labels in 0..num_classes (the last is the null label), or (B, condition_dim) vectors.
            iterations: FPDM: (n, m) for n iterations without and m with graph, or k for (0, k). DiT ignores it.
            start: FPDM: (B, T, D) iterate to start from; by default the tokens after the pre-layers, which then are a
                constant of the gradient.
            solver, relaxation, tolerance, with_residuals: see `fixed_point.solve_implicit`.
            activation_checkpointing: recompute each block, and each iteration, in the backward pass.
            intermediate: FPDM: also read out the iterate after this many of the m iterations; 0: none.
            seen: FPDM: (B, K) numbers, each once, of the tokens that the implicit layer sees and changes, as training
                with sparse iterations draws them (after SPRINT, 2510.21986); the post-layers see all. None: all.
            with_growth: FPDM: also measure how much an iteration enlarges a small change near the solution.

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
            tokens, _ = _run(self.blocks, tokens, timed, call)
            return Denoised(self._read_out(tokens, timed), None, None)
        outer = timed if self.config.pre_post_timestep_conditioning else label
        tokens, value = _run(self.blocks_pre, tokens, outer, call)
        value = value if self.config.value_residual else None
        if iterations is None:
            raise ValueError("iterations: an FPDM needs a count, k or (n, m)")
        if start is not None and start.shape != tokens.shape:
            raise ValueError(f"start: shape {tuple(start.shape)} does not fit this batch, {tuple(tokens.shape)}")
        begin = tokens.detach() if start is None else start.to(tokens.dtype)  # a constant in training: Algorithm 1
        start = tokens if start is None else begin
        step = self._map(_rows(tokens, seen), timed, None if value is None else _rows(value, seen), seen, call)
        solution = solve_implicit(
            step,
            _rows(begin, seen),
            iterations,
            solver=solver,
            relaxation=relaxation,
            tolerance=tolerance,
            with_residuals=with_residuals,
            intermediate=intermediate,
        )

        def read_out(iterate: Tensor) -> Tensor:
            return self._read_out(_run(self.blocks_post, iterate, outer, call, value)[0], outer)

        early = None if solution.intermediate is None else read_out(_with_rows(start, seen, solution.intermediate))
        ended = _with_rows(start, seen, solution.value)
        grown = growth(step, solution.value) if with_growth else None
        return Denoised(read_out(ended), ended, solution.residuals, early, grown)

    def _self_conditioned(self, tokens: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype, call: "Caller") -> Tensor:
        """Each block has a condition of its own; the final layer takes the first block's."""
        blocks = [cast(SelfConditionedBlock, block) for block in self.blocks]
        conditions = [block.t_embedder(t, dtype) + block.y_embedder(y) for block in blocks]  # (B, D) each
        for block, condition in zip(blocks, conditions, strict=True):
            tokens, _ = call(block, tokens, block.modulation(condition))
        return self._read_out(tokens, conditions[0])

    def _map(
        self, tokens: Tensor, c: Tensor, first_value: Tensor | None, places: Tensor | None, call: "Caller"
    ) -> Step:
        """The map whose fixed point is sought. What does not depend on the iterate is computed once, here.

        injection "concat": x -> Block(fc2(GELU(fc1[x, injection]))), the paper's. "decay": x -> Block(a x + injection)
        with 0 < a < 1 learned by channel, so that without the block's own changes the iteration would converge; it
        has 6 D^2 weights less, and 4 D^2 of 16 D^2 fewer products a token (D the width; after Parcae, 2604.12946).
        """
        injection = self.block_pre_projection(tokens)  # (B, T, D)
        modulation = self.block_fixed_point.modulation(c)
        if self.config.injection == "decay":
            decay = self.block_fixed_point_decay.sigmoid()

            def mixed(x: Tensor, injection: Tensor) -> Tensor:
                return torch.addcmul(injection, x, decay)
        else:
            weight, injection = self.block_fixed_point_projection_fc1(injection)  # (B, T, 2D)

            def mixed(x: Tensor, injection: Tensor) -> Tensor:
                return self.block_fixed_point_projection_fc2(add_gelu(linear(x, weight), injection))

        def step(x: Tensor, rows: Tensor | None) -> Tensor:
            term, m, value, where = injection, modulation, first_value, places
            if rows is not None:
                term, m = term[rows], m.rows(rows)
                value, where = (None if part is None else part[rows] for part in (value, where))
            return self.block_fixed_point(mixed(x, term), m, value, where)[0]

        return lambda x, rows: call(step, x, rows)

    def _read_out(self, tokens: Tensor, c: Tensor) -> Tensor:
        return unpatchify(self.final_layer(tokens, c), self.config.patch_size)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        config, batch = self.config, len(x)
        latents = (batch, config.in_channels, config.input_size, config.input_size)
        condition = (batch,) if config.condition_dim is None else (batch, config.condition_dim)
        for name, tensor, shape in (("x", x, latents), ("t", t, (batch,)), ("y", y, condition)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit the network, which takes {shape}")


Caller = Callable[..., Any]


def _plain(function: Caller, *arguments: object) -> Any:
    return function(*arguments)


def _checkpointed(function: Caller, *arguments: object) -> Any:
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _run(
    blocks: nn.ModuleList, tokens: Tensor, c: Tensor, call: Caller, first_value: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, T, D) after the blocks, and `first_value`: as it was given, or of the first of these blocks."""
    for block in cast("Iterable[Block]", blocks):
        tokens, value = call(block, tokens, block.modulation(c), first_value)
        first_value = value if first_value is None else first_value
    return tokens, first_value


def _rows(tokens: Tensor, numbers: Tensor | None) -> Tensor:
    """Of (B, ..., T, D) the tokens of these numbers (B, K): (B, ..., K, D); all of them for None."""
    return tokens if numbers is None else tokens.gather(-2, _index(tokens, numbers))


def _with_rows(tokens: Tensor, numbers: Tensor | None, values: Tensor) -> Tensor:
    """(B, T, D) with `values` (B, K, D) at these numbers (B, K); `values` themselves for None."""
    return values if numbers is None else tokens.scatter(-2, _index(tokens, numbers), values)


def _index(tokens: Tensor, numbers: Tensor) -> Tensor:
    middle = (1,) * (tokens.ndim - 3)
    return numbers.reshape(len(numbers), *middle, -1, 1).expand(*tokens.shape[:-2], -1, tokens.shape[-1])


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

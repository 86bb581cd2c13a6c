"""The settings of a network, and the sizes of DiT: Peebles and Xie (2023), table 1."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from fpdm.blocks import NORM_EPS, BlockConfig, MlpKind, Norm

Kind = Literal["fpdm", "dit"]
Injection = Literal["concat", "decay"]

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

    kind: Kind = "fpdm"
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
    norm: Norm = "layer"  # this and the next four: see `blocks.BlockConfig`
    qk_norm: bool = False
    rope: bool = False
    mlp: MlpKind = "gelu"
    value_residual: bool = False
    injection: Injection = "concat"  # FPDM only, see `Denoiser._map`

    def __post_init__(self) -> None:
        for field, kinds in (("kind", Kind), ("norm", Norm), ("mlp", MlpKind), ("injection", Injection)):
            if getattr(self, field) not in get_args(kinds):
                choices = " or ".join(map(repr, get_args(kinds)))
                raise ValueError(f"{field}: {getattr(self, field)!r} is unknown; choose {choices}")
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
        if self.hidden_size * self.mlp_ratio < 1:
            raise ValueError(
                f"mlp_ratio: {self.mlp_ratio:g} of {self.hidden_size} channels leaves none; choose a larger one"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.rope and self.hidden_size // self.num_heads % 4:
            raise ValueError(f"rope: needs a multiple of 4 channels a head, not {self.hidden_size // self.num_heads}")
        if self.value_residual and self.kind == "fpdm" and not self.pre_depth:
            raise ValueError("value_residual: takes the values of the first pre-layer; set pre_depth to 1 or more")
        options = ("norm", "qk_norm", "rope", "mlp", "value_residual")
        if self.self_conditioned and any(getattr(self, name) != getattr(BlockConfig, name) for name in options):
            raise ValueError("self_conditioned: supported with the published block only")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of 4, which the position table needs")

    @property
    def block_config(self) -> BlockConfig:
        """The settings of every block."""
        return BlockConfig(
            width=self.hidden_size,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            side=self.input_size // self.patch_size,
            norm=self.norm,
            mlp_eps=1e-5 if self.self_conditioned else NORM_EPS,
            qk_norm=self.qk_norm,
            rope=self.rope,
            mlp=self.mlp,
            value_residual=self.value_residual,
        )

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


def differing_field(one: DenoiserConfig, other: DenoiserConfig) -> str | None:
    """The first field in which two networks differ, of those that their kind uses, but for `self_conditioned`."""
    of_fpdm = ("pre_depth", "post_depth", "pre_post_timestep_conditioning", "injection")
    unused = of_fpdm if one.kind == "dit" else ("depth",)
    names = (field.name for field in fields(one) if field.name not in (*unused, "self_conditioned"))
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)

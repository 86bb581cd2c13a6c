"""The parts of the transformer: embeddings of patches, timesteps and conditions, the adaLN-Zero block, the final layer.

Peebles and Xie, "Scalable diffusion models with transformers" (ICCV 2023), section 3.2; parameter names as published.
Later additions are optional (`BlockConfig`), and add parameters only where they are on.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpdm.linear import Linear, linear_gelu

NORM_EPS = 1e-6
FREQUENCIES = 256
Norm = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]


def timestep_embedding(
    t: Tensor, width: int = FREQUENCIES, max_period: float = 10_000.0, *, with_slowest: bool = False
) -> Tensor:
    """Cosines, then sines, of timesteps t (B,) at geometrically spaced frequencies: (B, width) float32, width even.

    The frequencies fall from 1 to one step above 1 / max_period, or to 1 / max_period itself `with_slowest`.
    """
    steps = width // 2 - with_slowest
    frequencies = torch.exp(-math.log(max_period) / steps * torch.arange(width // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(width: int, side: int) -> Tensor:
    """The fixed 2-D sine/cosine table of side x side tokens: (1, side**2, width) float32, width divisible by 4.

    The first half of the channels encodes the column, the second the row.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    columns = axis[None].expand(side, -1, -1)
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()


class PatchEmbedder(nn.Module):
    """(B, C, H, W) -> (B, T, D): one token per patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, T, D)


class TimestepEmbedder(nn.Module):
    """(B,) timesteps, integer or continuous -> (B, D)."""

    def __init__(self, width: int, *, with_slowest: bool = False) -> None:
        super().__init__()
        self.with_slowest = with_slowest
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, with_slowest=self.with_slowest).to(dtype))


class LabelEmbedder(nn.Module):
    """(B,) class labels -> (B, D); the row after the last class belongs to the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class VectorEmbedder(nn.Module):
    """(B, condition_dim) vectors -> (B, D). The null condition is the zero vector, whose embedding is the bias."""

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(condition_dim, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.proj(y)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The settings of a block; the defaults are the published one.

    norm: before attention, MLP and last layer: "layer", or "rms", which leaves the mean in (Zhang and Sennrich, 2019).
    qk_norm: RMS-normalise queries and keys by head, with a learned scale (Dehghani et al., 2023).
    rope: rotate queries and keys by the token's row and column (Su et al., 2021), beside the position table.
    mlp: "gelu", or "swiglu" of two thirds of the width, which is about as many parameters (Shazeer, 2020).
    value_residual: add to the values a learned part of those of the network's first block (Zhou et al., 2024).
    """

    width: int
    num_heads: int
    mlp_ratio: float
    side: int  # tokens in a row, and rows
    norm: Norm = "layer"
    mlp_eps: float = NORM_EPS  # of the norm before the MLP; the others have NORM_EPS
    qk_norm: bool = False
    rope: bool = False
    mlp: MlpKind = "gelu"
    value_residual: bool = False

    def normalise(self, x: Tensor, eps: float) -> Tensor:
        """(B, T, D) -> (B, T, D), by token."""
        return F.layer_norm(x, x.shape[-1:], eps=eps) if self.norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=eps)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)
        if config.qk_norm:
            self.q_scale, self.k_scale = (nn.Parameter(torch.ones(config.width // config.num_heads)) for _ in "qk")
        if config.value_residual:
            self.value_mix = nn.Parameter(torch.zeros(config.num_heads, 1, 1))

    def forward(
        self, x: Tensor, first_value: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and this layer's own values (B, heads, T, D / heads).

        first_value: those of the network's first block, which `value_residual` mixes in.
        places (B, T): each token's number among all of the latent; None: x holds all, in order.
        """
        config = self.config
        qkv = self.qkv(x).unflatten(-1, (3, config.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        if config.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:], scale) for part, scale in ((q, self.q_scale), (k, self.k_scale)))
        if config.rope:
            q, k = rotate(q, config.side, places), rotate(k, config.side, places)
        mixed = v
        if config.value_residual:
            assert first_value is not None
            mixed = torch.addcmul(v, self.value_mix, first_value)
        return self.proj(F.scaled_dot_product_attention(q, k, mixed).transpose(1, 2).flatten(2)), v


@lru_cache(maxsize=16)
def _rotation(side: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (side**2, width / 2): half of the angles follow the row, half the column."""
    with torch.inference_mode(False):  # they are kept, and training may use them next
        steps = torch.arange(max(side, width // 4), dtype=torch.float64, device=device)
        angles = steps[:side, None] * 100.0 ** (-steps[: width // 4] / (width // 4))  # (side, width / 4)
        rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, side: int, places: Tensor | None = None) -> Tensor:
    """Queries or keys (B, heads, T, width), each pair of channels turned by its token's place; width % 4 = 0.

    places (B, T): in 0..side**2 - 1; None: x holds all tokens, in order.
    """
    cosine, sine = _rotation(side, x.shape[-1], x.device, x.dtype)
    if places is not None:
        cosine, sine = cosine[places][:, None], sine[places][:, None]  # (B, 1, T, width / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Mlp(nn.Module):
    """Two linear layers around the tanh approximation of GELU, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))


class GatedMlp(nn.Module):
    """SwiGLU: fc2(SiLU(gate) * value), both halves of fc1_gated; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = -(-hidden * 2 // 24) * 8  # two thirds, up to a multiple of 8
        self.fc1_gated = Linear(width, 2 * hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1_gated(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Modulation(NamedTuple):
    """A block's adaLN-Zero parameters, (B, 1, D) each: shift, 1 + scale and gate of attention and of the MLP."""

    attn_shift: Tensor
    attn_scale: Tensor
    attn_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor

    def rows(self, index: Tensor) -> "Modulation":
        """The modulation of some samples of the batch, (b, 1, D) each, by their numbers `index` (b,)."""
        return Modulation(*(part[index] for part in self))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.attn = Attention(config)
        self.mlp = (Mlp if config.mlp == "gelu" else GatedMlp)(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))

    def modulation(self, c: Tensor) -> Modulation:
        """(B, D) condition -> what `forward` needs of it; apart, so that a repeated block computes it once."""
        parts = list(self.adaLN_modulation(c)[:, None].chunk(6, dim=-1))
        parts[1], parts[4] = 1 + parts[1], 1 + parts[4]
        return Modulation(*parts)

    def forward(
        self, x: Tensor, m: Modulation, first_value: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and attention's values, see `Attention.forward`."""
        attended, value = self.attn(_modulate(self.config, x, m.attn_shift, m.attn_scale), first_value, places)
        x = torch.addcmul(x, m.attn_gate, attended)
        inner = self.mlp(_modulate(self.config, x, m.mlp_shift, m.mlp_scale, self.config.mlp_eps))
        return torch.addcmul(x, m.mlp_gate, inner), value


class SelfConditionedBlock(Block):
    """The block of diffusers' DiTTransformer2DModel, which embeds the timestep and the label by itself."""

    def __init__(self, config: BlockConfig, num_classes: int) -> None:
        super().__init__(config)
        self.t_embedder = TimestepEmbedder(config.width, with_slowest=True)
        self.y_embedder = LabelEmbedder(num_classes, config.width)


class FinalLayer(nn.Module):
    """(B, T, D) tokens and (B, D) condition -> (B, T, patch_size**2 * channels)."""

    def __init__(self, config: BlockConfig, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        self.linear = Linear(config.width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.config, x, shift, 1 + scale))


def _modulate(config: BlockConfig, x: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    return torch.addcmul(shift, config.normalise(x, eps), scale)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(B, T, patch_size**2 * C) -> (B, C, H, W), the inverse of the patches' row-by-row order."""
    side = math.isqrt(tokens.shape[1])
    patches = tokens.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, C)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h, p, w, q) -> (B, C, H, W)

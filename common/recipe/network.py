"""The denoiser and its objective, and both as `fpdm` takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool
from pydantic.dataclasses import dataclass

from common.recipe.fields import STRICT, Count, CountOrZero, Part, Positive, Timesteps

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from common.recipe import Recipe
    from fpdm.config import DenoiserConfig
    from fpdm.diffusion import Diffusion


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """The denoiser: FPDM, with a fixed point of one block between explicit layers, or DiT."""

    kind: Literal["fpdm", "dit"] = "fpdm"
    """`fpdm`: fixed point diffusion model. `dit`: diffusion transformer, the paper's baseline."""
    size: Literal["S", "B", "L", "XL"] | None = "XL"
    """Sets hidden_size, num_heads and depth to DiT's values of this size; each of them can be set alone instead."""
    hidden_size: Part | None = None
    """Width of a token. null: that of `size`."""
    num_heads: Part | None = None
    """Attention heads; divides hidden_size. null: that of `size`."""
    depth: Count | None = None
    """Blocks of DiT. null: that of `size`."""
    patch_size: Part = 2
    """Side of the square of the latent that becomes one token; divides the latent's side."""
    mlp_ratio: Annotated[Positive, Field(le=1_000)] = 4.0
    """Width of a block's MLP, in units of hidden_size."""
    pre_depth: CountOrZero = 1
    """Explicit blocks before the fixed point."""
    post_depth: CountOrZero = 1
    """Explicit blocks after the fixed point."""
    pre_post_timestep_conditioning: StrictBool = False
    """Whether the explicit blocks see the timestep. In the paper they do not."""
    num_classes: Annotated[Count, Field(le=10_000_000)] | None = None
    """Classes of the data. 1: unconditional. null: as many as the shards have."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalisation before attention, MLP and last layer. `rms`: RMSNorm, which leaves the mean in."""
    qk_norm: StrictBool = False
    """RMS-normalise the queries and keys of attention, which bounds its logits."""
    rope: StrictBool = False
    """Rotate queries and keys by the token's row and column (RoPE), beside the position table."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """`swiglu`: a gated MLP of two thirds of the width, which is about as many parameters."""
    value_residual: StrictBool = False
    """Add to the values of attention a learned part of the first block's (Zhou et al., 2024)."""
    injection: Literal["concat", "decay"] = "concat"
    """How the fixed point's input enters an iteration. `concat`: beside the iterate, through an MLP, as in the paper.
    `decay`: added to the iterate times a learned factor below 1; an iteration has a quarter fewer products."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Objective:
    """What the network learns (paper, section 4.1)."""

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    """Noise schedule. `flow`: straight lines between data and noise, together with prediction flow."""
    num_timesteps: Timesteps = 1000
    """Timesteps of the diffusion process."""
    zero_terminal_snr: StrictBool = True
    """Rescale the schedule so that the last timestep is pure noise (Lin et al., WACV 2024)."""
    prediction: Literal["epsilon", "v", "clean", "flow"] = "v"
    """What the network predicts: the noise, the velocity of diffusion, the clean latents, or the velocity of flow
    matching. The demo's network learned `clean` faster, with loss_weight velocity (docs/speedrun.md)."""
    learned_variance: StrictBool = True
    """Also learn the variance of a reverse step, from a second half of the output channels (Nichol and Dhariwal, ICML
    2021)."""
    loss_weight: Literal["none", "p2", "min_snr", "velocity"] = "none"
    """Weight of the loss by timestep: none, P2 (Choi et al., CVPR 2022), Min-SNR (Hang et al., ICCV 2023), or of clean
    predictions as if they were of the velocity (Li and He, 2025)."""


def num_classes(model: Model) -> int:
    """The classes of the data. ValueError where the recipe leaves them to the data (`preprocess.from_data`)."""
    if model.num_classes is None:
        raise ValueError("num_classes: null, and nothing has resolved it from the data; state it")
    return model.num_classes


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(C, h, w) of one latent."""
    side = recipe.data.resolution // recipe.vae.downsampling
    return recipe.vae.latent_channels, side, side


def denoiser_config(recipe: Recipe) -> DenoiserConfig:
    """The network's own settings: `size` resolved, the latents' shape from the VAE. ValueError names a field.

    `model.num_classes` must be resolved (`preprocess.from_data`).
    """
    from fpdm.config import SIZES, DenoiserConfig

    model = recipe.model
    size: dict[str, Any] = dict(SIZES[model.size]) if model.size else {}
    size |= {key: value for key in ("hidden_size", "num_heads", "depth") if (value := getattr(model, key)) is not None}
    return DenoiserConfig(
        kind=model.kind,
        input_size=latent_shape(recipe)[1],
        in_channels=recipe.vae.latent_channels,
        patch_size=model.patch_size,
        mlp_ratio=model.mlp_ratio,
        pre_depth=model.pre_depth,
        post_depth=model.post_depth,
        pre_post_timestep_conditioning=model.pre_post_timestep_conditioning,
        num_classes=num_classes(model),
        norm=model.norm,
        qk_norm=model.qk_norm,
        rope=model.rope,
        mlp=model.mlp,
        value_residual=model.value_residual,
        injection=model.injection,
        self_conditioned=False,  # only imported weights are
        learned_variance=recipe.objective.learned_variance,
        **size,
    )


def describe_network(recipe: Recipe) -> str:
    """One line: the network, the latents' shape, and its exact size."""
    from fpdm.denoiser import count_parameters

    config = denoiser_config(_with_classes(recipe))
    parameters = count_parameters(config)
    more = "" if recipe.model.num_classes else f" with one class, {config.hidden_size:,} more with each other"
    return f"network: {recipe.model.kind} on latents {latent_shape(recipe)}, {parameters:,} parameters{more}"


def _with_classes(recipe: Recipe) -> Recipe:
    """With one class where the number is left to the data: for what does not depend on it."""
    return recipe if recipe.model.num_classes else replace(recipe, model=replace(recipe.model, num_classes=1))


def diffusion(recipe: Recipe) -> Diffusion:
    """The objective as `fpdm` computes it. ValueError names a field that does not go with another."""
    from fpdm.diffusion import Diffusion

    return Diffusion(**vars(recipe.objective))


def check_network(recipe: Recipe) -> None:
    """Raises ValueError for a network that cannot be built, does not fit the latents, or an impossible objective."""
    if recipe.model.kind == "dit" and recipe.train.gradient != "sjfb":
        raise ValueError(f"train.gradient: {recipe.train.gradient}, and a DiT has no fixed point; leave it out")
    resolution, downsampling = recipe.data.resolution, recipe.vae.downsampling
    if resolution % downsampling:
        raise ValueError(f"data.resolution: {resolution} is not a multiple of vae.downsampling, {downsampling}")
    side = latent_shape(recipe)[1]
    if side % recipe.model.patch_size:
        raise ValueError(f"model.patch_size: {recipe.model.patch_size} does not divide the latents' side of {side}")
    for section, build in (("model", denoiser_config), ("objective", diffusion)):
        try:
            build(_with_classes(recipe))
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from None

"""Import of DiT and FPDM checkpoints, in the paper's names or in diffusers'."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fpdm import diffusers_dit
from fpdm.blocks import position_embedding
from fpdm.checkpoint_files import Checkpoint, read_checkpoint
from fpdm.config import SIZES, DenoiserConfig
from fpdm.denoiser import Denoiser, build_denoiser
from fpdm.weights import CLASS_NAME, assemble, check_seal, read_class, read_config, tensor_shapes


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and what did not match, as tensor names."""

    source: str  # "ema", "model", or "tensors" for a file of bare weights
    matched: list[str]
    missing: list[str]  # the network's own initialisation (seed 0) was kept
    unexpected: list[str]  # not used
    mismatched: list[str]  # another shape, or another position table: not used
    left_out: list[str] = field(default_factory=list)  # tensors of other networks in the same file
    note: str = ""  # how the network is computed, if that was inferred from the tensors

    @property
    def complete(self) -> bool:
        """Whether the tensors of the file and of the network are the same set, with the same shapes."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors from {self.source!r}"]
        for kind in ("missing", "unexpected", "mismatched", "left_out"):
            names = getattr(self, kind)
            if names:
                shown = f"{', '.join(ascii(name[:200])[1:-1] for name in names[:4])}{', ...' if len(names) > 4 else ''}"
                parts.append(f"{len(names)} {kind.replace('_', ' ')}: {shown}")
        return "; ".join(parts + ([self.note] if self.note else []))


def import_checkpoint(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    strict: bool = True,
    **settings: Any,
) -> tuple[Denoiser, ImportReport]:
    """Read a published checkpoint, in the paper's names or as diffusers' DiTTransformer2DModel, as a float32 network.

    Args:
        path: .safetensors, or a .pt of bare weights or of {"model", "ema", "args", ...}; or a folder with config.json,
            or with `transformer`. What runs code when it is loaded is refused; nothing but tensors and plain values is
            taken from a file.
        weights: which of a training checkpoint's two sets to read.
        strict: raise unless every tensor matches; otherwise the report says what did not.
        settings: fields of DenoiserConfig to set rather than infer, see `infer_config`.

    Raises:
        ValueError: naming the file if it is no checkpoint, a setting that cannot be inferred from the tensors or
            contradicts the file, or the tensors that do not match.
    """
    try:
        return _imported(Path(path), weights, strict, settings)
    except (ValueError, OSError):
        raise
    except Exception as error:  # an odd file fails anywhere
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a supported DiT or FPDM checkpoint ({type(error).__name__}: {words})") from error


def _imported(path: Path, weights: str, strict: bool, settings: dict[str, Any]) -> tuple[Denoiser, ImportReport]:
    checkpoint = read_checkpoint(path, weights)
    settings = _with_stated(path, checkpoint, settings)
    tensors, note = checkpoint.tensors, ""
    if diffusers_dit.is_named_so(tensors):
        tensors = diffusers_dit.rename(tensors, settings.get("self_conditioned"))
        alike = not any(name.startswith("blocks.0.t_embedder.") for name in tensors)
        note = f"computed as {'DiT, whose embedder is in all blocks' if alike else 'diffusers computes it'}"
    config = infer_config(tensors, **settings)
    own = tensor_shapes(config)
    table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    mismatched = [name for name in tensors if name in own and tuple(tensors[name].shape) != own[name]]
    if "pos_embed" in tensors and "pos_embed" not in mismatched and not _is_table(tensors["pos_embed"], table):
        mismatched.append("pos_embed")
    matched = [name for name in tensors if name in own and name not in mismatched]
    report = ImportReport(
        source=checkpoint.source,
        matched=matched,
        missing=[name for name in own if name not in tensors and name != "pos_embed"],
        unexpected=[name for name in tensors if name not in own],
        mismatched=mismatched,
        left_out=checkpoint.left_out,
        note=note,
    )
    if strict and not report.complete:
        raise ValueError(f"{path}: {report}")
    used = {name: tensors[name].detach().float() for name in matched}
    if report.missing or mismatched:
        used = build_denoiser(config).state_dict() | used
    return assemble(used | {"pos_embed": table}, config), report


def _with_stated(path: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, completed by the training arguments in the file or its config.json. ValueError if they disagree."""
    stated: dict[str, Any] = {}
    conditioned = checkpoint.arguments.get("fixed_point_pre_post_timestep_conditioning")
    if conditioned is not None and "block_fixed_point.attn.qkv.weight" in checkpoint.tensors:
        stated["pre_post_timestep_conditioning"] = bool(conditioned)
    if checkpoint.folder is not None and (path.is_dir() or diffusers_dit.is_named_so(checkpoint.tensors)):
        if read_class(checkpoint.folder) == CLASS_NAME:
            if path.is_dir():
                check_seal(checkpoint.folder)
            config = read_config(checkpoint.folder)
            traceless = ("num_heads", "input_size", "pre_post_timestep_conditioning", "mlp_ratio", "norm", "rope")
            stated |= {name: getattr(config, name) for name in traceless}
        else:
            stated |= diffusers_dit.read_settings(checkpoint.folder)
    for name, value in stated.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}: {path} states that it was trained with {value}, not {settings[name]}")
    return stated | settings


def _is_table(given: Tensor, table: Tensor) -> bool:
    """Whether a file's position table equals ours up to rounding.

    Its values are sines and cosines of angles up to the table's side: computed in float32 they are off by an epsilon of
    the angle, and stored in half precision by an epsilon of 1.
    """
    difference = (given.double() - table.double()).abs().max()
    computed = (math.isqrt(table.shape[1]) + 1) * torch.finfo(torch.float32).eps
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if difference <= computed + torch.finfo(dtype).eps:
            return bool((given.to(dtype).double() == given.double()).all()) or dtype == torch.float32
    return False


def infer_config(tensors: Mapping[str, Tensor], **settings: Any) -> DenoiserConfig:
    """Infer a network's config from the names and shapes of its tensors.

    Some settings leave no trace in them and change the output all the same: pre_post_timestep_conditioning of an FPDM,
    which must be given; num_heads, which is taken from the standard size of that width or must be given; norm and rope,
    which are the published ones unless given. input_size needs the position table, or must be given.

    Raises:
        ValueError: naming the setting to give, or the tensor that is missing.
    """
    kind = "fpdm" if any(name.startswith("block_fixed_point.") for name in tensors) else "dit"
    block = "block_fixed_point" if kind == "fpdm" else "blocks.0"
    config: dict[str, Any] = {"kind": kind, "self_conditioned": f"{block}.t_embedder.mlp.0.weight" in tensors}
    label = f"{block}.y_embedder" if config["self_conditioned"] else "y_embedder"
    needed = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, f"{block}.mlp.fc2.weight": 2}
    condition = [f"{label}.{name}.weight" for name in ("embedding_table", "proj")]
    needed[condition[condition[1] in tensors]] = 2
    if "pos_embed" in tensors:
        needed["pos_embed"] = 3
    for name, dimensions in needed.items():
        if name not in tensors or tensors[name].ndim != dimensions:
            fault = f"has {tensors[name].ndim} dimensions" if name in tensors else "is missing"
            raise ValueError(f"tensor {name!r} {fault}: these are no weights of a DiT or FPDM")
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    config |= {"hidden_size": width, "in_channels": channels, "patch_size": patch_size}
    outputs = len(tensors["final_layer.linear.weight"]) // max(1, patch_size**2)
    config["learned_variance"] = outputs == 2 * channels
    hidden = tensors[f"{block}.mlp.fc2.weight"].shape[1]
    if f"{block}.mlp.fc1_gated.weight" in tensors:  # has two thirds of the width that mlp_ratio says
        config |= {"mlp": "swiglu", "mlp_ratio": 1.5 * hidden / max(1, width)}
    else:
        config["mlp_ratio"] = hidden / max(1, width)
    config["qk_norm"] = f"{block}.attn.q_scale" in tensors
    config["value_residual"] = any(name.endswith(".attn.value_mix") for name in tensors)
    if kind == "fpdm" and "block_fixed_point_decay" in tensors:
        config["injection"] = "decay"
    if kind == "dit":
        config["depth"] = _depth(tensors, "blocks")
    else:
        config["pre_depth"], config["post_depth"] = _depth(tensors, "blocks_pre"), _depth(tensors, "blocks_post")
    if condition[1] in tensors:
        config["condition_dim"] = tensors[condition[1]].shape[1]
    else:
        config["num_classes"] = len(tensors[condition[0]]) - 1
    if "pos_embed" in tensors:
        config["input_size"] = math.isqrt(tensors["pos_embed"].shape[1]) * patch_size
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    if width in heads:
        config["num_heads"] = heads[width]
    traceless = ["num_heads", "input_size"] + (["pre_post_timestep_conditioning"] if kind == "fpdm" else [])
    config |= settings
    for name in traceless:
        if name not in config:
            raise ValueError(f"{name}: cannot be inferred from these tensors, and changes the output; pass it")
    return DenoiserConfig(**config)


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    """Number of blocks in a stack. Raises ValueError for a gap in their numbers."""
    numbers = {match[1] for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))}
    for number in range(len(numbers)):
        if str(number) not in numbers:
            raise ValueError(f"block {stack}.{number} is missing, but {stack}.{max(numbers)[:20]} is there")
    return len(numbers)

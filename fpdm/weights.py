"""Weights on disk: diffusers' folder layout (config.json and safetensors); import of DiT and FPDM checkpoints."""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpdm.blocks import position_embedding
from fpdm.denoiser import SIZES, Denoiser, DenoiserConfig, build_denoiser

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CLASS_NAME = "FPDMTransformer2DModel"


def save_pretrained(
    state_dict: Mapping[str, Tensor], config: DenoiserConfig, folder: str | Path, extra: dict[str, object] | None = None
) -> None:
    """Write weights and config; each file appears whole or not at all, the config last.

    Args:
        state_dict: every parameter by its name, any dtype and device; the position table is added.
        config: of the network that they belong to.
        folder: made if absent.
        extra: further JSON values to keep in config.json under "extra", for example the diffusion's settings.

    Raises:
        ValueError: naming the tensor that is missing, unknown or of the wrong shape.
    """
    table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    tensors = {**state_dict, "pos_embed": table}
    check_tensors(tensors, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps({"_class_name": CLASS_NAME, **asdict(config), "extra": extra or {}}, indent=2) + "\n"
    _write_whole(folder / CONFIG_NAME, lambda path: path.write_text(text))


def load_pretrained(folder: str | Path) -> Denoiser:
    """The network that `save_pretrained` wrote, in the dtype it was written in, on the CPU.

    Raises:
        ValueError: naming the config's field, or the tensor that is missing, unknown or of the wrong shape.
    """
    config = read_config(folder)
    tensors = load_file(Path(folder) / WEIGHTS_NAME)
    try:
        return assemble(tensors, config)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / WEIGHTS_NAME}: {error}") from error


def assemble(tensors: Mapping[str, Tensor], config: DenoiserConfig) -> Denoiser:
    """A network that holds these tensors, which must be exactly its own; the position table is computed if absent."""
    table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    tensors = {"pos_embed": table, **tensors}
    check_tensors(tensors, config)
    with torch.device("meta"):
        model = Denoiser(config)
    model.load_state_dict(tensors, assign=True)
    dtype = next(model.parameters()).dtype
    model.pos_embed = model.pos_embed.to(dtype)
    return model.requires_grad_()


def read_config(folder: str | Path) -> DenoiserConfig:
    """The config of a folder written by `save_pretrained`; a ValueError names what is wrong with it."""
    path = Path(folder) / CONFIG_NAME
    values = json.loads(path.read_text())
    values.pop("extra", None)
    known = {field.name for field in fields(DenoiserConfig)}
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    try:
        return DenoiserConfig(**{name: value for name, value in values.items() if name in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What was passed as `extra` to `save_pretrained`."""
    return json.loads((Path(folder) / CONFIG_NAME).read_text()).get("extra", {})


def check_tensors(tensors: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Raise a ValueError that names the first tensor which is missing, unknown or of the wrong shape."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Denoiser(config).state_dict().items()}
    for name in expected:
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing; the config ({config.kind}) needs it")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"tensor {name!r} is unknown to the config ({config.kind})")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}; the config needs {expected[name]}")


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and what did not match, as tensor names."""

    source: str  # "ema", "model", or "tensors" for a file of bare weights
    matched: list[str]
    missing: list[str]  # the network's own initialisation (seed 0) was kept
    unexpected: list[str]  # not used
    mismatched: list[str]  # of another shape: not used

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors from {self.source!r}"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                parts.append(f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        return "; ".join(parts)


def import_checkpoint(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    strict: bool = True,
    **settings: Any,
) -> tuple[Denoiser, ImportReport]:
    """Read a published checkpoint: .safetensors, or a .pt of bare weights or of {"model", "ema", "args", ...}.

    Args:
        weights: which of a training checkpoint's two sets to read.
        strict: raise unless every tensor matches; otherwise the report says what did not.
        settings: fields of DenoiserConfig to set rather than infer, see `infer_config`.

    Raises:
        ValueError: naming the setting that cannot be told from the tensors, or the tensors that do not match.
    """
    tensors, source, arguments = _read_checkpoint(Path(path), weights)
    stated = arguments.get("fixed_point_pre_post_timestep_conditioning")
    if stated is not None and "block_fixed_point.attn.qkv.weight" in tensors:
        settings = {"pre_post_timestep_conditioning": bool(stated), **settings}
    config = infer_config(tensors, **settings)
    model = build_denoiser(config)
    own = model.state_dict()
    mismatched = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    matched = [name for name in tensors if name in own and name not in mismatched]
    report = ImportReport(
        source=source,
        matched=matched,
        missing=[name for name in own if name not in tensors and name != "pos_embed"],
        unexpected=[name for name in tensors if name not in own],
        mismatched=mismatched,
    )
    if strict and not report.complete:
        raise ValueError(f"{path}: {report}")
    model.load_state_dict({name: tensors[name] for name in matched}, strict=False)
    return model, report


def infer_config(tensors: Mapping[str, Tensor], **settings: Any) -> DenoiserConfig:
    """Tell a network's config from its tensors' names and shapes.

    Two settings leave no trace in them and change the output all the same: pre_post_timestep_conditioning of an FPDM,
    which must be given, and num_heads, which is taken from the standard size of that width or must be given. input_size
    needs the position table, or must be given.

    Raises:
        ValueError: naming the setting to give, or the tensor that is missing.
    """
    for name in ("x_embedder.proj.weight", "final_layer.linear.weight"):
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing: these are no weights of a DiT or FPDM")
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    found: dict[str, Any] = {"hidden_size": width, "in_channels": channels, "patch_size": patch_size}
    outputs = len(tensors["final_layer.linear.weight"]) // patch_size**2
    found["learned_variance"] = outputs == 2 * channels
    found["kind"] = "fpdm" if any(name.startswith("block_fixed_point.") for name in tensors) else "dit"
    block = "block_fixed_point" if found["kind"] == "fpdm" else "blocks.0"
    found["mlp_ratio"] = len(tensors[f"{block}.mlp.fc1.weight"]) / width
    if found["kind"] == "dit":
        found["depth"] = _depth(tensors, "blocks")
    else:
        found["pre_depth"], found["post_depth"] = _depth(tensors, "blocks_pre"), _depth(tensors, "blocks_post")
    if "y_embedder.proj.weight" in tensors:
        found["condition_dim"] = tensors["y_embedder.proj.weight"].shape[1]
    else:
        found["num_classes"] = len(tensors["y_embedder.embedding_table.weight"]) - 1
    if "pos_embed" in tensors:
        found["input_size"] = math.isqrt(tensors["pos_embed"].shape[1]) * patch_size
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    if width in heads:
        found["num_heads"] = heads[width]
    needed = ["num_heads", "input_size"] + (["pre_post_timestep_conditioning"] if found["kind"] == "fpdm" else [])
    found |= settings
    for name in needed:
        if name not in found:
            raise ValueError(f"{name}: cannot be told from these tensors, and changes the output; give it")
    return DenoiserConfig(**found)


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = [int(match[1]) for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))]
    return max(indices, default=-1) + 1


def _read_checkpoint(path: Path, weights: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Tensors by plain names, where they came from, and the training arguments if the file states them."""
    if path.suffix == ".safetensors":
        return _plain_names(load_file(path)), "tensors", {}
    with torch.serialization.safe_globals([argparse.Namespace]):  # DiT keeps its arguments as one; it is inert
        content = torch.load(path, map_location="cpu", weights_only=True)
    arguments = content.get("args") or {}
    if "model" not in content and "ema" not in content:
        return _plain_names(content), "tensors", {}
    if weights not in content:
        raise ValueError(f"weights: {path} holds no {weights!r}; it holds {', '.join(content)}")
    return _plain_names(content[weights]), weights, arguments if isinstance(arguments, dict) else vars(arguments)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put in front."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in tensors.items()}


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

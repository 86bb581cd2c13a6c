"""Weights on disk: diffusers' folder layout (config.json and safetensors); import of DiT and FPDM checkpoints."""

import argparse
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpdm.blocks import position_embedding
from fpdm.denoiser import SIZES, Denoiser, DenoiserConfig, build_denoiser

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CLASS_NAME = "FPDMTransformer2DModel"
# What torch and safetensors raise for files that are damaged or something else.
NOT_READABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError),
)


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
        ValueError: naming the damaged file, the config's field, or the tensor that is missing, unknown or misshapen.
    """
    config = read_config(folder)
    try:
        return assemble(load_file(Path(folder) / WEIGHTS_NAME), config)
    except (ValueError, SafetensorError) as error:
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
    path, values = Path(folder) / CONFIG_NAME, _read_json(folder)
    values.pop("extra", None)
    known = {field.name for field in fields(DenoiserConfig)}
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    try:
        return DenoiserConfig(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What was passed as `extra` to `save_pretrained`; a ValueError where the file is damaged."""
    return _read_json(folder).get("extra", {})


def _read_json(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_NAME
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: no JSON object")
    return values


def check_tensors(tensors: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Raise a ValueError that names the first tensor which is missing, unknown or of the wrong shape."""
    expected = _shapes(config)
    for name in expected:
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing; the config ({config.kind}) needs it")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"tensor {name!r} is unknown to the config ({config.kind})")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}; the config needs {expected[name]}")


def _shapes(config: DenoiserConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Denoiser(config).state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and what did not match, as tensor names."""

    source: str  # "ema", "model", or "tensors" for a file of bare weights
    matched: list[str]
    missing: list[str]  # the network's own initialisation (seed 0) was kept
    unexpected: list[str]  # not used
    mismatched: list[str]  # of another shape, or a position table of other numbers: not used

    @property
    def complete(self) -> bool:
        """Whether every tensor of the file and of the network found its own."""
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

    What runs code when it is loaded is refused; nothing but tensors and plain values is taken from a file.

    Args:
        weights: which of a training checkpoint's two sets to read.
        strict: raise unless every tensor matches; otherwise the report says what did not.
        settings: fields of DenoiserConfig to set rather than infer, see `infer_config`.

    Raises:
        ValueError: naming the file that is no checkpoint, the setting that cannot be told from the tensors, or the
            tensors that do not match.
    """
    tensors, source, arguments = _read_checkpoint(Path(path), weights)
    stated = arguments.get("fixed_point_pre_post_timestep_conditioning")
    if stated is not None and "block_fixed_point.attn.qkv.weight" in tensors:
        settings = {"pre_post_timestep_conditioning": bool(stated), **settings}
        if settings["pre_post_timestep_conditioning"] != bool(stated):
            raise ValueError(f"pre_post_timestep_conditioning: {path} states that it was trained with {bool(stated)}")
    config = infer_config(tensors, **settings)
    own = _shapes(config)
    table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    given = tensors.get("pos_embed", table)
    mismatched = [name for name in tensors if name in own and tuple(tensors[name].shape) != own[name]]
    if given.shape == table.shape and not torch.allclose(given.float(), table, atol=1e-4):
        mismatched.append("pos_embed")
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
    used = {name: tensors[name].float() for name in matched}
    if report.missing or mismatched:
        used = build_denoiser(config).state_dict() | used
    return assemble(used, config), report


def infer_config(tensors: Mapping[str, Tensor], **settings: Any) -> DenoiserConfig:
    """Tell a network's config from its tensors' names and shapes.

    Two settings leave no trace in them and change the output all the same: pre_post_timestep_conditioning of an FPDM,
    which must be given, and num_heads, which is taken from the standard size of that width or must be given. input_size
    needs the position table, or must be given.

    Raises:
        ValueError: naming the setting to give, or the tensor that is missing.
    """
    kind = "fpdm" if any(name.startswith("block_fixed_point.") for name in tensors) else "dit"
    block = "block_fixed_point" if kind == "fpdm" else "blocks.0"
    needed = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, f"{block}.mlp.fc1.weight": 2}
    condition = [f"y_embedder.{name}.weight" for name in ("embedding_table", "proj")]
    needed[condition[condition[1] in tensors]] = 2
    if "pos_embed" in tensors:
        needed["pos_embed"] = 3
    for name, dimensions in needed.items():
        if name not in tensors or tensors[name].ndim != dimensions:
            fault = f"has {tensors[name].ndim} dimensions" if name in tensors else "is missing"
            raise ValueError(f"tensor {name!r} {fault}: these are no weights of a DiT or FPDM")
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    found: dict[str, Any] = {"kind": kind, "hidden_size": width, "in_channels": channels, "patch_size": patch_size}
    outputs = len(tensors["final_layer.linear.weight"]) // patch_size**2
    found["learned_variance"] = outputs == 2 * channels
    found["mlp_ratio"] = len(tensors[f"{block}.mlp.fc1.weight"]) / width
    if kind == "dit":
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
    traceless = ["num_heads", "input_size"] + (["pre_post_timestep_conditioning"] if kind == "fpdm" else [])
    found |= settings
    for name in traceless:
        if name not in found:
            raise ValueError(f"{name}: cannot be told from these tensors, and changes the output; give it")
    return DenoiserConfig(**found)


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = [int(match[1]) for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))]
    return max(indices, default=-1) + 1


def _read_checkpoint(path: Path, weights: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Tensors by plain names, where they came from, and the training arguments if the file states them."""
    content, source = _load(path), "tensors"
    arguments: Any = {}
    if isinstance(content, dict) and ("model" in content or "ema" in content):
        if weights not in content:
            raise ValueError(f"weights: {path} holds no {weights!r}; it holds {', '.join(map(str, content))}")
        content, source, arguments = content[weights], weights, content.get("args") or {}
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path}: no state dict, tensors by name{'' if source == 'tensors' else f', in {source!r}'}")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return _plain_names(content), source, arguments if isinstance(arguments, dict) else {}


def _load(path: Path) -> Any:
    path.open("rb").close()  # a file that is not there says so itself
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT keeps its arguments as one; it is inert
            return torch.load(path, map_location="cpu", weights_only=True)
    except NOT_READABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"loading it would run {refused[1]}" if refused else "damaged, or no checkpoint"
        raise ValueError(f"{path}: {found}; give a .safetensors file, or a .pt of tensors and plain values") from error


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put in front."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in tensors.items()}


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors makes files that only their owner reads
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

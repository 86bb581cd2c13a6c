"""Reads checkpoints in their common forms as tensors by plain names. Runs no code in them: no pickled objects."""

import argparse
import datetime
import pathlib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fpdm.diffusers_folders import CONFIG_NAME, PIPELINE_NAME, STEM, weight_files

# Keys of averaged weights, of raw weights, and keys that say neither.
WRAPPERS = {
    "ema": ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_model_state_dict"),
    "model": ("model", "model_state_dict", "model_state"),
}
NEUTRAL = ("state_dict", "module", "net", "network", "checkpoint", "params", "weights")
DEEPEST = 8  # nested wrappers
FIRST_LAYERS = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # of DiT and FPDM; in diffusers' names
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _inert_types() -> list[Any]:
    """Types beside tensors in checkpoints whose construction has no side effects, by their pickled names."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    inert: list[Any] = [argparse.Namespace, types.SimpleNamespace]
    inert += [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]  # torch fills no others
    inert += [dict, list, tuple, str, int, float, bool]  # what a defaultdict makes
    inert += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    inert += [np.dtype, np.ndarray, *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type))]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        inert += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):  # the second is Python 3.13's; a path of another system stays a name
        for name, kind in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
            inert += [(kind, f"{module}.{name}Path"), (kind, f"{module}.Pure{name}Path")]
    return inert


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _plain_list(*_: Any) -> list[Any]:
    return []


@dataclass(frozen=True)
class Checkpoint:
    """A network's tensors and what the file says about them."""

    tensors: dict[str, Tensor]  # without prefixes and wrappers
    source: str  # "ema", "model", or "tensors" if the file does not say
    arguments: dict[str, Any]  # training arguments in the file; empty if there are none
    left_out: list[str]  # tensors of other networks in the same state dict
    folder: Path | None  # with its config.json


def read_checkpoint(path: Path, weights: str) -> Checkpoint:
    """Reads a file, a diffusers folder, or a pipeline's folder with `transformer` in it.

    Args:
        path: .safetensors, or what torch.save wrote; or a folder.
        weights: "ema" or "model", of a file that holds both.

    Raises:
        ValueError: naming what in the file cannot be read, and what to do.
    """
    if path.is_dir():
        path = path / "transformer" if (path / PIPELINE_NAME).is_file() else path
        content: Any = _load_folder(path)
        folder = path
    else:
        content, folder = _load(path), path.parent
    content, source, arguments = _unwrap(path, content, weights)
    named = _plain_names(path, content)
    prefix, source = _choose(path, list(named), weights, source)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    for name, tensor in tensors.items():
        if fault := _fault(tensor):
            raise ValueError(f"{path}: tensor {name[:200]!r} {fault}; save it as dense float32, float16 or bfloat16")
    return Checkpoint(
        tensors=tensors,
        source=source,
        arguments=arguments,
        left_out=[name for name in named if not name.startswith(prefix)],
        folder=folder if (folder / CONFIG_NAME).is_file() else None,
    )


def _load_folder(folder: Path) -> dict[str, Tensor]:
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder}: has no {CONFIG_NAME}; give the file itself, or a folder of save_pretrained")
    pickled = folder / f"{STEM}.bin"
    files = [pickled] if pickled.is_file() and not any(folder.glob("*.safetensors")) else weight_files(folder)[0]
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _load(file)
        if not isinstance(part, dict) or not part.keys().isdisjoint(tensors):
            raise ValueError(f"{file}: no part of a state dict, or its tensors are in another file too")
        tensors |= part
    return tensors


def _load(path: Path) -> Any:
    path.open("rb").close()  # a missing file raises here
    inert = _inert_types()
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise anything for damaged files
        fault = "damaged, or no checkpoint"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            fault = f"loading it would run {refused[1]}"
        elif refused := re.search(r"but got (?:<class ')?([\w.]+)", str(error)):
            fault = f"it holds an object, {refused[1]}"
        raise ValueError(
            f"{path}: {fault}; give a .safetensors file, or a .pt of tensors and plain values, as "
            "torch.save(model.state_dict(), ...) writes it"
        ) from error


def _unwrap(path: Path, content: Any, weights: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The state dict in a checkpoint, however it is nested, and which weights it holds."""
    source = "tensors"
    arguments: dict[str, Any] = {}
    other = "model" if weights == "ema" else "ema"
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping) or not content or _is_state(content):
            break
        stated = content.get("args")
        stated = vars(stated) if isinstance(stated, argparse.Namespace) else stated
        arguments = stated if isinstance(stated, dict) else arguments
        names = WRAPPERS[weights] + NEUTRAL + (() if source == "tensors" else WRAPPERS[other])
        chosen = next((name for name in names if name in content), None)
        if chosen is None:
            if source == "tensors" and any(name in content for name in WRAPPERS[other]):
                held = ", ".join(map(str, content))
                raise ValueError(f"weights: {path} holds no {weights!r}; it holds {held}; choose {other!r} instead")
            break
        if chosen in WRAPPERS[weights] and source == "tensors":
            source = weights
        elif source == "tensors" and weights == "ema":
            beside = [name for name, value in content.items() if isinstance(value, Tensor | Mapping | list)]
            _refuse_averages(path, [str(name) for name in beside if name != chosen])
        content = content[chosen]
    if not _is_state(content):
        held = f"; it holds {', '.join(map(str, content))}" if isinstance(content, Mapping) else ""
        within = "" if source == "tensors" else f", in {source!r}"
        raise ValueError(f"{path}: no state dict, tensors by name{within}{held[:200]}")
    return dict(content), source, arguments


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _plain_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel, FSDP and torch.compile."""
    wrapped = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = wrapped.sub("", name)
        if plain in named:
            raise ValueError(f"{path}: tensor {plain!r} is duplicated as {name!r}; keep one of the two")
        named[plain] = tensor
    return named


def _choose(path: Path, names: list[str], weights: str, source: str) -> tuple[str, str]:
    """The prefix of the network's names, such as Lightning's "model.", and which weights these are."""
    ends = re.compile(rf"(.*\.)?(?:{'|'.join(map(re.escape, FIRST_LAYERS))})")
    prefixes = {match[1] or "" for name in names if (match := ends.fullmatch(name))}
    averaged = {prefix for prefix in prefixes if _is_average(prefix)}
    if len(prefixes) <= 1 and not averaged:
        (prefix,) = prefixes or {""}
        if source == "tensors" and weights == "ema":
            _refuse_averages(path, [name for name in names if not name.startswith(prefix)])
        return prefix, source
    wanted = averaged if weights == "ema" else prefixes - averaged
    if len(wanted) != 1:
        held = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        raise ValueError(f"weights: {path} holds networks under {held}: keep the one that is {weights!r} alone")
    return wanted.pop(), weights


def _is_average(name: str) -> bool:
    return "ema" in re.split(r"[._]", name.lower())


def _refuse_averages(path: Path, names: list[str]) -> None:
    """Raises ValueError for raw weights beside averaged ones in an unknown form."""
    for name in names:
        if _is_average(name):
            raise ValueError(f"weights: {path} keeps averages as {name!r}, which is not read; choose 'model' instead")


def _fault(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        return f"is a {'quantized tensor' if tensor.is_quantized else type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_meta:
        return "holds no numbers (meta)"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"claims {tensor.numel():,} numbers, and holds fewer"  # repeated, or never written
    return None if tensor.dtype in FLOATS else f"is {str(tensor.dtype).removeprefix('torch.')}"

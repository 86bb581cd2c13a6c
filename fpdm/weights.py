"""Weights on disk in diffusers' folder layout: config.json and safetensors.

config.json holds the sha256 of the weights and a key of its own content: a file that changed since is not loaded.
Folders written by other programs have neither and are loaded unchecked.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpdm.blocks import position_embedding
from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoiser
from fpdm.diffusers_folders import CONFIG_NAME, weights_name

CLASS_NAME = "FPDMTransformer2DModel"
WEIGHTS_SHA256, CONTENT_KEY = SEAL = ("weights_sha256", "content_key")  # fields of config.json
VARIANTS_SHA256 = "variants_sha256"  # of the weights in other precisions, by variant


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: DenoiserConfig,
    folder: str | Path,
    extra: dict[str, object] | None = None,
    variant: str | None = None,
) -> None:
    """Write weights and config; each file appears whole or not at all, the config last.

    Args:
        state_dict: every parameter by its name, any dtype and device; the position table is added.
        config: the network's config.
        folder: created if absent.
        extra: further JSON values to keep in config.json under "extra", for example the diffusion's settings.
        variant: such as "fp16": the weights are written beside those of the same network that the folder has.

    Raises:
        ValueError: naming the tensor that is missing, unknown or of the wrong shape.
    """
    table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    tensors = {**state_dict, "pos_embed": table}
    check_tensors(tensors, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = folder / weights_name(variant)
    _atomic_write(path, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    values = {"_class_name": CLASS_NAME, **asdict(config), "extra": extra or {}}
    values |= _hashes(folder, values, variant, _sha256(path))
    text = json.dumps({**values, CONTENT_KEY: _content_key(values)}, indent=2) + "\n"
    _atomic_write(folder / CONFIG_NAME, lambda path: path.write_text(text))


def _hashes(folder: Path, values: dict[str, Any], variant: str | None, sha256: str) -> dict[str, Any]:
    """The seals of all weights of this network in the folder; without weights but variants the first one is empty.

    Variants of other weights than these are none of this network.
    """
    try:
        found = _read_json(folder)
        same = json.loads(json.dumps(values)) == {key: found[key] for key in values}
    except (ValueError, KeyError):  # none yet, or another network's, whose files are replaced
        same = False
    main, variants = (found.get(WEIGHTS_SHA256, ""), found.get(VARIANTS_SHA256, {})) if same else ("", {})
    if variant is None:
        main, variants = sha256, variants if main in ("", sha256) else {}
    else:
        variants = {**variants, variant: sha256}
    return {WEIGHTS_SHA256: main} | ({VARIANTS_SHA256: variants} if variants else {})


def load_pretrained(folder: str | Path, variant: str | None = None) -> Denoiser:
    """The network that `save_pretrained` wrote, in the dtype it was written in, on the CPU.

    Raises:
        ValueError: naming the damaged file, the config's field, or the tensor that is missing, unknown or misshapen.
    """
    config, path = read_config(folder), Path(folder) / weights_name(variant)
    check_seal(folder, variant)
    try:
        return assemble(load_file(path), config)
    except Exception as error:
        raise ValueError(f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def check_seal(folder: str | Path, variant: str | None = None) -> None:
    """Raises ValueError where the weights are not those that config.json was written with."""
    sealed, path = weights_sha256(folder), Path(folder) / weights_name(variant)
    if sealed is not None and variant:
        variants = _read_json(folder).get(VARIANTS_SHA256)
        sealed = variants.get(variant, "") if isinstance(variants, dict) else ""
    if sealed is not None and (not path.is_file() or _sha256(path) != sealed):
        raise ValueError(f"{path}: {'changed after it was written' if path.is_file() else 'no such file'}")


def assemble(tensors: Mapping[str, Tensor], config: DenoiserConfig) -> Denoiser:
    """A network with these tensors; the position table is computed if absent. ValueError as `check_tensors`."""
    if "pos_embed" not in tensors:
        table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
        tensors = {**tensors, "pos_embed": table}
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
    for name in ("extra", VARIANTS_SHA256, *SEAL):
        values.pop(name, None)
    known = {field.name for field in fields(DenoiserConfig)}
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    try:
        for name in known & values.keys():
            _check_type(name, values[name])
        return DenoiserConfig(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_type(name: str, value: Any) -> None:
    default = getattr(DenoiserConfig, name)
    allowed = {"condition_dim": (int, type(None)), "mlp_ratio": (int, float)}.get(name, (type(default),))
    if type(value) not in allowed:
        raise ValueError(f"{name}: {str(value)[:100]!r} is a {type(value).__name__}; write one such as {default!r}")


def read_class(folder: str | Path) -> str | None:
    """The class that a folder's config.json names: CLASS_NAME where `save_pretrained` wrote it."""
    return _read_json(folder).get("_class_name")


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What was passed as `extra` to `save_pretrained`; a ValueError where the file is damaged."""
    extra = _read_json(folder).get("extra", {})
    if not isinstance(extra, dict):
        raise ValueError(f"{Path(folder) / CONFIG_NAME}: extra: no JSON object")
    return extra


def weights_sha256(folder: str | Path) -> str | None:
    """The sha256 of the weights in config.json; None in a folder that `save_pretrained` did not write.

    ValueError as `read_config`.
    """
    return _read_json(folder).get(WEIGHTS_SHA256)


def _read_json(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_NAME
    try:
        values = json.loads(path.read_bytes().decode())
        sealed = [values.get(name) for name in SEAL] if isinstance(values, dict) else []
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not sealed:
        raise ValueError(f"{path}: no JSON object")
    content = {name: value for name, value in values.items() if name != CONTENT_KEY}
    if sealed != [None, None] and not (isinstance(sealed[0], str) and sealed[1] == _content_key(content)):
        raise ValueError(f"{path}: changed after it was written")
    return values


def _content_key(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Raise a ValueError that names the first tensor which is missing, unknown or of the wrong shape."""
    expected = tensor_shapes(config)
    for name in expected:
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing; the config ({config.kind}) needs it")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"tensor {name!r} is unknown to the config ({config.kind})")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}; the config needs {expected[name]}")


def tensor_shapes(config: DenoiserConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by name, including the position table; allocates none."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Denoiser(config).state_dict().items()}


def _atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename (`fpdm` does not import `common`)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # the umask's mode; safetensors would write files that only their owner can read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Folders as diffusers writes them: what their config.json means to diffusers, and which files hold their weights."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{STEM}.safetensors"
CODE_NAME = "pipeline.py"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # of `from_pretrained`
# One file or the list of several, each of which may be a variant: "fp16".
_NAMES = re.compile(rf"{STEM}(?:\.([^.]+))?\.safetensors(?:\.index(?:\.([^.]+))?\.json)?")


def weights_name(variant: str | None = None) -> str:
    """The file of the weights, or of a variant of them such as "fp16"."""
    return f"{STEM}.{variant}.safetensors" if variant else WEIGHTS_NAME


def local_folder(name: str | Path, arguments: dict[str, Any]) -> Path:
    """A folder, or the copy of a repository of the hub: configurations and safetensors, no code and nothing pickled.

    Takes those of HUB_ARGUMENTS out of `arguments`.
    """
    given = {key: arguments.pop(key, None) for key in HUB_ARGUMENTS}
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = {key: value for key, value in given.items() if value is not None}
    return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **wanted))


def class_named(stated: Any) -> str | None:
    """The class that a configuration names, as diffusers calls it today; None where it names none."""
    name = stated.get("_class_name") if isinstance(stated, dict) else None
    if name == "Transformer2DModel" and stated.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"  # as in the published facebook/DiT-XL-2-256
    return name if isinstance(name, str) else None


def read_configuration(folder: Path, kinds: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A model's class in diffusers, and all arguments that diffusers builds it with.

    Those that config.json leaves out are diffusers' own defaults: the published files of Stable Diffusion's
    autoencoders, for one, leave out the scaling factor. `kinds`: the names of the classes that are read.

    Raises ValueError where the file is no configuration, or another class's.
    """
    from diffusers import models  # seconds to import

    path = folder / CONFIG_NAME
    try:
        stated = models.AutoencoderKL.load_config(folder)  # of any class; it only reads
    except Exception:  # noqa: BLE001 # as nested too deeply
        raise ValueError(f"{path}: no JSON, or not readable; get the file again") from None
    name = class_named(stated)
    if name is None:
        raise ValueError(f"{path}: says not which class of diffusers it is of; add _class_name, of {', '.join(kinds)}")
    if name not in kinds:
        *others, last = kinds
        listed = f"{', '.join(others)} and {last}" if others else last
        raise ValueError(f"{path}: is an {name[:100]}; of diffusers' classes {listed} can be read here")
    kind = getattr(models, name)
    defaults = {argument: each.default for argument, each in inspect.signature(kind).parameters.items()}
    return kind, defaults | kind.extract_init_dict(stated)[0]


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files that hold a folder's weights, and their variant, such as "fp16".

    Files without a variant come first, then the only variant there is.

    Raises ValueError where there are none, several variants, or not all the files that a list of them names.
    """
    weights = {}
    for path in sorted(folder.glob(f"{STEM}*.safetensors*"), reverse=True):  # one whole file before a list of several
        if match := _NAMES.fullmatch(path.name):
            if re.search(r"-\d+-of-\d+$", match[1] or ""):
                continue
            weights[match[1] or match[2]] = path
    if not weights:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        kept = f" but {pickled.name}, which is pickled" if pickled else ""
        raise ValueError(f"{folder}: has no {WEIGHTS_NAME}{kept}; get that file, or write it with save_pretrained")
    if None not in weights and len(weights) > 1:
        raise ValueError(
            f"{folder}: has no {WEIGHTS_NAME} but several variants of it, {', '.join(sorted(map(str, weights)))}; "
            f"copy the one you mean, with {CONFIG_NAME}, into a folder of its own"
        )
    variant = None if None in weights else next(iter(weights))
    path = weights[variant]
    return (_listed(path) if path.suffix == ".json" else [path]), variant


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except Exception:  # noqa: BLE001
        raise ValueError(f"{index}: no list of weight files; get the file again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is no file beside it; get all files of the folder")
    return [index.parent / name for name in names]


def write_code(folder: Path, source: str, own: Sequence[str]) -> None:
    """Puts a pipeline's code beside model_index.json and beside the components of the classes `own`.

    diffusers then takes the classes from there, where it is told to trust it.
    """
    path = folder / PIPELINE_NAME
    index = json.loads(path.read_text(encoding="utf-8"))
    module = CODE_NAME.removesuffix(".py")
    index["_class_name"] = [module, index["_class_name"]]
    places = [folder]
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_") and value[-1] in own:
            index[name] = [module, value[-1]]
            places.append(folder / name)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / CODE_NAME).write_text(source, encoding="utf-8")
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

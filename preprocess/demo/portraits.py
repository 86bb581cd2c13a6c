"""Portraits of robots, monsters, robot heads and cats, composed from robohash's image parts."""

import importlib.util
import math
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import TypedDict  # pydantic does not read typing's own before 3.12

from common.errors import UserError
from common.files import atomic_folder
from common.recipe import Recipe
from common.sealed import read_sealed, write_sealed

CLASSES = {"robot": "set1", "monster": "set2", "robot-head": "set3", "cat": "set4"}
BACKGROUND = (238, 238, 238, 255)
MARKER = ".demo-pictures.json"  # hidden from sources; the name is kept, since finished folders have it

Layers = tuple[tuple[Image.Image, ...], ...]  # bottom layer first; one part of each is drawn


@dataclass(frozen=True)
class Portraits:
    """The portraits of a class at one resolution. Parts of different variants (set1's ten colours) never mix."""

    variants: tuple[Layers, ...]

    @property
    def combinations(self) -> int:
        return sum(math.prod(map(len, layers)) for layers in self.variants)

    def compose(self, combination: int) -> Image.Image:
        """Portrait number `combination`, below `combinations`: RGB, resolution x resolution."""
        combination, variant = divmod(combination, len(self.variants))
        layers = self.variants[variant]
        image = Image.new("RGBA", layers[0][0].size, BACKGROUND)
        for parts in layers:
            combination, part = divmod(combination, len(parts))
            image.alpha_composite(parts[part])
        return image.convert("RGB")


def load_portraits(class_name: str, resolution: int) -> Portraits:
    """Reads and scales all parts of a class, which takes seconds."""
    folder = _robohash_sets() / CLASSES[class_name]
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    variants = [folder] if "#" in children[0].name else children
    return Portraits(tuple(_load_layers(variant, resolution) for variant in variants))


def _robohash_sets() -> Path:
    specification = importlib.util.find_spec("robohash")
    if specification is None or specification.origin is None:
        raise UserError("robohash: not installed, and the demo's images come from it; run: pip install robohash==2.0")
    return Path(specification.origin).parent / "sets"


def _load_layers(folder: Path, resolution: int) -> Layers:
    """One folder per layer; the text after `#` in its name orders the layers from bottom to top."""
    layers = sorted((child for child in folder.iterdir() if child.is_dir()), key=lambda child: child.name.split("#")[1])
    return tuple(tuple(_load_part(file, resolution) for file in sorted(layer.glob("*.png"))) for layer in layers)


def _load_part(file: Path, resolution: int) -> Image.Image:
    with Image.open(file) as part:
        return part.convert("RGBA").resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3.0)


def training_combinations(seed: int, class_name: str, portraits: Portraits, start: int, count: int) -> list[int]:
    """Combinations of the training portraits `start` to `start + count`: all different, and of no held-out portrait."""
    return _permuted(seed, class_name, portraits, start, count)


def held_out_combinations(seed: int, class_name: str, portraits: Portraits, count: int) -> list[int]:
    """From the end of the permutation, so that they do not depend on the number of training portraits."""
    return _permuted(seed, class_name, portraits, portraits.combinations - count, count)


def _permuted(seed: int, class_name: str, portraits: Portraits, start: int, count: int) -> list[int]:
    import torch

    from fpdm.rng import permute

    positions = torch.arange(start, start + count)
    # The stream's name is data: with another one other portraits would be held out than those of assets/vae-demo.
    return permute(seed, f"demo_pictures/{class_name}", positions, portraits.combinations).tolist()


class Marker(TypedDict):
    """The marker file of a finished folder of portraits."""

    settings: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The training or the held-out portraits: a folder and what decides its content."""

    name: str
    folder: Path
    per_class: int
    resolution: int
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "folder": None, "robohash": _robohash_version(), "background": list(BACKGROUND)}

    @property
    def is_finished(self) -> bool:
        """Raises UserError if another program wrote the folder."""
        if not self.folder.exists():
            return False
        if not (self.folder / MARKER).is_file():
            raise UserError(f"data: {self.folder} is there and not made by this command; name another folder for it")
        made = read_sealed(self.folder / MARKER, Marker, f"delete {self.folder}")["settings"]
        wanted = self.settings
        if wanted["robohash"] is None:  # finished portraits do not need it
            wanted["robohash"] = made.get("robohash")
        return made == wanted


def _robohash_version() -> str | None:
    """None where it is not installed."""
    try:
        return version("robohash")
    except PackageNotFoundError:
        return None


def parts(recipe: Recipe) -> list[Part]:
    """The parts to compose. Raises UserError if the recipe has no section `demo`."""
    if recipe.demo is None:
        raise UserError("demo: the recipe has no such section; add it, or name your own images in data.images")
    folders = [("training", recipe.data.images, recipe.demo.per_class)]
    if recipe.data.held_out is not None:
        folders.append(("held-out", recipe.data.held_out, recipe.demo.held_out_per_class))
    return [Part(name, Path(path), count, recipe.data.resolution, recipe.seed) for name, path, count in folders]


def plan(recipe: Recipe) -> list[str]:
    return [
        f"{part.name} portraits: {part.per_class:,} of each of {', '.join(CLASSES)}, {part.resolution} px, "
        f"in {part.folder}{' (finished)' if part.is_finished else ''}"
        for part in parts(recipe)
    ]


def finished(recipe: Recipe) -> bool:
    return all(part.is_finished for part in parts(recipe))


def compose(recipe: Recipe) -> None:
    """Runs the stage; returns at once if it is finished."""
    missing = [part for part in parts(recipe) if not part.is_finished]
    if missing:
        sets = {name: load_portraits(name, recipe.data.resolution) for name in CLASSES}
        for part in missing:
            _compose_part(part, sets)


def _compose_part(part: Part, sets: dict[str, Portraits]) -> None:
    from tqdm import tqdm

    with (
        atomic_folder(part.folder) as folder,
        tqdm(total=part.per_class * len(sets), unit="portrait", desc=f"compose {part.name}") as bar,
    ):
        for class_name, portraits in sets.items():
            (folder / class_name).mkdir()
            for index, combination in enumerate(_chosen(part, class_name, portraits)):
                portraits.compose(combination).save(folder / class_name / f"{index:06d}.png")
                bar.update()
        write_sealed(folder / MARKER, {"settings": part.settings})


def _chosen(part: Part, class_name: str, portraits: Portraits) -> list[int]:
    if part.name == "held-out":
        return held_out_combinations(part.seed, class_name, portraits, part.per_class)
    return training_combinations(part.seed, class_name, portraits, 0, part.per_class)

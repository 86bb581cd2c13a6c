"""Real photographs, cut from those that scikit-image ships, and the layouts in which data sets are passed on."""

import importlib.util
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.recipe import Data
from preprocess.sources import Source, open_source

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "camera.png")


@cache
def _originals() -> list[Image.Image]:
    specification = importlib.util.find_spec("skimage")
    assert specification is not None
    assert specification.origin is not None
    folder = Path(specification.origin).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in NAMES]


def original(name: str) -> Image.Image:
    return _originals()[NAMES.index(name)]


def photograph(number: int, width: int = 96, height: int = 72) -> Image.Image:
    """Photograph `number`: a window of a real one; no two of the first thousands are the same."""
    window, original = divmod(number, len(NAMES))
    image = _originals()[original]
    left, top = 37 * window % (image.width - width), 53 * window % (image.height - height)
    return image.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, suffix: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def photographs(count: int, suffix: str = "jpeg", side: tuple[int, int] = (96, 72)) -> list[bytes]:
    return [encoded(photograph(number, *side), suffix) for number in range(count)]


def source_of(kind: str, path: object, **options: object) -> Source:
    """What a recipe opens with `data.source` and `data.images` so, and further fields of `data`."""
    return open_source(Data(source=kind, images=str(path), **options))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files: Mapping[str, bytes], *members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    """MNIST's form: (N, H, W) images, or (N,) labels."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_lmdb(folder: Path, files: Mapping[str, bytes]) -> Path:
    import lmdb

    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for name, data in files.items():
            transaction.put(name.encode(), data)
    return folder


def write_parquet(path: Path, images: list[bytes | None], labels: list[int], class_names: list[str] | None) -> Path:
    """As Hugging Face's `datasets` writes it, in small row groups."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": data, "path": f"{number}.JPEG"} for number, data in enumerate(images)]
    features = {"label": {"names": class_names, "_type": "ClassLabel"}} if class_names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"image": structs, "label": labels}).replace_schema_metadata(metadata)
    parquet.write_table(table, path, row_group_size=4)
    return path

"""Files of samples by index range: `chunk-<first>-<end>.npz` or `.tar` holds samples first to end - 1, or is absent.

A set's folder is named `...-<key>`, the key being of all that changes its content. Every chunk holds that key too, so
that one drawn with other weights or another autoencoder is refused wherever it lies. Where chunks of different sizes
overlap they hold the same samples, and each sample is counted once.

A tar is a WebDataset: `<index>.png`, `.cls`, and `.json`, sealed, with the sha256 of the pixels and the label. An npz
holds arrays under one seal.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import with_config
from typing_extensions import TypedDict

from common.arrays import read_arrays, write_arrays
from common.errors import UserError, errors_as, one_line
from common.files import atomic_write, content_key
from common.sealed import KEY, STRICT, unseal

CHUNK_NAME = re.compile(r"chunk-([0-9]{8,})-([0-9]{8,})\.(npz|tar)")
COMMAND = "python pipeline/sample.py"

Span = tuple[int, int]  # first, end
KINDS = {"images": ("u", 4), "labels": ("i", 1)}  # numpy's kind and the dimensions; of features ("f", 2)
Chunk = dict[str, NDArray]  # by name, each with a row a sample: images (N, H, W, 3) uint8, labels (N,), or features


def chunk_spans(count: int, size: int) -> list[Span]:
    """Samples 0 to count - 1, `size` in a chunk."""
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def chunk_path(folder: Path, span: Span, suffix: str = "npz") -> Path:
    return folder / f"chunk-{span[0]:08d}-{span[1]:08d}.{suffix}"


def find_chunks(folder: Path) -> dict[Span, Path]:
    """By their span; files under other names, such as copies, are none."""
    paths = (path for path in sorted(folder.glob("chunk-*")) if CHUNK_NAME.fullmatch(path.name))
    return {_span(path): path for path in paths if chunk_path(folder, _span(path), path.suffix[1:]).name == path.name}


def cover_gap(folder: Path, span: Span) -> Span | None:
    """The first range of samples within `span` that no chunk holds, if any."""
    return _cover(folder, span)[1]


def iterate(folder: Path, span: Span) -> Iterator[Chunk]:
    """Samples first to end - 1 in order, none missing and none twice, a chunk at a time.

    Raises UserError as `check_cover`, before anything is read, and naming the chunk that is damaged.
    """
    check_cover(folder, span)
    return ({name: rows[part] for name, rows in read_chunk(path).items()} for path, part in _cover(folder, span)[0])


def check_cover(folder: Path, span: Span) -> None:
    """Raises UserError naming the first samples of the span that no chunk holds."""
    if gap := cover_gap(folder, span):
        raise UserError(
            f"{folder}: samples {gap[0]} to {gap[1] - 1} of {span[1]} are missing; run {COMMAND} with this recipe"
        )


def _cover(folder: Path, span: Span) -> tuple[list[tuple[Path, slice]], Span | None]:
    """Files, and which rows of each, that hold samples first to end - 1 once each, in order; or the first gap."""
    parts: list[tuple[Path, slice]] = []
    chunks, (position, end) = find_chunks(folder), span
    while position < end:
        holding = [chunk for chunk in chunks if chunk[0] <= position < chunk[1]]
        if not holding:
            return parts, (position, min([first for first, _ in chunks if position < first < end], default=end))
        first, last = max(holding, key=lambda chunk: chunk[1])
        parts.append((chunks[first, last], slice(position - first, min(last, end) - first)))
        position = last
    return parts, None


def write_chunk(path: Path, rows: Chunk) -> None:
    """`rows`: arrays with a row a sample; of a tar, `images` and `labels`."""
    if path.suffix == ".tar":
        _write_tar(path, rows)
    else:
        write_arrays(path, first=_span(path)[0], key=_key(path), names=_names(rows), **rows)


def read_chunk(path: Path) -> Chunk:
    """Raises UserError naming the file where it is damaged, not what its name says, or of other settings."""
    first, end = _span(path)
    arrays = _read_tar(path) if path.suffix == ".tar" else read_arrays(path, COMMAND)
    found_first, key, names = (one_line(str(arrays.pop(name, None)), 100) for name in ("first", "key", "names"))
    shapes = {name: rows.shape for name, rows in arrays.items()}
    if (
        found_first != str(first)
        or names != _names(arrays)
        or not all(shape[:1] == (end - first,) for shape in shapes.values())
    ):
        raise UserError(
            f"{path}: holds {shapes} from {found_first}, not the samples of its name; delete it and run {COMMAND} again"
        )
    if key != _key(path):
        raise UserError(
            f"{path}: made with other settings ({key}) than its folder's ({_key(path)}): other weights, another "
            f"autoencoder, sampler or extractor; delete it and run {COMMAND} again"
        )
    for name, rows in arrays.items():
        kind, dimensions = KINDS.get(name, ("f", 2))
        if rows.dtype.kind != kind or rows.ndim != dimensions or (name == "images" and rows.shape[3] != 3):
            raise _damaged(path, f"{name} are {rows.dtype} {rows.shape}")
    return arrays


def _names(rows: Chunk) -> str:
    return ",".join(sorted(rows))


def _span(path: Path) -> Span:
    match = CHUNK_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _key(path: Path) -> str:
    """The key of the chunk's set: the end of its folder's name."""
    return path.parent.name.rpartition("-")[2]


def _write_tar(path: Path, rows: Chunk) -> None:
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, (image, label) in enumerate(zip(rows["images"], rows["labels"], strict=True), _span(path)[0]):
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            sha256 = hashlib.sha256(image.tobytes()).hexdigest()
            facts = {"index": index, "key": _key(path), "label": int(label), "sha256": sha256}
            sealed = json.dumps({**facts, KEY: content_key(facts)})
            members = {"png": png.getvalue(), "cls": b"%d" % label, "json": sealed.encode()}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{index:08d}.{suffix}")  # of owner and date 0: equal samples, equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@with_config(STRICT)
class Facts(TypedDict):
    """The JSON file of a sample in a tar."""

    index: int
    key: str
    label: int
    sha256: str  # of the pixels


def _read_tar(path: Path) -> Chunk:
    """The same arrays as `read_arrays` gives of an npz. Raises UserError naming the sample that is damaged."""
    with errors_as(UserError, f"{path}: damaged; {_REMEDY}"), tarfile.open(path, "r:") as tar:
        members = {member.name: _content(tar, member) for member in tar}
    first, end = _span(path)
    keys, images, labels = set(), [], []
    for index in range(first, end):
        with errors_as(UserError, f"{path}: damaged: sample {index}; {_REMEDY}"):
            facts = unseal(members[f"{index:08d}.json"], f"{path}: sample {index}", Facts, _REMEDY)
            image = np.asarray(Image.open(io.BytesIO(members[f"{index:08d}.png"])))
            stated = (facts["index"], facts["label"], facts["sha256"])
            label = int(members[f"{index:08d}.cls"])
            as_written = stated == (index, label, hashlib.sha256(image.tobytes()).hexdigest()) and image.ndim == 3
        if not as_written:
            raise _damaged(path, f"sample {index} is not the one that was written")
        keys.add(facts["key"])
        images.append(image)
        labels.append(label)
    if len(keys) > 1:
        raise _damaged(path, "samples of several settings")
    with errors_as(UserError, f"{path}: damaged; {_REMEDY}"):
        rows = {"images": np.stack(images), "labels": np.array(labels, dtype=np.int64)}
    return rows | {"key": np.array(keys.pop()), "first": np.array(first), "names": np.array(_names(rows))}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


_REMEDY = f"delete it and run {COMMAND} again"


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged ({one_line(reason, 200)}); {_REMEDY}")

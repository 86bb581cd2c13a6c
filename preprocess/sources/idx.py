"""IDX files, the form of MNIST and Fashion-MNIST: the grey images of a split in one file, their labels in another."""

import gzip
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, errors_as
from preprocess.sources.entries import Entries, Entry, file_stamp, is_hidden, kind_of, refuse_lfs_pointer
from preprocess.sources.folders import walk_visible
from preprocess.sources.listing import some

IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?", re.I)  # train-images-idx3-ubyte.gz, t10k-images.idx3-ubyte
LABELS = r"\1labels\2idx1-ubyte\3"  # of the images' name
UINT8 = 8  # the header's code of the type
GZIP = b"\x1f\x8b"
MOST_BYTES = 2**30  # unpacked; EMNIST's largest file has half of it


class IdxSource:
    """The images of one split, in their order: a file of images, or the folder that holds one. Labels lie beside it.

    Both files are read at once, gzip or not, and kept in memory. A key is `<file>/<number>`. Raises UserError for
    several files of images, and for headers that contradict the files.
    """

    def __init__(self, path: str, field: str) -> None:
        self.left_out = Counter[str]()
        file = _find(Path(path), field, self.left_out)
        self._images = _read(file, field, 3)  # (N, H, W)
        beside = _labels_beside(file, field)
        labels = _read(beside, field, 1)  # (N,)
        if len(labels) != len(self._images):
            raise UserError(
                f"{field}: {file} has {len(self._images):,} images and {beside} {len(labels):,} labels; each image "
                "needs one: get both files of one split"
            )
        if not self._images.size:
            raise UserError(f"{field}: {file} has {_shape(self._images.shape)} pixels, no images; name another")
        name, stamp = re.sub(r"\.gz$", "", file.name, flags=re.I), file_stamp(file.stat())
        size = len(self._header()) + self._images[0].size
        self.entries = Entries(
            Entry(f"{name}/{number:06d}", int(label), size, (number, 0), stamp) for number, label in enumerate(labels)
        )
        self.class_names = [str(label) for label in range(int(labels.max()) + 1)]

    def open(self, entry: Entry) -> bytes:
        """The image as a PGM."""
        return self._header() + self._images[entry.place[0]].tobytes()

    def _header(self) -> bytes:
        _, height, width = self._images.shape
        return b"P5 %d %d 255\n" % (width, height)


def _find(path: Path, field: str, left_out: Counter[str]) -> Path:
    """The file of images; counts the other files, except that of its labels."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(
                f"{field}: {path} is not there; name a folder of IDX files, or one of images "
                "(train-images-idx3-ubyte.gz). Fashion-MNIST: apt-get install dataset-fashion-mnist; "
                "ln -s /usr/share/datasets/fashion-mnist data/"
            )
        if not IMAGES.fullmatch(path.name):
            raise UserError(f"{field}: {path} is not named as IDX images are: train-images-idx3-ubyte, with .gz or not")
        return path
    files = []
    for parent, links, names in walk_visible(path, field, left_out):
        if links:
            raise UserError(f"{field}: {parent}/{links[0]} is a symbolic link to a folder; name that folder")
        files += [parent / name for name in names]
    found = [file for file in files if IMAGES.fullmatch(file.name) and not is_hidden(file.name)]
    if len(found) != 1:
        what = (
            f"holds several files of images ({some(list(map(str, found)))}); name one"
            if found
            else "holds no IDX file of images"
        )
        raise UserError(f"{field}: {path} {what}, such as train-images-idx3-ubyte.gz")
    own = {found[0], _labels_beside(found[0], field)}
    left_out.update(kind_of(file.name) for file in files if file not in own)
    return found[0]


def _labels_beside(file: Path, field: str) -> Path:
    """The labels of a file of images, packed as it is or otherwise."""
    same = file.with_name(IMAGES.sub(LABELS, file.name))
    other = same.with_suffix("") if same.suffix.lower() == ".gz" else same.with_name(f"{same.name}.gz")
    for beside in (same, other):
        if beside.is_file():
            return beside
    raise UserError(f"{field}: {file} has no labels beside it, in {same.name}; get the file")


def _read(file: Path, field: str, dimensions: int) -> NDArray[np.uint8]:
    """The array in a file. Reads no more than its header announces, and a byte, however much it unpacks to."""
    if not file.is_file():
        raise UserError(f"{field}: {file} is no regular file")
    remedy = "download it again"
    with errors_as(UserError, f"{field}: {file} cannot be read; {remedy}"), open(file, "rb") as packed:
        start = packed.read(40)
        refuse_lfs_pointer(file, field, start)
        packed.seek(0)
        with gzip.open(packed) if start.startswith(GZIP) else packed as opened:
            header = opened.read(4 + 4 * dimensions)
            shape = _announced(header, file, field, dimensions)
            size = int(np.prod(shape, dtype=object))
            if size > MOST_BYTES:
                raise UserError(
                    f"{field}: {file} announces {_shape(shape)} = {size:,} bytes, more than {MOST_BYTES:,}, which are "
                    "read at once; convert it to a zip or tar of images"
                )
            data = opened.read(size + 1)
    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else "more"
        raise UserError(f"{field}: {file} announces {_shape(shape)} = {size:,} bytes and holds {found}; {remedy}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _announced(header: bytes, file: Path, field: str, dimensions: int) -> tuple[int, ...]:
    """The shape in a header: two zeros, the code of the type, the number of dimensions, and each as 32 bits."""
    if len(header) != 4 + 4 * dimensions:
        raise UserError(f"{field}: {file} ends in its header, after {len(header)} bytes; download it again")
    zeros, code, count = struct.unpack(">HBB", header[:4])
    if (zeros, code, count) != (0, UINT8, dimensions):
        kind = "images" if dimensions == 3 else "labels"
        raise UserError(
            f"{field}: {file} begins with {header[:4].hex(' ')}; IDX {kind} of bytes begin with 00 00 08 0{dimensions}"
        )
    return struct.unpack(f">{dimensions}I", header[4:])


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{side:,}" for side in shape)

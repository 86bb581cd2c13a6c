"""WebDatasets of images: tars of `key.jpg` with `key.cls` or `key.json`, read in place."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.errors import UserError, errors_as
from preprocess.sources.data_files import common_folder, data_files
from preprocess.sources.entries import Entries, Entry, file_stamp, is_image, kind_of, read_at
from preprocess.sources.labels import NONE, REMEDY, Candidates, Value, as_label
from preprocess.sources.tars import TarMember, Window, tar_members

MAX_TEXT, MAX_JSON = 1000, 2**24  # bytes of a label and of a sample's description
DEPTH = 3  # of nested objects in a description that are searched for labels
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")
NAMES_FILE = "classnames.txt"


class WebDatasetSource:
    """A tar, a folder of tars, or a pattern such as `train-{000000..000146}.tar`; plain paths only.

    A sample is what shares a name up to its first dot, and the rest is the member's field (`jpg`, `seg.png`). Its image
    is the member of a simple field (`.jpg`, not `.seg.png`), or that of `image_field`; images beside it are left out.
    `label_field`: see `labels.Candidates`; fields of JSON are named `json:label`. Without any label all are one class.

    Entries are in the order of tars and of members; a key is `<tar>/<name of the image>`.
    """

    def __init__(
        self, path: str | Path, field: str, image_field: str | None = None, label_field: str | None = None
    ) -> None:
        self.path = Path(path)
        self.tars, others = data_files(str(path), field, ".tar")
        root = common_folder(self.tars)
        samples = Samples(self.path, field, image_field, label_field)
        self.entries = Entries(samples.read(self.tars, root))
        if not len(self.entries) and len(samples.fields) == 1:  # all of them `key.image.jpg`
            (image_field,) = samples.fields
            samples = Samples(self.path, field, image_field, label_field)
            self.entries = Entries(samples.read(self.tars, root))
        samples.check_found(len(self.entries))
        labels = samples.candidates.decide(lambda position: self.entries[position].key)
        if labels is None:
            samples.check_unlabelled()
            self.class_names = [self.path.stem]
        else:
            self.entries = self.entries.labelled(labels.indices)
            self.class_names = labels.class_names(_names_beside(root, field), self.path, field)
        self.left_out = others + samples.left_out

    def open(self, entry: Entry) -> bytes:
        number, offset = entry.place
        return read_at(self.tars[number], offset, entry.size)


class Member(NamedTuple):
    field: str  # the part of the name after the first dot, in lower case
    member: TarMember


class Samples:
    """Reads all tars: the images, and the fields that may be their labels."""

    def __init__(self, path: Path, field: str, image_field: str | None, label_field: str | None) -> None:
        self.path, self.field, self.image_field = path, field, image_field and image_field.lower()
        self.candidates = Candidates(path, field, label_field)
        self.left_out = Counter[str]()
        self.fields = Counter[str]()  # fields of images such as `key.image.jpg` in samples without a `key.jpg`
        self.alone = ""  # the first of these images
        self.unread: dict[str, str] = {}  # fields that are no labels by their names, with the first text of each

    def read(self, tars: list[Path], root: Path) -> Iterator[Entry]:
        for number, tar in enumerate(tars):
            name = tar.absolute().relative_to(root)
            with errors_as(UserError, f"{self.field}: {tar} cannot be read"):
                file = open(tar, "rb")  # noqa: SIM115
            with file:
                stamp = file_stamp(os.fstat(file.fileno()))
                for image, labels in self._samples(tar, file):
                    self.candidates.add(labels)
                    yield Entry(f"{name}/{image.name}", 0, image.size, (number, image.offset), stamp)

    def _samples(self, tar: Path, file: BinaryIO) -> Iterator[tuple[TarMember, dict[str, Value]]]:
        samples: dict[str, list[Member]] = {}
        for member in tar_members(tar, self.field, Window(file, 0, os.fstat(file.fileno()).st_size), self.left_out):
            folder, _, name = member.name.rpartition("/")
            key, _, field = name.partition(".")
            samples.setdefault(f"{folder}/{key}", []).append(Member(field.lower(), member))
        for members in samples.values():
            image = self._image(tar, members)
            others = [each for each in members if each.member is not image]
            if image is None:
                for each in others:
                    self.left_out[f"in a sample without an image: .{each.field.rpartition('.')[2]}"] += 1
            else:
                yield image, self._labels(tar, file, others)

    def _image(self, tar: Path, members: list[Member]) -> TarMember | None:
        images = [each for each in members if is_image(each.member.name)]
        if self.image_field is None:
            own = [each for each in images if "." not in each.field]
        else:
            own = [each for each in members if each.field == self.image_field]
        if len(own) > 1:
            first, second = own[:2]
            raise UserError(
                f"{self.field}: {tar} has two images of one sample, {first.member.name!r} and {second.member.name!r} "
                f"(a sample's name ends at its first dot); set data.image_field={first.field}, or pack it without one"
            )
        if not own and images and self.image_field is None:
            self.fields.update({each.field: 1 for each in images} if len(self.fields) < 100 else {})
            self.alone = self.alone or f"{tar}: {images[0].member.name}"
        return own[0].member if own else None

    def _labels(self, tar: Path, file: BinaryIO, members: list[Member]) -> dict[str, Value]:
        """The fields of a sample that may be its label; counts the others."""
        labels: dict[str, Value] = {}
        for field, member in members:
            before = len(labels)
            if is_image(member.name):
                self.left_out[f"image beside the sample's own (.{field[-40:]})"] += 1
                continue
            if field.rpartition(".")[2] == "json":
                labels |= self._json_labels(tar, file, member, field)
            elif self.candidates.among([field]):
                labels[field] = self._text_label(tar, file, member)
            if len(labels) == before:
                self._leave_out(file, field, member)
        return labels

    def _text_label(self, tar: Path, file: BinaryIO, member: TarMember) -> Value:
        data = _content(file, member, MAX_TEXT)
        with errors_as(UserError, f"{self.field}: {tar}: {member.name} is no label; mend it, or {REMEDY}"):
            return as_label(data.decode())

    def _json_labels(self, tar: Path, file: BinaryIO, member: TarMember, field: str) -> dict[str, Value]:
        wanted, place = self.candidates.wanted, f"{self.field}: {tar}: {member.name}"
        if wanted is not None and not wanted.startswith(f"{field}:"):
            return {}
        if member.size > MAX_JSON:
            raise UserError(f"{place} has {member.size:,} bytes, too many for a sample's description; {REMEDY}")
        with errors_as(UserError, f"{place} is not valid JSON; mend it, or {REMEDY}"):
            content = json.loads(_content(file, member, MAX_JSON), object_pairs_hook=_unique)
            if not isinstance(content, dict):
                raise ValueError(f"{str(content)[:50]!r} in place of an object")
            values = {f"{field}:{name}": value for name, value in _leaves(content, DEPTH)}
            return {name: as_label(values[name]) for name in self.candidates.among(values)}

    def _leave_out(self, file: BinaryIO, field: str, member: TarMember) -> None:
        """Counts a member that is neither image nor label, and keeps the first text of each field."""
        kind = field.rpartition(".")[2]
        if field not in self.unread and len(self.unread) < 100:
            self.unread[field] = _content(file, member, 20).decode(errors="replace").strip() if member.size < 20 else ""
        if kind == "json":
            reason = "description without a label that is read (.json)"
        else:
            reason = "caption (.txt)" if kind == "txt" else kind_of(member.name)
        self.left_out[reason] += 1

    def check_found(self, count: int) -> None:
        """Raises UserError if there are no images, or if a sample has images but none that can be chosen."""
        fields = ", ".join(sorted(self.fields)[:5]) + (", ..." if len(self.fields) > 5 else "")
        if self.alone:
            raise UserError(
                f"{self.field}: {self.alone} is an image without a simple field as .jpg (a sample's name ends at its "
                f"first dot); set data.image_field to the one that holds the images: {fields}"
            )
        if not count:
            what = f"no images of data.image_field={self.image_field}" if self.image_field else "no images"
            there = ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.most_common(3))
            raise UserError(f"{self.field}: {self.path} holds {what}{f', but {there}' if there else ''}")

    def check_unlabelled(self) -> None:
        """Raises UserError if an unsupported field may hold the labels."""
        if self.candidates.wanted == NONE:
            return
        if self.candidates.wanted:
            raise UserError(f"{self.field}: {self.path} has no {self.candidates.wanted} in its samples; {REMEDY}")
        for field, text in self.unread.items():
            is_pickle = field.rpartition(".")[2] in PICKLES
            if is_pickle or re.fullmatch(r"-?\d+", text) or self.candidates.among([field.partition(".")[0]]):
                what = "a pickle, which is never read" if is_pickle else repr(text) if text.isdigit() else "not read"
                raise UserError(
                    f"{self.field}: {self.path} has no supported label, but .{field} ({what}) may be one; {REMEDY}"
                )


def _content(file: BinaryIO, member: TarMember, limit: int) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, limit + 1))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object with a key twice")
    return dict(pairs)


def _leaves(content: dict[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a description by dotted name; objects deeper than `depth` are not opened."""
    for name, value in content.items():
        if isinstance(value, dict) and depth > 1:
            yield from _leaves(value, depth - 1, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _names_beside(root: Path, field: str) -> list[str] | None:
    """The class names in a file beside the tars, or one folder above, one per line."""
    file = next((file for file in (root / NAMES_FILE, root.parent / NAMES_FILE) if file.is_file()), None)
    if file is None:
        return None
    with errors_as(UserError, f"{field}: {file} is no list of class names; mend it or move it away"):
        names = file.read_text(encoding="utf-8").splitlines()
    return [name.strip() for name in names]

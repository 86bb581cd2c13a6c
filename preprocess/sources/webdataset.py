"""WebDatasets of pictures: tars of `key.jpg` with `key.cls`, read where they lie."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from preprocess.sources.archives import TarMember, tar_members
from preprocess.sources.entries import MAX_CLASSES, Entries, Entry, is_picture, kind_of, read_at

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # of an address; no plain path that is meant begins so


class WebDatasetSource:
    """A tar, a folder of tars, or a pattern such as `train-{000000..000146}.tar`; plain paths only.

    A sample is what shares a name up to its first dot: one picture and, in all samples or in none, its class index as
    text in `.cls`. Entries are in the order of tars and of members; a key is `<tar>/<name of the picture>`.
    """

    def __init__(self, path: str | Path, field: str) -> None:
        self.path, self.field, self.left_out = Path(path), field, Counter[str]()
        self.tars = self._find(str(path))
        labels: set[int | None] = set()
        self.entries = Entries(self._labelled(labels))
        if None in labels and len(labels) > 1:
            raise UserError(f"{field}: {path} has samples with and without a class (.cls); label all of them or none")
        if not labels:
            raise UserError(f"{field}: {path} holds no pictures")
        indices = [label for label in labels if label is not None]
        self.class_names = [str(label) for label in range(max(indices) + 1)] if indices else [self.path.stem]

    def open(self, entry: Entry) -> bytes:
        number, offset = entry.place
        return read_at(self.tars[number], offset, entry.size)

    def _find(self, path: str) -> list[Path]:
        from braceexpand import braceexpand

        if SCHEME.match(path):
            raise UserError(f"{self.field}: {path} begins with a scheme; only plain paths are read: download it first")
        if os.path.isdir(path):
            tars = sorted(Path(path).glob("*.tar"))
        else:
            try:
                tars = [Path(name) for name in braceexpand(path)]
            except ValueError:
                raise UserError(f"{self.field}: {path} has unbalanced braces") from None
        missing = next((tar for tar in tars if not tar.is_file()), None)
        if missing or not tars:
            raise UserError(f"{self.field}: {missing or path} is not there or holds no .tar; name tars that are")
        names = [tar.name for tar in tars]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"{self.field}: {path} names {twice} twice; rename one of them")
        return tars

    def _labelled(self, labels: set[int | None]) -> Iterator[Entry]:
        """All entries; gathers the labels met on the way."""
        for number, tar in enumerate(self.tars):
            with open(tar, "rb") as file:
                members = list(tar_members(tar, self.field, file))
                for picture, label in self._samples(tar, members, file):
                    labels.add(label)
                    yield Entry(f"{tar.name}/{picture.name}", label or 0, picture.size, (number, picture.offset))

    def _samples(self, tar: Path, members: list[TarMember], file: BinaryIO) -> Iterator[tuple[TarMember, int | None]]:
        pictures: dict[str, TarMember] = {}
        classes: dict[str, int] = {}
        for member in members:
            folder, _, name = member.name.rpartition("/")
            key = f"{folder}/{name.partition('.')[0]}"
            if is_picture(member.name):
                if key in pictures:
                    raise UserError(
                        f"{self.field}: {tar} has two pictures of one sample, {pictures[key].name!r} and "
                        f"{member.name!r}; keep one of them"
                    )
                pictures[key] = member
            elif name.partition(".")[2] == "cls":
                classes[key] = self._class(tar, member, file)
            else:
                self.left_out[kind_of(member.name)] += 1
        for key, picture in pictures.items():
            yield picture, classes.get(key)

    def _class(self, tar: Path, member: TarMember, file: BinaryIO) -> int:
        file.seek(member.offset)
        text = file.read(min(member.size, 20)).decode(errors="replace").strip()
        if not (text.isascii() and text.isdigit()) or int(text) >= MAX_CLASSES:
            raise UserError(f"{self.field}: {tar}: {member.name} holds {text!r}, no class index")
        return int(text)

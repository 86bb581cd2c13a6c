"""Where pictures come from. A source lists (key, label, size) in a stable order, and opens any key."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from common.errors import UserError
from preprocess.images import Rejected

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Entry(NamedTuple):
    """One picture: its name within the source, class index, and size of the encoded file in bytes."""

    key: str
    label: int
    size: int


class Source(Protocol):
    class_names: list[str]
    entries: list[Entry]
    left_out: int  # files that are no pictures by their name

    def open(self, key: str) -> bytes:
        """A picture's bytes. Raises Rejected where they cannot be read."""
        ...


class FolderSource:
    """`<class>/**/<picture>`, or pictures alone: one class, named as the folder.

    Classes are numbered in the order of their names. Entries are ordered by class, then by key, which is the path below
    the folder. Names that begin with a dot are not looked at; files without a picture's suffix count in `left_out`.

    Raises UserError for a folder that is missing, empty or mixed, for a class without pictures, and for symbolic links
    to folders or to files outside.
    """

    def __init__(self, path: str | Path, field: str = "data.images") -> None:
        """`field` is what of the recipe names the folder; errors begin with it."""
        self.path, self.field = Path(path), field
        self.left_out = 0
        if not self.path.is_dir():
            raise UserError(f"{self.field}: {path} is not a folder; it should hold one sub-folder of pictures a class")
        items = self._scan("")
        self.class_names = [item.name for item in items if item.is_dir()]
        alone = [item.name for item in items if not item.is_dir() and _is_picture(item.name)]
        if self.class_names and alone:
            raise UserError(
                f"{self.field}: {path} holds both pictures ({alone[0]}) and folders; move them into classes"
            )
        if self.class_names:
            self.left_out = len(items) - len(self.class_names)
            entries = [self._class_entries(name, label) for label, name in enumerate(self.class_names)]
            self.entries = [entry for members in entries for entry in members]
        else:
            self.class_names = [self.path.resolve().name]
            self.entries = self._class_entries("", 0)

    def open(self, key: str) -> bytes:
        """The encoded picture; OSError where the file cannot be read."""
        try:
            return (self.path / key).read_bytes()
        except OSError as error:
            raise Rejected(f"cannot be opened: {error.strerror}") from None

    def _class_entries(self, name: str, label: int) -> list[Entry]:
        files = sorted(self._files(name))
        pictures = [Entry(key, label, size) for key, size in files if _is_picture(key)]
        if not pictures:
            raise UserError(f"{self.field}: {self.path / name} holds no pictures; fill it or remove it")
        self.left_out += len(files) - len(pictures)
        return pictures

    def _files(self, folder: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every file below a folder of this source."""
        for item in self._scan(folder):
            key = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir():
                yield from self._files(key)
            else:
                yield key, item.stat().st_size

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        """The visible members of a folder, by name; reads no inode but those of symbolic links."""
        try:
            with os.scandir(self.path / folder) as items:
                visible = sorted((item for item in items if not item.name.startswith(".")), key=lambda item: item.name)
        except PermissionError as error:
            raise UserError(f"{self.field}: {error.filename} cannot be listed; make it readable or remove it") from None
        for item in visible:
            if item.is_symlink():
                self._check_link(Path(item.path))
        return visible

    def _check_link(self, link: Path) -> None:
        target = Path(os.path.realpath(link))
        if not target.is_file() or not target.is_relative_to(os.path.realpath(self.path)):
            raise UserError(
                f"{self.field}: {link} is a symbolic link to {target}, which is no file inside {self.path}; "
                "copy the pictures, or name the folder they are in"
            )


SOURCES: dict[str, Callable[[str, str], Source]] = {"folder": FolderSource}


def fingerprint(source: Source) -> str:
    """sha256 over every key, label and size and the class names, in order: another list of pictures has another one."""
    digest = hashlib.sha256("\n".join(source.class_names).encode())
    for entry in source.entries:
        digest.update(f"\n{entry.key}\t{entry.label}\t{entry.size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES

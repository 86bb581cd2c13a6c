"""Pictures in folders."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from preprocess.sources.entries import PICTURE_SUFFIXES, Entries, Entry, is_picture, kind_of, read_whole


class FolderSource:
    """`<class>/**/<picture>`, or pictures alone: one class, named as the folder.

    Classes are numbered in the order of their names. Entries are ordered by class, then by key, which is the path below
    the folder. Names that begin with a dot are not looked at; files without a picture's suffix count in `left_out`.

    Raises UserError for a folder that is missing, empty or mixed, for a class without pictures, for symbolic links to
    folders or to files outside, and for pipes and devices.
    """

    def __init__(self, path: str | Path, field: str = "data.images") -> None:
        """`field` is what of the recipe names the folder; errors begin with it."""
        self.path, self.left_out = Path(path), Counter[str]()
        tree = Tree(self.path, field)
        items = tree.scan("")
        self.class_names = [item.name for item in items if item.is_dir()]
        alone = [item.name for item in items if not item.is_dir() and is_picture(item.name)]
        if self.class_names and alone:
            raise UserError(f"{field}: {path} holds both pictures ({alone[0]}) and folders; move them into classes")
        self.left_out.update(kind_of(item.name) for item in items if not item.is_dir() and not is_picture(item.name))
        folders = self.class_names or [""]
        self.entries = Entries(
            entry for label, name in enumerate(folders) for entry in self._entries(tree, name, label)
        )
        self.class_names = self.class_names or [self.path.resolve().name]

    def open(self, entry: Entry) -> bytes:
        return read_whole(self.path / entry.key, entry.size)

    def _entries(self, tree: "Tree", folder: str, label: int) -> list[Entry]:
        files = sorted(tree.files(folder))
        if folder:
            self.left_out.update(kind_of(key) for key, _ in files if not is_picture(key))
        return tree.pictures(files, label, folder)


class OneClassFolder:
    """Every picture below a folder, at any depth, as one class; entries are ordered by path."""

    def __init__(
        self, path: str | Path, field: str, class_name: str, suffixes: frozenset[str] = PICTURE_SUFFIXES
    ) -> None:
        self.path, self.class_names = Path(path), [class_name]
        tree = Tree(self.path, field, suffixes)
        files = sorted(tree.files(""))
        self.entries = Entries(tree.pictures(files, 0))
        self.left_out = Counter(kind_of(key) for key, _ in files if not is_picture(key, suffixes))

    def open(self, entry: Entry) -> bytes:
        return read_whole(self.path / entry.key, entry.size)


class Tree:
    """The visible files below a folder, in the order of their names."""

    def __init__(self, path: Path, field: str, suffixes: frozenset[str] = PICTURE_SUFFIXES) -> None:
        self.path, self.field, self.suffixes = path, field, suffixes
        if not path.is_dir():
            raise UserError(
                f"{field}: {path} is not a folder; docs/data.md lists in what forms each data.source is read"
            )

    def pictures(self, files: list[tuple[str, int]], label: int, folder: str = "") -> list[Entry]:
        """Those of (key, size) that are pictures by their name. Raises UserError where `folder` has none."""
        entries = [Entry(key, label, size) for key, size in files if is_picture(key, self.suffixes)]
        if not entries:
            raise UserError(f"{self.field}: {self.path / folder} holds no pictures; fill it or remove it")
        return entries

    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every file below a folder of this tree."""
        for item in self.scan(folder):
            key = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir():
                yield from self.files(key)
            elif item.is_file():
                yield key, item.stat().st_size
            else:  # reading a pipe would wait for ever
                raise UserError(f"{self.field}: {item.path} is no plain file, but a pipe, socket or device; remove it")

    def scan(self, folder: str) -> list[os.DirEntry[str]]:
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

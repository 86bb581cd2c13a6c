"""Lists a folder recursively, following symbolic links as the recipe says."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.errors import UserError
from preprocess.sources.entries import HIDDEN, HIDDEN_FOLDER, IMAGE_SUFFIXES, Entry, file_stamp, is_hidden, read_whole
from preprocess.sources.listing import Folder, Listing, Place


def list_folder(
    path: str | Path, field: str, suffixes: frozenset[str] = IMAGE_SUFFIXES, *, follow_links: bool = False
) -> Listing:
    """Lists everything below a folder, with a stat of symbolic links only, or with `follow_links` of folders too.

    Raises UserError for a folder that is missing or cannot be listed, for pipes and devices, and for symbolic links:
    without `follow_links` those to folders and to files outside of `path`; with it dangling ones, and those to a folder
    that is listed already, which would loop or count images twice.
    """
    path = Path(path)
    if not path.is_dir():
        fault = "is not there" if not path.exists() else "is not a folder"
        raise UserError(f"{field}: {path} {fault}; docs/data.md lists in what forms each data.source is read")
    listing = Listing(path, field, Folder(), partial(_locate, path, field), partial(_open, path))
    _Walk(listing, suffixes, follow_links).run()
    return listing


def walk_visible(folder: Path, field: str, left_out: Counter[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields each visible folder with the names of its links to folders, which are not followed, and of its files.

    Hidden folders are only counted. Raises UserError for a folder that cannot be listed.
    """
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        try:
            items = sorted(os.scandir(parent), key=lambda item: item.name)
        except OSError as error:
            raise UserError(f"{field}: {parent} cannot be listed: {error.strerror}; make it readable") from None
        links = {item.name for item in items if item.is_symlink()}
        folders = [item.name for item in items if (os.path.isdir(item) if item.name in links else item.is_dir())]
        left_out.update(HIDDEN_FOLDER for name in folders if is_hidden(name))
        visible = [name for name in folders if not is_hidden(name)]
        yield parent, [name for name in visible if name in links], sorted({item.name for item in items} - {*folders})
        waiting.extend(parent / name for name in visible if name not in links)


def _open(path: Path, entry: Entry) -> bytes:
    return read_whole(path / entry.key, entry.size)


def _locate(path: Path, field: str, key: str) -> Place:
    try:
        status = os.stat(f"{path}/{key}")
        return status.st_size, (0, 0), file_stamp(status)
    except OSError as error:
        raise UserError(f"{field}: {path}/{key} cannot be read: {error.strerror}; is the folder in use?") from None


class _Walk:
    def __init__(self, listing: Listing, suffixes: frozenset[str], follow_links: bool) -> None:
        self.listing, self.suffixes, self.follow_links = listing, suffixes, follow_links
        self.real = os.path.realpath(listing.path)
        self.met: dict[tuple[int, int], str] = {}  # device and inode of each folder, with `follow_links`
        self.waiting = [listing.root]

    def run(self) -> None:
        while self.waiting:
            folder = self.waiting.pop()
            try:
                with os.scandir(self.listing.path / folder.key) as items:
                    self._list(folder, items)
            except OSError as error:
                text = f"cannot be listed: {error.strerror}; make it readable or move it away"
                raise self.listing.refusal(folder, text) from None

    def _list(self, folder: Folder, items: "os._ScandirIterator[str]") -> None:
        if self.follow_links:
            self._meet(folder)
        for item in items:
            if is_hidden(item.name):
                folder.others[HIDDEN_FOLDER if item.is_dir(follow_symlinks=False) else HIDDEN] += 1
                continue
            if item.is_symlink():
                self._check_link(item)
            if item.is_dir():
                self.waiting.append(folder.folder(item.name))
            elif item.is_file():
                folder.add(item.name, self.suffixes)
            else:  # reading a pipe would block
                raise self._refusal(item, "is no regular file, but a pipe, socket or device; move it away")

    def _meet(self, folder: Folder) -> None:
        """Raises UserError if this folder was listed before: a loop of links, or images that would count twice."""
        status = os.stat(self.listing.path / folder.key)
        first = self.met.setdefault((status.st_dev, status.st_ino), folder.key)
        if first != folder.key:
            where = f"{self.listing.path}/{first}" if first else self.listing.path
            raise self.listing.refusal(folder, f"is by a symbolic link the same folder as {where}; remove the link")

    def _check_link(self, item: "os.DirEntry[str]") -> None:
        target = os.path.realpath(item.path)
        if self.follow_links:
            try:
                os.stat(item.path)
            except OSError as error:
                raise self._refusal(
                    item, f"is a symbolic link to {target}, which cannot be opened: {error.strerror}; remove or mend it"
                ) from None
        elif not os.path.isfile(target) or not Path(target).is_relative_to(self.real):
            raise self._refusal(
                item,
                f"is a symbolic link to {target}, which is no file inside {self.listing.path}; set "
                "data.follow_links=true to read what links lead to, or name the folder that holds the images",
            )

    def _refusal(self, item: "os.DirEntry[str]", text: str) -> UserError:
        return UserError(f"{self.listing.field}: {item.path} {text}")

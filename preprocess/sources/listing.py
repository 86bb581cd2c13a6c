"""What lies below a folder or in a zip, before it is decided which files are the images that are meant."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from preprocess.sources.entries import Entries, Entry, is_hidden, is_image, kind_of

LABELS = "dataset.json"  # where StyleGAN's dataset_tool keeps labels
SHOWN = 4  # of many names or reasons, in one line

Place = tuple[int, tuple[int, int], int]  # size, place and stamp of a file, as an Entry has them


class Folder:
    """A folder with all that is below it: the keys of images by their names, the count of other files by reason."""

    __slots__ = ("folders", "has_labels", "images", "key", "others")

    def __init__(self, key: str = "") -> None:
        self.key = key  # the path below what was listed; of that itself ""
        self.folders: dict[str, Folder] = {}
        self.images: list[str] = []
        self.others: Counter[str] = Counter()
        self.has_labels = False  # whether LABELS is among the others

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    def add(self, name: str, suffixes: frozenset[str]) -> None:
        """A file of this folder. A hidden one is none of the images, whatever its suffix."""
        if is_image(name, suffixes) and not is_hidden(name):
            self.images.append(self.below(name))
        else:
            self.others[kind_of(name)] += 1
            self.has_labels |= name == LABELS

    def below(self, name: str) -> str:
        return f"{self.key}/{name}" if self.key else name

    def folder(self, name: str) -> "Folder":
        """The folder `name` in this one, made where it is not there."""
        if name not in self.folders:
            self.folders[name] = Folder(self.below(name))
        return self.folders[name]

    def walk(self) -> Iterator["Folder"]:
        """This folder and all below it, by name."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting.extend(folder.folders[name] for name in sorted(folder.folders, reverse=True))

    def keys(self) -> list[str]:
        """Of all images below, in order."""
        return sorted(key for folder in self.walk() for key in folder.images)

    def count(self) -> int:
        """Images below."""
        return sum(len(folder.images) for folder in self.walk())

    def with_images(self) -> dict[str, "Folder"]:
        """The folders in this one with images below them, by name."""
        return {name: self.folders[name] for name in sorted(self.folders) if self.folders[name].has_images()}

    def has_images(self) -> bool:
        return any(folder.images for folder in self.walk())

    def reasons(self) -> Counter[str]:
        """Why the other files below are no images, counted."""
        return sum((folder.others for folder in self.walk() if folder.others), Counter())


@dataclass(frozen=True)
class Listing:
    """All that is below `path`, and how files of it are found and opened."""

    path: Path
    field: str  # of the recipe; errors begin with it
    root: Folder
    locate: Callable[[str], Place]
    open: Callable[[Entry], bytes]

    def refusal(self, folder: Folder, text: str) -> UserError:
        return UserError(f"{self.field}: {self.where(folder)} {text}")

    @property
    def name(self) -> str:
        """Of the folder or zip."""
        return re.sub(r"\.zip$", "", self.path.resolve().name, flags=re.I)

    def where(self, folder: Folder) -> str:
        return f"{self.path}/{folder.key}" if folder.key else str(self.path)

    def read(self, key: str) -> bytes:
        """A file's bytes. Raises Rejected."""
        return self.open(Entry(key, 0, *self.locate(key)))


@dataclass(frozen=True)
class Layout:
    """Which images of a listing are meant: the keys of each class, in order; the others are left out by reason."""

    class_names: list[str]
    keys: list[list[str]]
    left_out: Counter[str]


class ListedSource:
    """The images of a listing as a layout has them; entries are ordered by class, then by key."""

    def __init__(self, listing: Listing, layout: Layout) -> None:
        self.class_names = layout.class_names
        self.entries = Entries(
            Entry(key, label, *listing.locate(key)) for label, keys in enumerate(layout.keys) for key in keys
        )
        assert len(self.entries) + layout.left_out.total() == listing.root.count()
        self.left_out = listing.root.reasons() + layout.left_out
        self._open = listing.open

    def open(self, entry: Entry) -> bytes:
        return self._open(entry)


def base(key: str) -> str:
    """A file's name without its folders."""
    return key.rpartition("/")[2]


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def what_it_holds(folder: Folder) -> str:
    """Of a folder without images, for people."""
    reasons = folder.reasons()
    if not reasons:
        return "is empty"
    kinds = some([f"{count:,} {reason}" for reason, count in reasons.most_common()])
    return f"holds no images but other files ({kinds})"

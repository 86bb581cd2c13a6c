"""The files in a folder or zip, listed by folders.py or zips.py, and the choice of images among them."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from preprocess.sources.entries import Entries, Entry, is_hidden, is_image, kind_of

LABELS = "dataset.json"  # where StyleGAN's dataset_tool keeps labels
SHOWN = 4  # names or reasons in a message

Place = tuple[int, tuple[int, int], int]  # size, place and stamp of a file, as an Entry has them


class Folder:
    """A folder: the keys of its images, the number of other files by reason, and its sub-folders."""

    __slots__ = ("folders", "has_labels", "images", "key", "others")

    def __init__(self, key: str = "") -> None:
        self.key = key  # the path below the listed folder, "" for the root
        self.folders: dict[str, Folder] = {}
        self.images: list[str] = []
        self.others: Counter[str] = Counter()
        self.has_labels = False  # whether LABELS is among the others

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    def add(self, name: str, suffixes: frozenset[str]) -> None:
        """Adds a file. Hidden files are never images."""
        if is_image(name, suffixes) and not is_hidden(name):
            self.images.append(self.below(name))
        else:
            self.others[kind_of(name)] += 1
            self.has_labels |= name == LABELS

    def below(self, name: str) -> str:
        return f"{self.key}/{name}" if self.key else name

    def folder(self, name: str) -> "Folder":
        """The sub-folder `name`, created if missing."""
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
        """Keys of all images below, sorted."""
        return sorted(key for folder in self.walk() for key in folder.images)

    def count(self) -> int:
        """Number of images below."""
        return sum(len(folder.images) for folder in self.walk())

    def with_images(self) -> dict[str, "Folder"]:
        """The sub-folders with images below them, by name."""
        return {name: self.folders[name] for name in sorted(self.folders) if self.folders[name].has_images()}

    def has_images(self) -> bool:
        return any(folder.images for folder in self.walk())

    def reasons(self) -> Counter[str]:
        """Number of other files below, by reason."""
        return sum((folder.others for folder in self.walk() if folder.others), Counter())


@dataclass(frozen=True)
class Listing:
    """The files below `path`, with functions to locate and open them."""

    path: Path
    field: str  # the recipe's field, with which errors begin
    root: Folder
    locate: Callable[[str], Place]
    open: Callable[[Entry], bytes]

    def refusal(self, folder: Folder, text: str) -> UserError:
        return UserError(f"{self.field}: {self.where(folder)} {text}")

    @property
    def name(self) -> str:
        """Name of the folder or zip."""
        return re.sub(r"\.zip$", "", self.path.resolve().name, flags=re.I)

    def where(self, folder: Folder) -> str:
        return f"{self.path}/{folder.key}" if folder.key else str(self.path)

    def read(self, key: str) -> bytes:
        """A file's bytes. Raises Rejected."""
        return self.open(Entry(key, 0, *self.locate(key)))


@dataclass(frozen=True)
class Layout:
    """The chosen images of a listing: sorted keys for each class; `left_out` counts the others by reason."""

    class_names: list[str]
    keys: list[list[str]]
    left_out: Counter[str]


class ListedSource:
    """The images of a layout, ordered by class, then by key."""

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
    """The first names of a list, for messages."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def what_it_holds(folder: Folder) -> str:
    """Describes a folder without images."""
    reasons = folder.reasons()
    if not reasons:
        return "is empty"
    kinds = some([f"{count:,} {reason}" for reason, count in reasons.most_common()])
    return f"holds no images but other files ({kinds})"

"""Finds the classes among the folders of a listing."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from common.errors import UserError
from preprocess.sources.dataset_json import labelled
from preprocess.sources.entries import ENCODED_AS
from preprocess.sources.listing import Folder, Layout, Listing, base, some, what_it_holds

SPLIT = re.compile(
    r"(.*[-_])?(train|val|test|dev|eval)(?:ing|id|idation|uation)?(?:[-_]?(?:a|b|lmdb|set|images|imgs|\d+))?", re.I
)
CHUNK, CHUNKED = (
    re.compile(r"\d{5}"),
    re.compile(r"img\d{8}\.\w+"),
)  # dataset_tool's chunks of a data set, whatever the classes
ELSEWHERE = {  # advice for files found instead of images
    ".mdb": "an LMDB is read with data.source=lsun, not in an archive: unzip it and name the folder of data.mdb",
    ".tar": "tars are read with data.source=webdataset, ILSVRC2012_img_train.tar with imagenet: name one itself",
    ".zip": "name the zip itself",
    ".parquet": "parquet files are read with data.source=parquet",
    ".npy": "NumPy arrays are read with data.source=celebahq or ffhq",
}


def class_folders(listing: Listing) -> Layout:
    """One folder per class, at the top or below single folders; images without folders are one class.

    Labels in a dataset.json replace the folders. Raises UserError for images beside folders of images, for splits side
    by side, and for a folder without images beside the classes.
    """
    way = way_down(listing)
    home = next((folder for folder in way if folder.has_labels), None)
    if home and (layout := labelled(listing, home)):
        return layout
    root, top = listing.root, way[-1]
    folders = top.with_images()
    if root.images and folders:
        raise listing.refusal(
            root,
            f"holds both images ({base(root.images[0])}) and folders of images ({some(list(folders))}); "
            "move the images into classes, or name one of the folders",
        )
    if root.images or any(_is_chunked(folder.with_images()) for folder in way):
        return Layout([listing.name], [root.keys()], Counter())
    if top.images:  # one class, however deep its images lie
        top, folders = root, root.with_images()
    check_splits(listing, top, folders, "rename them if they are classes, or ")
    check_classes(listing, top, top.folders)
    return Layout(list(folders), [folder.keys() for folder in folders.values()], Counter())


def all_as_one_class(listing: Listing) -> Layout:
    """All images as one class. Raises UserError for splits side by side."""
    check_not_empty(listing)
    for folder in listing.root.walk():
        check_splits(listing, folder, folder.with_images())
    return Layout([listing.name], [listing.root.keys()], Counter())


def way_down(listing: Listing) -> list[Folder]:
    """The path from the root down to the first folder with images or with several folders of images."""
    check_not_empty(listing)
    way = [listing.root]
    while not way[-1].images and len(folders := way[-1].with_images()) == 1:
        way.extend(folders.values())
    return way


def splits_in(names: Iterable[str]) -> list[str]:
    """The names that are different splits of one data set, such as `train` and `val`."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if match := SPLIT.fullmatch(name):
            splits[match[1] or ""][name] = match[2].lower()
    return next((list(names) for names in splits.values() if len(set(names.values())) > 1), [])


def check_splits(listing: Listing, folder: Folder, names: Iterable[str], advice: str = "") -> None:
    """Raises UserError if the folders `names` in `folder` are splits of one data set."""
    if splits := splits_in(names):
        raise name_one(listing, folder, f"the splits {some(splits)}", splits, advice)


def name_one(listing: Listing, folder: Folder, what: str, names: list[str], advice: str = "") -> UserError:
    """An error that asks the user to name one of several folders in `folder`."""
    example = listing.where(folder.folders[names[0]])
    return listing.refusal(folder, f"holds {what}, side by side; {advice}name one of them, such as {example}")


def check_classes(listing: Listing, top: Folder, names: Iterable[str]) -> None:
    """Raises UserError if a class, one of the folders `names` in `top`, has no images or holds splits."""
    for name in sorted(names):
        folder = top.folders[name]
        if not folder.has_images():
            remedy = f"move it out of {listing.where(top)} if it is no class"
            if not folder.reasons():
                remedy = "fill it or remove it"
            elif any(reason.startswith(ENCODED_AS) for reason in folder.reasons()):
                remedy = "convert them, or move the folder away"
            raise listing.refusal(folder, f"{what_it_holds(folder)}, beside folders of images, the classes; {remedy}")
        if splits := splits_in(folder.with_images()):
            raise listing.refusal(
                folder, f"is a class that holds the splits {some(splits)}; put the classes into folders of one split"
            )


def check_not_empty(listing: Listing) -> None:
    """Raises UserError if no file is an image by its name."""
    if listing.root.has_images():
        return
    reasons = listing.root.reasons()
    advice = [text for suffix, text in ELSEWHERE.items() if f"not an image: {suffix}" in reasons]
    remedy = advice[0] if advice else "docs/data.md lists in what forms each data.source is read"
    raise listing.refusal(listing.root, f"{what_it_holds(listing.root)}: there are no images; {remedy}")


def _is_chunked(folders: dict[str, Folder]) -> bool:
    """Whether these folders are dataset_tool's chunks of a data set, which are no classes."""
    return bool(folders) and all(
        CHUNK.fullmatch(name) and all(CHUNKED.fullmatch(base(key)) for key in folder.keys())  # noqa: SIM118
        for name, folder in folders.items()
    )

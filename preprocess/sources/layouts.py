"""How images lie in folders: which folders are classes, and which are something else."""

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
CHUNK, CHUNKED = re.compile(r"\d{5}"), re.compile(r"img\d{8}\.\w+")  # parts in which dataset_tool writes any class
ELSEWHERE = {  # what is there in place of images, and how it is read
    ".mdb": "an LMDB is read with data.source=lsun, not in an archive: unzip it and name the folder of data.mdb",
    ".tar": "tars are read with data.source=webdataset, ILSVRC2012_img_train.tar with imagenet: name one itself",
    ".zip": "name the zip itself",
    ".parquet": "parquet files are read with data.source=parquet",
    ".npy": "NumPy arrays are read with data.source=celebahq or ffhq",
}


def class_folders(listing: Listing) -> Layout:
    """One folder a class, side by side at the top or below single folders; or images alone, which are one class.

    Where a dataset.json has labels, they count in place of folders. Raises UserError for images beside folders of
    images, splits side by side, and a folder beside the classes that has no images.
    """
    way = way_down(listing)
    home = next((folder for folder in way if folder.has_labels), None)
    if home and (layout := labelled(listing, home)):
        return layout
    root, top = listing.root, way[-1]
    found = top.with_images()
    if root.images and found:
        raise listing.refusal(
            root,
            f"holds both images ({base(root.images[0])}) and folders of images ({some(list(found))}); "
            "move the images into classes, or name one of the folders",
        )
    if root.images or any(_is_chunked(folder.with_images()) for folder in way):
        return Layout([listing.name], [root.keys()], Counter())
    if top.images:  # one class, however deep its images lie
        top, found = root, root.with_images()
    check_splits(listing, top, found, "rename them if they are classes, or ")
    check_classes(listing, top, top.folders)
    return Layout(list(found), [folder.keys() for folder in found.values()], Counter())


def all_as_one_class(listing: Listing) -> Layout:
    """All images, whatever the folders. Raises UserError for splits side by side."""
    check_not_empty(listing)
    for folder in listing.root.walk():
        check_splits(listing, folder, folder.with_images())
    return Layout([listing.name], [listing.root.keys()], Counter())


def way_down(listing: Listing) -> list[Folder]:
    """From what is listed down to the first folder that holds images itself or several folders of images."""
    check_not_empty(listing)
    way = [listing.root]
    while not way[-1].images and len(found := way[-1].with_images()) == 1:
        way.extend(found.values())
    return way


def splits_in(names: Iterable[str]) -> list[str]:
    """Those of the names of folders that are splits of one data set, where there are several: `train` and `val`."""
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if match := SPLIT.fullmatch(name):
            splits[match[1] or ""][name] = match[2].lower()
    return next((list(names) for names in splits.values() if len(set(names.values())) > 1), [])


def check_splits(listing: Listing, folder: Folder, names: Iterable[str], advice: str = "") -> None:
    """Raises UserError where the folders `names` in `folder` are splits: neither classes nor one data set."""
    if splits := splits_in(names):
        raise name_one(listing, folder, f"the splits {some(splits)}", splits, advice)


def name_one(listing: Listing, folder: Folder, found: str, names: list[str], advice: str = "") -> UserError:
    """Of several folders in `folder` one is meant, and only the user knows which."""
    example = listing.where(folder.folders[names[0]])
    return listing.refusal(folder, f"holds {found}, side by side; {advice}name the one that is meant, as {example}")


def check_classes(listing: Listing, top: Folder, names: Iterable[str]) -> None:
    """Raises UserError for a class, one of the folders `names` in `top`, that has no images or holds splits."""
    for name in sorted(names):
        folder = top.folders[name]
        if not folder.has_images():
            remedy = f"move what is no class out of {listing.where(top)}"
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
    """Raises UserError where nothing below is an image by its name."""
    if listing.root.has_images():
        return
    reasons = listing.root.reasons()
    advice = [text for suffix, text in ELSEWHERE.items() if f"not an image: {suffix}" in reasons]
    remedy = advice[0] if advice else "docs/data.md lists in what forms each data.source is read"
    raise listing.refusal(listing.root, f"{what_it_holds(listing.root)}: there are no images; {remedy}")


def _is_chunked(found: dict[str, Folder]) -> bool:
    """Whether these folders are the parts in which dataset_tool writes a data set: classes are not to be seen."""
    return bool(found) and all(
        CHUNK.fullmatch(name) and all(CHUNKED.fullmatch(base(key)) for key in folder.keys())  # noqa: SIM118
        for name, folder in found.items()
    )

"""LSUN: a scene's LMDB, or its images in folders or a zip."""

import os
from pathlib import Path

from common.errors import UserError
from preprocess.sources.expected_counts import lsun_scene
from preprocess.sources.folder_classes import name_one
from preprocess.sources.listing import Layout, Listing, some
from preprocess.sources.lmdbs import DATA
from preprocess.sources.one_class import one_class


def find_lmdb(path: str, field: str) -> Path | None:
    """The LMDB file that `path` names or contains. Raises UserError if there are LMDBs further below instead."""
    if path.lower().endswith((".mdb", ".lmdb")) and os.path.isfile(path):
        return Path(path)
    if os.path.isfile(f"{path}/{DATA}"):
        return Path(path) / DATA
    below = [str(file.parent) for form in (f"*/{DATA}", f"*/*/{DATA}") for file in sorted(Path(path).glob(form))]
    below += [str(file) for file in sorted(Path(path).glob("*.lmdb")) if file.is_file()]
    if below:
        raise UserError(f"{field}: {path} is no LMDB, but LMDBs lie below it; name one of them: {some(below)}")
    return None


def scene(listing: Listing) -> Layout:
    """A scene's images as one class. Raises UserError for several scenes or splits side by side."""
    scenes = [name for name in listing.root.with_images() if lsun_scene(name)]
    if len({lsun_scene(name) for name in scenes}) > 1:
        raise name_one(listing, listing.root, f"the scenes {some(scenes)}", scenes)
    return one_class(listing, listing.name.removesuffix("_lmdb"))

"""Labels in the format of StyleGAN's dataset_tool: dataset.json, {"labels": [["00000/img00000000.png", 6], ...]}."""

import json
from collections import Counter
from reprlib import repr as short
from typing import Any

from common.errors import UserError, errors_as
from preprocess.sources.entries import MAX_CLASSES
from preprocess.sources.listing import LABELS, Folder, Layout, Listing


def labelled(listing: Listing, home: Folder) -> Layout | None:
    """The images below `home` with the labels in its dataset.json; None if it has no labels.

    Raises UserError if a label is no class index, and if an image or a label has no counterpart.
    """
    path = f"{listing.where(home)}/{LABELS}"
    pairs = _pairs(listing, home.below(LABELS), path)
    if pairs is None:
        return None
    labels: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise _refusal(listing, path, f'{short(pair)} among its labels; ["00000/img00000000.png", 6] is read')
        name, label = pair
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise _refusal(listing, path, f"the label {short(label)} of {name!r}; one class index of each is read")
        if labels.setdefault(home.below(name), label) != label:
            raise _refusal(listing, path, f"two labels of {name!r}; keep one")
    keys: list[list[str]] = [[] for _ in range(max(labels.values(), default=-1) + 1)]
    for key in home.keys():  # noqa: SIM118
        if key not in labels:
            raise _refusal(listing, path, f"no label of {key!r}; label all images, or set its labels to null")
        keys[labels.pop(key)].append(key)
    if labels:
        name = min(labels)
        raise _refusal(listing, path, f"labels of {len(labels):,} images that are not there ({name!r}); complete them")
    return Layout([str(label) for label in range(len(keys))], keys, Counter())


def _pairs(listing: Listing, key: str, path: str) -> list[Any] | None:
    remedy = "mend it, or rename it where it holds no labels"
    with errors_as(UserError, f"{listing.field}: {path} cannot be read; {remedy}"):
        content = json.loads(listing.read(key))
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is not None and not isinstance(pairs, list):
        raise _refusal(listing, path, f"{short(pairs)} for its labels; a list or null is read")
    return pairs


def _refusal(listing: Listing, path: str, text: str) -> UserError:
    return UserError(f"{listing.field}: {path} has {text}")

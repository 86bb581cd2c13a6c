"""Data sets of one class (faces, LSUN's categories), and the choice among several folders of images.

- Folders of derived images (masks, thumbnails, photographs before alignment) are left out if there are other folders of
  images beside them.
- Splits, several resolutions and duplicate names in the rest are refused: the user names one folder.
- All other images are taken, at any depth.
"""

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from preprocess.sources.folder_classes import check_not_empty, check_splits, name_one
from preprocess.sources.listing import Folder, Layout, Listing, base, some

MAPS = "masks and maps of faces"
MADE_OF_FACES = {  # folders of images derived from faces: reasons, and patterns of names
    MAPS: re.compile(
        r"(?:.*[-_ ])?(?:masks?|anno(?:tations?)?|seg(?:mentations?|maps?)?|parsing|labels?|landmarks?|sketch(?:es)?|"
        r"edges?|depth)\d*(?:[-_ ].*)?",
        re.I,
    ),
    "thumbnails": re.compile(r"(?:.*[-_ ])?thumb(?:nail)?s?\d*(?:[-_ x×]?\d+)*", re.I),
    "in-the-wild images, not aligned": re.compile(r"(?:.*[-_ ])?in[-_ ]?the[-_ ]?wild(?:[-_ ].*)?", re.I),
}
MASK = re.compile(  # CelebAMask-HQ's masks of parts of a face: 00000_l_eye.png
    r"\d+_(?:skin|nose|eye_g|[lr]_(?:eye|brow|ear)|mouth|[ul]_lip|hair|hat|ear_r|neck(?:_l)?|cloth|mask)\.\w+"
)
SIDE = re.compile(  # a resolution in a name: 256x256, 256px, celeba_hq_256
    r"(?P<before>.*?\D)??(?:(?P<square>\d{2,4})[x×](?P=square)|(?P<side>32|64|128|256|512|1024|2048)(?P<unit>px|p)?)",
    re.I,
)
NUMBER = re.compile(r"(?P<before>.*\D)?\d+")


def faces(listing: Listing) -> Layout:
    """The class `face`. Raises UserError if several folders hold the same faces, or if there are only masks."""
    layout = one_class(listing, "face", MADE_OF_FACES)
    keys = [key for key in layout.keys[0] if not MASK.fullmatch(base(key))]
    if not keys:
        raise listing.refusal(listing.root, f"holds masks alone ({base(layout.keys[0][0])}); name the folder of faces")
    layout.left_out[MAPS] += len(layout.keys[0]) - len(keys)
    _check_names(listing, keys)
    return Layout(layout.class_names, [keys], +layout.left_out)


def one_class(
    listing: Listing, name: str, made_of_images: Mapping[str, re.Pattern[str]] = MappingProxyType({})
) -> Layout:
    """The images as the class `name`; `made_of_images`: reasons and names of folders of derived images."""
    check_not_empty(listing)
    keys: list[str] = []
    left_out: Counter[str] = Counter()
    waiting = [listing.root]
    while waiting:
        folder = waiting.pop()
        folders = folder.with_images()
        reasons = {
            each: reason for each in folders for reason, names in made_of_images.items() if names.fullmatch(each)
        }
        if folder.images or len(reasons) < len(folders):  # else there are no others
            for each, reason in reasons.items():
                left_out[reason] += folders.pop(each).count()
        _check(listing, folder, list(folders))
        keys.extend(folder.images)
        waiting.extend(folders.values())
    return Layout([name], [sorted(keys)], left_out)


def _check(listing: Listing, folder: Folder, names: list[str]) -> None:
    """Raises UserError if the folders `names` of images in `folder` are not one data set."""
    if folder.images and names:
        raise listing.refusal(
            folder,
            f"holds both images ({base(folder.images[0])}) and folders of images ({some(names)}); name one of the "
            f"folders, as {listing.where(folder.folders[names[0]])}, or move the images away",
        )
    check_splits(listing, folder, names)
    sides = _sides(names)
    if len(set(sides.values())) > 1:
        raise name_one(listing, folder, f"several resolutions ({some(list(sides))})", list(sides))


def _sides(names: list[str]) -> dict[str, str]:
    """Resolutions in folder names. In part-31, part-32 the number is none, since 31 is no usual resolution."""
    matches = {name: match for name in names if (match := SIDE.fullmatch(name))}
    counted = {match["before"] for name in names if name not in matches and (match := NUMBER.fullmatch(name))}
    return {
        name: match["square"] or match["side"]
        for name, match in matches.items()
        if match["square"] or match["unit"] or match["before"] not in counted
    }


def _check_names(listing: Listing, keys: list[str]) -> None:
    """Raises UserError if two keys differ only in suffix and folder: the same face twice."""
    met: dict[str, str] = {}
    for key in keys:
        name = base(key).rpartition(".")[0]
        if (first := met.setdefault(name, key)) != key:
            raise listing.refusal(
                listing.root,
                f"holds {first} and {key}, the same face again by their names; name "
                "one folder, or give all images unique names",
            )

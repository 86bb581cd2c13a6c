"""Data sets of one class: faces and LSUN's categories. Which of several folders of images are those that are meant.

- Folders that hold something made of the images (masks, thumbnails, the photographs before alignment) are left out
  where other folders of images lie beside them.
- Where what is left holds splits, several resolutions or the same names several times, it is refused: the user names
  one folder.
- All else is taken, at any depth.
"""

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from preprocess.sources.layouts import check_not_empty, check_splits, name_one
from preprocess.sources.listing import Folder, Layout, Listing, base, some

MAPS = "masks and maps of faces"
MADE_OF_FACES = {  # reasons, and the names of folders
    MAPS: re.compile(
        r"(?:.*[-_ ])?(?:masks?|anno(?:tations?)?|seg(?:mentations?|maps?)?|parsing|labels?|landmarks?|sketch(?:es)?|"
        r"edges?|depth)\d*(?:[-_ ].*)?",
        re.I,
    ),
    "thumbnails": re.compile(r"(?:.*[-_ ])?thumb(?:nail)?s?\d*(?:[-_ x×]?\d+)*", re.I),
    "in-the-wild images, not aligned": re.compile(r"(?:.*[-_ ])?in[-_ ]?the[-_ ]?wild(?:[-_ ].*)?", re.I),
}
MASK = re.compile(  # of a part of a face, as CelebAMask-HQ names them: 00000_l_eye.png
    r"\d+_(?:skin|nose|eye_g|[lr]_(?:eye|brow|ear)|mouth|[ul]_lip|hair|hat|ear_r|neck(?:_l)?|cloth|mask)\.\w+"
)
SIDE = re.compile(  # pixels, in a name: 256x256, 256px, celeba_hq_256
    r"(?P<before>.*?\D)??(?:(?P<square>\d{2,4})[x×](?P=square)|(?P<side>32|64|128|256|512|1024|2048)(?P<unit>px|p)?)",
    re.I,
)
NUMBER = re.compile(r"(?P<before>.*\D)?\d+")


def faces(listing: Listing) -> Layout:
    """The one class `face`. Raises UserError where several folders hold the same faces, or there are masks alone."""
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
    """All images that are meant, as the class `name`; `made_of_images` tells by their names folders that are not."""
    check_not_empty(listing)
    keys: list[str] = []
    left_out: Counter[str] = Counter()
    waiting = [listing.root]
    while waiting:
        folder = waiting.pop()
        found = folder.with_images()
        reasons = {each: reason for each in found for reason, names in made_of_images.items() if names.fullmatch(each)}
        if folder.images or len(reasons) < len(found):  # else they are all there is
            for each, reason in reasons.items():
                left_out[reason] += found.pop(each).count()
        _check(listing, folder, list(found))
        keys.extend(folder.images)
        waiting.extend(found.values())
    return Layout([name], [sorted(keys)], left_out)


def _check(listing: Listing, folder: Folder, names: list[str]) -> None:
    """Raises UserError where the folders `names` of images in `folder` are not one data set."""
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
    """What resolution names of folders tell. A mere number tells none beside one that is no side: part-31, part-32."""
    matches = {name: match for name in names if (match := SIDE.fullmatch(name))}
    counted = {match["before"] for name in names if name not in matches and (match := NUMBER.fullmatch(name))}
    return {
        name: match["square"] or match["side"]
        for name, match in matches.items()
        if match["square"] or match["unit"] or match["before"] not in counted
    }


def _check_names(listing: Listing, keys: list[str]) -> None:
    """Raises UserError where two keys have one name, but for suffix and folder: the same face twice."""
    met: dict[str, str] = {}
    for key in keys:
        name = base(key).rpartition(".")[0]
        if (first := met.setdefault(name, key)) != key:
            raise listing.refusal(
                listing.root,
                f"holds {first} and {key}, the same face again by their names; name "
                "the folder that is meant, or give all images names of their own",
            )

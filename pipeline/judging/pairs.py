"""Which images of two sets are the same image, how one lies in the other, and what was done to its pixels."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.evaluation.image_sets import evenly_spaced
from pipeline.judging.changes import jpeg
from pipeline.judging.scan import Scan, nearest

EXAMINED = 16  # pairs whose pixels are compared
ENCODED = 4  # of these, for each JPEG quality
SIDE = 32  # of the images that are laid over one another
ZOOMS = [1.04**step for step in range(-9, 10)]  # 0.70 to 1.42
SHIFTS = [step * 2 / SIDE for step in range(-4, 5)]  # 2 is a whole side
SURELY = 0.9  # a share of pairs that needs no other way of finding them
SAME_IMAGE = 0.965  # correlation of brightness, laid over one another: copies 0.971 and more, other portraits 0.95
CLEARLY = 0.003  # by how much more another place must correlate than the images as they lie
QUALITIES = range(20, 100)
EXPLAINED = 0.6  # share of the squared difference that a JPEG must explain
LOCAL = 0.5  # a filter moves means of 4 x 4 pixels by less than this share of what it moves pixels by
KERNEL, KERNEL_ROWS = 5, 20_000


@dataclass(frozen=True)
class Pairs:
    """Images of two sets that are nearest to one another, and what comparing some of them found."""

    first: NDArray[np.int64]  # positions (P,)
    second: NDArray[np.int64]
    share: float  # of the smaller set, that is the same image as one of the other
    before: NDArray[np.uint8]  # some of these, (E, R, R, 3)
    after: NDArray[np.uint8]
    placement: NDArray[np.float64]  # (E, 4), of `placed`


def find_pairs(first: Scan, second: Scan, first_unique: NDArray[np.int64], second_unique: NDArray[np.int64]) -> Pairs:
    """Pairs of images, and what distinguishes the two of a pair.

    Nearest by their thumbnails, or, where crops differ, by their features.
    """
    by_thumbnails = _paired(first, second, first_unique, second_unique, first.small, second.small)
    if by_thumbnails.share > SURELY:
        return by_thumbnails
    by_features = _paired(first, second, first_unique, second_unique, first.pooled, second.pooled)
    return max(by_thumbnails, by_features, key=lambda pairs: pairs.share)


def _paired(
    first: Scan,
    second: Scan,
    first_unique: NDArray[np.int64],
    second_unique: NDArray[np.int64],
    mine: NDArray[np.float32],
    theirs: NDArray[np.float32],
) -> Pairs:
    there = nearest(mine[first_unique], theirs[second_unique])
    back = nearest(theirs[second_unique], mine[first_unique])
    mutual = np.flatnonzero(back[there] == np.arange(len(there)))
    positions = first_unique[mutual], second_unique[there[mutual]]
    chosen = evenly_spaced(len(mutual), EXAMINED)
    before, after = (_at(found, where[chosen]) for found, where in zip((first, second), positions, strict=True))
    placement, correlation = placed(before, after)
    true = correlation >= SAME_IMAGE
    share = true.mean() * len(mutual) / min(len(first_unique), len(second_unique))
    return Pairs(*positions, float(share), before[true], after[true], placement[true])


def _at(found: Scan, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The images at positions in any order, (P, R, R, 3)."""
    order = np.argsort(positions)
    images = np.stack(found.chosen(positions[order]))
    return images[np.argsort(order)]


def placed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How each image lies in its partner: zoom and shift in x and y (P, 4), and their correlation there (P,).

    A zoom of 0.9: it shows the inner nine tenths of its partner. The images as they lie are (1, 1, 0, 0).
    """
    candidates = [(x, y, 0.0, 0.0) for x, y in product(ZOOMS, ZOOMS)]
    candidates += [(1.0, 1.0, x, y) for x, y in product(SHIFTS, SHIFTS) if x or y]
    as_they_lie = candidates.index((1.0, 1.0, 0.0, 0.0))
    zoom_x, zoom_y, shift_x, shift_y = torch.tensor(candidates).T
    zero = torch.zeros_like(zoom_x)
    matrices = torch.stack([zoom_x, zero, shift_x, zero, zoom_y, shift_y], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(matrices, [len(candidates), 1, SIDE, SIDE], align_corners=False)
    inside = (grid.abs() <= 1).all(dim=-1).flatten(1).float()  # (C, SIDE²)
    best, correlations = [], []
    for one, other in zip(_brightness(before), _brightness(after), strict=True):
        moved = functional.grid_sample(
            one.expand(len(candidates), 1, SIDE, SIDE), grid, align_corners=False, padding_mode="border"
        )
        values = _correlation(moved.flatten(1), other.flatten().expand(len(candidates), -1), inside)
        place = int(values.argmax())
        place = as_they_lie if values[as_they_lie] >= values[place] - CLEARLY else place
        best.append(candidates[place])
        correlations.append(float(values[place]))
    return np.array(best), np.array(correlations)


def _brightness(images: NDArray[np.uint8]) -> Tensor:
    """(P, R, R, 3) -> (P, SIDE, SIDE)."""
    grey = torch.from_numpy(images).float().mean(dim=-1)[:, None]
    return functional.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]


def _correlation(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Of each row, (C, n) -> (C,), where the weight is 1."""
    total = weight.sum(dim=1, keepdim=True)
    first, second = ((each - (each * weight).sum(1, keepdim=True) / total) * weight for each in (first, second))
    scale = (first.square().sum(dim=1) * second.square().sum(dim=1)).sqrt().clamp_min(1e-9)
    return (first * second).sum(dim=1) / scale


def pixel_cause(pairs: Pairs) -> tuple[str | None, str]:
    """What the pixels of the same images differ by, or None, and how that shows."""
    before, after, placement = pairs.before, pairs.after, pairs.placement
    moved = np.abs(placement - [1, 1, 0, 0]).max(axis=1) > 0.01
    if moved.mean() > 0.5:
        zoom_x, zoom_y, shift_x, shift_y = np.median(placement[moved], axis=0)
        shift = f", moved by {50 * shift_x:.0f} % and {50 * shift_y:.0f} % of a side" if shift_x or shift_y else ""
        return "crop", f"OTHER shows {100 * zoom_x:.0f} % x {100 * zoom_y:.0f} % of what SAMPLES show{shift}"
    before, after = before[~moved], after[~moved]
    difference = after.astype(np.float64) - before
    if not difference.any():
        return None, "pixels are equal"
    if (np.abs(difference) <= 1).mean() > 0.999:
        mean = difference.mean()
        if abs(mean) < 0.1:
            return None, "pixels differ by a level here and there, as sums in another order do"
        return (
            "rounding",
            f"OTHER's values are {mean:+.2f} levels off, none by more than 1: half of them were truncated",
        )
    return _jpeg(before, after) or _filter(before, after) or ("pixels", "OTHER's colours or contents differ")


def _jpeg(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[str, str] | None:
    found = []
    few = evenly_spaced(len(before), ENCODED)
    for name, plain, target in (("OTHER", before[few], after[few]), ("SAMPLES", after[few], before[few])):
        for quality, subsampling in product(QUALITIES, (2, 0)):
            encoded = np.stack([jpeg(image, quality, subsampling) for image in plain])
            found.append((explained(encoded, plain, target), name, quality))
    share, name, quality = max(found)
    if share < EXPLAINED:
        return None
    return (
        "JPEG",
        f"{name} were JPEG of quality {quality}, which explains {100 * share:.0f} % of the squared difference",
    )


def explained(changed: NDArray, plain: NDArray, target: NDArray) -> float:
    """Share of the squared difference of target and plain images that a change of the plain ones explains."""
    left, whole = (np.square(each.astype(np.float64) - target).sum() for each in (changed, plain))
    return float(1 - left / whole)


def _filter(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[str, str] | None:
    """A change that moves pixels, and the means of small areas much less."""
    difference = torch.from_numpy(after.astype(np.float32) - before).permute(0, 3, 1, 2)  # (P, 3, R, R)
    local = (
        functional.avg_pool2d(difference, 4, ceil_mode=True).square().mean().sqrt() / difference.square().mean().sqrt()
    )
    if local > LOCAL:
        return None
    forward, backward = kernel_explains(before, after), kernel_explains(after, before)
    ratio = float(np.mean([fine_detail(image) for image in after]) / np.mean([fine_detail(image) for image in before]))
    words = "softer" if ratio < 1 else "sharper"
    share = max(forward, backward)
    return "filter", (
        f"OTHER are {words}: {ratio:.2f} times the power in fine detail; one 5 x 5 filter explains {100 * share:.0f} % "
        "of the squared difference"
    )


def kernel_explains(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Share of the squared difference that the best filter of KERNEL x KERNEL pixels explains."""
    planes = torch.from_numpy(before).permute(0, 3, 1, 2).flatten(0, 1)[:, None].double()  # (3P, 1, R, R)
    patches = functional.unfold(planes, KERNEL).transpose(1, 2).flatten(0, 1)  # (rows, KERNEL²)
    edge = KERNEL // 2
    inner = torch.from_numpy(after).permute(0, 3, 1, 2)[:, :, edge:-edge, edge:-edge].double().flatten()
    rows = torch.from_numpy(evenly_spaced(len(patches), KERNEL_ROWS))
    change = inner[rows] - patches[rows, KERNEL**2 // 2]
    solution = torch.linalg.lstsq(patches[rows], change[:, None], driver="gelsd").solution
    left = change - (patches[rows] @ solution)[:, 0]
    return float(1 - left.square().sum() / change.square().sum().clamp_min(1e-9))


def fine_detail(image: NDArray[np.uint8]) -> float:
    """Share of an image's power, its mean left out, at more than half of the highest frequency."""
    grey = image.astype(np.float64).mean(axis=-1)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(size)) for size in grey.shape)
    fine = np.maximum(rows[:, None], columns[None]) > 0.25
    return float(power[fine].sum() / max(power.sum(), 1e-9))


def blockiness(image: NDArray[np.uint8]) -> float:
    """How much larger steps between neighbours are at the edges of JPEG's 8 x 8 blocks than elsewhere; about 1."""
    grey = image.astype(np.float64).mean(axis=-1)
    edges, others = [], []
    for plane in (grey, grey.T):
        steps = np.abs(np.diff(plane, axis=1)).mean(axis=0)
        at_edge = np.arange(1, len(steps) + 1) % 8 == 0
        edges.append(steps[at_edge].mean())
        others.append(steps[~at_edge].mean())
    return float(np.mean(edges) / max(np.mean(others), 1e-9))

"""What moves the number of a set, and by how much: usual changes made to these very images, and measured again.

Each is made alone. Changes of pixels are measured on at most `probe` images, against the same images unchanged; what
concerns which images there are is measured on all features, as a mean over draws.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fpdm import rng
from pipeline.evaluation.image_sets import evenly_spaced
from pipeline.evaluation.metrics import statistics
from pipeline.judging.changes import SEED, cropped_inside, jpeg, refiltered, truncated
from pipeline.judging.numbers import Distance, Reference
from pipeline.judging.scan import Measuring, Scan, copies, copies_of, pick
from preprocess.images.images import CROPS

DRAWS = 4
SHARE = 0.1  # of the images that are replaced

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Mover:
    """A change and its effect on the distance. An effect of None was not measured; the note says why."""

    cause: str
    change: str
    effect: float | None
    note: str = ""


def movers(found: Scan, reference: Reference, measuring: Measuring, probe: int) -> list[Mover]:
    """By effect, the largest first."""
    distance = Distance(reference.statistics["pooled"])
    all_of_them = [
        *_of_pixels(found, distance, measuring, probe),
        _balance(found, reference, distance),
        _count(found, distance),
        _duplicates(found, distance),
        _near_copies(found, reference, distance),
        *_crops(found, reference, measuring, probe),
    ]
    return sorted(all_of_them, key=lambda mover: -abs(mover.effect) if mover.effect is not None else 1)


def _of_pixels(found: Scan, distance: Distance, measuring: Measuring, probe: int) -> Iterator[Mover]:
    positions = evenly_spaced(found.count, probe)
    images, before = found.chosen(positions), distance(found.pooled[positions])
    changes: list[tuple[str, str, Callable[[int], NDArray[np.uint8]]]] = [
        ("rounding", "truncated to 8 bits instead of rounded", lambda i: truncated(images[i], int(positions[i]))),
        (
            "filter",
            "reduced from twice the size by a bilinear filter instead of Lanczos",
            lambda i: refiltered(images[i], Image.Resampling.BILINEAR),
        ),
        ("JPEG", "stored as JPEG of quality 95", lambda i: jpeg(images[i], 95)),
        ("JPEG", "stored as JPEG of quality 75", lambda i: jpeg(images[i], 75)),
    ]
    on = "" if len(images) == found.count else f"on {len(images):,} of the images"
    for cause, change, changed in changes:
        after = distance(measuring.rows(map(changed, range(len(images)))))
        yield Mover(cause, change, after - before, on)
    with _half_precision(measuring):
        after = distance(measuring.rows(images))
    yield Mover("weights", "the extractor's weights rounded to float16", after - before, on)


class _half_precision:
    """Within the block the extractor's weights have the values that float16 holds."""

    def __init__(self, measuring: Measuring) -> None:
        self._parameters = list(measuring.network().parameters())

    def __enter__(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        self._set([kept.half().float() for kept in self._kept])

    def __exit__(self, *_: object) -> None:
        self._set(self._kept)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def mean_over_draws(draw: Callable[[int], float]) -> float:
    return float(np.mean([draw(number) for number in range(DRAWS)]))


def shuffled(count: int, stream: str) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the stream's name decides."""
    return rng.uniform(SEED, f"judge/{stream}", torch.arange(count)).argsort(stable=True).numpy()


def labels_of(found: Scan, *others: Scan | None) -> tuple[NDArray[np.int64], str] | None:
    """A set's labels; or those of the nearest class mean of another set's features; or None."""
    if found.images.labels is not None:
        return found.images.labels, "its own labels"
    for other in others:
        if other is not None and (labels := other.images.labels) is not None:
            classes = np.unique(labels)
            means = np.stack([other.pooled[labels == each].mean(axis=0) for each in classes])  # (classes, D)
            distances = np.square(means).sum(axis=1) - 2 * found.pooled @ means.T  # (N, classes)
            return classes[distances.argmin(axis=1)], f"classes by the nearest class mean of {other.images.path}"
    return None


def _balance(found: Scan, reference: Reference, distance: Distance) -> Mover:
    known = labels_of(found, reference.scan)
    if known is None:
        return Mover("balance", "labels balanced", None, "neither the samples nor the reference have labels")
    labels, how = known
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() == 1:
        return Mover("balance", "labels balanced", None, "one image of each class")
    is_balanced = counts.max() - counts.min() <= 1
    half = max(2, found.count // 2)
    uniform = np.full(len(counts), half / len(counts))

    def draw(number: int) -> float:
        order = shuffled(found.count, f"balance/{number}")
        picks = rng.uniform(SEED, f"judge/labels/{number}", torch.arange(half)).numpy()
        drawn = np.bincount((picks * len(counts)).astype(int), minlength=len(counts)).astype(float)
        even = composed(labels, uniform, order)
        other = composed(labels, drawn if is_balanced else counts * half / found.count, order)
        size = min(len(even), len(other))
        before, after = (other, even) if not is_balanced else (even, other)
        return distance(found.pooled[after[:size]]) - distance(found.pooled[before[:size]])

    change = "labels drawn at random instead of balanced" if is_balanced else "labels balanced instead of as they are"
    return Mover("balance", change, mean_over_draws(draw), how)


def composed(labels: NDArray[np.int64], wanted: NDArray[np.floating], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of images with about `wanted` of each class (classes,), in the order given; no image twice, so that of
    rare classes there may be fewer.
    """
    chosen = []
    for label, count in zip(np.unique(labels), wanted, strict=True):
        chosen.append(order[labels[order] == label][: round(count)])
    together = np.concatenate(chosen)
    return together[np.argsort(np.argsort(order)[together])]  # so that a part of them is as mixed


def _count(found: Scan, distance: Distance) -> Mover:
    whole = distance(found.pooled)

    def draw(number: int) -> float:
        order = shuffled(found.count, f"count/{number}")
        halves = (part for part in np.array_split(order, 2) if len(part) > 1)
        return float(np.mean([distance(found.pooled[half]) for half in halves])) - whole

    if found.count < 4:
        return Mover("count", "half as many images", None, "too few images to halve")
    effect = mean_over_draws(draw)
    # The bias falls as 1 / N (Chong & Forsyth 2020): what half the images add is what infinitely many would take away.
    return Mover("count", "half as many images", effect, f"with infinitely many about {whole - effect:.4g}")


def _duplicates(found: Scan, distance: Distance) -> Mover:
    count = int(copies(found).sum())
    effect = mean_over_draws(lambda number: replaced(found.pooled, SHARE, number, distance) - distance(found.pooled))
    there = f"{count:,} of {found.count:,} repeat an earlier one"
    return Mover("duplicates", f"{SHARE:.0%} of the images replaced by copies of others", effect, there)


def replaced(rows: Rows, share: float, number: int, distance: Distance) -> float:
    """The distance with this share of the rows replaced by copies of others."""
    order = shuffled(len(rows), f"duplicates/{number}")
    size = min(max(1, round(share * len(rows))), len(rows) - 1)
    kept = rows[order[size:]]
    return distance(np.concatenate([kept, kept[np.arange(size) % len(kept)]]))


def _near_copies(found: Scan, reference: Reference, distance: Distance) -> Mover:
    change = f"{SHARE:.0%} of the images replaced by images of the reference"
    if reference.scan is None:
        return Mover("near-copies", change, None, "the reference is statistics without images")
    against, size = reference.scan, max(1, round(SHARE * found.count))

    def draw(number: int) -> float:
        order = shuffled(found.count, f"copies/{number}")
        from_reference = shuffled(against.count, f"copied/{number}")[np.arange(size) % against.count]
        return distance(np.concatenate([found.pooled[order[size:]], against.pooled[from_reference]]))

    near = copies_of(found, against)
    note = f"{int(near.sum()):,} of {found.count:,} are near-copies of one"
    if near.any() and (~near).sum() > 1:
        kept = int((~near).sum())
        random = mean_over_draws(lambda number: distance(found.pooled[shuffled(found.count, f"kept/{number}")[:kept]]))
        note += f"; without them {distance(found.pooled[~near]) - random:+.4g}, beside as many left out at random"
    return Mover("near-copies", change, mean_over_draws(draw) - distance(found.pooled), note)


def _crops(found: Scan, reference: Reference, measuring: Measuring, probe: int) -> Iterator[Mover]:
    """Of the reference: other rules from its originals, or the inner part of images that are cropped already."""
    if reference.scan is None:
        yield Mover("crop", "the reference cropped otherwise", None, "the reference is statistics without images")
        return
    against = reference.scan
    positions = evenly_spaced(against.count, probe)
    samples = found.pooled[evenly_spaced(found.count, probe)]
    before = Distance(statistics([against.pooled[positions]]))(samples)
    on = "" if len(positions) == against.count else f"on {len(positions):,} of the reference's images"
    cropped, own = against.images.cropped, against.images.crop
    if cropped is None:
        rows = measuring.rows(map(cropped_inside, against.chosen(positions)))
        effect = Distance(statistics([rows]))(samples) - before
        yield Mover("crop", "the reference's inner 7/8, as Resize(256) and CenterCrop(224) keep", effect, on)
        return
    for rule in CROPS:
        if rule != own:
            rows = measuring.rows(pick(cropped(rule), positions))
            effect = Distance(statistics([rows]))(samples) - before
            yield Mover("crop", f"the reference cropped by `{rule}` instead of `{own}`", effect, on)

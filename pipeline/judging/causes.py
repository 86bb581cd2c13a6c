"""Why the number of one set differs from that of another: each cause with what shows it and what it is worth."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.image_sets import evenly_spaced
from pipeline.judging.movers import composed, labels_of, mean_over_draws, replaced, shuffled
from pipeline.judging.numbers import Distance
from pipeline.judging.pairs import EXAMINED, Pairs, blockiness, find_pairs, fine_detail, pixel_cause
from pipeline.judging.scan import Scan, copies

MADE_OF_THE_SAME = 0.5  # share of the smaller set that must lie in the other for the two to be made from one
TELLING = 0.005  # a share of copies, or a distance of label shares, that counts
SURE = 2.33  # standard deviations of the chi-squared test of labels: 1 %
UNPAIRED_SURE = 4.0  # of the tests of images that are not the same ones


@dataclass(frozen=True)
class Cause:
    """A difference of two sets; the effect is what it adds to the distance from SAMPLES to OTHER."""

    cause: str
    evidence: str
    effect: float | None  # None: not measured


def causes(samples: Scan, other: Scan, distance: Distance, reference: Scan | None) -> tuple[list[Cause], str]:
    """The causes, by effect, the largest first, and whether the two sets hold the same images."""
    repeated = copies(samples), copies(other)
    unique = tuple(np.flatnonzero(~each) for each in repeated)
    pairs = find_pairs(samples, other, *unique)
    together = pairs.share >= MADE_OF_THE_SAME
    cause, evidence = (
        pixel_cause(pairs)
        if together
        else (None, "not made from the same images, so that rounding and crop cannot be told")
    )
    found = [
        None if cause is None else Cause(cause, evidence, _of_pairs(pairs, samples, other, distance)),
        *([] if together else _of_signatures(samples, other)),
        _duplicates(samples, distance, *repeated),
        _count(samples, other, distance, unique),
        _balance(samples, other, distance, reference, unique),
    ]
    there = [cause for cause in found if cause is not None]
    there.sort(key=lambda cause: -abs(cause.effect) if cause.effect is not None else 1)
    relation = f"{100 * min(1.0, pairs.share):.0f} % of the smaller set's images are in the other"
    return there, relation if cause else f"{relation}: {evidence}"


def _of_pairs(pairs: Pairs, samples: Scan, other: Scan, distance: Distance) -> float | None:
    """The effect of what was done to the pixels, measured on the images that are in both sets."""
    if len(pairs.first) < 2:
        return None
    return distance(other.pooled[pairs.second]) - distance(samples.pooled[pairs.first])


def _of_signatures(samples: Scan, other: Scan) -> list[Cause]:
    """What JPEG and filters leave in images, where no two are the same one."""
    images = [found.chosen(evenly_spaced(found.count, 4 * EXAMINED)) for found in (samples, other)]
    causes = []
    for cause, what, signature in (
        ("JPEG", "steps at the edges of blocks of 8 pixels", blockiness),
        ("filter", "share of power in fine detail", fine_detail),
    ):
        mine, theirs = (np.log([max(signature(image), 1e-6) for image in each]) for each in images)
        error = np.sqrt(mine.var(ddof=1) / len(mine) + theirs.var(ddof=1) / len(theirs))
        if abs(theirs.mean() - mine.mean()) > UNPAIRED_SURE * max(error, 1e-9):
            ratio = np.exp(theirs.mean() - mine.mean())
            causes.append(Cause(cause, f"OTHER have {ratio:.2f} times the {what}", None))
    return causes


def _duplicates(samples: Scan, distance: Distance, mine: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Cause | None:
    more = theirs.mean() - mine.mean()
    if abs(more) < TELLING:
        return None
    base = distance(samples.pooled)
    size = abs(more)
    effect = mean_over_draws(lambda number: replaced(samples.pooled, size, number, distance)) - base
    repeats = f"{theirs.sum():,} of OTHER's {len(theirs):,} images", f"{mine.sum():,} of SAMPLES' {len(mine):,}"
    evidence = f"{repeats[0]} repeat an earlier one, {repeats[1]}"
    return Cause("duplicates", evidence, float(np.sign(more)) * effect)


def _count(samples: Scan, other: Scan, distance: Distance, unique: tuple[NDArray[np.int64], ...]) -> Cause | None:
    if samples.count == other.count or len(unique[0]) == len(unique[1]):
        return None
    larger, fewer = max(samples, other, key=lambda found: found.count), min(samples.count, other.count)
    whole = distance(larger.pooled)

    def draw(number: int) -> float:
        return distance(larger.pooled[shuffled(larger.count, f"count/{number}")[:fewer]])

    effect = mean_over_draws(draw) - whole
    return Cause("count", f"{samples.count:,} and {other.count:,} images", effect if larger is samples else -effect)


def _balance(
    samples: Scan, other: Scan, distance: Distance, reference: Scan | None, unique: tuple[NDArray[np.int64], ...]
) -> Cause | None:
    of_samples, of_other = labels_of(samples, other, reference), labels_of(other, samples, reference)
    if of_samples is None or of_other is None:
        return None
    (mine, how), (theirs, _) = of_samples, of_other
    classes = np.unique(np.concatenate([mine, theirs]))
    counts = [
        np.array([(labels[kept] == each).sum() for each in classes], float)
        for labels, kept in zip((mine, theirs), unique, strict=True)
    ]
    shares = [each / each.sum() for each in counts]
    apart = float(np.abs(shares[0] - shares[1]).sum() / 2)
    no_copies = samples.count == len(unique[0]) == other.count == len(unique[1])
    one_is_even = no_copies and _is_even(counts[0]) != _is_even(counts[1]) and how == "its own labels"
    if apart < TELLING or not (one_is_even or _differ(*counts)):
        return None
    evidence = f"{100 * apart:.1f} % of OTHER's labels would have to change to SAMPLES' shares ({how})"
    present, of_class = np.isin(classes, np.unique(mine)), np.unique(mine, return_counts=True)[1]
    if of_class.max() == 1:
        return Cause("balance", evidence, None)
    half = max(2, samples.count // 2)

    def draw(number: int) -> float:
        order = shuffled(samples.count, f"balance/{number}")
        before, after = (composed(mine, half * share[present], order) for share in shares)
        size = min(len(before), len(after))
        return distance(samples.pooled[after[:size]]) - distance(samples.pooled[before[:size]])

    return Cause("balance", evidence, mean_over_draws(draw))


def _is_even(counts: NDArray[np.float64]) -> bool:
    return bool(counts.max() - counts.min() <= 1)


def _differ(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether two tables of counts, (classes,), are of different shares, by the chi-squared test at 1 % with Wilson and
    Hilferty's normal approximation.
    """
    total, freedom = first.sum() + second.sum(), len(first) - 1
    if freedom < 1:
        return False
    expected = np.outer([first.sum(), second.sum()], first + second) / total
    squared = float((np.square(np.stack([first, second]) - expected) / expected).sum())
    spread = 2 / (9 * freedom)
    return ((squared / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread) > SURE

"""Summaries of a set's features: the Gaussians fitted to them, and rows for metrics that compare single images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.arrays import read_arrays, write_arrays
from common.errors import UserError, errors_as
from pipeline.evaluation.metrics import (
    DENSITY_NEIGHBOURHOOD,
    ISC_SPLITS,
    NEIGHBOURHOOD,
    Accumulator,
    Statistics,
    density_coverage,
    fault_of,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from pipeline.features.extractors import Features
from pipeline.sampling.chunks import Chunk

FITTED = ("pooled", "spatial")
KEPT_LAYERS = ("pooled", "logits")
KEPT = 50_000  # rows, evenly spaced: KID draws from them, precision and recall compare them all with one another


@dataclass(frozen=True)
class Summary:
    """One set's features, by layer. `rows` is empty where they come from a statistics file."""

    statistics: dict[str, Statistics]
    rows: dict[str, NDArray[np.float32]]  # each (at most KEPT, D)


def summarise(batches: Iterable[Features | Chunk], size: int, kept_layers: Sequence[str] = KEPT_LAYERS) -> Summary:
    """In one pass over at most `size` images' features; errors as `Accumulator.statistics`."""
    sums: dict[str, Accumulator] = {}
    rows: dict[str, list[NDArray[np.float32]]] = {}
    position = 0
    for batch in batches:
        places = np.arange(position, position + len(batch["pooled"]))
        chosen = kept_rows(places, size)
        position += len(places)
        for layer, features in batch.items():
            if layer in FITTED:
                sums.setdefault(layer, Accumulator()).add(features)
            if layer in kept_layers:
                rows.setdefault(layer, []).append(features[chosen])
    if not sums:
        raise UserError("features of 0 images: a covariance needs two images at least; give a larger set")
    return Summary(
        {layer: total.statistics() for layer, total in sums.items()},
        {layer: np.concatenate(parts) for layer, parts in rows.items()},
    )


def kept_rows(places: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Which of the images at these places of a set of `size` have their rows kept: at most KEPT, evenly spaced."""
    kept, size = min(size, KEPT), max(1, size)
    return (places + 1) * kept // size > places * kept // size


def write_summary(path: Path, summary: Summary) -> None:
    arrays: dict[str, NDArray | int] = {f"rows_{layer}": rows for layer, rows in summary.rows.items()}
    for layer, fitted in summary.statistics.items():
        assert fitted.count is not None
        arrays |= {f"mean_{layer}": fitted.mean, f"covariance_{layer}": fitted.covariance, "count": fitted.count}
    write_arrays(path, **arrays)


def read_summary(path: Path, command: str) -> Summary:
    """Raises UserError naming the file, and `command`, which makes it again, where it is no summary."""
    arrays = read_arrays(path, command)
    with errors_as(UserError, f"{path}: no summary of features; delete it and run {command} again"):
        layers = [layer for layer in FITTED if f"mean_{layer}" in arrays]
        statistics = {
            layer: Statistics(arrays[f"mean_{layer}"], arrays[f"covariance_{layer}"], int(arrays["count"]))
            for layer in layers
        }
        rows = {layer: arrays[f"rows_{layer}"] for layer in KEPT_LAYERS if f"rows_{layer}" in arrays}
        faults = [fault_of(fitted) for fitted in statistics.values()]
        faults += [None if each.ndim == 2 and np.isfinite(each).all() else "rows" for each in rows.values()]
        if "pooled" not in statistics or any(faults) or int(arrays["count"]) < 2:
            raise ValueError(next((fault for fault in faults if fault), "too little"))
    return Summary(statistics, rows)


def reason_unavailable(metric: str, own: Summary, reference: Summary) -> str | None:
    """Why a metric cannot be measured of two sets; None where it can."""
    if metric in ("kid", "precision_recall", "density_coverage"):
        if "pooled" not in reference.rows:
            return "the reference is a statistics file without images"
        fewest = len(reference.rows["pooled"])
        if metric == "density_coverage":
            return f"a reference of {fewest} images is too small" if fewest <= DENSITY_NEIGHBOURHOOD else None
        fewest = min(fewest, len(own.rows["pooled"]))
        return f"sets of {fewest} images are too small" if fewest <= NEIGHBOURHOOD else None
    if metric == "spatial" and "spatial" not in reference.statistics:
        return "the reference's file has no mu_s and sigma_s"
    if metric == "inception_score" and len(own.rows["logits"]) < ISC_SPLITS:
        return f"{len(own.rows['logits'])} images are fewer than its {ISC_SPLITS} parts"
    return None


def measure(metric: str, own: Summary, reference: Summary) -> dict[str, float]:
    """The numbers that a metric consists of, by name; `<name>_spread` is a standard deviation over subsets or parts."""
    if metric in ("frechet", "spatial"):
        layer = "pooled" if metric == "frechet" else "spatial"
        return {metric: frechet_distance(own.statistics[layer], reference.statistics[layer])}
    if metric == "inception_score":
        mean, spread = inception_score(own.rows["logits"])
        return {"inception_score": mean, "inception_score_spread": spread}
    if metric == "kid":
        mean, spread = kernel_distance(own.rows["pooled"], reference.rows["pooled"])
        return {"kid": mean, "kid_spread": spread}
    if metric == "density_coverage":
        density, coverage = density_coverage(own.rows["pooled"], reference.rows["pooled"])
        return {"density": density, "coverage": coverage}
    precision, recall = precision_recall(own.rows["pooled"], reference.rows["pooled"])
    return {"precision": precision, "recall": recall}

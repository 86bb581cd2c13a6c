"""What the judge found, as JSON that holds the hashes of all inputs, and as text."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import printable
from common.files import content_key
from common.provenance import Provenance, provenance
from common.sealed import KEY, STRICT, read_sealed
from pipeline.judging.causes import Cause
from pipeline.judging.movers import Mover
from pipeline.judging.numbers import Number, Reference
from pipeline.judging.scan import Measuring, Scan

REMEDY = "make it again with python pipeline/judge.py --json"


@with_config(STRICT)
class SetForm(TypedDict):
    path: str
    label: str
    count: int | None  # None: statistics alone
    resolution: int | None
    sha256: str  # of the images' pixels, in whatever order and container; of statistics, of their numbers


@with_config(STRICT)
class NumberForm(TypedDict):
    key: str
    name: str
    value: float
    low: float
    high: float


@with_config(STRICT)
class MoverForm(TypedDict):
    cause: str
    change: str
    effect: float | None
    note: str


@with_config(STRICT)
class CauseForm(TypedDict):
    cause: str
    evidence: str
    effect: float | None


@with_config(STRICT)
class AgainstForm(TypedDict):
    path: str
    sha256: str
    relation: str
    value: float
    causes: list[CauseForm]


@with_config(STRICT)
class ExtractorForm(TypedDict):
    name: str
    weights_sha256: str


@with_config(STRICT)
class JudgeForm(TypedDict):
    samples: SetForm
    reference: SetForm
    extractor: ExtractorForm
    numbers: Annotated[list[NumberForm], Field(min_length=1)]  # the Fréchet distance first
    missing: list[str]
    movers: list[MoverForm]
    against: AgainstForm | None
    provenance: Provenance


def set_form(found: Scan) -> SetForm:
    return {
        "path": found.images.path,
        "label": found.images.label,
        "count": found.count,
        "resolution": found.resolution,
        "sha256": found.pixels_sha256,
    }


def reference_form(reference: Reference) -> SetForm:
    if reference.images.statistics is None:
        assert reference.scan is not None
        return set_form(reference.scan)
    numbers = {layer: [each.mean.tolist(), each.covariance.tolist()] for layer, each in reference.statistics.items()}
    return {
        "path": reference.images.path,
        "label": reference.images.label,
        "count": reference.scan.count if reference.scan else None,
        "resolution": reference.scan.resolution if reference.scan else None,
        "sha256": content_key(numbers),
    }


def judge_form(
    samples: Scan,
    reference: Reference,
    measuring: Measuring,
    numbers: list[Number],
    missing: list[str],
    moved: list[Mover],
    against: AgainstForm | None,
) -> JudgeForm:
    return {
        "samples": set_form(samples),
        "reference": reference_form(reference),
        "extractor": {"name": measuring.weights.extractor, "weights_sha256": measuring.weights.sha256},
        "numbers": [asdict(number) for number in numbers],  # type: ignore[misc]
        "missing": missing,
        "movers": [asdict(mover) for mover in moved],  # type: ignore[misc]
        "against": against,
        "provenance": provenance(),
    }


def sealed(report: JudgeForm) -> dict[str, Any]:
    return {**report, KEY: content_key(report)}


def read_report(path: Path) -> JudgeForm:
    """Raises UserError for a file that is no report, or not as it was written."""
    return read_sealed(path, JudgeForm, REMEDY)


def against_set(path: str, other: Scan, relation: str, value: float, found: list[Cause]) -> AgainstForm:
    return {
        "path": path,
        "sha256": other.pixels_sha256,
        "relation": relation,
        "value": value,
        "causes": [asdict(cause) for cause in found],  # type: ignore[misc]
    }


def against_report(path: Path, report: JudgeForm, mine: JudgeForm) -> AgainstForm:
    """Why a number differs from that of a report. Images that differ are named, not explained: a report has none."""
    value, here = report["numbers"][0]["value"], mine["numbers"][0]["value"]
    gap, found = value - here, list[Cause]()
    if report["extractor"] != mine["extractor"]:
        names = [f"{each['name']} ({each['weights_sha256'][:8]})" for each in (mine["extractor"], report["extractor"])]
        found.append(Cause("weights", f"features by {names[0]} here and by {names[1]} there", gap))
    name: Literal["reference", "samples"]
    for name in ("reference", "samples"):
        theirs, ours = report[name], mine[name]
        if theirs["sha256"] != ours["sha256"]:
            evidence = f"{ours['label']} here and {theirs['label']} there are not the same"
            found.append(Cause(name, evidence + "; name that set itself with --against", None if found else gap))
    relation = "the same images" if report["samples"]["sha256"] == mine["samples"]["sha256"] else "other images"
    return {
        "path": str(path),
        "sha256": report["samples"]["sha256"],
        "relation": relation,
        "value": value,
        "causes": [asdict(cause) for cause in found],  # type: ignore[misc]
    }


def lines(report: JudgeForm) -> Iterator[str]:
    """For people. Some of the words are those of another person's report."""
    return map(printable, _lines(report))


def _lines(report: JudgeForm) -> Iterator[str]:
    extractor = report["extractor"]
    yield f"samples:   {report['samples']['label']} (sha256 {report['samples']['sha256'][:8]})"
    yield f"reference: {report['reference']['label']} (sha256 {report['reference']['sha256'][:8]})"
    yield f"features:  {extractor['name']}, weights {extractor['weights_sha256'][:8]}"
    yield ""
    yield "numbers, with 95 % intervals of drawing other samples"
    width = max(len(number["name"]) for number in report["numbers"])
    for number in report["numbers"]:
        yield f"  {number['name']:{width}}  {number['value']:10.5g}   {number['low']:.5g} to {number['high']:.5g}"
    yield from (f"  not measured: {reason}" for reason in report["missing"])
    if report["movers"]:
        yield ""
        yield f"what moves {report['numbers'][0]['name']}, each alone"
        for mover in report["movers"]:
            yield f"  {_signed(mover['effect'])}  {mover['cause']:11} {mover['change']}{_noted(mover['note'])}"
    if report["against"] is not None:
        yield ""
        yield from _against_lines(report["against"], report["numbers"][0])


def _against_lines(against: AgainstForm, number: NumberForm) -> Iterator[str]:
    gap = against["value"] - number["value"]
    yield f"against {against['path']}: {number['name']} {against['value']:.5g} there, {gap:+.4g}; {against['relation']}"
    for place, cause in enumerate(against["causes"], 1):
        yield f"  {place}. {_signed(cause['effect'])}  {cause['cause']}: {cause['evidence']}"
    if not against["causes"]:
        yield "  no cause found: the sets differ as other draws do, or not at all"


def _signed(effect: float | None) -> str:
    return f"{'?' if effect is None else f'{effect:+.4g}':>10}"


def _noted(note: str) -> str:
    return f" ({note})" if note else ""

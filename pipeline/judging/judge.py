"""The judge: opens, scans, measures, moves and compares, in that order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.recipe import Evaluate
from pipeline.features.extractors import EFFICIENTNET, INCEPTION, LAYERS, NamedExtractor, find_extractor_weights
from pipeline.judging.causes import causes
from pipeline.judging.inputs import Judged, open_judged
from pipeline.judging.movers import Mover, movers
from pipeline.judging.numbers import Distance, Number, Reference, all_numbers, distance_number
from pipeline.judging.report import AgainstForm, JudgeForm, against_report, against_set, judge_form, read_report
from pipeline.judging.scan import Measuring, Scan, scan
from preprocess.images.images import CROPS


@dataclass(frozen=True)
class Question:
    """What is judged."""

    samples: Path
    reference: Path
    against: Path | None = None  # another set, or a report
    crop: str | None = None  # the rule that crops the reference's images
    probe: int = 1000  # images that changes of pixels are measured on; 0: nothing is moved


def judge(question: Question, extractors: Sequence[Measuring]) -> JudgeForm:
    """All numbers by the first extractor, what moves its distance, and the distances by the others.

    Raises UserError, beginning with the option's name, for what cannot be judged.
    """
    main, *others = extractors
    report = _report_of(question)  # what is wrong with it is said before minutes of work
    samples = open_judged(question.samples, "SAMPLES", main.weights.extractor)
    if samples.open is None:
        raise UserError(f"SAMPLES: {question.samples} is statistics without images; name the images themselves")
    resolution = _resolution(samples)
    named = _open_reference(question, main, resolution)
    against = None
    if question.against is not None and report is None:
        against = open_judged(question.against, "--against", main.weights.extractor)
        if against.open is None:
            raise UserError(f"--against: {question.against} is statistics without images; name images, or a report")
        _check_resolution("--against", against, _resolution(against), resolution)

    found = scan(samples, main, "SAMPLES")
    reference = _measured(named, main)
    numbers, missing = all_numbers(found, reference, main)
    for other in others:
        numbers.append(_by(other, question, samples, resolution))
    moved = movers(found, reference, main, question.probe) if question.probe else []
    moved += _other_weights(numbers[0], numbers[len(numbers) - len(others) :], main, others)
    compared = None if against is None else _compare(found, scan(against, main, "--against"), reference)
    form = judge_form(found, reference, main, numbers, missing, moved, compared)
    if report is not None and question.against is not None:
        form["against"] = against_report(question.against, report, form)
    return form


def _report_of(question: Question) -> JudgeForm | None:
    if question.against is None or question.against.suffix != ".json":
        return None
    return read_report(question.against)


def _open_reference(question: Question, measuring: Measuring, resolution: int) -> Judged:
    crop = None if question.crop is None else (question.crop, resolution)
    if question.crop is not None and question.crop not in CROPS:
        raise UserError(f"--crop: {question.crop}; one of {', '.join(CROPS)}")
    reference = open_judged(question.reference, "--reference", measuring.weights.extractor, crop)
    if crop and reference.crop is None:
        raise UserError(f"--crop: {question.reference} holds images that are cropped already; leave it out")
    if reference.open is not None:
        _check_resolution("--reference", reference, _resolution(reference), resolution)
    return reference


def _resolution(images: Judged) -> int:
    first = next(iter(images.iterate()), None)
    return 0 if first is None else first.shape[0]


def _check_resolution(field: str, images: Judged, found: int, wanted: int) -> None:
    if found != wanted:
        raise UserError(
            f"{field}: {images.path} has images of {found} pixels, SAMPLES have {wanted}; distances between "
            "resolutions mean nothing: name images of the same one, or the rule of a reference with --crop"
        )


def _measured(images: Judged, measuring: Measuring) -> Reference:
    return Reference.of(images, None if images.open is None else scan(images, measuring, "--reference"))


def _by(measuring: Measuring, question: Question, samples: Judged, resolution: int) -> Number:
    """The distance by another extractor."""
    reference = _measured(_open_reference(question, measuring, resolution), measuring)
    rows = measuring.rows(samples.iterate())
    return distance_number(rows, reference.statistics["pooled"], measuring.weights)


def _other_weights(mine: Number, theirs: Sequence[Number], main: Measuring, others: Sequence[Measuring]) -> list[Mover]:
    """Other weights of the same network move the number; another network gives another number."""
    return [
        Mover("weights", f"the extractor's weights {other.weights.sha256[:8]}", number.value - mine.value)
        for number, other in zip(theirs, others, strict=True)
        if other.weights.extractor == main.weights.extractor
    ]


def _compare(samples: Scan, other: Scan, reference: Reference) -> AgainstForm:
    distance = Distance(reference.statistics["pooled"])
    found, relation = causes(samples, other, distance, reference.scan)
    return against_set(other.images.path, other, relation, distance(other.pooled), found)


def extractor(named: str | None) -> Measuring:
    """The extractor `NAME`, or `NAME=WEIGHTS`; by default Inception if its weights are here, else EfficientNet-Lite0.

    Raises UserError for another name, and for weights that are missing.
    """
    name, _, weights = (named or _default()).partition("=")
    if name not in LAYERS:
        raise UserError(f"--features: {name}; one of {', '.join(LAYERS)}, or NAME=FILE with weights of its own")
    try:
        chosen = NamedExtractor(
            Evaluate(feature_extractor=name, feature_extractor_weights=weights or None)  # type: ignore[arg-type]
        )
    except UserError as error:
        raise UserError(f"--features: {str(error).partition(': ')[2]}") from None
    return Measuring(chosen.weights, tuple(chosen.layers), chosen.features, lambda: chosen.network.network)


def _default() -> str:
    return INCEPTION if find_extractor_weights(Evaluate()).path.is_file() else EFFICIENTNET

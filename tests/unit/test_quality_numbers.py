"""README's numbers of quality are those that commands wrote: of the runs in assets/measured, or in docs/results.md."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import with_config
from typing_extensions import TypedDict

from common.loading import load_recipe
from common.sealed import OPEN, read_sealed
from pipeline.reproduction.claims import TABLES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs/results.md"  # pipeline/reproduce.py writes it
ROWS = {  # how a row begins: the run, and what of it was measured
    "`make demo`": ("demo", "trained"),
    "`assets/demo`": ("demo_long", "trained"),
    "images that training never saw": ("demo_long", "held_out"),
    "these through the autoencoder": ("demo_long", "reconstruction"),
}
WORDS = {  # how a metric is called, and its name in a measurement; None: README shows none that was measured here
    "FD|distance|reach(?:es|ed)|end(?:s|ed) at": "frechet",
    "precision": "precision",
    "recall": "recall",
    r"s?FID(?:-\d+K)?|KID|PSNR|dB": None,
}
COUNT = r"\d[\d,]* (?:training |held-out )?(?:images|samples)"
MENTION = re.compile(  # a metric, its extractor, and the next number that counts no images
    rf"(?<!\w)(?P<word>{'|'.join(WORDS)})(?!\w)(?: \([^)]*\))?(?:{COUNT}|[^\d.;|]){{0,60}}?"
    rf"(?<![\w.,-])(?!{COUNT})(?P<value>\d+(?:\.\d+)?)(?!\w|[.,]\d)",
    re.IGNORECASE,
)


@with_config(OPEN)
class Number(TypedDict):
    value: float


@with_config(OPEN)
class Of(TypedDict):
    name: str
    numbers: dict[str, Number]
    recipe: dict[str, Any]


@with_config(OPEN)
class Measured(TypedDict):
    measurements: list[Of]


def measured() -> dict[tuple[str, str], dict[str, float]]:
    """By run and set: each metric. A digit that was changed by hand is refused."""
    return {
        (path.stem, one["name"]): {name: number["value"] for name, number in one["numbers"].items()}
        for path in (ROOT / "assets/measured").glob("*.json")
        for one in read_sealed(path, Measured)["measurements"]
    }


def rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def unsourced(text: str) -> Iterator[str]:
    """The numbers of quality in a Markdown text that no file holds."""
    header: list[str] = []
    generated = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    for paragraph in re.split(r"\n(?=\||\n)|(?<=\|)\n", text):  # a row of a table is one of its own
        line = " ".join(paragraph.replace("\n# ", "\n").replace("*", "").split())
        if not line.startswith("|"):
            header = []
            yield from mentions(line)
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif line not in generated and re.search(r"\w", line):
            yield from row(header, cells)
            yield from (fault for cell in cells for fault in mentions(cell))


def metric_of(word: str) -> tuple[str | None, ...]:
    """The metric that a word means, or none at all where it means no metric."""
    return tuple(name for words, name in WORDS.items() if re.fullmatch(words, word, re.IGNORECASE))


def row(header: list[str], cells: list[str]) -> Iterator[str]:
    run = next((place for start, place in ROWS.items() if cells[0].startswith(start)), None)
    for title, cell in zip(header, cells, strict=True):
        for metric in metric_of(title):
            known = measured()[run].get(metric) if run and metric else None
            if known is None or rounded(known, cell) != cell:
                yield f"{cells[0]}: {title} {cell}, measured {known}"


def mentions(text: str) -> Iterator[str]:
    """The metrics in prose whose number is none that was measured, or the paper's where the text names it."""
    for found in MENTION.finditer(text):
        (metric,) = metric_of(found["word"])
        known = [numbers[metric] for numbers in measured().values() if metric]
        if "paper" in text[max(0, found.start() - 80) : found.end() + 7]:
            known = [number for table in TABLES for by_arm in table.published.values() for number in by_arm.values()]
        if found["value"] not in {rounded(number, found["value"]) for number in known}:
            yield found[0]


@pytest.mark.parametrize("path", ["README.md", "assets/demo/README.md", "recipes/demo.yaml", "docs/start.md"])
def test_every_number_of_quality_was_written_by_a_command(path: str) -> None:
    assert not list(unsourced((ROOT / path).read_text(encoding="utf-8")))


def test_readme_shows_all_that_was_measured_of_the_demo() -> None:
    assert all(f"\n| {start}" in README for start in ROWS)
    assert {run for run, _ in ROWS.values()} == {path.stem for path in (ROOT / "assets/measured").glob("*.json")}


def test_the_demo_was_measured_as_its_recipe_is_now() -> None:
    samples = read_sealed(ROOT / "assets/measured/demo.json", Measured)["measurements"][0]
    recipe = json.loads(json.dumps(asdict(load_recipe(ROOT / "recipes/demo.yaml"))))
    for section in ("seed", "model", "objective", "train", "sample", "evaluate"):
        assert samples["recipe"][section] == recipe[section], section


@pytest.mark.parametrize(
    "changed",
    [
        ("| 34 |", "| 36 |"),
        ("| 0.74 |", "| 0.76 |"),
        ("FID-50K 43.3 (paper", "FID-50K 42.3 (paper"),
        ("FID-50K 43.3 (paper", "FID-50K 43.3 (here"),
        ("\n| images that training", "\n| another network | 12 | 0.95 | 0.94 |\n| images that training"),
        ("\n## The recipes", "\nA larger one reaches 12.5.\n\n## The recipes"),
        ("\n## The recipes", "\nIts **FD** (EfficientNet-Lite2) of 512\nimages is 31.\n\n## The recipes"),
        ("\n## The recipes", "\n| data | PSNR |\n|---|---|\n| x | 31.2 |\n\n## The recipes"),
        ("\n## The recipes", "\nWith a precision of 0.93, it is sharp.\n\n## The recipes"),
    ],
)
def test_a_number_without_a_source_is_found(changed: tuple[str, str]) -> None:
    assert changed[0] in README
    assert len(list(unsourced(README.replace(*changed)))) >= 1


def test_rows_of_the_generated_results_need_no_other_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "\n| budget | FD |\n|---|---|\n| 140, ddim | 31.2 ± 1.0 |\n"
    assert list(unsourced(table))
    (tmp_path / "results.md").write_text(table, encoding="utf-8")
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path / "results.md")
    assert not list(unsourced(table))

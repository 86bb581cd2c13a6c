"""The numbers of docs/sampling.md's tables, and README's of few blocks, are those that `pipeline/sweep.py` wrote."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.sealed import read_sealed
from pipeline.evaluation.sweep_table import TableForm

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
FILES = {"fitted": "fitted", "multistep": "multistep", "ddim": "paper"}  # by a row's way
COLUMNS = (("demo", "frechet"), ("demo", "limit"), ("demo_long", "frechet"), ("demo_long", "limit"))


def measured(name: str, metric: str, blocks: int) -> set[str]:
    """As the documents write them: the distances in a file's rows of so many blocks."""
    rows = read_sealed(ROOT / f"assets/measured/sampling/{name}.json", TableForm, "it is damaged")["rows"]
    numbers = [row["numbers"][metric] for row in rows if row["blocks"] == blocks]
    return {f"{number['value']:.1f}{end}" for number in numbers for end in ("", f" ± {number['spread']:.1f}")}


def unsourced(document: str) -> Iterator[str]:
    """The rows of the two tables that hold a number of no file."""
    part = document[document.index("`make demo`: FD |") : document.index("What to use, then")]
    for line in part.splitlines():
        if not re.match(r"\| \d", line):
            continue
        blocks, way, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        guided = "guided_" * (len(cells) == 2)
        for (network, metric), cell in zip(COLUMNS, cells, strict=False):
            name = f"{network}_{guided}{FILES[re.split('[, ]', way)[0]]}"
            if cell and cell not in measured(name, metric, int(blocks)):
                yield line


def test_the_tables_show_what_was_measured() -> None:
    assert not list(unsourced(DOCUMENT))


@pytest.mark.parametrize(
    "changed", [("| 20 | fitted, 5 x 2 | 4", "| 20 | fitted, 5 x 2 | 3"), ("| 44 | fitted", "| 88 | fitted")]
)
def test_another_number_is_found(changed: tuple[str, str]) -> None:
    assert changed[0] in DOCUMENT
    assert list(unsourced(DOCUMENT.replace(*changed)))


@pytest.mark.parametrize(("row", "name"), [("the paper's way", "demo_paper"), ("fitted", "demo_fitted")])
def test_readme_shows_the_same(row: str, name: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if "20 blocks" in line)
    blocks = [int(found) for found in re.findall(r"(\d+)(?: blocks)? (?=\|)", header)]
    cells = next(line for line in lines if line.startswith(f"| {row}")).strip("|").split("|")[1:]
    shown = {count: cell.strip() for count, cell in zip(blocks, cells, strict=True) if cell.strip()}
    assert len(shown) >= 2
    assert all(cell in measured(name, "frechet", count) for count, cell in shown.items())

"""The numbers of docs/sampling.md's tables, and README's of few blocks, are those that `pipeline/sweep.py` wrote."""

import re
from pathlib import Path

import pytest

from common.sealed import read_sealed
from pipeline.evaluation.sweep_table import TableForm

ROOT = Path(__file__).parents[2]
MEASURED = sorted((ROOT / "assets/measured/sampling").glob("*.json"))
DISTANCE = re.compile(r"\d+\.\d(?: ± \d+\.\d)?")


def measured() -> dict[int, set[str]]:
    """By blocks an image: the distances, as the documents write them."""
    found: dict[int, set[str]] = {}
    for path in MEASURED:
        for row in read_sealed(path, TableForm, "it is damaged")["rows"]:
            for name in ("frechet", "limit"):
                value, spread = row["numbers"][name]["value"], row["numbers"][name]["spread"]
                found.setdefault(row["blocks"], set()).update((f"{value:.1f}", f"{value:.1f} ± {spread:.1f}"))
    return found


def unsourced(document: str) -> list[str]:
    """Of docs/sampling.md: cells of the two tables whose number was not measured at those blocks."""
    tables = document[document.index("`make demo`: FD |") : document.index("What to use, then")]
    rows = [line.strip("|").split("|") for line in tables.splitlines() if re.match(r"\| \d", line)]
    return [
        cell
        for blocks, _way, *cells in rows
        for cell in map(str.strip, cells)
        if cell and cell not in measured()[int(blocks)]
    ]


def test_the_tables_show_what_was_measured() -> None:
    text = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
    assert not unsourced(text)
    assert unsourced(text.replace("| 20 | fitted, 5 x 2 | 4", "| 20 | fitted, 5 x 2 | 3"))


@pytest.mark.parametrize("row", ["the paper's way", "fitted"])
def test_readme_shows_the_same(row: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if "20 blocks" in line)
    blocks = [int(found) for found in re.findall(r"(\d+)(?: blocks)? (?=\|)", header)]
    cells = next(line for line in lines if line.startswith(f"| {row}")).strip("|").split("|")[1:]
    shown = {count: cell.strip() for count, cell in zip(blocks, cells, strict=True) if cell.strip()}
    assert len(shown) >= 2
    assert all(cell in measured()[count] for count, cell in shown.items())

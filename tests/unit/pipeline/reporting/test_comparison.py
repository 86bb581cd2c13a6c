"""Runs are compared by the same noise, at equal blocks and equal training computation; the page says what differs."""

import json
import re
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.log_lines import append_line
from common.recipe import Recipe
from common.run_recipe import write_recipe
from pipeline.reporting import comparison
from pipeline.reporting.comparison import Compared, at_blocks, compare, draw, loss_at, notes, page, read_run
from pipeline.sampling.plans import blocks_an_image
from tests.conftest import copied, generated, load_samples


@pytest.fixture(scope="module")
def runs(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    """The same run twice; the second one's samples cost twice the blocks, and it logged less."""
    made = []
    for number, steps in enumerate((3, 6)):
        recipe = copied(tiny_run, tmp_path_factory.mktemp("runs"))
        recipe = replace(recipe, sample=replace(recipe.sample, num_steps=steps))
        write_recipe(recipe)
        for samples in range(16, 80 - 32 * number, 16):
            append_line(recipe.folder / "metrics.jsonl", {"samples": samples, "step": samples, "loss": 1 / samples})
        made.append(recipe)
    return made


@pytest.fixture(scope="module")
def compared(runs: list[Recipe]) -> Compared:
    return compare([recipe.folder for recipe in runs], None, 4)


def test_pictures_are_drawn_from_the_same_noise_at_the_blocks_of_the_cheapest(
    runs: list[Recipe], compared: Compared
) -> None:
    assert [drawn.blocks for drawn in compared.drawn] == [12, 12]
    assert (compared.drawn[0].images == compared.drawn[1].images).all()  # equal weights, noise and blocks
    own, labels = load_samples(generated(runs[0]), 10)
    assert np.abs(own[:4].astype(int) - compared.drawn[0].images).max() <= 1
    assert compared.drawn[0].classes == [f"class {label}" for label in labels[:4]]  # no list of them is here
    assert [row["blocks"] for row in compared.rows] == [12, 24]


def test_weights_are_taken_from_where_the_shortest_training_ended(runs: list[Recipe]) -> None:
    run = read_run(runs[0].folder)
    assert (run.samples_seen, run.pflop) == (64, 64 * run.flops_a_sample / 1e15)
    assert [loss_at(run, share * run.pflop) for share in (1, 0.5, 0.1)] == [1 / 64, 1 / 32, None]
    drawn = draw(run, run.pflop / 2, 12, 1)
    assert drawn.samples_seen == 64  # the only trained ones
    assert "saved no weights of as little" in Compared([run], [drawn], run.pflop / 2, 12).notes[-1]


@pytest.mark.parametrize("blocks", [8, 13, 50])
def test_a_budget_is_spent_exactly(tiny_recipe: Recipe, blocks: int) -> None:
    assert blocks_an_image(at_blocks(tiny_recipe, blocks)) == blocks


def test_too_few_blocks_and_a_folder_without_a_run_are_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--blocks: 1: .*no combination can be drawn"):
        at_blocks(tiny_recipe, 1)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        read_run(tmp_path)


def test_what_does_not_compare_is_said(runs: list[Recipe]) -> None:
    run = read_run(runs[0].folder)
    other = replace(run, name="b", recipe=replace(run.recipe, seed=1), flops_a_sample=2 * run.flops_a_sample)
    assert notes([run, run]) == ["Not evaluated: tiny, tiny; python pipeline/eval_fid.py does it."]
    said = "\n".join(notes([run, other]))
    assert "same place in the pictures is not the same noise" in said
    assert "Their trainings differ in computation" in said


def test_classes_have_their_names_on_the_page_and_in_the_table(
    runs: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "class_names", lambda recipe: ["cat", "<b>dog</b>", "fox"])
    compared = compare([recipe.folder for recipe in runs], None, 4)
    names = compared.rows[0]["drawn"]["classes"]
    assert set(names) <= {"cat", "<b>dog</b>", "fox"}
    assert len(names) == 4
    page(compared, tmp_path / "compare.html")
    shown = re.findall(r"<h4>(.*?)</h4>", (tmp_path / "compare.html").read_text())
    assert shown == [escape(name) for name in dict.fromkeys(names)]
    assert compared.drawn[0].of_class("cow") is None


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_shows_all_pictures_and_fits(
    compared: Compared, width: int, tmp_path: Path, chromium: list[str]
) -> None:
    page(compared, tmp_path / "compare.html")
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "broken: [...document.images].filter(one => !one.naturalWidth).length, images: document.images.length,"
        "overflow: document.documentElement.scrollWidth - innerWidth}); })</script></body>"
    )
    written = (tmp_path / "compare.html").read_text()
    (tmp_path / "inner.html").write_text(written.replace("</body>", probe))
    command = [*chromium, f"--window-size={width},900", "--dump-dom", (tmp_path / "inner.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", shown.stdout)
    assert title, shown.stderr
    seen = json.loads(title[1])
    assert (seen["broken"], seen["images"]) == (0, 1 + 2 * len(compared.classes))
    assert seen["overflow"] <= 0

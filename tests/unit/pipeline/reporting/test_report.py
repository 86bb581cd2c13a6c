"""From images and weights to distances that say what they were made of, and to a page that needs nothing else."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import Refused, UserError
from common.log_lines import append_line
from common.provenance import provenance
from common.recipe import Recipe
from common.run_folder import RunFolder, SampleFolder
from common.stage_checks import check_stages
from common.stage_jobs import run_job, steps
from common.stage_times import write_time
from pipeline.evaluation import references
from pipeline.evaluation.measurements import Evaluation
from pipeline.evaluation.stage import STAGE as EVALUATE
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.reporting import contact_sheet
from pipeline.reporting.cost import as_dit, receipt
from pipeline.reporting.nearest import nearest
from pipeline.reporting.page import TEMPLATE, context, render
from pipeline.reporting.stage import STAGE as REPORT
from pipeline.sampling import iterates
from pipeline.sampling.sample_set import Sampling, sample_set
from pipeline.sampling.stage import STAGE as SAMPLE
from pipeline.stages import select
from tests.conftest import copied, load_samples, run_stage
from tests.json_files import read_json

HOSTILE = '<img src="http://host/x" onerror=alert(1)>&$x_{'.replace("/", "\N{DIVISION SLASH}")


@pytest.fixture(scope="module")
def measured(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Sampled and evaluated. What it is compared with: three classes of one colour each, one of a hostile name."""
    generator = np.random.default_rng(0)
    for folder, count in ((tiny_run.data.images, 4), (tiny_run.data.held_out, 2)):
        for label, name in enumerate((HOSTILE, "a", "b")):
            (Path(folder) / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(Path(folder) / name / f"{number}.png")
    recipe = replace(
        copied(tiny_run, tmp_path_factory.mktemp("measured")),
        sample=replace(tiny_run.sample, save_images=9),
        evaluate=replace(tiny_run.evaluate, untrained_baseline=True, reference_samples=6),
    )
    run_stage(SAMPLE, recipe)
    assert not EVALUATE.is_finished(recipe)
    run_stage(EVALUATE, recipe)
    losses = {"samples": 64, "step": 1, "loss": 0.5}
    (recipe.folder / "metrics.jsonl").write_text(json.dumps(losses) + "\n")
    (recipe.folder / "provenance.jsonl").write_text(json.dumps({"stage": "train", "command": HOSTILE}) + "\n")
    return recipe


@pytest.fixture
def recipe(measured: Recipe, tmp_path: Path) -> Recipe:
    return copied(measured, tmp_path / "runs")


def metrics_of(recipe: Recipe) -> dict[str, Any]:
    return read_json(recipe.folder / "metrics.json")


def test_each_distance_says_what_it_was_made_of(recipe: Recipe) -> None:
    assert EVALUATE.is_finished(recipe)
    metrics = metrics_of(recipe)
    assert metrics["distance"] == "FD (EfficientNet-Lite0)"
    assert list(metrics["distances"]) == ["held_out", "reconstruction", "trained", "untrained"]
    assert all(value > 0 for value in metrics["distances"].values())
    trained = metrics["measurements"][0]
    assert trained["count"] == trained["content"]["ranges"][0][1] == 10
    assert trained["reference"]["count"] == 6
    assert trained["content"]["seed"] == 0
    assert trained["content"]["sample"]["num_steps"] == 3
    assert len(trained["content"]["weights_sha256"]) == len(trained["extractor"]["weights_sha256"]) == 64
    assert trained["provenance"]["packages"]["torch-fidelity"]


def test_what_is_measured_is_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = metrics_of(recipe)
    (recipe.folder / "metrics.json").unlink()
    assert not EVALUATE.is_finished(recipe)
    monkeypatch.setattr("pipeline.features.extractors.load_extractor", None)
    run_stage(EVALUATE, recipe)
    assert metrics_of(recipe) == metrics


def test_another_reference_is_another_measurement(recipe: Recipe) -> None:
    fewer = replace(recipe, evaluate=replace(recipe.evaluate, reference_samples=5))
    assert not EVALUATE.is_finished(fewer)
    before = metrics_of(recipe)["distances"]
    run_stage(EVALUATE, fewer)
    after = metrics_of(recipe)["distances"]
    assert all(before[name] != after[name] for name in before)
    assert not EVALUATE.is_finished(recipe)  # metrics.json is the other recipe's now


def test_missing_samples_are_named_before_anything_is_measured(recipe: Recipe) -> None:
    fewer = replace(recipe, evaluate=replace(recipe.evaluate, reference_samples=5))
    for chunk in sample_set(recipe, 0).folder.rglob("chunk-*"):
        chunk.unlink()
    before = sorted((recipe.folder / "eval").rglob("*"))
    with pytest.raises(UserError, match=r"samples 0 to 9 of 10 are missing; run python pipeline/sample\.py"):
        run_stage(EVALUATE, fewer)
    for stages, fault in (
        ("evaluate", "samples 0 to 9 of 10 are missing"),
        ("report", "metrics.json: not there, or of"),
    ):
        with pytest.raises(Refused, match=fault):  # before anything is started, too
            check_stages(fewer, select(fewer, stages), "local", fetches=False)
    assert sorted((recipe.folder / "eval").rglob("*")) == before


def test_the_reference_is_spaced_over_all_classes(recipe: Recipe) -> None:
    pictures = references.reference(recipe).iterate()
    assert [int(picture.mean(axis=(0, 1)).argmax()) for picture in pictures] == [0, 0, 1, 1, 2, 2]


def test_a_rejected_image_is_left_out_of_the_reference_and_not_counted(recipe: Recipe, tmp_path: Path) -> None:
    images = shutil.copytree(recipe.data.images, tmp_path / "images")
    (images / "a" / "2.png").write_bytes(b"no picture")
    run_stage(EVALUATE, replace(recipe, data=replace(recipe.data, images=str(images), held_out=None)))
    assert [found["reference"]["count"] for found in metrics_of(recipe)["measurements"]] == [5, 5]


def test_a_panel_shows_a_class_with_its_own_images(recipe: Recipe) -> None:
    panels = contact_sheet.class_panels(Sampling.of(recipe))
    origins = ["real", "drawn after 64 training samples", "drawn before training"]
    assert [[block.origin for block in panel] for panel in panels] == [origins] * 3
    images, labels = load_samples(sample_set(recipe, "latest").folder, 10)
    expected = contact_sheet.grid(list(images[labels == 1][:3]))
    assert (panels[1][1].grid == expected).all()
    assert [panel[0].title for panel in panels] == [HOSTILE, "a", "b"]


def test_the_training_image_nearest_to_each_sample_is_found_unless_one_may_be_missing(
    recipe: Recipe, tmp_path: Path
) -> None:
    images, _ = load_samples(sample_set(recipe, "latest").folder, 10)
    for number in (4, 7, 8):
        (tmp_path / f"images/{number}").mkdir(parents=True)
        Image.fromarray(images[number]).save(tmp_path / f"images/{number}/0.png")
    data = replace(recipe.data, images=str(tmp_path / "images"), held_out=None, shards=str(tmp_path / "none"))
    evaluation = Evaluation.of(replace(recipe, data=data, evaluate=replace(recipe.evaluate, reference_samples=None)))
    evaluation.samples[0].extract()
    assert nearest(evaluation, [7, 4]) == []  # nothing is extracted for it
    evaluation.yardstick.prepare_reference()
    found = nearest(evaluation, [7, 4])
    assert (found[0] == images[7]).all()
    assert (found[1] == images[4]).all()
    panels = contact_sheet.class_panels(evaluation.sampling, partial(nearest, evaluation))
    assert [block.origin for block in panels[0]][2] == contact_sheet.NEAREST
    kept = evaluation.yardstick.kept_reference
    assert kept is not None
    fewer = SimpleNamespace(kept_reference=replace(kept, rows={"pooled": kept.rows["pooled"][:1]}))
    assert nearest(replace(evaluation, yardstick=fewer), [7]) == []  # one was rejected, and no index says which


def test_the_receipt_counts_devices_operations_and_the_dit(recipe: Recipe) -> None:
    trained = replace(recipe, train=replace(recipe.train, total_samples=64, batch_size=16))
    append_line(recipe.folder / "provenance.jsonl", {"stage": "train", "ranks": 4})
    write_time(RunFolder(recipe.folder), "train", 1800.0)
    lines = dict(receipt(trained, 64, "NVIDIA H100 80GB HBM3"))
    assert lines["GPU-hours"] == "2: train 2"  # of four
    assert lines["energy"] == "at most 1.4 kWh, at the H100's rated power of 700 W"
    assert "PFLOP for 64 samples" in lines["training"]
    (dit,) = (value for name, value in lines.items() if name.startswith("a DiT of"))
    assert "blocks an image in as many steps instead of 12" in dit
    assert dict(receipt(trained, 64, None))["energy"] == "not known: no rated power of this CPU"
    assert not any(name.startswith("a DiT") for name, _ in receipt(as_dit(trained), 64, None))


def test_a_precision_of_zero_has_a_sentence_and_the_command_is_as_typed(recipe: Recipe) -> None:
    def page(precision: float) -> str:
        values = context(recipe)
        values["measurements"][0]["numbers"] |= {"precision": {"name": "precision", "value": precision, "spread": None}}
        losses = [{"samples": 64, "step": 1, "loss": 0.5}]
        return render(TEMPLATE, **values, panels=[], fixed_point=None, losses=losses, loss_curve=b"", inputs="")

    assert "A precision of 0: not one sample" in page(0.0)
    assert "A precision of 0" not in page(0.1)
    assert "<p>Training was started by:</p>\n<pre>&lt;img src=" in page(0.1)


def test_a_job_records_the_command_that_submitted_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDM_COMMAND", "")  # which a job in this process may have set
    monkeypatch.setattr(sys, "orig_argv", ["python", "pipeline/run.py", "--config", "my recipe.yaml"])
    (step,) = steps(recipe, REPORT, "local")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "submitit.core._submit"])
    functions = dict.fromkeys(("call", "resolve"), "common.stage:the_recipe")
    run_job(recipe, **{**step.jobs[0].arguments, **functions, "timed": False})
    assert provenance()["command"] == "python pipeline/run.py --config 'my recipe.yaml'"


def test_the_report_needs_the_evaluation(recipe: Recipe) -> None:
    (recipe.folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json: not there, .* run python pipeline/eval_fid\.py"):
        run_stage(REPORT, recipe)
    assert not REPORT.is_finished(recipe)


def test_a_damaged_measurement_is_said_to_be_damaged(recipe: Recipe) -> None:
    run_stage(EVALUATE, recipe)
    path = recipe.folder / "metrics.json"
    path.write_text(path.read_text().replace("frechet", "frechat", 1))
    with pytest.raises(UserError, match=r"metrics\.json: changed after it was written"):
        run_stage(REPORT, recipe)


def test_the_report_stands_alone_and_escapes_every_name(recipe: Recipe) -> None:
    run_stage(REPORT, recipe)
    page = (recipe.folder / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;img src=" in page
    # Three blocks of three classes, six numbers of iterations, four of steps, and the loss.
    assert page.count("<img ") == 3 * 3 + 6 + 4 + 1
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r'(?:src|href)="([^"]*)', page))
    assert not re.search(r"<script|<link|<iframe|@import|url\(|srcset", page)
    with Image.open(recipe.folder / "samples.png") as sheet:
        assert sheet.width > 3 * 2 * 128


NAMES = {
    "half a character": "caf\ud800\udce9",
    "a terminal's command": "\x1b[2J\x00\x7f\x9b",
    "from right to left": "\u202egnp.exe\u2066",
    "a script": "<script>alert(1)</script>",
    "pictures": "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "lines": "a\nb\r\n\u2028c\x85",
    "a megabyte": "x" * 2**20,
    "nothing": "",
}


@pytest.mark.parametrize("case", NAMES)
def test_whatever_a_class_is_called_the_report_is_made_and_shows_it(
    recipe: Recipe, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_class = contact_sheet.by_class
    monkeypatch.setattr(contact_sheet, "by_class", lambda *given: (NAMES[case], by_class(*given)[1]))
    line = json.dumps({"stage": "train", "command": NAMES[case][:1000], "packages": {NAMES[case][:1000]: "1"}})
    (recipe.folder / "provenance.jsonl").write_text(f"{line}\n")
    run_stage(REPORT, recipe)
    page = re.sub(r'src="[^"]*"', "", (recipe.folder / "report.html").read_bytes().decode("utf-8"))
    assert "<script" not in page
    assert all(line.isprintable() for line in page.split("\n"))
    assert len(page) < 50_000
    assert REPORT.is_finished(recipe)


def test_a_sweeps_table_and_image_are_in_the_report(recipe: Recipe) -> None:
    run_stage(REPORT, recipe)
    run_stage(SWEEP, replace(recipe, sweep=replace(recipe.sweep, budgets=(8,), iterations=(2,), sampler=("ddim",))))
    assert not REPORT.is_finished(recipe)
    run_stage(REPORT, recipe)
    assert REPORT.is_finished(recipe)
    page = (recipe.folder / "report.html").read_text(encoding="utf-8")
    # As above, the nearest training image of each sheet, whose features the sweep kept, and the sweep's plot.
    assert page.count("<img ") == 3 * 3 + 6 + 4 + 1 + 3 + 1
    assert "<h2>Ways of sampling</h2>" in page
    assert re.search(r"<tr><td>8</td><td>8</td><td>ddim</td><td>2</td><td>2</td><td>constant</td>", page)


def test_the_report_says_fid_only_to_say_that_it_is_none(recipe: Recipe) -> None:
    run_stage(REPORT, recipe)
    page = re.sub(r'src="[^"]*"', "", (recipe.folder / "report.html").read_text(encoding="utf-8"))
    assert "FD (EfficientNet-Lite0)" in page
    assert re.findall(r".*\bFID\b.*", page) == [
        "This is not FID: another network sees the images, so that the number compares with others of its kind only."
    ]


def test_a_loss_that_was_not_finite_and_a_line_that_is_still_written_are_passed_over(recipe: Recipe) -> None:
    log = recipe.folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"samples": 128, "step": 2, "loss": null}\n{"samp')
    run_stage(REPORT, recipe)
    assert "the last is 0.5000" in (recipe.folder / "report.html").read_text(encoding="utf-8")
    log.write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no line has a loss"):
        run_stage(REPORT, recipe)


def test_a_report_of_older_numbers_is_made_again(recipe: Recipe) -> None:
    run_stage(REPORT, recipe)
    assert REPORT.is_finished(recipe)
    with open(recipe.folder / "metrics.jsonl", "a") as lines:
        lines.write('{"samples": 128, "step": 2, "loss": 0.4}\n')
    assert not REPORT.is_finished(recipe)


def test_the_fixed_point_is_shown_after_more_and_fewer_iterations_and_steps(recipe: Recipe) -> None:
    drawn = iterates.read(sample_set(recipe, "latest"))
    assert drawn is not None
    images, _ = load_samples(sample_set(recipe, "latest").folder, 10)
    # The recipe's own cost gives its own samples; its counts are those of sampling.
    assert list(drawn.steps) == [1, 2, 3, 6]
    assert (drawn.by_steps[2] == images[:4]).all()
    assert list(drawn.blocks) == [(2 + 2) * steps for steps in drawn.steps]
    # Iterations change the images, and the residual falls.
    moved = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(drawn.by_iterations)]
    assert moved[0] > 0
    assert drawn.residuals.shape == (3, 26)
    assert (drawn.residuals[:, -1] < drawn.residuals[:, 0]).all()
    run_stage(REPORT, recipe)
    page = (recipe.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<polyline") == 6 * 3  # a curve a step, in the chart of each number of iterations
    (SampleFolder(sample_set(recipe, "latest").folder).iterates).unlink()
    assert not SAMPLE.is_finished(recipe)
    assert not REPORT.is_finished(recipe)


def test_in_a_browser_the_page_shows_its_images_fits_a_phone_and_runs_nothing(
    measured: Recipe, recipe: Recipe, chromium: list[str]
) -> None:
    shutil.copytree(RunFolder(measured.folder).references, RunFolder(recipe.folder).references)
    run_stage(REPORT, recipe)
    page = recipe.folder / "report.html"
    assert "<h2>What it cost</h2>" in page.read_text()
    # What the browser sees is written into the page by a probe that only this copy holds.
    probe = (
        "<script>addEventListener('load', () => { const pictures = [...document.images];"
        "document.title = JSON.stringify({pictures: pictures.length,"
        "broken: pictures.filter(picture => !picture.naturalWidth).length,"
        "overflow: document.documentElement.scrollWidth - innerWidth}); })</script>"
    )
    copy = recipe.folder / "probed.html"
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    shown = subprocess.run(
        [*chromium, "--window-size=500,900", "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(\{.*?\})</title>", shown.stdout)  # one an attacker's script had set would be another
    assert title is not None, shown.stderr
    seen = json.loads(title[1])
    assert seen["pictures"] == (3 + 1) * 3 + 6 + 4 + 1  # the nearest training images among them
    assert seen["broken"] == 0
    assert seen["overflow"] <= 0


def test_in_a_browser_a_dial_shows_one_of_its_frames_and_another_when_it_is_turned(
    recipe: Recipe, chromium: list[str]
) -> None:
    run_stage(REPORT, recipe)
    page = (recipe.folder / "report.html").read_text()
    probe = (
        "<script>addEventListener('load', () => { const shown = () => [...document.querySelectorAll('.frame')]"
        ".map((frame, place) => frame.offsetHeight ? place : -1).filter(place => place >= 0);"
        "const before = shown(); document.querySelectorAll('.dial input')[1].click();"
        "document.title = JSON.stringify([before, shown()]); })</script>"
    )
    copy = recipe.folder / "probed.html"
    copy.write_text(page.replace("</body>", f"{probe}</body>"))
    command = [*chromium, "--window-size=500,900", "--dump-dom", copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # Six numbers of iterations, then four of blocks: the most of the ones and the recipe's own of the others.
    assert "<title>[[5,8],[1,8]]</title>" in shown.stdout, shown.stderr

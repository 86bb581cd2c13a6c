"""Numbers under a seal: in a run folder a flipped bit is named or mended, and no edit is a traceback."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.log_lines import LogLine, append_line, read_log
from common.provenance import Started
from common.recipe import Recipe
from common.run_folder import RunFolder, counted, weights_folder
from common.run_recipe import read_recipe, write_recipe
from common.run_weights import describe, find_weights, load_network
from common.stage_times import read_times, write_time
from fpdm.diffusers_folders import CONFIG_NAME, WEIGHTS_NAME
from pipeline.evaluation import evaluate
from pipeline.evaluation.measurements import Evaluation
from pipeline.evaluation.stage import STAGE as EVALUATE
from pipeline.evaluation.statistics import read_summary
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.evaluation.sweep_table import read_table
from pipeline.orchestration.code_snapshot import take_snapshot
from pipeline.reporting import page
from pipeline.reporting.stage import STAGE as REPORT
from pipeline.sampling import chunks, plans
from pipeline.sampling.sample_set import sample_set
from pipeline.sampling.stage import STAGE as SAMPLE
from tests.conftest import copied, features_folder, generated, load_samples, run_stage
from tests.json_files import read_json
from tests.seals import WRONG, edits, flips, resealed
from tests.unit.pipeline.evaluation.test_evaluation import sampled  # noqa: F401
from tests.watching_files import only_below


@pytest.fixture(scope="module")
def measured(sampled: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:  # noqa: F811
    """With all that stages leave for those after them."""
    recipe = copied(sampled, tmp_path_factory.mktemp("sealed"))
    recipe = replace(recipe, sweep=replace(recipe.sweep, budgets=(8,), iterations=(2,), sampler=("ddim",)))
    run_stage(EVALUATE, recipe)
    run_stage(SWEEP, recipe)
    write_recipe(recipe)
    for samples_seen in (32, 64):
        append_line(recipe.folder / "metrics.jsonl", {"samples": samples_seen, "step": samples_seen // 32, "loss": 0.5})
        append_line(recipe.folder / "provenance.jsonl", {"stage": "train", "from_samples": samples_seen})
    for stage in ("train", "sample"):
        write_time(RunFolder(recipe.folder), stage, 2.5)
    return recipe


@pytest.fixture
def recipe(measured: Recipe, tmp_path: Path) -> Recipe:
    return copied(measured, tmp_path / "runs")


def drawn_in(recipe: Recipe) -> Path:
    return sample_set(recipe, "latest").folder


def eval_file(recipe: Recipe) -> Path:
    evaluation = Evaluation.of(recipe)
    return evaluation.path_of(evaluation.samples[0])


def plan_of(recipe: Recipe) -> dict[str, Any]:
    return asdict(plans.read_plan(recipe, drawn_in(recipe)))


def first_chunk(recipe: Recipe) -> Path:
    return min(drawn_in(recipe).glob("chunk-*"))


def first_features(recipe: Recipe) -> Path:
    return min(features_folder(recipe).glob("chunk-*"))


def rows_of(path: Path) -> dict[str, Any]:
    return {name: rows.tolist() for name, rows in chunks.read_chunk(path).items()}


def reference_file(recipe: Recipe) -> Path:
    folder = RunFolder(recipe.folder).references
    if not folder.exists():
        Evaluation.of(recipe).yardstick.prepare_reference()
    return min(folder.glob("*.npz"))


def network_of(recipe: Recipe) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_network(weights_folder(recipe, 64)).state_dict().items()}


Reader = tuple[Callable[[Recipe], Path], Callable[[Recipe], Any]]  # the file, and what is read of it
JSON: dict[str, Reader] = {
    "plan.json": (lambda r: drawn_in(r) / "plan.json", plan_of),
    "eval": (eval_file, lambda r: Evaluation.of(r).measured(Evaluation.of(r).samples[0])),
    "metrics.json": (lambda r: r.folder / "metrics.json", lambda r: evaluate.read_metrics(RunFolder(r.folder))),
    "table.json": (lambda r: r.folder / "sweep/table.json", lambda r: read_table(RunFolder(r.folder))),
    "config.json": (lambda r: weights_folder(r, 64) / CONFIG_NAME, lambda r: describe(weights_folder(r, 64))),
    "stages.json": (lambda r: r.folder / "stages.json", lambda r: read_times(RunFolder(r.folder))),
}
READERS: dict[str, Reader] = JSON | {
    "chunk": (first_chunk, lambda r: rows_of(first_chunk(r))),
    "features": (first_features, lambda r: rows_of(first_features(r))),
    "weights": (lambda r: weights_folder(r, 64) / WEIGHTS_NAME, network_of),
    "reference": (reference_file, lambda r: read_summary(reference_file(r), "").statistics["pooled"].count),
}
FLIPS = (60, pytest.param(400, marks=pytest.mark.slow))


def tried(reader: Callable[[Recipe], Any], recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """What it reads, None where it refuses, and its one line."""
    try:
        found, said = reader(recipe), ""
    except UserError as error:
        found, said = None, f"{error}\n"
    said += capsys.readouterr().err
    assert said.count("\n") <= 1
    return found, said


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_named_by_whoever_reads_the_file(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], name: str, count: int
) -> None:
    find, reader = READERS[name]
    path = find(recipe)
    expected, _ = tried(reader, recipe, capsys)
    assert expected
    for bit in flips(path, np.random.default_rng(0), count):
        found, said = tried(reader, recipe, capsys)
        assert str(path) in said or found == expected, bit


@pytest.mark.parametrize("name", JSON)
def test_an_edited_field_under_a_new_seal_is_one_line_or_a_value_of_its_form(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    find, reader = JSON[name]
    path = find(recipe)
    whole = {field: value for field, value in json.loads(path.read_text()).items() if field != "content_key"}
    expected, _ = tried(reader, recipe, capsys)
    told = 0
    read = [Path(recipe.runs), Path(recipe.vae.path), Path(recipe.data.images)]
    for edited in edits(whole, np.random.default_rng(0), 150, (*WRONG, "/etc/passwd", f"{path.parents[3]}/x", "~")):
        resealed(path, lambda _, edited=edited: edited)
        with only_below(*read):
            found, said = tried(reader, recipe, capsys)
        told += str(path) in said
        assert str(path) in said or type(found) is type(expected)
    assert told > 20


def test_a_digit_changed_in_a_measurement_or_in_metrics_is_measured_again(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value = eval_file(recipe), evaluate.read_metrics(RunFolder(recipe.folder))["measurements"][0]["value"]
    for changed in (path, recipe.folder / "metrics.json"):
        text = changed.read_text()
        digit = str(value)[0]
        changed.write_text(text.replace(str(value), f"{(int(digit) + 1) % 10}{str(value)[1:]}"))
        assert changed.read_text() != text
        assert not EVALUATE.is_finished(recipe)
        run_stage(EVALUATE, recipe)
        assert EVALUATE.is_finished(recipe)
        assert read_json(changed)["content_key"]
        assert evaluate.read_metrics(RunFolder(recipe.folder))["measurements"][0]["value"] == pytest.approx(
            value, rel=1e-9
        )
    assert f"warning: {path}: changed after it was written" in capsys.readouterr().err
    resealed(path, lambda found: found.update(value=1.0))
    assert not EVALUATE.is_finished(recipe)


def test_an_edited_plan_is_written_again_and_a_measured_one_refused(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = drawn_in(recipe) / "plan.json", plan_of(recipe)
    for change in (lambda plan: plan.update(iterations=[1, 1, 4]), lambda plan: plan.update(reuse=False)):
        resealed(path, change)
        min(drawn_in(recipe).glob("chunk-*")).unlink()
        generated(recipe, "latest")
        assert f"warning: {path}: not the plan that the recipe says" in capsys.readouterr().err
        assert plan_of(recipe) == whole
    measured = replace(recipe, sample=replace(recipe.sample, allocation="adaptive", calibration_samples=2))
    folder = generated(measured, "latest")
    min(folder.glob("chunk-*")).unlink()
    text = (folder / "plan.json").read_text()
    for changed in ("", text.replace("true", "false"), None):
        (folder / "plan.json").unlink() if changed is None else (folder / "plan.json").write_text(changed)
        with pytest.raises(UserError, match=r"plan\.json: .*; delete the folder and run python pipeline/sample"):
            generated(measured, "latest")


def test_a_flipped_mantissa_in_the_weights_draws_no_image(recipe: Recipe) -> None:
    min(drawn_in(recipe).glob("chunk-*")).unlink()
    path = weights_folder(recipe, 64) / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: changed after it was written"):
        generated(recipe, "latest")
    whole = json.loads((path.parent / CONFIG_NAME).read_text())
    del whole["content_key"], whole["weights_sha256"]
    (path.parent / CONFIG_NAME).write_text(json.dumps(whole))
    with pytest.raises(UserError, match="has no seal, which all weights of a run have"):
        generated(recipe, "latest")


def test_a_chunk_whose_arrays_are_exchanged_under_right_checksums_of_zip_is_named(recipe: Recipe) -> None:
    folder = drawn_in(recipe)
    for path in (min(folder.glob("chunk-*")), min(features_folder(recipe).glob("chunk-*"))):
        with np.load(path) as arrays:
            changed = {name: array.copy() for name, array in arrays.items()}
        rows = changed["images" if "images" in changed else "pooled"]
        rows[0] = rows[1]
        np.savez(path, **changed)
        with pytest.raises(UserError, match=f"{path}: damaged, or not written by this version; delete it and run"):
            chunks.read_chunk(path)


def test_a_damaged_summary_of_the_reference_is_made_again(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    value = evaluate.read_metrics(RunFolder(recipe.folder))["measurements"][0]["value"]
    Evaluation.of(recipe).yardstick.prepare_reference()
    (path,) = (Path(recipe.runs) / ".references").glob("*.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    eval_file(recipe).unlink()
    run_stage(EVALUATE, recipe)
    assert evaluate.read_metrics(RunFolder(recipe.folder))["measurements"][0]["value"] == value
    assert f"warning: {path}: damaged" in capsys.readouterr().err
    assert read_summary(path, "").statistics


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "provenance.jsonl"])
def test_a_damaged_or_cut_line_of_a_log_is_left_out_with_a_warning(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], name: str, count: int
) -> None:
    path, form = recipe.folder / name, Started if name == "provenance.jsonl" else LogLine
    lines = read_log(path, form)
    assert len(lines) == 2
    for _ in flips(path, np.random.default_rng(0), count):
        found, said = read_log(path, form), capsys.readouterr().err
        kept = [{field: line[field] for field in lines[0] if field in line} for line in found]
        # Nothing to say of the end of the last line, which may still be written, or of the seal's own name.
        assert f"{path}: line " in said or kept in (lines, lines[:1])
        assert all(line in lines for line in kept)
    with open(path, "ab") as log:
        log.write(b'{"samples": 96, "st')
    append_line(path, {"samples": 128, "stage": "train"})
    assert len(read_log(path, form)) == 3
    run_stage(REPORT, recipe)
    assert f"{path}: line 3: not readable" in capsys.readouterr().err


@pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_recipe_of_a_run_that_is_a_reference_is_named(recipe: Recipe, count: int) -> None:
    path, whole = recipe.folder / "recipe.yaml", read_recipe(recipe.folder)
    named = 0
    for _ in flips(path, np.random.default_rng(0), count):
        try:
            assert read_recipe(recipe.folder) == whole
        except UserError as error:
            named += str(path) in str(error)
    assert named > 0.8 * count


def test_damaged_times_are_told_and_fail_no_stage(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.folder / "stages.json").write_bytes(b"\xff")
    run_stage(REPORT, recipe)
    write_time(RunFolder(recipe.folder), "evaluate", 1.0)
    assert read_times(RunFolder(recipe.folder)) == {"evaluate": 1.0}
    assert f"warning: {RunFolder(recipe.folder).times}: not readable as JSON" in capsys.readouterr().err
    (recipe.folder / "stages.json").unlink()
    (recipe.folder / "stages.json").mkdir()
    write_time(RunFolder(recipe.folder), "evaluate", 1.0)
    assert f"warning: {RunFolder(recipe.folder).times}: a folder, where a file" in capsys.readouterr().err


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("name", ["report.html", "samples.png"])
def test_a_flipped_bit_in_the_report_makes_it_again(recipe: Recipe, name: str, count: int) -> None:
    run_stage(REPORT, recipe)
    path, shown = recipe.folder / name, page.Report(recipe)
    pristine = path.read_bytes()
    assert page.finished(shown)
    for bit in flips(path, np.random.default_rng(0), count):
        assert not page.finished(shown), bit
    path.write_bytes(pristine[:-1])
    assert not page.finished(shown)
    run_stage(REPORT, recipe)
    assert page.finished(page.Report(recipe))


def test_copies_beside_weights_and_chunks_are_none(recipe: Recipe) -> None:
    weights, folder = recipe.folder / "weights", drawn_in(recipe)
    for name in ("000000000064.bak", "000000000128 (copy)", "128"):
        (weights / name / "0.9999").mkdir(parents=True)
    assert [path.name for path in counted(weights)] == ["000000000000", "000000000064"]
    assert find_weights(recipe, "latest")[0] == 64
    images, _ = load_samples(folder, 10)
    for span in ("00000000-00000010.npz.bak", "0-10.npz", "٠٠٠٠٠٠٠٠-00000010.npz", "000000000-00000010.npz"):
        (folder / f"chunk-{span}").write_bytes(b"mine")
    assert (load_samples(folder, 10)[0] == images).all()


def test_what_killed_samplers_and_evaluations_left_is_removed(recipe: Recipe) -> None:
    folder = drawn_in(recipe)
    beside = [folder / "chunk-00000000-00000004.npz", features_folder(recipe) / "chunk-00000000-00000004.npz"]
    beside += [eval_file(recipe), recipe.folder / "eval/statistics/reference-1.npz"]
    left = [path.with_name(f".{path.name}.node.77.tmp") for path in beside]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    beside[0].unlink()
    run_stage(SAMPLE, recipe)
    eval_file(recipe).unlink()
    run_stage(EVALUATE, recipe)
    assert not [path for path in left if path.exists()]


def test_a_snapshot_of_the_code_that_was_changed_is_taken_again(tmp_path: Path) -> None:
    taken = take_snapshot(tmp_path)
    whole = (taken / "fpdm/rng.py").read_bytes()
    (taken / "fpdm/rng.py").write_bytes(whole + b"# edited\n")
    (taken / "fpdm/__pycache__").mkdir()
    (taken / "fpdm/__pycache__/rng.pyc").write_bytes(b"")
    assert take_snapshot(tmp_path) == taken
    assert (taken / "fpdm/rng.py").read_bytes() == whole

"""What a distance is measured from and how well it is known; forms of samples that give the same number."""

import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.efficientnet import PUBLISHED
from common.errors import UserError
from common.loading import dump_recipe
from common.recipe import Recipe
from common.stage_jobs import run_in_jobs
from pipeline.evaluation import image_sets, references
from pipeline.evaluation.evaluate import extract_part
from pipeline.evaluation.measurements import Evaluation
from pipeline.evaluation.metrics import bootstrap_error, frechet_distance, statistics
from pipeline.evaluation.stage import STAGE as EVALUATE
from pipeline.evaluation.statistics import read_summary, summarise, write_summary
from pipeline.evaluation.yardstick import Yardstick
from pipeline.features import extractors as features
from pipeline.sampling.chunks import find_chunks, write_chunk
from pipeline.sampling.sample_set import sample_set
from pipeline.sampling.stage import STAGE as SAMPLE
from tests.conftest import copied, features_folder, load_samples, run_stage
from tests.json_files import read_json

WIDTH = 1280
INDEFINITE = np.eye(WIDTH)
INDEFINITE[:2, :2] = [[1, 2], [2, 1]]  # of positive variances
HOSTILE = [
    ({"mu": np.zeros(2048)}, r"mu is float64 \(2048,\), efficientnet-lite0's is of \(1280,\)"),
    ({"sigma": np.zeros(WIDTH)}, r"sigma is float64 \(1280,\), efficientnet-lite0's is of \(1280, 1280\)"),
    ({"sigma": np.array({})}, r"sigma is object \(\), efficientnet"),
    ({"mu": np.full(WIDTH, np.nan)}, r"mu and sigma are no mean and covariance"),
    ({"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, r"mu and sigma are no mean and covariance"),
    ({"sigma": -np.eye(WIDTH)}, r"mu and sigma are no mean and covariance: not positive semi-definite"),
    ({"sigma": INDEFINITE}, r"no mean and covariance: not positive semi-definite \(an eigenvalue of -1, "),
    ({"mu": np.full(WIDTH, np.inf)}, r"no mean and covariance: not finite, or too large"),
    ({"mu": np.full(WIDTH, 1e200)}, r"no mean and covariance: not finite, or too large"),
    ({"sigma": np.full((WIDTH, WIDTH), np.inf)}, r"no mean and covariance: not finite, or too large"),
    ({"arr_0": np.array(3)}, r"arr_0 is int64 \(\); images are uint8 of \(N, H, W, 3\)"),
    ({"arr_0": np.zeros((2, 16, 16, 3))}, r"arr_0 is float64 \(2, 16, 16, 3\); images are uint8"),
    ({"arr_0": np.zeros((2, 16, 8, 3), np.uint8)}, r"has images of 8 pixels, this recipe's have 16"),
    ({"arr_0": np.array([{}])}, r"arr_0 is object \(1,\); images are uint8"),
]


@pytest.fixture(scope="module")
def sampled(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Sampled; with images to compare with."""
    folder = tmp_path_factory.mktemp("evaluated")
    generator = np.random.default_rng(0)
    for label in range(3):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{number}.png")
    recipe = replace(
        copied(tiny_run, folder / "runs"),
        data=replace(tiny_run.data, images=str(folder / "images"), held_out=None),
    )
    run_stage(SAMPLE, recipe)
    return recipe


@pytest.fixture
def recipe(sampled: Recipe, tmp_path: Path) -> Recipe:
    return copied(sampled, tmp_path / "runs")


def evaluated(recipe: Recipe, **fields: Any) -> dict[str, Any]:
    """The measurement of the recipe's samples, with other settings of evaluation."""
    changed = replace(recipe, evaluate=replace(recipe.evaluate, **fields))
    run_stage(EVALUATE, changed)
    return read_json(recipe.folder / "metrics.json")["measurements"][0]


def numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: number["value"] for name, number in found["numbers"].items()}


def adm_file(recipe: Recipe, path: Path, *, pictures: bool = False, **changes: np.ndarray) -> Path:
    """The recipe's training images as a statistics file of ADM's."""
    images = np.stack(list(image_sets.training_images(recipe).iterate()))
    extractor = features.load_extractor(features.find_extractor_weights(recipe.evaluate))
    fitted = statistics(batch["pooled"] for batch in features.extract(extractor, images, 8))
    arrays = {"mu": fitted.mean, "sigma": fitted.covariance} | ({"arr_0": images} if pictures else {}) | changes
    np.savez(path, **arrays)
    return path


def test_a_statistics_file_gives_the_distance_of_the_images_it_was_made_of(recipe: Recipe, tmp_path: Path) -> None:
    direct = evaluated(recipe)
    path = adm_file(recipe, tmp_path / "statistics.npz")
    through_file = evaluated(recipe, reference=str(path))
    assert through_file["value"] == pytest.approx(direct["value"], rel=1e-6)
    assert set(through_file["numbers"]) == {"frechet"}  # nothing that needs the images
    assert through_file["reference"]["label"] == f"statistics of {path}"
    with_pictures = evaluated(recipe, reference=str(adm_file(recipe, tmp_path / "both.npz", pictures=True)))
    assert numbers(with_pictures) == pytest.approx(numbers(direct), rel=1e-6)


def test_of_two_evaluations_at_once_one_extracts_features_and_the_other_waits(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, path_of = features.NamedExtractor.features, Yardstick._path
    looked_for, extracted = [], []

    def looking(*arguments: Any) -> Path:
        looked_for.append(arguments)
        return path_of(*arguments)

    def slowly(extractor: features.NamedExtractor, images: Any) -> Any:
        extracted.append(extractor)
        deadline = time.monotonic() + 30
        while len(looked_for) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        return extract(extractor, images)

    monkeypatch.setattr(Yardstick, "_path", looking)
    monkeypatch.setattr(features.NamedExtractor, "features", slowly)
    images, yardsticks = image_sets.training_images(recipe), [Evaluation.of(recipe).yardstick for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for summary in [pool.submit(yardstick.summary, images) for yardstick in yardsticks]:
            assert summary.result(60).statistics["pooled"].count == images.size
    assert len(extracted) == 1


def test_what_a_statistics_file_does_not_give_is_said(recipe: Recipe, tmp_path: Path) -> None:
    path = adm_file(recipe, tmp_path / "statistics.npz")
    with pytest.raises(
        UserError, match=r"evaluate\.metrics: kid cannot be measured: the reference is a statistics file"
    ):
        evaluated(recipe, reference=str(path), metrics=("frechet", "kid"))
    with pytest.raises(UserError, match=r"evaluate\.metrics: efficientnet-lite0 does not give spatial"):
        evaluated(recipe, metrics=("spatial",))


def test_a_reference_of_another_resolution_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    larger = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    path = adm_file(recipe, tmp_path / "larger.npz", arr_0=larger)
    with pytest.raises(UserError, match=r"larger\.npz has images of 32 pixels, this recipe's have 16"):
        evaluated(recipe, reference=str(path))
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    smaller = replace(recipe, data=replace(recipe.data, resolution=8), runs=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"has images of 16 pixels, this recipe's have 8"):
        references.reference(replace(smaller, evaluate=replace(recipe.evaluate, reference=str(recipe.folder))))


@pytest.mark.parametrize(("changes", "reason"), HOSTILE)
def test_arrays_of_a_reference_that_do_not_fit_are_refused(
    recipe: Recipe, tmp_path: Path, changes: dict[str, np.ndarray], reason: str
) -> None:
    path = tmp_path / "hostile.npz"
    np.savez(path, **({"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH)} | changes))
    named = replace(recipe, evaluate=replace(recipe.evaluate, reference=str(path)))
    with pytest.raises(UserError, match=reason) as caught:
        references.reference(named).statistics()  # type: ignore[misc]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("mu", (2**40,), "<f8", r"mu is float64 \(1099511627776,\), "),
        (
            "arr_0",
            (2**40, 16, 16, 3),
            "|u1",
            r"not readable as an npz file; .* \(EOFError: images are missing\)",
        ),
    ],
)
def test_a_reference_that_claims_more_than_it_holds_is_refused(
    recipe: Recipe, tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str, reason: str
) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        member.write(bytes(16 * 16 * 3 * 4))
    with pytest.raises(UserError, match=reason):
        evaluated(recipe, reference=str(path))


def test_a_reference_that_is_none_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a run folder .* nor a file"):
        evaluated(recipe, reference="nowhere")
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz holds weights; a reference has mu and sigma, or images"):
        evaluated(recipe, reference=str(path))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"other\.npz is not readable as an npz file"):
        evaluated(recipe, reference=str(path))


def test_another_run_is_a_reference(recipe: Recipe) -> None:
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    found = evaluated(recipe, reference=str(recipe.folder))
    assert found["value"] == pytest.approx(0, abs=1e-6)
    assert found["reference"]["label"] == f"10 samples of {recipe.folder} after 64 training samples"


def test_the_distance_needs_no_images(recipe: Recipe) -> None:
    expected = evaluated(recipe)
    folder = sample_set(recipe, "latest").folder
    for path in [*folder.glob("chunk-*"), *folder.glob("features-*/chunk-*")]:
        path.unlink()
    for path in (recipe.folder / "eval").glob("*.json"):
        path.unlink()
    without = replace(recipe, sample=replace(recipe.sample, output="features", save_images=4))
    run_stage(SAMPLE, without)
    assert SAMPLE.is_finished(without)
    assert list(find_chunks(folder)) == [(0, 4)]  # what the report shows
    found = evaluated(without)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6)


def test_features_of_a_damaged_chunk_are_refused(recipe: Recipe) -> None:
    evaluated(recipe)
    folder = features_folder(recipe)
    path = min(folder.glob("chunk-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: damaged"):
        evaluated(recipe, bootstrap=2)


def test_constant_images_are_refused_with_their_count(recipe: Recipe) -> None:
    folder = sample_set(recipe, "latest").folder
    write_chunk(
        folder / "chunk-00000000-00000004.npz",
        {"images": np.full((4, 16, 16, 3), 7, dtype=np.uint8), "labels": np.array([0, 1, 2, 0])},
    )
    with pytest.raises(UserError, match="samples 0 to 3: 4 of 4 images are constant"):
        evaluated(recipe)


def test_parts_extract_the_features_of_their_chunks(recipe: Recipe) -> None:
    expected = evaluated(recipe)
    folder = features_folder(recipe)
    for path in [*folder.glob("chunk-*"), *(recipe.folder / "eval").glob("*.json")]:
        path.unlink()
    extract_part(Evaluation.of(recipe), 1, 2)
    assert list(find_chunks(folder)) == [(4, 8)]
    extract_part(Evaluation.of(recipe), 0, 2)
    assert numbers(evaluated(recipe)) == numbers(expected)


def test_of_several_ranks_each_extracts_its_features_and_the_last_one_measures(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.evaluate.rank_and_world_size", lambda: (1, 2))
    run_stage(EVALUATE, recipe)
    assert list(find_chunks(features_folder(recipe))) == [(4, 8)]
    assert not (recipe.folder / "metrics.json").exists()
    monkeypatch.setattr("pipeline.evaluation.evaluate.rank_and_world_size", lambda: (0, 2))
    run_stage(EVALUATE, recipe)
    assert read_json(recipe.folder / "metrics.json")["measurements"][0]["value"] > 0


def test_an_array_of_jobs_gives_the_same_images_and_the_same_number(recipe: Recipe) -> None:
    images, labels = load_samples(sample_set(recipe, "latest").folder, 10)
    expected = evaluated(recipe)
    for name in ("samples", "eval"):
        shutil.rmtree(recipe.folder / name)
    (recipe.folder / "metrics.json").unlink()
    run_in_jobs(recipe, SAMPLE, "debug", 3)
    found_images, found_labels = load_samples(sample_set(recipe, "latest").folder, 10)
    assert (found_images == images).all()
    assert (found_labels == labels).all()
    run_in_jobs(recipe, EVALUATE, "debug", 2)
    found = read_json(recipe.folder / "metrics.json")["measurements"][0]
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6)


def test_a_jobs_mistake_is_the_commands_own_line(recipe: Recipe) -> None:
    shutil.rmtree(recipe.folder / "samples")
    with pytest.raises(UserError, match=r"samples 0 to 9 of 10 are missing; run python pipeline/sample\.py"):
        run_in_jobs(recipe, EVALUATE, "debug", 2)


def test_three_ranges_of_samples_are_measured_apart(recipe: Recipe) -> None:
    once = evaluated(recipe)
    three = replace(recipe, evaluate=replace(recipe.evaluate, seed_ranges=3))
    run_stage(SAMPLE, three)
    found = evaluated(three)
    assert found["content"]["ranges"] == [[0, 10], [10, 20], [20, 30]]
    assert len(set(found["ranges"])) == 3
    assert found["ranges"][0] == pytest.approx(once["value"], rel=0.01)  # in other batches
    assert found["value"] == pytest.approx(np.mean(found["ranges"]), rel=1e-12)
    assert found["count"] == 10
    assert len(load_samples(sample_set(three, "latest").folder, 30)[0]) == 30


def test_the_bootstrap_error_is_the_spread_of_independent_sets() -> None:
    generator = np.random.default_rng(0)
    reference = statistics([generator.normal(size=(4000, 8))])
    sets = [generator.normal(0.2, 1.1, size=(500, 8)) for _ in range(200)]
    spread = np.std([frechet_distance(statistics([values]), reference) for values in sets])
    assert bootstrap_error(sets[0], reference, 200, seed=0) == pytest.approx(spread, rel=0.3)
    assert bootstrap_error(sets[0], reference, 5, seed=0) == bootstrap_error(sets[0], reference, 5, seed=0)


def test_a_summary_keeps_evenly_spaced_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.statistics.KEPT", 5)
    rows = np.arange(20, dtype=np.float32)[:, None] + np.zeros((1, 3), dtype=np.float32)
    found = summarise([{"pooled": part} for part in np.array_split(rows, 7)], 20)
    assert found.rows["pooled"][:, 0].tolist() == [3, 7, 11, 15, 19]
    assert found.statistics["pooled"].count == 20
    write_summary(tmp_path / "summary.npz", found)
    again = read_summary(tmp_path / "summary.npz", "")
    assert (again.statistics["pooled"].covariance == found.statistics["pooled"].covariance).all()
    assert (again.rows["pooled"] == found.rows["pooled"]).all()


def test_metrics_hold_what_repeats_the_number(recipe: Recipe) -> None:
    found = evaluated(recipe, bootstrap=2)
    content = found["content"]
    assert content["weights_sha256"]
    assert content["vae"]["weights_sha256"]
    assert content["seed"] == 0
    assert content["ranges"] == [[0, 10]]
    assert content["resolution"] == 16
    assert content["sample"]["labels"] == "balanced"
    assert found["extractor"]["weights_sha256"] == PUBLISHED["efficientnet-lite0"].sha256
    assert found["reference"]["count"] == 12
    assert found["reference"]["content"]["source"]
    assert found["provenance"]["packages"]["torch"]
    assert found["recipe"]["sample"]["num_steps"] == 3
    assert found["plan"]["iterations"] == [2, 2, 2]
    assert found["plan"]["reuse"] is True
    assert found["numbers"]["frechet"]["spread"] > 0


def test_a_reference_is_measured_once_for_all_runs(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(recipe)
    other = replace(recipe, name="second")
    monkeypatch.setattr("pipeline.features.extractors.extract", None)
    assert Evaluation.of(other).yardstick.reference_summary.statistics["pooled"].count == 12

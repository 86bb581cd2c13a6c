"""The tables' recipes are comparable, their verdicts are in words, and sizes are counted."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.recipe import denoiser_config
from fpdm.denoiser import count_parameters
from pipeline.evaluation.sweep import points
from pipeline.reproduction.claims import TABLES, Arm, Claim, Row, Table, tables_of
from pipeline.reproduction.counting import claims
from pipeline.reproduction.intervals import interval, judged, shown
from pipeline.reproduction.results import _section
from pipeline.reproduction.running import Outcome, Scale, _row, check_images
from pipeline.training.operations import training_flops

SCALES = [Scale(name, "runs/none", seeds=1, smoke=False) for name in ("small", "full")]


@pytest.mark.parametrize(
    ("scale", "table"),
    [pytest.param(scale, table, id=f"{scale.name}-{table.key}") for scale in SCALES for table in tables_of(scale.name)],
)
def test_the_columns_of_a_table_have_the_same_operations_and_the_same_rows(scale: Scale, table: Table) -> None:
    recipes = {arm.name: scale.recipes(arm)[0] for arm in table.arms}
    operations = {recipe.name.rpartition("-")[0]: training_flops(recipe) for recipe in recipes.values()}
    half = operations.pop("ours_half", None)
    assert max(operations.values()) < 1.01 * min(operations.values())
    assert half is None or half == pytest.approx(max(operations.values()) / 2, rel=0.01)
    rows = {
        name: {tuple(_row(getattr(point, field)) for field in table.rows) for point in points(recipe)[0]}
        for name, recipe in recipes.items()
    }
    if all(claim.share == 1 for claim in table.claims):
        assert all(each == rows[table.arms[0].name] for each in rows.values())
    assert all(values.keys() == recipes.keys() for values in table.published.values())
    for claim in table.claims:
        claimed = claim.rows or rows[claim.worse]
        assert {claim.compared(row) for row in claimed} <= rows[claim.better]
        assert set(claimed) <= rows[claim.worse]


def test_a_claim_of_half_of_the_blocks_compares_half_of_the_blocks() -> None:
    of_half = Claim("", "ours", "theirs", share=0.5)
    assert [of_half.compared(row) for row in ((40,), (160, "ddim"))] == [(20,), (80, "ddim")]
    table = Table("S", "", (Arm("ours", "", ""), Arm("theirs", "", "")), ("budget",), {}, (of_half,))
    recipe = SCALES[0].recipes(TABLES[0].arms[0])[0]

    def run(**distances: float) -> list[Outcome]:
        by_row: dict[Row, float] = {(int(row[1:]),): value for row, value in distances.items()}
        return [Outcome(recipe, by_row, "FD (x)", parameters=1, samples=1, pflop=0.0, seconds=None, residual=None)]

    arms = {"ours": run(b20=3.0, b40=2.0), "theirs": run(b40=5.0, b30=9.0)}
    text = "\n".join(_section(table, arms))
    assert "| 20 | 3.0 |  |" in text
    assert "; at 40: **not decided by one seed (by 2.0 there)**" in text
    assert "; at 30" not in text  # 15 blocks were not measured
    assert "published" not in text


def test_the_small_networks_have_the_papers_shares_of_parameters() -> None:
    arms = {arm.name: arm for arm in TABLES[0].arms}
    fpdm, dit = (count_parameters(denoiser_config(SCALES[0].recipes(arms[name])[0])) for name in ("FPDM", "DiT"))
    assert 0.10 < fpdm / dit < 0.15


def test_what_was_chosen_by_one_extractor_is_judged_by_another() -> None:
    small, full = SCALES
    own, again = tables_of("small")[:2], [table.key for table in TABLES if table.judged_again]
    assert again[:2] == ["T1", "T2"]
    assert small.judges(own[0]) == (None, "efficientnet-lite2")
    assert full.judges(tables_of("full")[0]) == (None,)
    recipe = small.recipes(own[0].arms[0], "efficientnet-lite2")[0]
    assert recipe.evaluate.feature_extractor == "efficientnet-lite2"
    assert recipe.folder == small.recipes(own[0].arms[0])[0].folder


def test_images_that_are_not_there_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    scale = Scale(
        "small", f"{tmp_path}/runs", 1, smoke=False, overrides=("data.images=nowhere/train-images-idx3-ubyte",)
    )
    portraits, fashion = (table for table in tables_of("small") if table.key in ("T1", "T2"))
    check_images([portraits], scale, "debug")
    told = r"^T2: data\.images: nowhere/train-images-idx3-ubyte is not there; .* or make the others, --only T1$"
    with pytest.raises(UserError, match=told):
        check_images([portraits, fashion], scale, "debug")
    assert not list(tmp_path.iterdir())


def test_a_verdict_needs_an_interval_that_leaves_zero_out() -> None:
    assert judged([1.0, 2.0, 3.0], [11.0, 12.5, 12.0]).startswith("holds (by 9.8 ± ")
    assert judged([11.0, 12.5, 12.0], [1.0, 2.0, 3.0]).startswith("does not hold: it is the other way round (by -9.8")
    assert judged([1.0, 2.0, 3.0], [2.0, 1.0, 4.0]).startswith("not decided by 3 seeds")
    assert judged([1.0], [100.0]) == "not decided by one seed (by 99.0 there)"


def test_what_diverged_is_no_number_and_loses() -> None:
    inf = float("inf")
    assert shown([inf, inf]) == "diverged"
    assert shown([1.0, inf, inf]) == "2 of 3 diverged"
    assert judged([1.0, 2.0], [inf, inf]) == "holds (of 2 seeds 0 diverged, 2 of the other)"
    assert judged([inf, inf], [1.0, 2.0]) == "does not hold (of 2 seeds 2 diverged, 0 of the other)"
    for better, worse in (([1.0, 2.0], [inf, 3.0]), ([inf, inf], [inf, inf]), ([1.0], [inf]), ([1.0, inf], [3.0, 1.0])):
        assert judged(better, worse).startswith("not decided (of ")


def test_intervals_are_students() -> None:
    from scipy.stats import t as student

    values = [3.0, 5.0, 4.5, 6.0]
    assert interval(values) == pytest.approx(student.ppf(0.975, 3) * 1.25 / 2, rel=1e-3)
    assert interval([1.0]) is None
    assert shown([1.0]) == "1.0"


def test_a_section_shows_means_published_values_and_a_verdict_of_every_claim() -> None:
    table = Table(
        key="T0",
        title="A table",
        arms=(Arm("a", "", ""), Arm("b", "", "")),
        rows=("budget", "sampler"),
        published={"140, ddim": {"a": 10.5, "b": 20.0}},
        claims=(Claim("a is better", "a", "b"),),
    )
    recipe = SimpleNamespace(sample=SimpleNamespace(num_samples=256))

    def runs(*values: float) -> list[SimpleNamespace]:
        return [SimpleNamespace(recipe=recipe, distance="FD (x)", distances={(140, "ddim"): value}) for value in values]

    text = "\n".join(_section(table, {"a": runs(1.0, 2.0), "b": runs(50.0, 52.0)}))  # type: ignore[dict-item]
    assert "FD (x), 256 images" in text
    assert "| 140, ddim | 1.5 ± 6.4 | 51.0 ± 12.7 |" in text
    assert "| published: 140, ddim | 10.5 | 20.0 |" in text
    assert "- a is better; at 140, ddim: **holds (by 49.5 ± 6.4)**" in text


def test_the_claims_of_size_are_counted_at_the_published_size() -> None:
    text = "\n".join(claims())
    assert "**87 % fewer parameters: holds.**" in text
    assert "FPDM 86,500,256, DiT 674,834,720, 87.2 %" in text
    assert "**60 % less training memory: does not hold (56%) where nothing is recomputed, holds where" in text

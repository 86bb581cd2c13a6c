"""What has been submitted is known for certain, or nothing is submitted."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.files import alone_in
from common.recipe import Recipe
from pipeline.chain import listed_jobs, submit_chain
from pipeline.stages import STAGES


@pytest.mark.parametrize("text", ["[{", '[{"step": "train"}]', "7", '{"step": "train"}'])
def test_a_damaged_listing_is_named_and_nothing_is_submitted(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/jobs.json").write_text(text)
    with pytest.raises(UserError, match=r"a/jobs\.json: damaged"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)


def test_of_two_submissions_at_the_same_moment_one_gives_way(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a/logs"), pytest.raises(UserError, match=r"process \d+ on .* is at work in it"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)


def test_where_slurm_does_not_answer_nothing_is_taken_for_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    entry = '{"step": "train", "job": "1", "parts": 1, "after": null, "logs": "", "recipe": "", "time": 0}'
    (tmp_path / "a/jobs.json").write_text(f"[{entry}]")
    assert listed_jobs(tmp_path / "a")[0].job == "1"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="slurm does not say which jobs are on their way"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)

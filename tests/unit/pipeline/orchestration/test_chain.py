"""What has been submitted is known for certain, or nothing is submitted."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.files import content_key, folder_lock
from common.loading import dump_recipe
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.sealed import write_sealed
from common.stage_jobs import Step
from pipeline.orchestration import slurm_chain
from pipeline.orchestration.slurm_chain import Submitted, _alive, listed_jobs, submit_chain
from pipeline.stages import STAGES
from tests.seals import edits, flips, resealed


@pytest.mark.parametrize("text", ["[{", '[{"step": "train"}]', "7", '{"step": "train"}'])
def test_a_damaged_listing_is_named_and_nothing_is_submitted(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/jobs.json").write_text(text)
    with pytest.raises(UserError, match=r"a/jobs\.json: (not readable|changed after)"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)


def test_of_two_submissions_at_the_same_moment_one_gives_way(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "a/logs"), pytest.raises(UserError, match=r"process \d+ on .* is at work in it"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)


def test_where_slurm_does_not_answer_nothing_is_taken_for_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    write_sealed(tmp_path / "a/jobs.json", {"jobs": [asdict(one) for one in chain(("train", "1", None))]})
    assert listed_jobs(RunFolder(tmp_path / "a"))[0].job == "1"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="slurm does not say which jobs are on their way"):
        submit_chain(Recipe(name="a", runs=str(tmp_path)), STAGES, None)


def test_a_listing_is_as_it_was_written_or_named(tmp_path: Path) -> None:
    path, random = tmp_path / "jobs.json", np.random.default_rng(0)
    jobs = chain(("encode", "1", None), ("train", "2", "1"))
    write_sealed(path, {"jobs": [asdict(one) for one in jobs]})
    for _ in flips(path, random, 400):
        with pytest.raises(UserError, match=str(path)):
            listed_jobs(RunFolder(tmp_path))
    listing = {"jobs": json.loads(path.read_text())["jobs"]}
    for edited in edits(listing, random, 200):
        resealed(path, lambda _, edited=edited: edited)
        try:
            found = listed_jobs(RunFolder(tmp_path))
        except UserError as error:
            said = str(error)
            assert "\n" not in said
        else:
            assert all(one.job.isdigit() and one.parts > 0 for one in found)


def chain(*jobs: tuple[str, str, str | None]) -> list[Submitted]:
    return [Submitted(step, job, 1, after, "", "", 0.0) for step, job, after in jobs]


def squeue_says(said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{said}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_how_a_job_ends_that_is_just_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = """if mkdir "$0.asked"; then echo '1|COMPLETING'; else echo '1|CANCELLED'; fi; echo '2|PENDING'"""
    squeue_says(said, tmp_path, monkeypatch)
    assert list(_alive(chain(("encode", "1", None), ("train", "2", None)))) == ["train"]


def test_a_job_whose_predecessor_failed_is_not_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue_says("printf '1|COMPLETED\\n2|FAILED\\n3|PENDING\\n4|PENDING\\n'", tmp_path, monkeypatch)
    jobs = chain(("encode", "1", None), ("train", "2", "1"), ("sample", "3", "2"), ("report", "4", "3"))
    assert _alive(jobs) == {}


def test_later_stages_are_submitted_behind_earlier_ones_that_are_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, submitted = Recipe(name="a", runs=str(tmp_path)), []
    key = content_key(dump_recipe(recipe))
    jobs = [replace(one, recipe=key) for one in chain(("encode", "1", None), ("train", "2", "1"))]
    (tmp_path / "a").mkdir()
    write_sealed(tmp_path / "a/jobs.json", {"jobs": [asdict(one) for one in jobs]})
    squeue_says("printf '1|COMPLETED\\n2|RUNNING\\n'", tmp_path, monkeypatch)

    def submit(_recipe: Recipe, step: Step, after: str | None, _code: Path | None, _key: str) -> Submitted:
        submitted.append((step.name, after))
        return Submitted(step.name, str(10 + len(submitted)), 1, after, "", key, 0.0)

    monkeypatch.setattr(slurm_chain, "_submit", submit)
    later = [stage for stage in STAGES if stage.name in ("sample", "evaluate", "report")]
    found = submit_chain(recipe, later, None)
    assert submitted[0] == ("sample", "2")
    assert [after for _, after in submitted[1:]] == [str(10 + number) for number in range(1, len(submitted))]
    assert [one.step for one in found] == [step for step, _ in submitted]
    assert submitted[-1][0] == "report"


def test_an_array_that_has_lost_a_part_and_is_still_at_work_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue_says("printf '1_0|RUNNING\\n1_1|CANCELLED\\n2|PENDING\\n'", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"encode: some of the jobs of array 1 .*\(scancel 1\)"):
        _alive(chain(("encode", "1", None), ("train", "2", "1")))

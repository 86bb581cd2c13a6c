"""What a stage would refuse once it has begun, by the recipe and its launch section, `run.py --dry-run` refuses."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.command import unless_forced
from common.errors import Refused, UserError
from common.loading import load_recipe, parse_recipe
from common.stage_checks import check_stages
from pipeline.stages import select
from slurm.cluster import Resources, refuse
from tests.forks import run_python

ROOT = Path(__file__).parents[4]


def check(tmp_path: Path, *overrides: str, cluster: str = "local", stages: str | None = None) -> None:
    """Of recipe and launch section alone: there are no files that a stage could read."""
    recipe = parse_recipe(
        "name: a\nmodel: {num_classes: 1000}", [f"runs={tmp_path}", f"data.shards={tmp_path}/none", *overrides]
    )
    check_stages(recipe, [replace(stage, inputs=(), fetch=None) for stage in select(recipe, stages)], cluster)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("slurm.site_file.DEFAULT", tmp_path / "site.yaml")
    monkeypatch.delenv("FPDM_SITE", raising=False)


@pytest.mark.parametrize("cluster", ["local", "slurm"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["runs=/dev/null/runs"], r"runs: /dev/null is a file; name another folder"),
        (["data.shards=/dev/null"], r"data\.shards: /dev/null is a file; name another folder"),
        (["launch.processes=3"], r"train\.batch_size: 512 is not divisible by the 3 ranks; use 510"),
        (["launch.processes=2", "train.micro_batch_size=100"], r"train\.micro_batch_size: 100 does not divide .* 256"),
        (["train.batch_size=4", "launch.processes=8"], r"train\.batch_size: 4 is not divisible by the 8 ranks; use 8"),
        (["train.precision=fp16"], r"train\.precision: fp16 needs a GPU"),
        (["sample.num_samples=1"], r"sample\.num_samples: 1, and the metric frechet needs 2"),
        (["evaluate.reference_samples=1"], r"evaluate\.reference_samples: 1, and the metric frechet needs 2"),
        (["evaluate.metrics=[kid]", "sample.num_samples=3"], r"sample\.num_samples: 3, and the metric kid needs 4"),
        (
            ["evaluate.metrics=[density_coverage]", "evaluate.reference_samples=5"],
            r"evaluate\.reference_samples: 5, and the metric density_coverage needs 6",
        ),
        (
            ["evaluate.metrics=[frechet, inception_score]", "sample.num_samples=9"],
            r"sample\.num_samples: 9, and the metric inception_score needs 10",
        ),
        (
            ["evaluate.metrics=[spatial]", "evaluate.feature_extractor=efficientnet-lite0"],
            r"evaluate\.metrics: efficientnet-lite0 does not give spatial",
        ),
    ],
)
def test_what_recipe_and_launch_alone_make_impossible(
    overrides: list[str], expected: str, cluster: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        check(tmp_path, *overrides, cluster=cluster)


def test_a_run_that_was_measured_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("metrics.json", "report.html"):
        (tmp_path / "a" / name).write_text("of other settings")
    check(tmp_path, stages="evaluate,report")


def test_nodes_multiply_the_ranks(tmp_path: Path) -> None:
    check(tmp_path, "launch.nodes=4", "launch.processes=8", cluster="slurm")
    with pytest.raises(UserError, match="512 is not divisible by the 24 ranks"):
        check(tmp_path, "launch.nodes=3", "launch.processes=8", cluster="slurm")
    with pytest.raises(UserError, match=r"launch\.nodes: 4 nodes need a SLURM cluster"):
        check(tmp_path, "launch.nodes=4")
    with pytest.raises(UserError, match=r"launch\.processes: [0-9]+, but the debug cluster runs one process"):
        check(tmp_path, "launch.processes=2", cluster="debug")


def test_a_stage_that_does_not_run_refuses_nothing(tmp_path: Path) -> None:
    check(tmp_path, "launch.processes=3", "train.precision=fp16", stages="sample,evaluate")
    check(tmp_path, "sample.num_samples=1", stages="train,sample")


def test_what_the_cluster_and_its_site_file_refuse(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: gpu")
    with pytest.raises(UserError, match=r"site\.yaml: partitoin: unknown key"):
        check(tmp_path, cluster="slurm")
    (tmp_path / "site.yaml").unlink()
    with pytest.raises(UserError, match="SLURM cannot write logs to a path with '%'"):
        check(tmp_path, f"runs={tmp_path}/100%", cluster="slurm")


def test_settings_of_deepspeeds_are_read_as_the_ranks_will_read_them(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"train_micro_batch_size_per_gpu": 16, "bf16": {"enabled": True}}))
    asked = [f"train.deepspeed_config={own}", "train.micro_batch_size=16", "launch.processes=8"]
    check(tmp_path, *asked, "launch.gpus_per_process=1", cluster="slurm")  # from a login node without GPUs
    with pytest.raises(UserError, match=r"has bf16\.enabled True, the recipe and the ranks make it False"):
        check(tmp_path, *asked, cluster="slurm")
    with pytest.raises(UserError, match=r"has train_micro_batch_size_per_gpu 16, .* make it 64"):
        check(tmp_path, *asked, "train.micro_batch_size=null", "launch.gpus_per_process=1", cluster="slurm")
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        check(tmp_path, f"train.deepspeed_config={tmp_path}/none.json")


def test_gpus_that_the_site_asks_for_are_gpus(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("sbatch: {gres: 'gpu:a100:8'}")
    check(tmp_path, "train.precision=fp16", cluster="slurm")


def test_more_processes_than_this_machine_has_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(tmp_path, "launch.processes=2", "launch.gpus_per_process=1", "train.precision=fp16")
    with pytest.raises(
        UserError, match=r"launch\.processes: 4 with 1 GPUs each, and this machine has 2; .*set it to 2"
    ):
        check(tmp_path, "launch.processes=4", "launch.gpus_per_process=1")


def test_a_signal_before_the_job_began_is_refused() -> None:
    two, three = (Resources(timeout_minutes=minutes, signal_seconds=120) for minutes in (2, 3))
    with pytest.raises(
        ValueError, match=r"launch\.signal_seconds: 120 is not below launch\.timeout_minutes \(2 minutes\)"
    ):
        refuse("slurm", "logs", two)
    refuse("slurm", "logs", three)
    refuse("local", "logs", two)


@pytest.mark.parametrize("way", [(), ("--detach",), ("--cluster", "auto")])
def test_a_dry_run_of_three_ranks_ends_with_one_line(way: tuple[str, ...], tmp_path: Path) -> None:
    command = ["pipeline/run.py", "--config", "recipes/demo.yaml", "--dry-run", *way]
    fields = ("runs", "data.shards", "data.images", "data.held_out")
    places = [f"{field}={tmp_path}/{field}" for field in fields]
    done = run_python(*command, *places, "launch.processes=3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: train.batch_size: 64 is not divisible by the 3 ranks; use 63 or another number of processes"
    ]
    assert list(tmp_path.iterdir()) == []


def demo(tmp_path: Path, stages: str | None, *overrides: str) -> None:
    places = [f"{field}={tmp_path / field}" for field in ("runs", "data.images", "data.held_out", "data.shards")]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", [*places, *overrides])
    check_stages(recipe, select(recipe, stages), "slurm", fetches=False)


def test_all_faults_of_all_stages_are_told_at_once(tmp_path: Path) -> None:
    missing = [f"data.images={tmp_path}/none", f"data.held_out={tmp_path}/no-val", "launch.processes=3"]
    recipe = parse_recipe("name: a", [*missing, f"evaluate.feature_extractor_weights={tmp_path}/no.pth"])
    with pytest.raises(Refused) as refused:
        check_stages(recipe, select(recipe, None), "slurm", fetches=False)
    fields = [fault.partition(":")[0] for fault in refused.value.faults]
    assert fields == ["data.images", "train.batch_size", "evaluate.feature_extractor_weights", "data.held_out"]


def test_what_another_stage_of_the_run_will_make_is_not_missed(tmp_path: Path) -> None:
    demo(tmp_path, None)
    with pytest.raises(Refused, match=r"data\.images: .* is not there"):
        demo(tmp_path, "encode,train,sample")  # nobody composes the images
    with pytest.raises(Refused, match=r"data\.shards"):
        demo(tmp_path, "train,sample")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_names_the_way_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(force: bool) -> None:
        with unless_forced(argparse.Namespace(force=force, dry_run=False)):
            raise Refused(["data.images: none", "train.batch_size: 3"])

    with pytest.raises(Refused):
        refused(force=False)
    assert "--force starts them all the same" in capsys.readouterr().err
    refused(force=True)
    assert capsys.readouterr().err == "warning: data.images: none\nwarning: train.batch_size: 3\n"


def test_an_array_longer_than_the_clusters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.controller.longest_array", lambda: 4)
    check(tmp_path, "launch.jobs=4", cluster="slurm")
    with pytest.raises(Refused, match=r"launch\.jobs: 5 jobs of sample, and an array of this cluster has at most 4"):
        check(tmp_path, "launch.stages.sample.jobs=5", cluster="slurm")


def test_training_counts_the_ranks_that_it_asks_for_itself(tmp_path: Path) -> None:
    check(tmp_path, "launch.processes=3", "launch.stages.train.processes=4")
    with pytest.raises(UserError, match="512 is not divisible by the 6 ranks"):
        check(tmp_path, "launch.stages.train.processes=3", "launch.stages.train.nodes=2", cluster="slurm")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("launch.stages.report.nodes=2", r"launch\.stages\.report\.nodes: 2, but its jobs have one process each"),
        ("launch.stages.train.jobs=2", r"launch\.stages\.train\.jobs: 2, but it is one job"),
        ("launch.stages.encode.at_once=2", r"launch\.stages\.encode\.at_once: 2, but it is one job"),
        ("launch.stages.report.gpu_type=a100", r"launch\.stages\.report\.gpu_type: a100, but it has no GPU"),
        ("launch.stages.train.partition='a b'", r"launch\.stages\.train\.partition: string should match"),
        ("launch.stages.trian.jobs=2", r"launch\.stages\.trian: unknown key; did you mean launch\.stages\.train\?"),
    ],
)
def test_what_a_stages_jobs_would_not_use_is_refused(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_recipe("name: a", [override])
    with pytest.raises(UserError, match=r"sample\.processes: 8, but its 4 jobs have one process each"):
        parse_recipe("name: a", ["launch.jobs=4", "launch.stages.sample.processes=8"])

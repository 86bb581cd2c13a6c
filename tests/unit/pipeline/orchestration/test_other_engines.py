"""The chain for SkyPilot and Kueue: their schemas accept it, it asks for what the recipe says, and every command in it
is understood."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from common.command import exit_status_of
from common.errors import UserError
from common.jobs import Job
from common.loading import load_recipe
from common.stage_jobs import plain_steps
from pipeline import run
from pipeline.orchestration.other_engines import render
from pipeline.stages import select
from slurm.site_file import Elsewhere, Site
from tests.unit.pipeline.orchestration import engine_forms as forms

ROOT = Path(__file__).parents[4]
PLACE = Elsewhere(image="hub/fpdm:1", volume="disk", mount="/shared", clone="/shared/it's here", queue="queue")
SITE = Site(elsewhere=PLACE, memory_gb=64, gpu_type="h100")
HOSTILE = """data.images='it''s "here"; $(touch pwned) `x` $HOME $(RANK)'"""
WORDS = (
    *("--config", "recipes/demo.yaml", "name=Demo_2.b", HOSTILE, "launch.nodes=2", "launch.processes=4"),
    *("launch.gpus_per_process=1", "launch.jobs=5", "launch.stages.encode={at_once: 2, memory_gb: 5.5}"),
    "launch.stages.sample={gpu_type: a100, jobs: 1, nodes: 1}",
)
STEPS = ["compose", "encode", "encode-merge", "train", "sample", "evaluate", "evaluate-merge", "report"]


def accepts(form: Any, documents: Any) -> None:
    TypeAdapter(form).validate_json(json.dumps(documents))  # from JSON, whose objects strict forms take


def rendered(engine: str, *more: str, site: Site = SITE) -> list[dict[str, Any]]:
    recipe = load_recipe(ROOT / WORDS[1], (*WORDS[2:], *more))
    return list(yaml.safe_load_all(render(engine, recipe, select(recipe, None), (*WORDS, *more), site)))


def test_skypilots_schema_accepts_a_pipeline_that_asks_for_what_the_recipe_says() -> None:
    header, *tasks = rendered("skypilot")
    accepts(forms.SkyHeader, header)
    accepts(list[forms.SkyTask], tasks)
    assert [task["name"] for task in tasks] == STEPS
    asked = {task["name"]: (task["num_nodes"], task["resources"]) for task in tasks}
    for name, nodes, cpus, memory, gpus in (
        ("encode", 2, "1+", "5.5+", {"h100": 1}),
        ("train", 2, "4+", "64+", {"h100": 4}),
        ("sample", 1, "4+", "64+", {"a100": 4}),
        ("report", 1, "1+", "16+", None),
    ):
        assert asked[name][0] == nodes
        assert [asked[name][1].get(field) for field in ("cpus", "memory", "accelerators")] == [cpus, memory, gpus]


def test_the_schemas_of_jobset_and_kubernetes_accept_jobs_that_ask_for_what_the_recipe_says() -> None:
    (chain,) = rendered("kueue")
    accepts(forms.JobSet, chain)
    assert chain["metadata"] == {"name": "demo-2-b", "labels": {"kueue.x-k8s.io/queue-name": "queue"}}
    jobs = chain["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == STEPS
    assert [job.get("dependsOn", [{}])[0].get("name") for job in jobs] == [None, *STEPS[:-1]]
    asked = {job["name"]: job["template"]["spec"] for job in jobs}
    for name, pods, at_once, cpus, memory, gpus, kind in (
        ("encode", 5, 2, "1", "5632Mi", "1", "h100"),
        ("train", 2, 2, "4", "65536Mi", "4", "h100"),
        ("sample", 1, 1, "4", "65536Mi", "4", "a100"),
        ("report", 1, 1, "1", "16384Mi", None, None),
    ):
        job, pod = asked[name], asked[name]["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert (job["completions"], job["parallelism"]) == (pods, at_once)
        assert [limits.get(what) for what in ("cpu", "memory", "nvidia.com/gpu")] == [cpus, memory, gpus]
        assert pod.get("nodeSelector", {}).get("nvidia.com/gpu.product") == kind


def commands_of_skypilot(folder: Path) -> Iterator[list[str]]:
    """What each node's script calls `python` with, as bash runs it."""
    (folder / "python").write_text(
        '#!/bin/bash\npwd >> calls\nprintf "%s\\0" "$@" >> calls\nprintf "\\n\\0" >> calls\n'
    )
    (folder / "python").chmod(0o755)
    for task in rendered("skypilot", site=replace(SITE, elsewhere=replace(PLACE, clone=str(folder)))):
        for node in range(task.get("num_nodes", 0)):
            variables = {"NODE_RANK": node, "NUM_NODES": task["num_nodes"], "NODE_IPS": "10.0.0.1\n10.0.0.2"}
            environment = {f"SKYPILOT_{name}": str(value) for name, value in variables.items()}
            environment["PATH"] = f"{folder}:/usr/bin:/bin"
            subprocess.run(["bash", "-c", task["run"]], env=environment, check=True)
    for call in (folder / "calls").read_text().split("\n\0")[:-1]:
        where, *words = call.replace("\n", "\0", 1).rstrip("\0").split("\0")
        assert where == str(folder)
        yield words


def commands_of_kueue(_folder: Path) -> Iterator[list[str]]:
    """What each pod starts, as Kubernetes replaces its variables."""
    for job in rendered("kueue")[0]["spec"]["replicatedJobs"]:
        program, *words = job["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        assert program == "python"
        for pod in range(job["template"]["spec"]["completions"]):
            parts = [[part.replace("$(JOB_COMPLETION_INDEX)", str(pod)) for part in word.split("$$")] for word in words]
            yield ["$".join(part) for part in parts]


@pytest.mark.parametrize("commands", [commands_of_skypilot, commands_of_kueue])
def test_the_commands_do_every_job_of_the_chain_once_with_the_users_words_as_they_were(
    commands: Callable[[Path], Iterator[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it's a clone"
    folder.mkdir()
    done: list[Job] = []
    monkeypatch.setattr(Job, "work", lambda job: done.append(job))
    ranks = []
    for words in commands(folder):
        if words[0] == "-m":
            ranks.append([word for word in words if word.startswith(("--n", "--m"))])
            words = words[words.index("pipeline/run.py") :]
        assert tuple(words[1 : 1 + len(WORDS)]) == WORDS
        monkeypatch.setattr(sys, "argv", [words[0], f"--config={ROOT / WORDS[1]}", *words[3:]])
        assert exit_status_of(run.main) == 0
    recipe = load_recipe(ROOT / WORDS[1], WORDS[2:])
    planned = [step for stage in select(recipe, None) for step in plain_steps(recipe, stage)]
    jobs = [job for step in planned for job in step.jobs * (step.resources.nodes if len(step.jobs) == 1 else 1)]
    assert sorted(map(str, done)) == sorted(map(str, jobs))
    train, _, sample = ranks  # of training's two nodes, and of sampling by four processes on one
    assert train[:3] == ["--nnodes=2", "--node-rank=0", "--nproc-per-node=4"]
    assert train[3] in ("--master-addr=10.0.0.1", "--master-addr=demo-2-b-train-0-0.demo-2-b")
    assert sample[:3] == ["--nnodes=1", "--node-rank=0", "--nproc-per-node=4"]


def test_what_an_engine_lacks_is_said_in_one_line() -> None:
    for engine, site, words in (
        ("argo", SITE, "--render: found 'argo'; allowed: skypilot, kueue"),
        ("kueue", Site(), "site file: no section elsewhere"),
        ("kueue", replace(SITE, elsewhere=replace(PLACE, queue=None)), r"elsewhere\.queue: null"),
        ("skypilot", replace(SITE, gpu_type=None), r"launch\.stages\.encode\.gpu_type: null, and SkyPilot"),
    ):
        with pytest.raises(UserError, match=words):
            rendered(engine, site=site)
    with pytest.raises(UserError, match=r"name: x+; for Kubernetes at most 32 characters"):
        rendered("kueue", f"name={'x' * 40}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detach", "--cluster", "local"], "error: --detach: submits to SLURM, and --cluster is local"),
        (["--render", "kueue", "--detach"], "error: --render: it starts no jobs, and does not go with --detach"),
        (["--step", "train", "--force"], "error: --step: it starts no jobs, and does not go with --force"),
        (["--step", "train:1"], "error: --step: found 'train:1'; allowed: compose, encode, train"),
        (["--render", "kueue", "--config", "{outside}"], "error: --config: {outside} is outside of the clone"),
    ],
)
def test_options_that_do_not_go_together_end_with_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outside = tmp_path / "demo.yaml"
    outside.write_text((ROOT / WORDS[1]).read_text())
    words = [word.replace("{outside}", str(outside)) for word in ("--config", str(ROOT / WORDS[1]), *options)]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert exit_status_of(run.main) == 2
    assert capsys.readouterr().err.startswith(message.replace("{outside}", str(outside)))

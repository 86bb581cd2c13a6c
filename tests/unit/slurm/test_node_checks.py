"""Preflight: each check passes on this machine, finds the fault that is planted for it, and says what must change."""

import errno
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.command import exit_status_of
from common.loading import parse_recipe
from slurm import node_checks, preflight
from slurm.node_checks import CHECKS, Finding, Node, site_page

Plant = Callable[[pytest.MonkeyPatch, Node], Node]
TWO = {"world_size": 2, "gather": lambda own: [own, own]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "WRITTEN_MB", 1)
    monkeypatch.setattr(node_checks, "REDUCED_MB", 1)
    monkeypatch.setattr(node_checks, "LEAST_WRITE_MB_S", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, torch.device("cpu"), 0, "auto")


def test_on_this_machine_nothing_must_change_and_nothing_is_left_behind(node: Node) -> None:
    assert [finding for finding in (check(node) for check in CHECKS) if finding.must] == []
    assert list(node.folder.iterdir()) == []


def test_a_recipe_without_an_autoencoder_needs_none() -> None:
    recipe = parse_recipe("name: a", ["vae.path=null", "vae.latent_channels=3", "vae.downsampling=1"])
    assert preflight.vae(recipe) == Finding("autoencoder", "none: the network draws pixels")


def fewer_gpus(_: pytest.MonkeyPatch, node: Node) -> Node:
    return replace(node, gpus=8)


def old_driver(patch: pytest.MonkeyPatch, node: Node) -> Node:
    version = node.folder / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n")
    patch.setattr(node_checks.driver, "__defaults__", (version,))
    return node


def old_gpu(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    return replace(node, device=torch.device("cuda"))


def wrong_sum(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(torch.distributed, "all_reduce", lambda _values: None)
    return replace(node, **TWO)


def slow_network(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(torch.distributed, "all_reduce", lambda values: (time.sleep(0.1), values.mul_(2)))
    return replace(node, **TWO)


def no_locks(patch: pytest.MonkeyPatch, node: Node) -> Node:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    patch.setattr(node_checks.fcntl, "flock", flock)
    return node


def locks_of_one_node_alone(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(node_checks, "TRY_LOCK", "")  # as a process on another node, which gets the lock
    return node


def cached_names(_: pytest.MonkeyPatch, node: Node) -> Node:
    return replace(node, world_size=2, gather=lambda own: [own, "old" if own == "new" else own])


def slow_disk(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(node_checks, "LEAST_WRITE_MB_S", 1e9)
    return node


def no_disk(_: pytest.MonkeyPatch, node: Node) -> Node:
    return replace(node, folder=node.folder / "none")


def little_shared_memory(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setattr(node_checks.os, "statvfs", lambda _: SimpleNamespace(f_frsize=2**20, f_blocks=16))
    return node


def clock_ahead(_: pytest.MonkeyPatch, node: Node) -> Node:
    return replace(
        node, world_size=2, gather=lambda own: [own, own + 60 if isinstance(own, float) and own > 1e9 else own]
    )


def deaf(patch: pytest.MonkeyPatch, node: Node) -> Node:
    (node.folder / "status").write_text("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000800\n")  # bit 11: SIGUSR2
    patch.setattr(node_checks.signals, "__defaults__", (node.folder / "status",))
    return node


def not_requeued(patch: pytest.MonkeyPatch, node: Node) -> Node:
    (node.folder / "scontrol").write_text("#!/bin/sh\necho JobId=$3 Requeue=0 Restarts=0\n")
    (node.folder / "scontrol").chmod(0o755)
    patch.setenv("SLURM_JOB_ID", "7")
    patch.setenv("PATH", f"{node.folder}:{os.environ['PATH']}")
    return node


def no_scontrol(patch: pytest.MonkeyPatch, node: Node) -> Node:
    patch.setenv("SLURM_JOB_ID", "7")
    patch.setenv("PATH", str(node.folder))
    return node


@pytest.mark.parametrize(
    ("check", "plant", "found", "must"),
    [
        (node_checks.gpus, fewer_gpus, "none", "asks for 8 on a node"),
        (node_checks.driver, old_driver, "470.57.02", "a newer driver"),
        (node_checks.bf16, old_gpu, "not in hardware", "train.precision=fp16 or fp32"),
        (node_checks.all_reduce, wrong_sum, "a wrong sum", "NCCL_P2P_DISABLE"),
        (node_checks.all_reduce, slow_network, "MB/s between 2 ranks", "NCCL_SOCKET_IFNAME"),
        (node_checks.locks, no_locks, "No locks available", "a disk with flock"),
        (node_checks.locks, locks_of_one_node_alone, "not seen by other processes", "a disk with flock"),
        (node_checks.renames, cached_names, "not seen by ranks [1]", "less caching"),
        (node_checks.write_speed, slow_disk, "writes", "a faster disk"),
        (node_checks.write_speed, no_disk, "No such file", "another folder for runs"),
        (node_checks.shared_memory, little_shared_memory, "16 MB", "--shm-size"),
        (node_checks.clocks, clock_ahead, "60.0 s apart", "NTP"),
        (node_checks.signals, deaf, "SIGUSR2 ignored", "nohup"),
        (node_checks.requeue, not_requeued, "may not be requeued", "requeue: false"),
        (node_checks.requeue, no_scontrol, "no scontrol in the job", "container"),
    ],
)
def test_a_planted_fault_is_found(
    check: Callable[[Node], Finding],
    plant: Plant,
    found: str,
    must: str,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = check(plant(monkeypatch, node))
    assert found in finding.found
    assert must in finding.must


def test_weights_that_are_missing_on_a_node_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    recipe = parse_recipe("name: a", ["vae.path=nobody/none", "evaluate.feature_extractor=inception-v3-compat"])
    assert "nobody/none is not here" in preflight.vae(recipe).must
    assert "TORCH_HOME" in preflight.extractor(recipe).must
    gone = parse_recipe("name: a", [f"vae.path={tmp_path}/none", f"evaluate.feature_extractor_weights={tmp_path}/none"])
    assert "no folder" in preflight.vae(gone).must
    assert "no file" in preflight.extractor(gone).must


def test_what_must_change_comes_first_and_names_the_hosts() -> None:
    fine, slow = Finding("disk", "writes 900 MB/s"), Finding("disk", "writes 3 MB/s", "a faster disk")
    lines = list(preflight.page([("a", fine), ("b", slow), ("c", fine), ("a", Finding("GPUs", "8 x H100"))]))
    assert [line.split()[0] for line in lines] == ["MUST", "->", "ok", "ok"]
    assert lines[0].endswith("writes 3 MB/s (b)")
    assert lines[2].endswith("writes 900 MB/s (a, c)")


def test_sinfo_gives_lines_for_the_site_file() -> None:
    told = "gpu|gpu:a100:8(S:0-1)|515000+\ndebug|gpu:a100:8|515000\n"
    assert site_page(told) == ["partition: gpu", "memory_gb: 502", "gpu_type: a100"]
    assert site_page("cpu|(null)|16000") == ["partition: cpu", "memory_gb: 15"]
    assert site_page("") == []


def test_the_command_ends_with_status_2_where_something_must_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--config", "recipes/demo.yaml", f"runs={tmp_path}"])
    assert exit_status_of(preflight.main) == 0
    sys.argv.append("launch.gpus_per_process=1")
    assert exit_status_of(preflight.main) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: GPUs: none; the recipe asks for 2 on a node")
    assert "MUST CHANGE" in told.out

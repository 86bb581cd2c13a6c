"""The provenance of an artefact: command, commit, package versions, machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from common.sealed import OPEN, STRICT

COMMAND_VARIABLE = "FPDM_COMMAND"  # in a job: what was typed, where the job's own command is submitit's
COMMIT_FILE = "COMMIT"  # in a snapshot of the code, which is no checkout
PACKAGES = ("torch", "numpy", "deepspeed", "diffusers", "torch-fidelity", "timm", "safetensors", "submitit")


@with_config(STRICT)
class Provenance(TypedDict):
    time: str
    command: str
    git: str | None
    python: str
    packages: dict[str, str | None]
    machine: str
    device: str | None
    host: str


@with_config(OPEN)
class Started(TypedDict):
    """A line of a run's `provenance.jsonl`, all of which the report shows."""

    stage: str
    ranks: NotRequired[int]  # not of runs before 2026-11-27, which count as one rank


def provenance() -> Provenance:
    """A JSON-able record; `git` is the result of `git_commit`."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": typed_command(),
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": _device(),
        "host": platform.node(),
    }


def typed_command() -> str:
    """The command that was typed, of a job the one that submitted it."""
    return os.environ.get(COMMAND_VARIABLE) or shlex.join(sys.orig_argv)


def _device() -> str | None:
    """The GPU's name, if there is one and this process has imported torch."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the running code, with `-dirty` if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]
    if (root / COMMIT_FILE).exists():
        return (root / COMMIT_FILE).read_text().strip() or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()

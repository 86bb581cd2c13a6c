"""Commands and scripts complete their options, fields of a recipe and values, as bash asks for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.completion import complete_override

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    path
    for room in ("pipeline", "preprocess", "slurm")
    for path in sorted((ROOT / room).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


def proposed(line: str) -> set[str]:
    """For the last word of `python ...`."""
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "2", "_ARGCOMPLETE_IFS": "|"}
    asked |= {"_ARGCOMPLETE_COMP_WORDBREAKS": " =:", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    program = [sys.executable, line.split()[1]]
    command = ["bash", "-c", '"$0" "$@" 8>&1 9>/dev/null >/dev/null', *program]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, cwd=ROOT, timeout=120)
    return set(done.stdout.split("|"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python pipeline/run.py --clu", {"--cluster"}),
        ("python pipeline/run.py --cluster s", {"slurm"}),
        ("python pipeline/train.py --config recipes/dem", {"recipes/demo.yaml"}),
        ("python pipeline/run.py --config recipes/demo.yaml --dry-run sample.sampler=dd", {"ddim", "ddpm"}),
        ("python pipeline/init.py images --time 2h data.cro", {"data.crop="}),
        ("python slurm/status.py --li", {"--lines"}),
    ],
)
def test_the_shell_is_told_what_can_follow(line: str, expected: set[str]) -> None:
    assert proposed(line) == expected


def test_a_field_is_completed_with_its_section_and_then_its_value(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert {"seed=", "train.optimizer.betas=", "launch.stages.sample.jobs="} <= set(complete_override(""))
    assert complete_override("data.flips=") == ["data.flips=true", "data.flips=false"]
    assert complete_override("train.epochs=") == ["train.epochs=null"]
    assert complete_override(f"data.images={tmp_path}/im") == [f"data.images={tmp_path}/images/"]
    assert complete_override("data.nothing=") == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_command_says_that_it_completes(path: Path) -> None:
    assert "PYTHON_ARGCOMPLETE_OK" in path.read_text(encoding="utf-8")[:1024]

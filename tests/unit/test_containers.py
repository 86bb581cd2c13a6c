"""The containers' recipes name files that are here, and install what pyproject.toml pins on a Python that it allows."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "containers/Dockerfile", ROOT / "containers/fpdm.def"]


def copied(path: Path) -> list[str]:
    """What it copies from the clone."""
    text = path.read_text()
    if path.name == "Dockerfile":
        return [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    section = text.split("%files")[1].split("%post")[0]
    return [line.split()[0] for line in section.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_copies_what_the_clone_has(path: Path) -> None:
    assert copied(path)
    assert all((ROOT / name).exists() for name in copied(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_installs_extras_that_exist_with_a_python_that_they_allow(path: Path) -> None:
    text, project = path.read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"'\.\[([a-z,]+)\]'", text)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    minor = re.search(r"python:3\.(\d+)-", text)
    assert minor is not None
    assert project["requires-python"] == ">=3.11,<3.14"
    assert 11 <= int(minor[1]) < 14


def test_both_start_from_the_same_image() -> None:
    bases = [re.search(r"^(?:FROM|From:) (\S+)$", path.read_text(), re.MULTILINE) for path in FILES]
    assert bases[0] is not None
    assert bases[1] is not None
    assert bases[0][1] == bases[1][1]

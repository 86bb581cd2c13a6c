"""What is installed, and what is shipped."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(lines: list[str]) -> dict[str, str]:
    return {name.strip(): version.strip() for name, _, version in (line.partition("==") for line in lines) if version}


def test_environment_yml_holds_the_pins_of_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    installed = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    extras = PROJECT["optional-dependencies"]
    assert pins(installed) == pins(extras["pipeline"]) | pins(extras["demo"]) | pins(extras["dev"])


def test_every_pin_is_what_is_installed_here() -> None:
    from importlib.metadata import version

    for extra, lines in PROJECT["optional-dependencies"].items():
        if extra == "ffcv" and find_spec("ffcv") is None:  # needs a compiler and OpenCV; scripts/setup.sh says so
            continue
        for name, pinned in pins(lines).items():
            assert version(name).partition("+")[0] == pinned, name


def test_the_wheel_holds_fpdm_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fpdm"}

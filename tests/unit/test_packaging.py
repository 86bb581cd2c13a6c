"""What is installed, and what is shipped."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
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
        if extra == "ffcv" and find_spec("ffcv") is None:  # needs a compiler and OpenCV: scripts/setup.sh --ffcv
            continue
        for name, pinned in pins(lines).items():
            assert version(name).partition("+")[0] == pinned, name


def test_a_clone_installs_every_command_and_the_wheel_none(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = SimpleNamespace(BuildHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)  # of the build alone
    hook = runpy.run_path(str(ROOT / "scripts/console_scripts.py"))["ConsoleScripts"]()
    hook.root = str(ROOT)
    wheel: dict[str, dict[str, str]] = {"shared_scripts": {}}
    hook.initialize("standard", wheel)
    assert wheel == {"shared_scripts": {}}
    clone: dict[str, dict[str, str]] = {"shared_scripts": {}}
    hook.initialize("editable", clone)
    assert {"fpdm-run", "fpdm-train", "fpdm-init", "fpdm-encode-latents", "fpdm-status"} <= set(
        clone["shared_scripts"].values()
    )
    for path, name in clone["shared_scripts"].items():
        module = re.search(r'run_module\("([a-z._]+)"', Path(path).read_text())
        assert module, name
        assert (ROOT / f"{module[1].replace('.', '/')}.py").is_file()
        assert os.access(path, os.X_OK)
    hook.finalize("editable", clone, "")


def test_the_wheel_holds_fpdm_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fpdm"}

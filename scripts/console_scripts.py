"""A build hook: an editable install, which is how a clone is set up, also installs each command as `fpdm-<name>`.

The wheel holds the library alone, and gets none: what they would run is not in it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOMS = ("preprocess", "pipeline", "slurm")
SCRIPT = """#!python
# PYTHON_ARGCOMPLETE_OK
from runpy import run_module

run_module("{module}", run_name="__main__", alter_sys=True)
"""


def commands(root: Path) -> dict[str, str]:
    """Modules by the names of their commands: `fpdm-train` runs `pipeline.train`."""
    files = (path for room in ROOMS for path in sorted((root / room).glob("*.py")))
    programs = (path for path in files if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"))
    return {f"fpdm-{path.stem.replace('_', '-')}": f"{path.parent.name}.{path.stem}" for path in programs}


class ConsoleScripts(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        self.folder = TemporaryDirectory()
        for name, module in commands(Path(self.root)).items():
            script = Path(self.folder.name) / name
            script.write_text(SCRIPT.format(module=module), encoding="utf-8")
            script.chmod(0o755)
            build_data["shared_scripts"][str(script)] = name

    def finalize(self, version: str, _build_data: dict[str, Any], _artifact: str) -> None:
        if version == "editable":
            self.folder.cleanup()

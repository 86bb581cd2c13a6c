"""The names of a run's files have one home."""

import ast
from pathlib import Path

from common import run_folder
from common.run_folder import RunFolder, SampleFolder

ROOT = Path(__file__).parents[3]
HOME = ROOT / "common/run_folder.py"
FILES = [path for room in ("common", "pipeline", "preprocess", "slurm") for path in (ROOT / room).rglob("*.py")]
NAMES = {
    place.name
    for folder in (RunFolder, SampleFolder)
    for place in vars(folder).values()
    if isinstance(place, run_folder._Place)
}


def test_no_other_module_spells_them() -> None:
    spelled = {
        (str(path.relative_to(ROOT)), node.right.value)
        for path in FILES
        if path != HOME
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant)
    }
    of_other_folders = {
        ("pipeline/features/extractors.py", "checkpoints"),  # torch.hub's
        ("pipeline/exporting/export.py", "recipe.yaml"),  # an export's, which holds those of its run
        ("pipeline/exporting/model_card.py", "samples.png"),
        ("pipeline/planning/machine.py", "recipe.yaml"),  # of a trial
    }
    assert {place for place in spelled if place[1] in NAMES} == of_other_folders
    assert "metrics.json" in NAMES

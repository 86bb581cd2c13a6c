"""The published network's vectors, by the same functions as the command `python tests/golden/compare.py`."""

from pathlib import Path

import pytest
import torch
from compare import compare, main
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_entry_of_the_published_network_is_met_to_1e_5(path):
    differences = compare(path)
    assert len(differences) > 50
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("change", ["wrong number", "unknown entry"])
def test_the_command_fails_on_a_wrong_number_and_on_an_entry_it_does_not_know(tmp_path, capsys, change):
    with safe_open(FOLDER / "fpdm_1_1.safetensors", "pt") as file:
        entries, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if change == "wrong number":
        entries["out.eval.k4"][0, 0, 0, 0] += 0.01
    else:
        entries["out.unheard"] = torch.zeros(1)
    save_file(entries, tmp_path / "changed.safetensors", metadata=metadata)
    assert main([str(tmp_path / "changed.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert "1 entries above 1e-05" in printed
    assert ("out.eval.k4" if change == "wrong number" else "out.unheard") + "  ABOVE TOLERANCE" in printed

"""The published network's vectors, by the same functions as the command `python tests/golden/compare.py`."""

import re
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


def saved(path, metadata, **entries):
    save_file({"none": torch.zeros(1), **entries}, path, metadata=metadata)


def metadata_of(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text("no tensors"), "header"),
        (lambda path: saved(path, None), "'hidden_size' is missing from its metadata or its entries"),
        (lambda path: saved(path, {**metadata_of("dit"), "depth": "two"}), "invalid literal for int.*'two'"),
        (lambda path: saved(path, {**metadata_of("dit"), "num_heads": "5"}), "hidden_size: .* multiple of num_heads 5"),
        (lambda path: saved(path, metadata_of("dit")), "tensor 'x_embedder.proj.weight' is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_status_2(tmp_path, capsys, write, reason):
    path = tmp_path / "vectors.safetensors"
    write(path)
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {path}: .*{reason}.*; compare.py --help shows the layout", line)


def test_a_file_needs_only_what_its_entries_need_and_the_tolerance_is_the_callers(tmp_path, capsys):
    path = tmp_path / "vectors.safetensors"
    with safe_open(FOLDER / "dit.safetensors", "pt") as file:
        kept = [name for name in file.keys() if name.startswith(("param.", "in.", "out.eval"))]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in kept}, path, metadata=file.metadata())
    assert main([str(path)]) == 0
    assert "out.eval" in capsys.readouterr().out
    assert main([str(path), "--tolerance", "1e-12"]) == 1
    assert "out.eval  ABOVE TOLERANCE" in capsys.readouterr().out

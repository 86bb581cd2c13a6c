"""The published network's vectors, by the same functions as the command `python tests/golden/compare.py`."""

import re
from pathlib import Path

import pytest
import torch
from compare import compare, main
from rounding import bounds
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from fpdm import blocks, linear

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.rglob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_entry_of_the_published_network_and_of_each_option_is_met_within_its_derived_bound(path):
    rows = compare(path)
    assert len(rows) > 30
    assert not [str(row) for row in rows if not row.met]
    assert max(row.bound for row in rows) < 1e-3  # or they would let mistakes pass


def few_entries(*wanted):
    """(entries, metadata) of a DiT: its parameters, inputs and a few results, so that comparing takes a second."""
    with safe_open(FOLDER / "dit.safetensors", "pt") as file:
        kept = [name for name in file.keys() if name.startswith(("param.", "in.", *wanted))]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in kept}, file.metadata()


timestep_embedding = blocks.timestep_embedding
MISTAKES = {
    "GELU by erf": (linear, "_gelu", F.gelu),
    "a period of 10,010": (blocks, "timestep_embedding", lambda t, **_: timestep_embedding(t, max_period=10_010.0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_small_mistake_in_the_network_is_above_the_bounds(tmp_path, monkeypatch, mistake):
    entries, metadata = few_entries("out.eval")
    save_file(entries, tmp_path / "few.safetensors", metadata=metadata)
    monkeypatch.setattr(linear, "_uses_onednn", False)  # which has a GELU of its own
    monkeypatch.setattr(*MISTAKES[mistake])
    (row,) = compare(tmp_path / "few.safetensors")
    assert row.name == "out.eval"
    assert not row.met


@pytest.mark.parametrize("change", ["wrong number", "unknown entry"])
def test_the_command_fails_on_a_wrong_number_and_on_an_entry_it_does_not_know(tmp_path, capsys, change):
    entries, metadata = few_entries("out.eval")
    if change == "wrong number":
        entries["out.eval"][0, 0, 0, 0] += 0.01
    else:
        entries["out.unheard"] = torch.zeros(1)
    save_file(entries, tmp_path / "changed.safetensors", metadata=metadata)
    assert main([str(tmp_path / "changed.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert "1 entries above their bounds" in printed
    assert ("out.eval" if change == "wrong number" else "out.unheard") + "  ABOVE ITS BOUND" in printed


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


def test_a_file_needs_only_what_its_entries_need_and_each_bound_is_stated(tmp_path, capsys):
    path = tmp_path / "vectors.safetensors"
    entries, metadata = few_entries("out.eval")
    save_file(entries, path, metadata=metadata)
    assert main([str(path)]) == 0
    assert re.search(r"\d\.\d\de-\d\d +\d\.\d\de-\d\d +out\.eval\n", capsys.readouterr().out)
    assert max(row.bound for row in compare(path)) > 0


def test_the_bounds_are_the_same_each_time_and_grow_with_the_timestep():
    """Frequencies that differ in the last place turn the angles by as much as t is large."""

    def angles(t):
        return bounds(lambda: [("angles", blocks.timestep_embedding(torch.tensor([t])))], distance)["angles"]

    def distance(found, expected):
        return float((found - expected).abs().max())

    assert angles(900) == angles(900)
    assert angles(900) > 30 * angles(9)
    assert angles(900) < 2 * (900 * 2**-23 + 900 * 2**-24 + 2**-22)  # BOTH x (exp, rounding of the angle, cos)

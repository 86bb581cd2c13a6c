"""The pipeline's code in one file."""

import ast
import sys
from pathlib import Path

import pytest

from fpdm import single_file


def test_the_file_imports_torch_and_what_diffusers_needs_alone() -> None:
    tree = ast.parse(single_file.pipeline_source())
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    allowed = {"torch", "diffusers", "safetensors", "numpy", "huggingface_hub"}
    assert imported <= allowed | set(sys.stdlib_module_names)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {"FPDMPipeline", "FPDMTransformer2DModel", "FPDMScheduler", "Denoiser"} <= classes


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("from fpdm.one import same\nsame = 2\n", "same is a name of fpdm.one too"),
        ("from fpdm.one import same as other\n", "imports same under another name"),
        ("import math as same\nfrom fpdm.one import another\n", "same is imported by another module"),
        ("from fpdm.one import same\nlen = 3\n", "len is a name of Python too"),
        ("from fpdm.one import same\nimport json as re\n", "'import json as re', where another module has 'import re'"),
    ],
)
def test_names_that_would_hide_one_another_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, message: str
) -> None:
    (tmp_path / "one.py").write_text("import re\nsame = 1\nanother = 2\n")
    (tmp_path / "two.py").write_text(other)
    monkeypatch.setattr(single_file, "__file__", str(tmp_path / "single_file.py"))
    monkeypatch.setattr(single_file, "ENTRY", "two")
    with pytest.raises(ValueError, match=message):
        single_file.pipeline_source.__wrapped__()

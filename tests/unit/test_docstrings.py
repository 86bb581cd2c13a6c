"""Public names of the science say what they take and give: shapes, errors, source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "fpdm").glob("*.py"))


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{node.name}.")


def missing(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {name: ast.get_docstring(node) or "" for name, node in public(tree) if isinstance(node, ast.ClassDef)}
    for name, node in public(tree):
        owner = name.rpartition(".")[0]
        said = ast.get_docstring(node) or ""
        if node.name == "forward":  # the class says what its call takes and gives
            said += classes[owner]
        if not said:
            yield f"{name}: no docstring"
        if not isinstance(node, ast.FunctionDef):
            continue
        annotations = [argument.annotation for argument in [*node.args.args, *node.args.kwonlyargs]]
        takes_tensors = any(isinstance(a, ast.Name) and a.id == "Tensor" for a in [*annotations, node.returns])
        if takes_tensors and "(" not in said:
            yield f"{name}: no shape"
        if any(isinstance(part, ast.Raise) for part in ast.walk(node)) and "rror" not in said:
            yield f"{name}: raises, and does not say so"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_public_name_says_shapes_and_errors(path: Path) -> None:
    assert list(missing(path)) == []


def test_what_is_not_said_is_found(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text('def f(x: Tensor) -> int:\n    """Adds."""\n    raise ValueError\nclass C:\n    def g(self): ...\n')
    assert list(missing(path)) == [
        "f: no shape",
        "f: raises, and does not say so",
        "C: no docstring",
        "C.g: no docstring",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_that_follows_a_paper_names_it(path: Path) -> None:
    files = ("checkpoint_files", "diffusers_dit", "diffusers_folders", "importing", "latents", "single_file", "weights")
    diffusers = ("autoencoders", "call_settings", "class_names", "pipeline_hf", "scheduler_hf", "transformer_hf")
    own = ("__init__", "calibration", "conversion", "flops", "linear", *files, *diffusers)  # this project's
    named = re.search(r"\b20\d\d\)", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    assert named or path.stem in own

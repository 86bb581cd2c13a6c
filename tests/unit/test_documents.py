"""The documents' programs run as they are written."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.recipe.reference import explanations, reference, section_reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAMS = {
    path.name: blocks
    for path in sorted(DOCS.glob("*.md"))
    if (blocks := re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_in_the_documents_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    program = "".join(PROGRAMS[name])
    exec(compile(program, name, "exec"), {})
    for comment in re.findall(r"print\(.*\)  # (.*)", program):  # what a program says it prints
        assert comment in capsys.readouterr().out


def test_the_reference_of_recipes_is_that_of_the_dataclasses() -> None:
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == reference(), (
        "python -m common.recipe.reference > docs/recipe.md"
    )


def test_a_field_without_an_explanation_is_refused() -> None:
    @dataclass
    class Section:
        """Of a field that is explained and one that is not."""

        said: int = 1
        """Says so."""
        unsaid: int = 2

    assert explanations(Section) == {"said": "Says so."}
    with pytest.raises(KeyError, match="unsaid"):
        list(section_reference("section", Section))


def test_there_are_programs() -> None:
    assert "model.md" in PROGRAMS


def messages() -> Iterator[str]:
    """Every text in the code, with … for what is filled in; of scripts each line."""
    for room in ("common", "fpdm", "pipeline", "preprocess", "slurm"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    for path in [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "scripts").glob("*.sh")]:
        yield from path.read_text(encoding="utf-8").splitlines()


def test_the_error_messages_that_are_explained_are_those_of_the_code() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(explained) == text.count("\n### ") > 20
    known = list(messages())
    for message in explained:
        parts = [part.strip() for part in message.split("…")]
        longest = max(parts, key=len)
        assert len(longest) >= 12, f"{message}: anything could be that"
        words = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(words.search(one) for one in known if longest in one), message


def test_the_pictures_of_how_it_works_are_drawn_by_their_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("draw_fixed_point", ROOT / "scripts/draw_fixed_point.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    few = {"STEPS": 2, "SAMPLES": 1, "MOST": 3, "SHOWN": 2, "ITERATIONS": (1, 2), "CURVES": (0, 1)}
    for name, value in {**few, "PICTURES": tmp_path}.items():
        monkeypatch.setattr(drawing, name, value)
    monkeypatch.setattr(drawing.torch, "set_num_threads", lambda _: None)
    drawing.main([])
    drawn = {path.name for path in tmp_path.iterdir() if path.stat().st_size}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}

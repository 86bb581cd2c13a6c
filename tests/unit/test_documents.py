"""The documents' programs run as they are written."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.recipe.reference import explanations, reference, section_reference

DOCS = Path(__file__).parents[2] / "docs"
PROGRAMS = {
    path.name: blocks
    for path in sorted(DOCS.glob("*.md"))
    if (blocks := re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_in_the_documents_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
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

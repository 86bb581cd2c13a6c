"""The documents' programs run as they are written."""

import re
from pathlib import Path

import pytest

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


def test_there_are_programs() -> None:
    assert "model.md" in PROGRAMS

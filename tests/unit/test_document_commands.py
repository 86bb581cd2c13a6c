"""Every command that a document, a script's help or a recipe's header names is there, and takes these arguments."""

import argparse
import ast
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from common.errors import UserError
from common.loading import load_recipe
from common.recipe.reference import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("assets/*/README.md"), *ROOT.glob("docs/*.md")]
SCRIPTS = [path for room in ("pipeline", "preprocess", "slurm") for path in ROOT.glob(f"{room}/*.py")]
HEADERS = [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("slurm/*.sh")]
COMMAND = re.compile(r"(?:\w+=\S* )*(?:python|torchrun|sbatch|bash|make|scripts/\w+\.sh)\s+[^=\s].*")


def texts_of(path: Path) -> Iterator[str]:
    """Code lines and code spans of a page, lines of a docstring, or of a header."""
    text = re.sub(r"\\\n +", "", path.read_text(encoding="utf-8"))
    if path.suffix == ".md":
        fences = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        yield from (line for block in fences for line in block.splitlines())
        yield from re.findall(r"^    (?! )(.*)$", text, re.MULTILINE)
        yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    elif path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").replace("\\\n", " ")
        yield from (line.strip() for line in said.splitlines())
    else:
        yield from (line[1:].strip() for line in text.splitlines() if line.startswith("#"))


def commands_of(path: Path) -> Iterator[str]:
    for text in texts_of(path):
        for part in re.split(r" ; |\s{3,}or,? ", text):
            if COMMAND.fullmatch(part.strip()):
                yield part.strip()


COMMANDS = {str(path.relative_to(ROOT)): list(commands_of(path)) for path in sorted([*PAGES, *SCRIPTS, *HEADERS])}


class Reached(Exception):
    """A script has made its parser, and would read its arguments now."""


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser of a script, which runs up to where it reads its arguments."""

    def reach(self: argparse.ArgumentParser, *_: object) -> None:
        raise Reached(self)

    reads = dict.fromkeys(("parse_args", "parse_intermixed_args"), reach)
    with (
        patch.multiple(argparse.ArgumentParser, **reads),
        patch.dict(os.environ),
        patch.object(sys, "argv", [script]),
        patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]),
        pytest.raises(Reached) as reached,
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return reached.value.args[0]


def words_of(command: str) -> list[str]:
    """As the shell would read it, with all that is optional in a synopsis: [--rounds N], [section.field=value ...]."""
    command = re.sub(r" \[section\.field=value \.\.\.\]", "", command)
    command = re.sub(r" \[(--[^\]]*?)(?: \.\.\.)?\]", lambda found: " " + found[1].replace(" N", " 1"), command)
    words = shlex.split(command, comments=True)
    return words[: words.index(">")] if ">" in words else words


def check(words: list[str]) -> None:
    """Raises SystemExit, AssertionError or UserError for a command that does not run as it is written."""
    while re.match(r"\w+=", words[0]):  # FPDM_WITHOUT_SLURM=1 make test
        words = words[1:]
    program, *arguments = words
    assert "..." not in arguments, "stands for what?"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program in ("sbatch", "bash") or program.startswith("scripts/"):
        script, *arguments = words if program.startswith("scripts/") else arguments
        check_shell(ROOT / script, arguments)
    elif arguments[0] == "-m":
        assert find_spec(arguments[1])
    else:
        if arguments[0].startswith("--nproc"):
            assert arguments[0] == "--nproc-per-node"
            assert int(arguments[1])
            arguments = arguments[2:]
        check_python(arguments)


def check_shell(script: Path, arguments: list[str]) -> None:
    text = script.read_text(encoding="utf-8")
    if launched := re.search(r'launch\.sh" "\$clone" (.*)"\$@"', text):
        check_python(["pipeline/run.py", "--detach", "--cluster", "slurm", *launched[1].split(), *arguments])
    else:
        assert all(word in text for word in arguments if word.startswith("-"))


def check_python(words: list[str]) -> None:
    script, *arguments = words
    assert (ROOT / script).is_file()
    if not arguments or arguments == ["--help"]:
        return
    parser = parser_of(script)
    intermixed = any(action.dest == "overrides" for action in parser._actions)
    read = vars(parser.parse_intermixed_args(arguments) if intermixed else parser.parse_args(arguments))
    if "overrides" in read:
        load_recipe(recipe_of(read.get("config")), read["overrides"])


def recipe_of(named: Path | None) -> Path:
    """Of the project's own the one that is named, and the demo's for a reader's."""
    if named is not None and named.parts[0] == "recipes":
        return ROOT / named
    return ROOT / "recipes/demo.yaml"


@pytest.mark.parametrize("path", [path for path, commands in COMMANDS.items() if commands])
def test_every_command_is_there_and_takes_these_arguments(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS[path]:
        try:
            check(words_of(command))
        except (SystemExit, AssertionError, UserError) as error:
            pytest.fail(f"{command}\n{error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command",
    [
        "python pipeline/trian.py --config recipes/demo.yaml",
        "python pipeline/train.py --config recipes/demo.yaml --fast",
        "python pipeline/train.py --config recipes/demo.yaml train.batch_szie=4",
        "python pipeline/train.py --config recipes/dome.yaml",
        "sbatch slurm/train_imagenet.sh train.batch_size=none",
        "torchrun --nproc-per-node 2 pipeline/play.py --cluster slurm",
        "make coffee",
        "scripts/setup.sh --everything",
    ],
)
def test_a_command_that_would_not_run_is_found(command: str) -> None:
    with pytest.raises((SystemExit, AssertionError, UserError)):
        check(words_of(command))


def test_the_documents_commands_are_found() -> None:
    for path in ("README.md", "docs/cluster.md", "docs/own-images.md", "pipeline/judge.py", "recipes/demo.yaml"):
        assert COMMANDS[path]


def test_every_field_that_a_document_names_is_one_of_the_recipe() -> None:
    sections, fields = [], set[str]()
    for line in reference().splitlines():
        if line.startswith("## "):
            first, *others = line[3:].split(", ")
            above = first.rpartition(".")[0]
            sections = [first, *(f"{above}.{other}" for other in others)]
            fields.update(sections)
        elif match := re.match(r"\| `(\w+)` \|", line):
            fields.update(f"{section}.{match[1]}" for section in sections)
    tops = "|".join({field.partition(".")[0] for field in fields})
    named = re.compile(rf"`((?:{tops})(?:\.(?!py|yaml|mdb)[a-z_]+)+)(?:=[^`]*)?`")  # but for files, as data.mdb
    unknown = [
        f"{page.name}: {field}"
        for page in PAGES
        for field in named.findall(page.read_text(encoding="utf-8"))
        if field not in fields
    ]
    assert unknown == []

"""Errors are one printable line of bounded length, whatever foreign text is in them."""

import pytest

from common.command import exit_status_of
from common.errors import OneLineError, UserError, errors_as, one_line, printable, shortened
from preprocess.images.images import Rejected

FOREIGN = "\x1b[2J two\nlines\r\u202e \ud800\x00"


def test_a_users_error_shows_no_terminal_a_command_and_keeps_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError(f"data.images: {FOREIGN * 10**6}; name another")

    assert exit_status_of(fail) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.images: \\x1b[2J two\\nlines\\r\\u202e \\ud800\\x00")
    assert line.endswith("; name another")
    assert line.isprintable()
    assert len(line) <= UserError.limit + len("error: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError(), "MemoryError"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("no number"), "no number"),
        (FileNotFoundError(2, "No such file", "/a/path"), "No such file"),
        (Rejected("too large"), "too large"),
        (SyntaxError("two\nlines\x1b"), "SyntaxError: two lines\\x1b"),
    ],
)
def test_any_parser_error_is_quoted_on_one_line(error: Exception, words: str) -> None:
    with pytest.raises(UserError) as found, errors_as(UserError, "x.tar: damaged"):
        raise error
    assert str(found.value) == f"x.tar: damaged ({words})"


@pytest.mark.parametrize("kind", [UserError, Rejected])
def test_errors_of_the_same_kind_pass_unchanged(kind: type[OneLineError]) -> None:
    with pytest.raises(kind, match=r"^told$"), errors_as(kind, "x.tar: damaged"):
        raise kind("told")


def test_long_text_loses_its_middle() -> None:
    assert shortened("a" * 30, 30) == "a" * 30
    assert shortened("a" * 20 + "b" * 20, 30) == f"{'a' * 15} ... {'b' * 10}"
    assert len(one_line(FOREIGN * 1000, 50)) == 50
    assert printable("caf\u00e9 \N{ROCKET}") == "caf\u00e9 \N{ROCKET}"

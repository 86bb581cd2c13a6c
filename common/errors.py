"""What ends a command before its work is done, and how faults of foreign bytes become one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class Told(Exception):
    """An error whose message is for the user already: one printable line that names what is at fault."""


class UserError(Told):
    """A mistake of the user's, or a fault in a user's file.

    The message is one line: the field or file, what was found, what is allowed, what to do. Commands print it and exit
    with status 2 (`common.command`); everything else is a fault of the program and keeps its traceback.
    """


class Interrupted(Exception):
    """The command was asked to stop, and has saved all it did: the same command again goes on from here.

    Commands print the message and exit with status INTERRUPTED; whoever launched the work queues it again.
    """


INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextmanager
def faults_told(kind: type[Told], message: str) -> Iterator[None]:
    """Makes `kind` of whatever a parser raises over foreign bytes: `message`, then its own words on the same line.

    What is `Told` already passes. Damaged files make parsers raise nearly anything (RecursionError, struct.error,
    MemoryError, tokenize.TokenError): a list of exceptions is never complete.
    """
    try:
        yield
    except Told:
        raise
    except Exception as error:  # noqa: BLE001
        words = one_line(str(error), 200) or type(error).__name__
        raise kind(f"{message} ({words})") from None


def one_line(text: str, limit: int = 1000) -> str:
    """`text` as one printable line of at most `limit` characters."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def printable(text: str) -> str:
    """`text` with what no terminal shows, or a terminal would obey, and what no encoding has, escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

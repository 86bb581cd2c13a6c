"""What ends a command before its work is done, and how faults of foreign bytes become one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class OneLineError(Exception):
    """An error whose message is for the user already: one line that names what is at fault.

    Whatever foreign text is put into it, it is printable and has at most `limit` characters.
    """

    limit = 1000

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(shortened(message, 2 * self.limit)), self.limit))


class UserError(OneLineError):
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
def errors_as(kind: type[OneLineError], message: str) -> Iterator[None]:
    """Makes `kind` of whatever a parser raises over foreign bytes: `message`, then its own words on the same line.

    What is `kind` already passes. Damaged files make parsers raise nearly anything (RecursionError, struct.error,
    MemoryError, tokenize.TokenError): a list of exceptions is never complete.
    """
    try:
        yield
    except kind:
        raise
    except Exception as error:  # noqa: BLE001
        raise kind(f"{message} ({_words(error)})") from None


def _words(error: Exception) -> str:
    """The exception's text, with its type if that is informative; without an OSError's path, which `message` has."""
    known = isinstance(error, OSError) and error.strerror
    words = one_line(str(known or error), 200)
    if words and isinstance(error, OneLineError | OSError | ValueError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def one_line(text: str, limit: int = 1000) -> str:
    """`text`, of any number of lines, as one printable line of at most `limit` characters."""
    return shortened(printable(" ".join(shortened(text, 2 * limit).split())), limit)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`: what is too long lacks its middle, and keeps how it ends."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def printable(text: str) -> str:
    """`text` with control characters, non-printable characters and lone surrogates escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

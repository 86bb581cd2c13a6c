"""Errors that end a command early, and the conversion of parser errors into one-line messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class OneLineError(Exception):
    """An error whose message is one printable line of at most `limit` characters, whatever text it quotes."""

    limit = 1000

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(shortened(message, 2 * self.limit)), self.limit))


class UserError(OneLineError):
    """A user's mistake, or a fault in a user's file.

    The message is one line: the field or file, what was found, what is allowed, what to do. Commands print it and exit
    with status 2 (`common.command`). Any other exception is a bug and keeps its traceback.
    """


class Refused(UserError):
    """Several faults that were found before any work began; commands print a line for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = [str(OneLineError(fault)) for fault in faults]


class NoDataYet(UserError):
    """The recipe leaves a field to the data, and the shards that would say it are not there."""


class Interrupted(Exception):
    """The command was asked to stop and has saved its work: the same command continues from here.

    Commands print the message and exit with status INTERRUPTED; the launcher queues the work again.
    """


INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

# Error messages of gloo and NCCL.
LOST_RANK_WORDS = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exit",
                   "exit of a remote peer")  # fmt: skip


@contextmanager
def errors_as(kind: type[OneLineError], message: str) -> Iterator[None]:
    """Re-raises any exception as `kind`: `message`, then the exception's own words in parentheses.

    An exception of type `kind` passes unchanged. It catches all because parsers raise nearly anything for damaged files
    (RecursionError, struct.error, MemoryError, tokenize.TokenError).
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


def has_lost_a_rank(error: Exception) -> bool:
    """Whether it is the end of a connection, in the words of gloo or NCCL, and not a fault of this rank's own."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in LOST_RANK_WORDS)


def one_line(text: str, limit: int = 1000) -> str:
    """`text` joined to one printable line of at most `limit` characters."""
    return shortened(printable(" ".join(shortened(text, 2 * limit).split())), limit)


def shortened(text: str, limit: int) -> str:
    """`text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def printable(text: str) -> str:
    """`text` with control characters, non-printable characters and lone surrogates escaped."""
    if text.isprintable():  # a report's pictures are millions of characters
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)

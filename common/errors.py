"""What ends a command before its work is done."""


class UserError(Exception):
    """A mistake of the user's, or a fault in a user's file.

    The message is one line: the field or file, what was found, what is allowed, what to do. Commands print it and exit
    with status 2 (`common.command`); everything else is a fault of the program and keeps its traceback.
    """


class Interrupted(Exception):
    """The command was asked to stop, and has saved all it did: the same command again goes on from here.

    Commands print the message and exit with status INTERRUPTED; whoever launched the work queues it again.
    """


INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later

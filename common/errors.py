"""What a user did that cannot work."""


class UserError(Exception):
    """A mistake of the user's, or a fault in a user's file.

    The message is one line: the field or file, what was found, what is allowed, what to do. Commands print it and exit
    with status 2 (`common.command`); everything else is a fault of the program and keeps its traceback.
    """

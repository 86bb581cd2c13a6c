"""Paths as a person writes them: `~`, `$NAME` and `${NAME}` are expanded, everywhere alike."""

import os
import re

VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*)|\{)")


def expanded(path: str) -> str:
    """`path` with a leading `~` or `~user` as the home folder, variables as their values, and `$$` as `$`.

    An address (`s3://...`) stays as it is. Raises ValueError for an empty path, and for a user or a variable that is
    not known on this machine.
    """
    if "://" in path:
        return path
    if not path:
        raise ValueError("empty; name a folder or file, . for the current folder")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if match[0] == "$$":
            return "$"
        if name is None:
            raise ValueError(f"{path} has a ${{ without a name and }}; write ${{NAME}}, or $$ for a $")
        if not os.environ.get(name):
            raise ValueError(f"{path} names a variable that is not set, {name}; set it, or write the path")
        return os.environ[name]

    head, slash, rest = path.partition("/")
    if head.startswith("~"):
        home = os.path.expanduser(head)
        if home == head:
            raise ValueError(f"{path}: no user {head[1:]} here; write ./{head} for a folder of that name")
    else:
        home = VARIABLE.sub(value, head)
    return home + slash + VARIABLE.sub(value, rest)

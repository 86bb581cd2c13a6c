"""Which files this process opens, writes and deletes, by Python's audit events."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGING = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "os.chmod", "os.chown"),
    *("os.link", "os.symlink", "shutil.rmtree", "shutil.copyfile", "shutil.move", "os.listxattr", "os.setxattr"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What an import, the clock or the number of CPUs takes; only read.
SYSTEMS = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc", "/sys", "/usr", "/etc", "/dev", "/lib")

_watchers: list[list[tuple[str, str, bool]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        mode, flags = arguments[1], arguments[2] or 0
        writes = bool(flags & WRITING) or any(letter in (mode or "") for letter in "wax+")
        _watchers[-1].append((event, os.fsdecode(arguments[0]), writes))
    elif event in CHANGING:
        paths = [each for each in arguments[:2] if isinstance(each, (str, bytes, os.PathLike))]
        _watchers[-1] += [(event, os.fsdecode(path), True) for path in paths]


sys.addaudithook(_hook)


@contextmanager
def only_below(*folders: Path) -> Iterator[None]:
    """Raises AssertionError where the block opens or changes a file outside `folders`; links are resolved."""
    events: list[tuple[str, str, bool]] = []
    _watchers.append(events)
    try:
        yield
    finally:
        _watchers.pop()
    roots = [os.path.realpath(folder) for folder in folders]
    for event, path, writes in events:
        real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
        compiled = "/__pycache__/" in real  # what Python keeps of a module when it is first imported
        allowed = roots if writes and not compiled else [*roots, *SYSTEMS]
        assert any(real == root or real.startswith(f"{root}/") for root in allowed), f"{event}: {path}"

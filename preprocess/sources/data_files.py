"""Resolves a path to the files of one split of a data set; never merges splits or configurations."""

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError, errors_as
from preprocess.sources.entries import is_hidden, kind_of
from preprocess.sources.folders import walk_visible

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # an address; no usual path begins so
NUMBERED = re.compile(
    r"(.*?)[-_.]?(\d+)-of-(\d+)(?:-[0-9a-f]+)?"
)  # the hub's file names: name, part and number of parts
SPLITS = {  # the hub's names of splits, not surrounded by letters
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
UNFINISHED = "gz|bz2|xz|zst|lz4|part|partial|incomplete|crdownload|aria2|tmp"
PACKED_TARS = r"|.*\.(tgz|tbz2?|txz)"
MAX_FILES = 1_000_000


def data_files(path: str, field: str, suffix: str) -> tuple[list[Path], Counter[str]]:
    """The files with `suffix` at `path`, sorted, and the number of other files by reason.

    A folder stands for all files below it, a pattern (`*`, `**`) for all its matches. They must be all parts of
    one split and one configuration. Braces (`{train,extra}-*.tar`, `x-{000..146}.tar`) combine sets, each checked
    separately.

    Raises UserError for addresses, missing files, packed or unfinished files, and for several sets.
    """
    left_out = Counter[str]()
    if SCHEME.match(path):
        raise UserError(f"{field}: {path} begins with a scheme; only plain paths are read: download it first")
    if os.path.isdir(path):
        files = sorted(_below(Path(path), suffix, field, left_out))
        _check_one_set(files, field, path)
    elif os.path.isfile(path):
        files = [Path(path)]
    else:
        files = [file for pattern in _alternatives(path, field) for file in _matching(pattern, field, suffix, left_out)]
    if not files:
        there = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common(3))
        raise UserError(f"{field}: {path} holds no {suffix}{f' ({there})' if there else ''}; name where they are")
    twice = next((file for file, count in Counter(files).items() if count > 1), None)
    if twice:
        raise UserError(f"{field}: {path} names {twice} twice; name each file once")
    return files, left_out


def common_folder(files: list[Path]) -> Path:
    """The deepest folder that contains all files."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def _below(folder: Path, suffix: str, field: str, left_out: Counter[str]) -> Iterator[Path]:
    unfinished = re.compile(rf".*{re.escape(suffix)}\.({UNFINISHED}){PACKED_TARS if suffix == '.tar' else ''}", re.I)
    for parent, links, names in walk_visible(folder, field, left_out):
        if links:
            raise UserError(f"{field}: {parent}/{links[0]} is a symbolic link to a folder; name that folder")
        for name in names:
            if unfinished.fullmatch(name) and not is_hidden(name):
                raise UserError(f"{field}: {parent}/{name} is packed or unfinished, no {suffix}; unpack or remove it")
            if name.lower().endswith(suffix) and not is_hidden(name):
                yield parent / name
            else:
                left_out[kind_of(name)] += 1


def _alternatives(path: str, field: str) -> list[str]:
    from braceexpand import braceexpand

    with errors_as(UserError, f"{field}: {path} has unbalanced braces; close them"):
        ranges = re.findall(r"\{(\d+)\.\.(\d+)", path)  # braceexpand would expand them all at once
        lists = re.findall(r"\{([^{},]*,[^{}]*)\}", path)
        count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
        if count * math.prod(each.count(",") + 1 for each in lists) <= MAX_FILES:
            return list(braceexpand(path))
    raise UserError(f"{field}: {path} means more than {MAX_FILES:,} files; name fewer")


def _matching(pattern: str, field: str, suffix: str, left_out: Counter[str]) -> list[Path]:
    if os.path.isfile(pattern):
        return [Path(pattern)]
    with errors_as(UserError, f"{field}: {pattern} cannot be looked for; name a folder"):
        matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    files = [file for file in matches if file.suffix.lower() == suffix]
    left_out.update(kind_of(file.name) for file in matches if file.suffix.lower() != suffix)
    if not files:
        raise UserError(f"{field}: {pattern} is not there or holds no {suffix}; name files that are")
    _check_one_set(files, field, pattern)
    return files


def _check_one_set(files: list[Path], field: str, path: str) -> None:
    """Raises UserError for several splits or configurations, and for missing parts by the files' names."""
    sets: dict[tuple[str, ...], list[Path]] = {}
    root = common_folder(files) if files else Path()
    for file in files:
        sets.setdefault(_set_of(file.absolute().relative_to(root)), []).append(file)
    if len(sets) > 1:
        patterns = {key: _pattern(members[0]) for key, members in sets.items()}
        _, chosen = min(("train" not in key, pattern) for key, pattern in patterns.items())
        shown = ", ".join(os.path.relpath(pattern, root) for pattern in list(patterns.values())[:5])
        shown += ", ..." if len(patterns) > 5 else ""
        raise UserError(
            f"{field}: {path} holds {len(sets)} sets of files that must not merge unnoticed, splits or configurations: "
            f"{shown}; list in braces what is meant together, or name one, as {chosen}"
        )
    numbered = [match for file in files if (match := NUMBERED.fullmatch(file.stem))]
    counts = Counter(int(match[2]) for match in numbered)
    parts = max(1, min(int(numbered[0][3]), MAX_FILES)) if numbered else 0
    first = int(counts[parts] > counts[0])  # numbered from 0, as the hub has them, or from 1
    wanted = range(first, first + parts)
    wrong = next((number for number in sorted({*wanted, *counts}) if counts[number] != (number in wanted)), None)
    if wrong is not None:
        raise UserError(
            f"{field}: {path} has {counts[wrong]} files of part {wrong} of {numbered[0][3]}, and each of {first} to "
            f"{wanted[-1]} should be there once; get what is missing, or list in braces the files that are meant"
        )


def _set_of(file: Path) -> tuple[str, ...]:
    """The key of a file's set: folder, split, and number of parts."""
    folder = str(file.parent)
    numbered = NUMBERED.fullmatch(file.stem)
    if numbered:
        return folder, numbered[1], numbered[3]
    words = (split for split, names in SPLITS.items() if re.search(rf"(?<![a-z])({names})(?![a-z])", file.stem, re.I))
    return folder, "+".join(words)


def _pattern(file: Path) -> Path:
    """A pattern that matches the files of this file's set."""
    stem = re.sub(r"\d+(-of-\d+)-[0-9a-f]+$", r"*\1*", file.stem)  # with the hub's older fingerprint
    return file.with_name(re.sub(r"\d+(-of-\d+)?$", r"*\1", stem) + file.suffix)

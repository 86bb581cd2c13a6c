"""Tars, read without unpacking: members are listed once, then read at their offsets."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError, errors_as
from preprocess.sources.entries import is_hidden, kind_of, member_name, refuse_lfs_pointer

MAX_HEADER = 2**20  # bytes; what tarfile reads at once for a name or for pax headers: kilobytes
NOT_PLAIN = {
    tarfile.LNKTYPE: "a hard link; pack it again with --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link; pack it again with --dereference",
    tarfile.GNUTYPE_SPARSE: "a sparse file; pack it again without --sparse",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class TarMember(NamedTuple):
    name: str
    size: int
    offset: int  # of its first byte in the file


class Window:
    """`size` bytes of a file from `start`, as a file for `tarfile`; limits the size of each read."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self._position = file, start, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        self.file.seek(self.start + self._position)
        data = self.file.read(max(0, min(size, self.size - self._position)))
        self._position += len(data)
        return data


def tar_members(path: Path, field: str, file: Window, left_out: Counter[str]) -> Iterator[TarMember]:
    """The visible regular files of a tar, with offsets in the underlying file; counts hidden files in `left_out`.

    Raises UserError for a compressed or damaged tar, one without an end mark or with data after it, links, devices,
    members of impossible sizes, paths that lead out of the tar, and duplicate names.
    """
    seen: set[str] = set()
    _check_start(path, field, file)
    for member in _headers(path, field, file):
        name = member_name(field, path, member.name)
        if member.isdir():
            continue
        _check_member(path, field, member, file.size)
        if name in seen:
            raise UserError(f"{field}: {path} has two members {name!r}; pack it again without one of them")
        seen.add(name)
        if is_hidden(name):
            left_out[kind_of(name)] += 1
        else:
            yield TarMember(name, member.size, file.start + member.offset_data)


def _headers(path: Path, field: str, file: Window) -> Iterator[tarfile.TarInfo]:
    """Yields the members, then checks the end of the archive."""
    with errors_as(UserError, f"{field}: {path} is not a complete tar: damaged or cut off; download it again"):
        tar = tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload] # noqa: SIM115
        while member := tar.next():
            tar.members = []  # else it keeps all members in memory
            yield member
        _check_end(path, field, file, tar.offset)


def _check_start(path: Path, field: str, file: Window) -> None:
    file.seek(0)
    start = file.read(tarfile.BLOCKSIZE)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise UserError(f"{field}: {path} is compressed ({kind}), and tars are read in place: unpack the {kind}")
    refuse_lfs_pointer(path, field, start)
    if not start:
        raise UserError(f"{field}: {path} is empty; download it again")
    file.seek(0)


def _check_member(path: Path, field: str, member: tarfile.TarInfo, length: int) -> None:
    if not member.isreg() or member.issparse():
        kind = tarfile.GNUTYPE_SPARSE if member.issparse() else member.type
        what = NOT_PLAIN.get(
            kind, f"no regular file, but of tar's type {kind.decode(errors='replace')!r}; pack it again"
        )
        raise UserError(f"{field}: {path} has a member {member.name!r} that is {what}")
    left = length - member.offset_data
    if not 0 <= member.size <= left:
        raise UserError(
            f"{field}: {path} says its member {member.name!r} has {member.size:,} bytes, of {left:,} that are left: "
            "damaged or cut off; download it again"
        )


def _check_end(path: Path, field: str, file: Window, end: int) -> None:
    """Checks the end, since `tarfile` takes any invalid header for it and ignores the rest."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise UserError(
            f"{field}: {path} ends at byte {end:,} without a tar's end mark: cut off between two members, or its "
            "writer did not close it; download it again, or unpack it, see that all is there, and pack it again"
        )
    if any(block):
        raise UserError(
            f"{field}: {path} is damaged at byte {end:,}, where a member's header should be; download it again"
        )
    position = file.tell()
    while block := file.read(MAX_HEADER):
        if any(block):
            position += next(place for place, byte in enumerate(block) if byte)
            raise UserError(
                f"{field}: {path} goes on at byte {position:,}, behind the tar's end mark, as two tars one after the "
                "other do; unpack it with `tar --ignore-zeros -xf`, see that all is there, and pack it again"
            )
        position += len(block)

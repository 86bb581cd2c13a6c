"""Tars, read without unpacking: their members are listed once, and any of them is read at its offset."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from preprocess.sources.entries import check_member, is_hidden


class TarMember(NamedTuple):
    name: str
    size: int
    offset: int  # of its first byte in the file


def tar_members(path: Path, field: str, file: BinaryIO) -> Iterator[TarMember]:
    """The visible regular files of the tar that begins where `file` stands; offsets are those in `file`.

    Raises UserError naming what it found for a compressed or damaged tar, one without its end marker, links, devices,
    members of impossible sizes, names that lead out, and names that occur twice.
    """
    seen: set[str] = set()
    length = os.stat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # else it keeps all it has met
                check_member(field, path, member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{field}: {path} has a member {member.name!r} that is no plain file; repack it")
                if member.name in seen:
                    raise UserError(f"{field}: {path} has two members {member.name!r}; repack it without one of them")
                if not 0 <= member.size <= length - member.offset_data:
                    raise UserError(
                        f"{field}: {path} says its member {member.name!r} has {member.size:,} bytes, of "
                        f"{length - member.offset_data:,} that are left: damaged or cut off; get it anew"
                    )
                seen.add(member.name)
                if not is_hidden(member.name):
                    yield TarMember(member.name, member.size, member.offset_data)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # the last three: headers that lie
        raise UserError(
            f"{field}: {path} is not a whole, uncompressed tar ({error}); get it anew, or gunzip it"
        ) from None
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any wrong header for the end
        raise UserError(f"{field}: {path} is damaged or cut off at byte {end:,}; get it anew")

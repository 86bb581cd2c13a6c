"""Zips, read without unpacking: members are listed once, then read at their offsets."""

import re
import stat
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path

from common.errors import UserError, errors_as
from preprocess.images.images import Rejected
from preprocess.sources.entries import (
    HIDDEN_FOLDER,
    IMAGE_SUFFIXES,
    MAX_ENCODED,
    Entry,
    is_hidden,
    member_name,
    read_at,
)
from preprocess.sources.listing import Folder, Listing, Place

LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of the name and of the extra field
DRIVE = re.compile(r"[A-Za-z]:")


def find_zip(path: str) -> tuple[Path, str] | None:
    """The zip in `path` and the folder in it, as in `faces.zip/images`; None if `path` has no zip."""
    parts = Path(path).parts
    for count, part in enumerate(parts, 1):
        if part.lower().endswith(".zip") and not (archive := Path(*parts[:count])).is_dir():
            return archive, "/".join(parts[count:])
    return None


def list_zip(archive: Path, inside: str, field: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Listing:
    """Lists a zip, or its folder `inside`.

    Raises UserError naming the member for links, encryption, methods other than stored and deflated, paths that lead
    out of the zip and duplicate names; for a damaged zip; and if there is no folder `inside`.
    """
    members = _members(archive, field)
    begin = f"{inside}/" if inside else ""
    places = {name[len(begin) :]: info for name, info in members.items() if name.startswith(begin)}
    path = archive / inside
    if inside and not places:
        tops = sorted({name.partition("/")[0] for name in members if "/" in name})
        raise UserError(f"{field}: {archive} has no folder {inside!r}; it has {', '.join(tops) or 'none'}")
    root = Folder()
    for name in dict.fromkeys(map(_visible, places)):
        *parents, last = name.removesuffix("/").split("/")
        folder = root
        for parent in parents:
            folder = folder.folder(parent)
        if name.endswith("/"):
            folder.others[HIDDEN_FOLDER] += 1
        else:
            folder.add(last, suffixes)
    for folder in root.walk():
        folder.images.sort()

    def locate(key: str) -> Place:
        info = places[key]
        return info.file_size, (info.header_offset, info.CRC), 0

    return Listing(path, field, root, locate, partial(_open, archive))


def _visible(name: str) -> str:
    """A file's path, or the path of the hidden folder that contains it, which ends with `/`."""
    parts = name.split("/")
    hidden = next((count for count, part in enumerate(parts[:-1], 1) if is_hidden(part)), None)
    return f"{'/'.join(parts[:hidden])}/" if hidden else name


def _open(archive: Path, entry: Entry) -> bytes:
    offset, crc32 = entry.place
    if entry.size > MAX_ENCODED:
        raise Rejected(f"unpacks to {entry.size:,} bytes, above {MAX_ENCODED:,}: too many for an image")
    header = read_at(archive, offset, LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise Rejected("damaged in its zip: no header where the directory says")
    _, method, name_length, extra_length = LOCAL_HEADER.unpack(header)
    slack = entry.size // 1000 + 1024 if method else 0  # deflating incompressible data makes it longer
    data = read_at(archive, offset + LOCAL_HEADER.size + name_length + extra_length, entry.size + slack)
    with errors_as(Rejected, "damaged in its zip"):
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1) if method else data
    if len(data) != entry.size or zlib.crc32(data) != crc32:
        raise Rejected("damaged in its zip: its checksum does not match")
    return data


def _members(path: Path, field: str) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their normalised paths."""
    if not path.is_file():
        raise UserError(f"{field}: {path} is not there")
    with (
        errors_as(UserError, f"{field}: {path} is not a complete zip, or is unreadable"),
        zipfile.ZipFile(path) as archive,
    ):
        infos = archive.infolist()
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = _name(info, path, field)
        fault = "twice" if name in members else _fault(info)
        if fault:
            raise UserError(f"{field}: {path} has a member {info.filename!r} {fault}; pack it again")
        if name and not name.endswith("/"):
            members[name] = info
    return members


def _name(info: zipfile.ZipInfo, path: Path, field: str) -> str:
    """A member's path, with the backslashes of old Windows programs replaced by `/`. Folders end with `/`."""
    name = info.orig_filename.replace("\\", "/")
    end = "/" if name.endswith("/") else ""
    return member_name(field, path, f"/{name}" if DRIVE.match(name) else name) + end


def _fault(info: zipfile.ZipInfo) -> str | None:
    if stat.S_ISLNK(info.external_attr >> 16):
        return "that is a symbolic link"
    if info.flag_bits & 1:
        return "that is encrypted"
    if info.file_size >= 2**62 or info.header_offset >= 2**62:
        return "of an impossible size"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {info.compress_type}, and only deflate is read"
    return None

"""Zips, read without unpacking: their members are listed once, and any of them is read at its offset."""

import stat
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from common.errors import UserError
from preprocess.images import Rejected
from preprocess.sources.entries import (
    MAX_ENCODED,
    PICTURE_SUFFIXES,
    Entries,
    Entry,
    is_hidden,
    is_picture,
    kind_of,
    member_name,
    read_at,
)

LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of the name and of the extra field


class ZipSource:
    """The pictures of a zip, labelled as `FolderSource` labels those of a folder, or all one class `class_name`.

    Raises UserError naming the member for links, encryption, methods other than stored and deflated, names that lead
    out and names that occur twice; and for a zip that is damaged, holds no pictures, or holds an LMDB.
    """

    def __init__(
        self,
        path: str | Path,
        field: str,
        class_name: str | None = None,
        suffixes: frozenset[str] = PICTURE_SUFFIXES,
    ) -> None:
        self.path, self.field = Path(path), field
        members = self._members()
        pictures = [member for member in members if is_picture(member.filename, suffixes)]
        self.left_out = Counter(
            kind_of(member.filename) for member in members if not is_picture(member.filename, suffixes)
        )
        if not pictures:
            inside = {Path(member.filename).name for member in members}
            remedy = "unzip it and name the folder of data.mdb" if "data.mdb" in inside else "name another archive"
            raise UserError(f"{field}: {path} holds no pictures; {remedy}")
        if class_name is not None:
            self.class_names, labels = [class_name], {member.filename: 0 for member in pictures}
        else:
            self.class_names, labels = self._classes([member.filename for member in pictures])
        entries = (
            Entry(member.filename, labels[member.filename], member.file_size, (member.header_offset, member.CRC))
            for member in pictures
        )
        self.entries = Entries(sorted(entries, key=lambda entry: (entry.label, entry.key)))

    def open(self, entry: Entry) -> bytes:
        offset, crc32 = entry.place
        if entry.size > MAX_ENCODED:
            raise Rejected(f"unpacks to {entry.size:,} bytes, above {MAX_ENCODED:,}: too many for a picture")
        header = read_at(self.path, offset, LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise Rejected("damaged in its zip: no header where the directory says")
        _, method, name_length, extra_length = LOCAL_HEADER.unpack(header)
        slack = entry.size // 1000 + 1024 if method else 0  # deflating what does not shrink makes it longer
        data = read_at(self.path, offset + LOCAL_HEADER.size + name_length + extra_length, entry.size + slack)
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1) if method else data
        except zlib.error as error:
            raise Rejected(f"damaged in its zip: {error}") from None
        if len(data) != entry.size or zlib.crc32(data) != crc32:
            raise Rejected("damaged in its zip: its checksum does not match")
        return data

    def _members(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise UserError(f"{self.field}: {self.path} is not a whole zip ({error}); get it anew") from None
        seen: set[str] = set()
        for info in infos:
            fault = self._fault(info, seen)
            if fault:
                raise UserError(f"{self.field}: {self.path} has a member {info.filename!r} {fault}; pack it again")
            seen.add(info.filename)
        return [info for info in infos if not info.is_dir() and not is_hidden(info.filename)]

    def _fault(self, info: zipfile.ZipInfo, seen: set[str]) -> str | None:
        member_name(self.field, self.path, info.orig_filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            return "that is a symbolic link"
        if info.flag_bits & 1:
            return "that is encrypted"
        if info.file_size >= 2**62 or info.header_offset >= 2**62:
            return "of an impossible size"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"compressed by method {info.compress_type}, and only deflate is read"
        return "twice" if info.filename in seen else None

    def _classes(self, names: list[str]) -> tuple[list[str], dict[str, int]]:
        """Class names, and every picture's label."""
        tops = {name: name.partition("/")[0] if "/" in name else "" for name in names}
        class_names = sorted(set(tops.values()))
        if "" in class_names and len(class_names) > 1:
            alone = next(name for name, top in tops.items() if not top)
            raise UserError(
                f"{self.field}: {self.path} holds both pictures ({alone}) and folders; move them into classes"
            )
        labels = {top: label for label, top in enumerate(class_names)}
        return [name or self.path.stem for name in class_names], {name: labels[top] for name, top in tops.items()}

"""A tar is read whole, whoever wrote it, or refused with one line that says where it goes wrong."""

import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.images.images import Rejected
from tests.photographs import photographs, source_of, tar_bytes, write_folder
from tests.planted import JPEG

LABELLED = {"a.jpg": JPEG, "a.cls": b"1", "b.jpg": JPEG + b"b", "b.cls": b"0"}
END = bytes(1024)


def keys(path: Path) -> dict[str, int]:
    return {entry.key: entry.label for entry in source_of("webdataset", path).entries}


def refused(path: object, **options: object) -> str:
    with pytest.raises(UserError) as found:
        source_of("webdataset", path, **options)
    message = str(found.value)
    assert "\n" not in message
    return message


def packed(folder: Path, path: Path, *options: str) -> Path:
    """By the system's tar."""
    subprocess.run(["tar", *options, "-cf", path, "."], cwd=folder, check=True)
    return path


def of_format(files: dict[str, bytes], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "ü" * 600}
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["gnu", "ustar", "posix", "v7"])
def test_a_tar_of_the_folder_itself_is_read_as_its_members_are_named(tmp_path: Path, form: str) -> None:
    folder = write_folder(
        tmp_path / "in", {f"sub/{name}" if form == "posix" else name: d for name, d in LABELLED.items()}
    )
    path = packed(folder, tmp_path / "x.tar", f"--format={form}")
    assert b"./" in path.read_bytes()[:2048]
    sub = "sub/" if form == "posix" else ""
    assert keys(path) == {f"x.tar/{sub}a.jpg": 1, f"x.tar/{sub}b.jpg": 0}


@pytest.mark.parametrize("name", ["./a.jpg", ".//a.jpg", "././a.jpg", "d//a.jpg", "d/./a.jpg"])
def test_a_name_is_the_path_it_means(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: JPEG}))
    assert list(keys(tmp_path / "x.tar")) == ["x.tar/d/a.jpg" if "d" in name else "x.tar/a.jpg"]


def test_names_that_mean_the_same_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.jpg": JPEG, "./a.jpg": JPEG}))
    assert "two members 'a.jpg'" in refused(tmp_path / "x.tar")


def test_a_dotted_shard_beside_a_plain_one_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "x-0.tar").write_bytes(tar_bytes({f"./{name}": data for name, data in LABELLED.items()}))
    (tmp_path / "x-1.tar").write_bytes(tar_bytes(LABELLED))
    assert keys(tmp_path) == {
        f"x-{shard}.tar/{name}.jpg": label for shard in (0, 1) for name, label in (("a", 1), ("b", 0))
    }


@pytest.mark.parametrize(
    "name", [".hidden.jpg", "./._a.jpg", "__MACOSX/a.jpg", "./PaxHeaders.1234/a.jpg", "PaxHeader/a.jpg", ".git/a.jpg"]
)
def test_hidden_files_are_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({**LABELLED, name: JPEG}))
    source = source_of("webdataset", tmp_path / "x.tar")
    assert (len(source.entries), source.left_out) == (2, {"hidden": 1})


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_letters_are_read_in_every_format(tmp_path: Path, tar_format: int) -> None:
    files = {f"{'deep/' * 60}ä{name}": data for name, data in LABELLED.items()}
    (tmp_path / "x.tar").write_bytes(of_format(files, tar_format))
    source = source_of("webdataset", tmp_path / "x.tar")
    assert {entry.key: source.open(entry) for entry in source.entries} == {
        f"x.tar/{name}": data for name, data in files.items() if name.endswith("jpg")
    }


def test_a_name_split_by_ustar_is_joined(tmp_path: Path) -> None:
    name = "/".join(["p" * 50] * 3) + "/a.jpg"
    (tmp_path / "x.tar").write_bytes(of_format({name: JPEG}, tarfile.USTAR_FORMAT))
    assert list(keys(tmp_path / "x.tar")) == [f"x.tar/{name}"]


ONE = tar_bytes(LABELLED)
AFTER_THE_END: dict[str, tuple[bytes, str | None]] = {
    "zeros to the blocking factor": (ONE, None),
    "more zeros than any blocking factor": (ONE + bytes(3 * 2**20 + 7), None),
    "the shortest end": (ONE.rstrip(b"\0").ljust(-(-len(ONE.rstrip(b"\0")) // 512) * 512, b"\0") + END, None),
    "a second tar": (ONE + ONE, rf"goes on at byte {len(ONE):,}, behind the tar's end mark, .*--ignore-zeros"),
    "a second tar after many zeros": (ONE + bytes(2**21) + ONE, rf"goes on at byte {len(ONE) + 2**21:,}"),
    "garbage": (ONE + bytes(5) + b"x", rf"goes on at byte {len(ONE) + 5:,}"),
    "no end mark": (
        ONE.rstrip(b"\0").ljust(-(-len(ONE.rstrip(b"\0")) // 512) * 512, b"\0"),
        "without a tar's end mark",
    ),
    "half an end mark": (tar_bytes({"a.jpg": JPEG})[: 512 + -(-len(JPEG) // 512) * 512 + 100], "without a tar's end"),
    "nothing at all": (b"", "is empty; download it again"),
    "zeros alone": (bytes(10240), "holds no images"),
    "a page that the server sent": (b"<!DOCTYPE html>" + bytes(600), "is not a complete tar"),
    "a note of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    **{
        f"packed by {kind}": (magic + bytes(600), rf"is compressed \({kind}\)")
        for kind, magic in (("gzip", b"\x1f\x8b\x08"), ("bzip2", b"BZh9"), ("xz", b"\xfd7zXZ\0"), ("zip", b"PK\3\4"))
    },
}


@pytest.mark.parametrize("case", AFTER_THE_END)
def test_nothing_is_dropped_behind_the_end_mark(tmp_path: Path, case: str) -> None:
    data, reason = AFTER_THE_END[case]
    (tmp_path / "x.tar").write_bytes(data)
    if reason is None:
        assert keys(tmp_path / "x.tar") == {"x.tar/a.jpg": 1, "x.tar/b.jpg": 0}
        return
    with pytest.raises(UserError, match=reason):
        source_of("webdataset", tmp_path / "x.tar")


def test_tars_that_tar_itself_appended_are_one(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.jpg": JPEG}))
    (tmp_path / "y.tar").write_bytes(tar_bytes({"b.jpg": JPEG}))
    subprocess.run(["tar", "-A", "-f", "x.tar", "y.tar"], cwd=tmp_path, check=True)
    assert list(keys(tmp_path / "x.tar")) == ["x.tar/a.jpg", "x.tar/b.jpg"]


def test_links_and_sparse_files_are_refused_with_tars_own_remedy(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", {"a.jpg": JPEG})
    os.link(folder / "a.jpg", folder / "b.jpg")
    assert "is a hard link; pack it again with --hard-dereference" in refused(packed(folder, tmp_path / "x.tar"))
    (folder / "b.jpg").unlink()
    (folder / "b.jpg").symlink_to("a.jpg")
    assert "is a symbolic link; pack it again with --dereference" in refused(packed(folder, tmp_path / "x.tar"))
    (folder / "b.jpg").unlink()
    with open(folder / "b.jpg", "wb") as file:
        file.truncate(2**20)
    for form in ("gnu", "posix"):
        message = refused(packed(folder, tmp_path / "x.tar", "--sparse", f"--format={form}"))
        assert "is a sparse file; pack it again without --sparse" in message


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "x.tar.part", "X.TAR.XZ"])
def test_a_folder_with_packed_or_unfinished_tars_says_so(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {"x-0.tar": ONE, name: b"\x1f\x8b"})
    assert f"{name} is packed or unfinished, no .tar; unpack or remove it" in refused(tmp_path)


def mutated(data: bytes, seed: int) -> bytes:
    """Some bytes of the headers changed, exchanged with others, or gone."""
    dice, changed = random.Random(seed), bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.choice(range(0, len(changed), 512)) + dice.randrange(512)
        kind = dice.randrange(3)
        if kind == 0:
            changed[place : place + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            other = dice.randrange(len(changed))
            changed[place : place + 40] = changed[other : other + 40]
        else:
            del changed[place : place + dice.choice((1, 512, 5000))]
    header = dice.choice(range(0, len(changed) - 512, 512))  # and a sum that is right again
    total = 256 + sum(changed[header : header + 148]) + sum(changed[header + 156 : header + 512])
    changed[header + 148 : header + 156] = b"%06o\0 " % (total & 0o777777)
    return bytes(changed)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_mutated_tar_is_read_or_refused_on_one_line(tmp_path: Path, tar_format: int) -> None:
    long = "" if tar_format == tarfile.USTAR_FORMAT else "l" * 200
    data = of_format({f"{long}{name}": content[:700] for name, content in LABELLED.items()}, tar_format)
    read, told = 0, list[str]()
    for seed in range(300):
        (tmp_path / "x.tar").write_bytes(mutated(data, seed))
        try:
            source = source_of("webdataset", tmp_path / "x.tar")
            read += all(len(source.open(entry)) == entry.size for entry in source.entries)
        except (UserError, Rejected) as error:
            told.append(str(error))
    assert not any("\n" in line for line in told)
    assert min(read, len(told)) > 10


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 2**32
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**32 + 2048)  # sparse: takes no room
    assert "a header of 4,294,967,296 bytes" in refused(tmp_path / "x.tar")


def test_a_chain_of_long_names_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
    block = member.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(block * 5000 + END)
    assert "is not a complete tar" in refused(tmp_path / "x.tar")


def test_imagenets_tar_of_tars_accounts_for_all_its_members(tmp_path: Path) -> None:
    inner = [tar_bytes({f"./{number}.JPEG": data}) for number, data in enumerate(photographs(2))]
    files = {"./n01440764.tar": inner[0], "n01443537.tar": inner[1], "README.md": b"x", "._n01443537.tar": b"x"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    source = source_of("imagenet", tmp_path / "x.tar")
    assert [(entry.key, entry.label) for entry in source.entries] == [("n01440764/0.JPEG", 0), ("n01443537/1.JPEG", 1)]
    assert source.left_out == {"not an image: .md": 1, "hidden": 1}


@pytest.mark.parametrize("tail", [ONE, b"x"])
def test_imagenets_inner_tars_are_read_to_their_ends(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"n01440764.tar": ONE + tail, "n01443537.tar": ONE}))
    with pytest.raises(UserError, match=r"x\.tar/n01440764\.tar goes on at byte"):
        source_of("imagenet", tmp_path / "x.tar")

"""Archives made to harm are refused in one line; all planted images at once are encoded, and none is lost."""

import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import VAE, Data, Model, Recipe
from preprocess.images.images import Rejected
from preprocess.shards import LatentShards, verify
from tests.encoding_stage import encode
from tests.photographs import photographs, source_of, tar_bytes, write_folder, write_lmdb, write_parquet, write_zip
from tests.planted import ACCEPTED_IMAGES, JPEG, REJECTED_IMAGES

NAMES = (b"caf\xe9.jpg", b"two\nlines.jpg", b"\x1b[2J.jpg")  # Latin-1, a line's end, a terminal's command


def recipe_of(images: Path, tiny_vae: Path, shards: Path) -> Recipe:
    data = Data(
        images=str(images), source="celebahq", resolution=16, shard_samples=8, shards=str(shards), max_rejected=1.0
    )
    return Recipe(name="test", data=data, vae=VAE(path=str(tiny_vae), downsampling=4), model=Model(num_classes=1))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_of_all_planted_images_each_is_encoded_or_listed_with_its_reason(tmp_path: Path, tiny_vae: Path) -> None:
    planted = REJECTED_IMAGES | ACCEPTED_IMAGES
    names = {f"{number:03d}.jpg": case for number, case in enumerate(planted)}
    images = write_folder(tmp_path / "images", {name: planted[case][0] for name, case in names.items()})
    encode(recipe_of(images, tiny_vae, tmp_path / "shards"))
    index = LatentShards(tmp_path / "shards").index
    rejected = {names[each["key"]]: each["reason"] for each in index["rejected"]}
    assert set(rejected) == set(REJECTED_IMAGES)
    assert all(re.search(REJECTED_IMAGES[case][1], reason) for case, reason in rejected.items())
    assert (index["found"], index["accepted"]) == (len(planted), len(ACCEPTED_IMAGES))
    assert not list(verify(tmp_path / "shards"))


def test_names_that_no_terminal_shows_are_listed_on_one_line(
    tmp_path: Path, tiny_vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "images", {"whole.jpg": JPEG})
    for name in NAMES:
        (images / os.fsdecode(name)).write_bytes(b"not an image")
    encode(recipe_of(images, tiny_vae, tmp_path / "shards"))
    line = capsys.readouterr().out.encode().splitlines()[-1].decode()  # has an encoding
    assert line.startswith("3 rejected: \\x1b[2J.jpg: not readable as an image")
    assert all(name in line for name in ("caf\\udce9.jpg", "two\\nlines.jpg"))


def tar_of_sizes(path: Path, size: Callable[[tarfile.TarInfo], bytes]) -> Path:
    """Two images, the second with the size field that `size` gives."""
    with open(path, "wb") as file:
        for name in ("0.jpg", "1.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(JPEG)
            header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
            if name == "1.jpg":
                header[124:136] = size(member)
                header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
            file.write(header + JPEG + bytes(-len(JPEG) % 512))
        file.write(bytes(1024))
    return path


def base256(number: int) -> bytes:
    """A tar's way to write numbers that its twelve octal digits do not hold, or negative ones."""
    return (b"\xff" if number < 0 else b"\x80") + (number % 256**11).to_bytes(11, "big")


def zip_of_a_size(path: Path) -> Path:
    write_zip(path, {"a.jpg": JPEG})
    with zipfile.ZipFile(path, "a") as archive:
        archive.infolist()[0].file_size = 2**63
        archive.writestr("b.jpg", JPEG)  # the directory is written anew
    return path


def parquet_of_a_label(path: Path) -> Path:
    return write_parquet(path, [JPEG, JPEG], [0, 2**60], None)


def parquet_of_other_metadata(path: Path) -> Path:
    from pyarrow import parquet

    table = parquet.read_table(write_parquet(path, [JPEG], [0], None))
    parquet.write_table(table.replace_schema_metadata({"huggingface": "[{"}), path)
    return path


def parquet_of_names(path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": ["0.jpg", "1.jpg"], "label": [0, 1]}), path)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a tar with a size below nothing": (
        lambda f: tar_of_sizes(f / "x.tar", lambda _: base256(-1)),
        "webdataset",
        "member '1.jpg' has -1 bytes",
    ),
    "a tar that leads back into itself": (
        lambda f: tar_of_sizes(f / "x.tar", lambda _: base256(-2560)),
        "webdataset",
        "member '1.jpg' has -2,560 bytes",
    ),
    "a tar with a size beyond 64 bits": (
        lambda f: tar_of_sizes(f / "x.tar", lambda _: base256(2**80)),
        "webdataset",
        "damaged or cut off",
    ),
    "a tar with a member longer than itself": (
        lambda f: tar_of_sizes(f / "x.tar", lambda _: b"77777777777\0"),
        "webdataset",
        "member '1.jpg' has 8,589,934,591 bytes, of",
    ),
    "a zip with a size of 64 bits": (lambda f: zip_of_a_size(f / "x.zip"), "ffhq", "'a.jpg' of an impossible size"),
    "a parquet with a label of 60 bits": (
        lambda f: parquet_of_a_label(f / "x.parquet"),
        "parquet",
        "x.parquet/000001 has the label 1152921504606846976",
    ),
    "a parquet with metadata that are no JSON": (
        lambda f: parquet_of_other_metadata(f / "x.parquet"),
        "parquet",
        "metadata that `datasets` does not write",
    ),
    "a parquet of names in place of images": (
        lambda f: parquet_of_names(f / "x.parquet"),
        "parquet",
        "column 'image' is of string, encoded images are read",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_numbers_that_lie_are_refused_before_memory_is_taken_for_them(case: str, tmp_path: Path) -> None:
    make, source, reason = HOSTILE[case]
    with pytest.raises(UserError, match=reason) as found:
        source_of(source, make(tmp_path))
    assert "\n" not in str(found.value)


def test_damage_anywhere_in_a_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", list(photographs(4)), [0, 1, 0, 1], ["a", "b"])
    data, told = path.read_bytes(), list[str]()
    for position in range(len(data) - 600, len(data), 20):  # metadata, where all else is described
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            source = source_of("parquet", path)
            for entry in source.entries:
                source.open(entry)
        except (UserError, Rejected) as error:
            told.append(str(error))
    assert any("not a complete parquet file" in line for line in told)
    assert not any("\n" in line for line in told)


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Callable[[int, str], Path]]:
    """Makes so many folders in one another, the last of which holds a tar."""

    def make(depth: int, name: str) -> Path:
        here = os.getcwd()
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        Path("x.tar").write_bytes(tar_bytes({"0.jpg": JPEG}))
        os.chdir(here)
        return tmp_path

    yield make
    subprocess.run(["rm", "-r", *tmp_path.iterdir()], check=True)  # pytest itself could not


def test_folders_deeper_than_a_path_can_be_are_refused_in_a_line(nested: Callable[[int, str], Path]) -> None:
    folder = nested(50, "a" * 200)
    for kind in ("folder", "webdataset"):
        with pytest.raises(UserError, match=r"/aaaa.* \.\.\. a.* cannot be listed: File name too long") as found:
            source_of(kind, folder)
        assert len(str(found.value)) <= UserError.limit


def test_folders_deeper_than_python_calls_go_are_listed(nested: Callable[[int, str], Path]) -> None:
    folder = nested(1100, "a")
    assert len(source_of("webdataset", folder).entries) == 1
    with pytest.raises(UserError, match=r"\*\*/\*\.tar cannot be looked for; name a folder"):
        source_of("webdataset", f"{folder}/**/*.tar")


@pytest.mark.parametrize("path", ["{" * 3000, "{a,b}" * 40, f"{{0..{'9' * 5000}}}", "{{a,b}," * 500])
def test_braces_that_mean_too_much_or_nothing_are_refused_at_once(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"more than 1,000,000 files|unbalanced braces") as found:
        source_of("webdataset", f"{tmp_path}/{path}.tar")
    assert len(str(found.value)) <= UserError.limit


def test_a_set_of_no_parts_by_its_name_is_one_part(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x-00000-of-00000.parquet", [JPEG], [0], None)
    assert len(source_of("parquet", tmp_path).entries) == 1


def test_a_member_whose_name_is_no_path_by_its_length_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a/" * 30_000 + "0.jpg": JPEG})
    with pytest.raises(UserError, match=r"of 60,005 characters: no path is so long"):
        source_of("folder", path)


def test_a_class_name_of_a_megabyte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"0.jpg": JPEG, "0.cls": b"0"}))
    (tmp_path / "classnames.txt").write_text("x" * 2**20)
    with pytest.raises(UserError, match="a class name of 1,048,576 characters; at most 4,096 are read"):
        source_of("webdataset", tmp_path)


def test_class_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [JPEG], [0], ["half \ud800"])
    with pytest.raises(UserError, match="no list of class names for label; write it again"):
        source_of("parquet", path)


@pytest.mark.parametrize("kind", ["parquet", "lsun"])
def test_an_image_beyond_all_sizes_is_rejected_and_the_other_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.sources.entries.MAX_ENCODED", len(JPEG))
    large = JPEG + bytes(1)
    if kind == "lsun":
        path = write_lmdb(tmp_path / "x", {"a": large, "b": JPEG})
    else:
        path = write_parquet(tmp_path / "x.parquet", [large, JPEG], [0, 0], None)
    source = source_of(kind, path)
    with pytest.raises(Rejected, match=r"bytes, above .*: too many for an image"):
        source.open(source.entries[0])
    assert source.open(source.entries[1]) == JPEG


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root, as whom tests may run, may read anything."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def test_images_and_folders_without_permission_are_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        images = write_folder(Path(name), {"a/0.jpg": JPEG, "b/1.jpg": JPEG})
        for path in (images, images / "a", images / "b"):
            path.chmod(0o755)
        (images / "a/0.jpg").chmod(0)
        source = source_of("folder", name)
        with as_nobody(), pytest.raises(Rejected, match=r"cannot be opened \(Permission denied"):
            source.open(source.entries[0])
        (images / "b").chmod(0)
        with as_nobody(), pytest.raises(UserError, match=r"/b cannot be listed: Permission denied; make it readable"):
            source_of("folder", name)

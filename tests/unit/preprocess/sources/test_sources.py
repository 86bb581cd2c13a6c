"""A folder or zip is listed completely, in one order: each file is taken or left out by a reason; links by a rule."""

import os
import random
import re
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.sources import Source, fingerprint
from tests.photographs import source_of, write_folder, write_zip

KEYS = ["b-class/2.png", "b-class/10.png", "b-class/sub/1.JPG", "b/1.webp", "a/x.jpeg"]


def fill(folder: Path, keys: list[str]) -> Path:
    return write_folder(folder, {key: key.encode() for key in keys})


def test_classes_and_keys_are_in_the_order_of_their_names_however_they_were_made(tmp_path: Path) -> None:
    sources = []
    for seed in range(3):
        keys = random.Random(seed).sample(KEYS, len(KEYS))
        sources.append(source_of("folder", fill(tmp_path / str(seed), keys)))
    expected = [
        ("a/x.jpeg", 0),
        ("b/1.webp", 1),
        ("b-class/10.png", 2),
        ("b-class/2.png", 2),
        ("b-class/sub/1.JPG", 2),
    ]
    for source in sources:
        assert source.class_names == ["a", "b", "b-class"]
        assert [(entry.key, entry.label) for entry in source.entries] == expected
        assert all(source.open(entry) == entry.key.encode() for entry in source.entries)
    assert len({fingerprint(source) for source in sources}) == 1


def test_images_alone_are_one_class(tmp_path: Path) -> None:
    source = source_of("folder", fill(tmp_path / "faces", ["2.png", "1.png"]))
    assert source.class_names == ["faces"]
    assert [entry[:3] for entry in source.entries] == [("1.png", 0, 5), ("2.png", 0, 5)]


def test_the_fingerprint_follows_names_labels_and_sizes(tmp_path: Path) -> None:
    folder = fill(tmp_path, KEYS)
    before = fingerprint(source_of("folder", folder))
    (folder / "a/x.jpeg").write_bytes(b"another image")
    resized = fingerprint(source_of("folder", folder))
    (folder / "b").rename(folder / "c")
    renamed = fingerprint(source_of("folder", folder))
    assert len({before, resized, renamed}) == 3


LEFT_OUT = {
    "README.md": "not an image: .md",
    "a/notes.txt": "not an image: .txt",
    "LICENSE": "not an image: no suffix",
    "a/odd.a b": "not an image: no suffix",
    "a/Thumbs.db": "not an image: .db",
    "a/array.npy": "not an image: .npy",
    ".marker.json": "hidden",
    "a/.x.png": "hidden",
    "a/.DS_Store": "hidden",
    "a/x.HEIC": "encoded as HEIC, which is not supported; convert to PNG or JPEG",
    "a/x.heif": "encoded as HEIC, which is not supported; convert to PNG or JPEG",
    "a/x.avif": "encoded as AVIF, which is not supported; convert to PNG or JPEG",
    "a/x.jxl": "encoded as JPEG XL, which is not supported; convert to PNG or JPEG",
    "a/x.dng": "encoded as a camera's raw data, which is not supported; convert to PNG or JPEG",
}


HIDDEN_FOLDERS = dict.fromkeys(  # each counts as one, however much is in it
    [".git", ".zfs", "__MACOSX", "a/@eaDir", "b/.thumbnails", "$RECYCLE.BIN", "lost+found"],
    "hidden folder, not looked into",
)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_every_file_that_is_not_taken_is_counted_by_its_reason(tmp_path: Path, form: str) -> None:
    in_hidden = [f"{folder}/{name}" for folder in HIDDEN_FOLDERS for name in ("1.png", "._x", ".b/2.png", "c/d/3.png")]
    files = {key: key.encode() for key in [*KEYS, *LEFT_OUT, *in_hidden]}
    path = write_folder(tmp_path / "x", files) if form == "folder" else write_zip(tmp_path / "x.zip", files)
    source = source_of("folder", path)
    expected = [*LEFT_OUT.values(), *HIDDEN_FOLDERS.values()]
    assert source.left_out == {reason: expected.count(reason) for reason in expected}
    assert sorted(entry.key for entry in source.entries) == sorted(KEYS)


FOLDERS = ["a", "b", "train", "val", "thumbnails128x128", "in-the-wild-images", "masks", "data128x128", "data256x256"]
FOLDERS += [
    ".git",
    "__MACOSX",
    "00000",
    "01000",
    "n01440764",
    "n01443537",
    "church_outdoor_train",
    "img",
    "two\nlines",
]
FILES = [
    "1.png",
    "2.JPG",
    "3.webp",
    "x",
    ".DS_Store",
    "y.txt",
    "z.heic",
    "w.npy",
    "Thumbs.db",
    "00001_hair.png",
    ".h.png",
]


def random_tree(seed: int) -> dict[str, bytes]:
    drawn = random.Random(seed)
    names = drawn.sample(FOLDERS, drawn.randint(1, 4))
    files = drawn.sample(FILES, drawn.randint(1, 5))
    keys = {
        "/".join([*drawn.sample(names, drawn.randint(0, min(3, len(names)))), drawn.choice(files)])
        for _ in range(drawn.randint(1, 12))
    }
    return {key: f"{seed} {key}".encode() for key in sorted(keys)}


def visible(key: str) -> str:
    """The key, or the hidden folder that it lies in, which counts as one."""
    return re.sub(r"^(.*?/)?(\.git|__MACOSX)/.*", r"\1\2", key, flags=re.S)


def test_a_hidden_folder_is_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `.zfs/snapshot`, which has the data set many times, and `lost+found`, which only root may list."""
    folder = fill(tmp_path, ["a/1.png", ".zfs/snapshot/day/a/1.png", "lost+found/2.png", "a/.git/3.png"])
    listed: list[str] = []
    original = os.scandir
    monkeypatch.setattr(
        "preprocess.sources.folders.os.scandir", lambda path: (listed.append(str(path)), original(path))[1]
    )
    source = source_of("folder", folder)
    assert sorted(listed) == [str(folder), f"{folder}/a"]
    assert (keys_of(source), source.left_out) == (["a/1.png"], {"hidden folder, not looked into": 3})


@pytest.mark.parametrize("kind", ["folder", "imagenet", "ffhq", "celebahq", "lsun"])
def test_of_any_tree_all_files_are_taken_or_left_out_or_it_is_refused(tmp_path: Path, kind: str) -> None:
    """Random trees, in a folder and in a zip: both give the same, and opened files are those that were written."""
    taken, refusals = 0, list[str]()
    for seed in range(100):
        files = random_tree(seed)
        if kind == "imagenet" and seed % 2:
            files = {f"n01440764/{key}": data for key, data in files.items()}
        outcomes: list[tuple[object, ...]] = []
        for path in (write_folder(tmp_path / f"{seed}/x", files), write_zip(tmp_path / f"{seed}/x.zip", files)):
            try:
                source = source_of(kind, path)
            except UserError as error:
                refusals.append(str(error))
                outcomes.append(())
                continue
            assert len(source.entries) + source.left_out.total() == len(set(map(visible, files)))
            assert all(count > 0 for count in source.left_out.values())
            assert {entry.key: source.open(entry) for entry in source.entries}.items() <= files.items()
            entries = [(entry.key, entry.label, entry.size) for entry in source.entries]
            outcomes.append((entries, source.class_names, source.left_out))
        assert outcomes[0] == outcomes[1]
        taken += bool(outcomes[0])
    assert min(taken, len(refusals)) > 3
    assert all(line.startswith("data.images: ") and line.isprintable() for line in refusals)


def test_an_undecodable_file_name_is_read_and_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    folder = fill(tmp_path, ["a/1.png"])
    (folder / name).mkdir()
    with pytest.raises(UserError, match=r"/caf\\udce9 is empty"):
        source_of("folder", folder)
    (folder / name / "2.png").write_bytes(b"2")
    source = source_of("folder", folder)
    assert source.class_names == ["a", name]
    assert source.open(source.entries[1]) == b"2"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.images: .*nowhere is not there"):
        source_of("folder", tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file is not a folder; docs/data\.md"):
        source_of("folder", tmp_path / "file")


NO_IMAGES = {
    "nothing": ([], "is empty: there are no images; docs/data"),
    "text": (["README.md"], r"holds no images but other files \(1 not an image: \.md\)"),
    "hidden files": ([".a.png"], r"\(1 hidden\)"),
    "tars": (["n01440764.tar"], "tars are read with data.source=webdataset"),
    "a zip": (["images.zip"], "name the zip itself"),
    "parquet files": (["x/0.parquet"], "data.source=parquet"),
    "arrays": (["0.npy"], "data.source=celebahq or ffhq"),
    "HEIC": (["a/0.heic"], "encoded as HEIC, which is not supported; convert"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_files_found_instead_of_images_are_named(tmp_path: Path, case: str) -> None:
    keys, told = NO_IMAGES[case]
    with pytest.raises(UserError, match=told):
        source_of("folder", fill(tmp_path, keys))


LINKS = ["../outside/1.png", "../outside", "nowhere", ".", "link.png"]


@pytest.mark.parametrize("target", LINKS)
def test_a_symbolic_link_that_leaves_or_leads_to_a_folder_is_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "outside", ["1.png"])
    folder = fill(tmp_path / "images", ["a/1.png"])
    (folder / "a/link.png").symlink_to(folder / target if target != "link.png" else target)
    with pytest.raises(UserError, match=r"link\.png is a symbolic link .*set data\.follow_links=true"):
        source_of("folder", folder)


def test_a_symbolic_link_to_an_image_inside_is_an_image(tmp_path: Path) -> None:
    folder = fill(tmp_path, ["a/1.png"])
    (folder / "a/2.png").symlink_to(folder / "a/1.png")
    assert [entry.size for entry in source_of("folder", folder).entries] == [7, 7]


def keys_of(source: Source) -> list[str]:
    return [entry.key for entry in source.entries]


def test_links_are_followed_to_files_and_folders_anywhere_where_the_recipe_says_so(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", ["1.png", "sub/2.png"])
    folder = fill(tmp_path / "images", ["a/1.png"])
    (folder / "b").symlink_to(outside)
    (folder / "a/3.png").symlink_to(outside / "1.png")
    (folder / "c").mkdir()
    (folder / "c/4.png").symlink_to("../a/1.png")
    (folder / ".hidden").symlink_to("nowhere")  # counted, not followed
    source = source_of("folder", folder, follow_links=True)
    assert keys_of(source) == ["a/1.png", "a/3.png", "b/1.png", "b/sub/2.png", "c/4.png"]
    assert source.left_out == {"hidden": 1}
    assert [source.open(entry) for entry in source.entries][1:4] == [b"1.png", b"1.png", b"sub/2.png"]
    whole = tmp_path / "whole"
    whole.symlink_to(folder)
    assert keys_of(source_of("folder", whole, follow_links=True)) == keys_of(source)


@pytest.mark.parametrize("link", ["a/b/up", "a/up", "a/a2"])
@pytest.mark.parametrize("target", ["..", "../..", "../../images/a", "../../way"])
def test_a_loop_of_followed_links_is_named(tmp_path: Path, link: str, target: str) -> None:
    folder = fill(tmp_path / "images", ["a/b/1.png"])
    (tmp_path / "way").symlink_to(folder)
    (folder / link).symlink_to(target if link != "a/b/up" else f"../{target}")
    with pytest.raises(UserError, match=r"is by a symbolic link the same folder as .*; remove the link"):
        source_of("folder", folder, follow_links=True)


def test_a_folder_that_followed_links_reach_twice_would_count_twice_and_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", ["cat/1.png"])
    (folder / "kitten").symlink_to("cat")
    with pytest.raises(UserError, match=r"the same folder as .*images/(cat|kitten); remove the link"):
        source_of("folder", folder, follow_links=True)


@pytest.mark.parametrize("target", ["nowhere", "../nowhere/1.png", "link.png"])
def test_a_followed_link_to_nothing_is_named(tmp_path: Path, target: str) -> None:
    folder = fill(tmp_path / "images", ["a/1.png"])
    (folder / "a/link.png").symlink_to(target)
    with pytest.raises(UserError, match=r"a/link\.png is a symbolic link to .*, which cannot be opened: "):
        source_of("folder", folder, follow_links=True)


def test_a_followed_link_to_a_device_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", ["a/1.png"])
    (folder / "a/2.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"a/2\.png is no regular file"):
        source_of("folder", folder, follow_links=True)


def test_no_inode_is_read_of_files_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path, ["a/1.png", "a/2.txt", ".git/3.png", "b/4.heic", "b/5.jpg"])
    looked_at: list[str] = []
    original = os.stat

    def counted(path: object, **options: object) -> os.stat_result:
        looked_at.append(str(path))
        return original(path, **options)

    monkeypatch.setattr("preprocess.sources.folders.os.stat", counted)
    source_of("folder", folder)
    files = [path for path in looked_at if "." in path.rpartition("/")[2]]
    assert files == [f"{folder}/a/1.png", f"{folder}/b/5.jpg"]

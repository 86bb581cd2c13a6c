"""A folder of pictures is listed completely, in one order, or refused with one line that names the fault."""

import random
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.sources import fingerprint
from tests.photographs import source_of

KEYS = ["b-class/2.png", "b-class/10.png", "b-class/sub/1.JPG", "b/1.webp", "a/x.jpeg"]


def fill(folder: Path, keys: list[str]) -> Path:
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(key.encode())
    return folder


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


def test_pictures_alone_are_one_class(tmp_path: Path) -> None:
    source = source_of("folder", fill(tmp_path / "faces", ["2.png", "1.png"]))
    assert source.class_names == ["faces"]
    assert [entry[:3] for entry in source.entries] == [("1.png", 0, 5), ("2.png", 0, 5)]


def test_the_fingerprint_follows_names_labels_and_sizes(tmp_path: Path) -> None:
    folder = fill(tmp_path, KEYS)
    before = fingerprint(source_of("folder", folder))
    (folder / "a/x.jpeg").write_bytes(b"another picture")
    resized = fingerprint(source_of("folder", folder))
    (folder / "b").rename(folder / "c")
    renamed = fingerprint(source_of("folder", folder))
    assert len({before, resized, renamed}) == 3


def test_other_files_are_counted_and_hidden_ones_not_looked_at(tmp_path: Path) -> None:
    source = source_of("folder", fill(tmp_path, [*KEYS, "README.md", "a/notes.txt", ".marker.json", "a/.x.png.tmp"]))
    assert source.left_out == {"no picture: .md": 1, "no picture: .txt": 1}
    assert len(source.entries) == len(KEYS)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.images: .*nowhere is not a folder"):
        source_of("folder", tmp_path / "nowhere")


@pytest.mark.parametrize("keys", [[], ["README.md"], ["a/1.png", "b/notes.txt"]])
def test_a_folder_or_class_without_pictures_is_named(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        source_of("folder", fill(tmp_path, keys))


def test_pictures_beside_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"both pictures \(1\.png\) and folders"):
        source_of("folder", fill(tmp_path, ["a/1.png", "1.png"]))


@pytest.mark.parametrize("target", ["../outside/1.png", "../outside", "nowhere", "."])
def test_a_symbolic_link_that_leaves_or_leads_to_a_folder_is_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "outside", ["1.png"])
    folder = fill(tmp_path / "images", ["a/1.png"])
    (folder / "a/link.png").symlink_to(folder / target)
    with pytest.raises(UserError, match=r"link\.png is a symbolic link"):
        source_of("folder", folder)


def test_a_symbolic_link_to_a_picture_inside_is_a_picture(tmp_path: Path) -> None:
    folder = fill(tmp_path, ["a/1.png"])
    (folder / "a/2.png").symlink_to(folder / "a/1.png")
    assert [entry.size for entry in source_of("folder", folder).entries] == [7, 7]

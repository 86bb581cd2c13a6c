"""Artefacts appear whole or not at all."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from common.errors import UserError
from common.files import (
    atomic_folder,
    atomic_write,
    content_key,
    folder_lock,
    remove_leftovers,
    shared_folder_lock,
    write_json,
)
from common.log_lines import append_line
from common.sealed import parse_json, read_bytes


def test_a_file_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "below" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_disk_does_not_take_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, words in (
        (tmp_path / "file/below/new", "a file lies where a folder is needed"),
        (tmp_path / "folder", "a folder, where a file is to be written"),
        (Path("/proc/none/new"), None),
    ):
        with pytest.raises(UserError if words else OSError, match=words), atomic_write(path):
            pass

    def full() -> None:
        with atomic_folder(tmp_path / "weights"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"weights: not written \(.*No space left.*make room"):
        full()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_replaced_folder_comes_back_if_the_new_one_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    def replace(count: int) -> None:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / str(count)).touch()
            refused.append(str(temporary))

    refused: list[str] = []
    replace(1)
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if str(self) in refused:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="not empty"):
        replace(2)
    assert names() == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["1"]
    # A kill at the same moment: neither has the name.
    monkeypatch.undo()
    (tmp_path / "folder").replace(tmp_path / ".folder.old.node.12.tmp")
    (tmp_path / ".folder.node.12.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names() == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["1"]


def test_a_folder_is_for_all_to_read_whoever_wrote_in_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "weights").touch(mode=0o600)  # as safetensors does
    assert (tmp_path / "folder/weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_replaced_atomically(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_targets_of_links_are_never_written_locked_or_deleted(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    (theirs / "file").write_text("theirs")
    for name in ("folder", ".folder.node.12.tmp", ".folder.old.node.12.tmp"):
        (ours / name).symlink_to(theirs)
    for name in ("file", ".lock", "log", ".file.node.12.tmp"):
        (ours / name).symlink_to(theirs / "file")
    with atomic_folder(ours / "folder") as temporary:
        (temporary / "new").touch()
    with atomic_write(ours / "file") as temporary:
        temporary.write_text("ours")
    with pytest.raises(UserError, match=r"ours/\.lock: a symbolic link"), folder_lock(ours):
        pass
    with pytest.raises(UserError, match="ours/log: a symbolic link"):
        append_line(ours / "log", {})
    remove_leftovers(ours)
    assert sorted(path.name for path in ours.iterdir()) == [".lock", "file", "folder", "log"]
    assert [path.name for path in (ours / "folder").iterdir()] == ["new"]
    assert [path.name for path in theirs.iterdir()] == ["file"]
    assert (theirs / "file").read_text() == "theirs"


def test_leftovers_go_when_nobody_is_at_work_and_nothing_else_goes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    kept = ["mine.tmp", ".mine.tmp", ".12.tmp"]
    for name in (".chunk.npz.node.12.tmp", "below/.chunk.npz.node.12.tmp", *kept):
        (tmp_path / name).touch()
    with folder_lock(tmp_path, shared=True), shared_folder_lock(tmp_path), shared_folder_lock(tmp_path):
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 + len(kept) + 1
    with shared_folder_lock(tmp_path):
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted([*kept, ".lock"])


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_bytes(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"half\.json: not readable as JSON"):
        parse_json('{"a": ', tmp_path / "half.json")
    write_json(tmp_path / "whole.json", {"b": 1, "a": [2]})
    assert parse_json(read_bytes(tmp_path / "whole.json"), "whole.json") == {"a": [2], "b": 1}


def test_a_content_key_depends_on_content_not_on_order() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})

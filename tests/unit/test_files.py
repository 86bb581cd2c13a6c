"""Artefacts appear whole or not at all."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import atomic_folder, atomic_write, content_key, write_json
from common.sealed import read_json


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


def test_a_folder_is_for_all_to_read_whoever_wrote_in_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "weights").touch(mode=0o600)  # as safetensors does
    assert (tmp_path / "folder/weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json: not readable as JSON"):
        read_json(tmp_path / "half.json")
    write_json(tmp_path / "whole.json", {"b": 1, "a": [2]})
    assert json.loads((tmp_path / "whole.json").read_text()) == read_json(tmp_path / "whole.json")


def test_a_content_key_depends_on_content_not_on_order() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})

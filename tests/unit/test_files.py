"""Directories that appear whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import ArtefactError
from compressor.files import (
    check_target,
    did_you_mean,
    hash_files,
    next_directory,
    read_json,
    staged_directory,
    to_json,
)
from tests.conftest import snapshot


def finished(folder: Path, **files: str) -> Path:
    """A directory as `_result` leaves it."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(to_json({"verb": "score", "model": "m", "finished": 1}))
    (folder / "recipe.yaml").write_text("model: m\n")
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_directory(target) as staged:
        (staged / "file").write_text("x")
        assert not target.exists()
        assert staged.parent == target.parent  # the same file system: a rename, not a copy
        assert staged.name.startswith(".")
    assert snapshot(tmp_path) == {"a": None, "a/b": None, "a/b/file": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError, ArtefactError])
def test_nothing_appears_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def work() -> None:
        with staged_directory(tmp_path / "a" / "b") as staged:
            (staged / "sub").mkdir()
            (staged / "sub" / "file").write_text("x")
            raise error

    with pytest.raises(ArtefactError if error is OSError else error):
        work()
    assert snapshot(tmp_path) == {}


def test_a_failing_block_takes_no_parent_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="x"), staged_directory(tmp_path / "a" / "b" / "c"):
        raise ValueError("x")
    assert snapshot(tmp_path) == {"a": None}


def test_a_failing_block_takes_no_parent_that_somebody_used(tmp_path: Path) -> None:
    def work() -> None:
        with staged_directory(tmp_path / "a" / "b"):
            (tmp_path / "a" / "other").write_text("of another run")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert snapshot(tmp_path) == {"a": None, "a/other": b"of another run"}


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with staged_directory(tmp_path / "a") as staged:
        (staged / "file").write_text("x")
    assert snapshot(tmp_path) == {"a": None, "a/file": b"x"}


def test_a_directory_with_content_is_refused_at_once(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    before = snapshot(tmp_path)
    entered = []
    with pytest.raises(ArtefactError, match="--force"), staged_directory(tmp_path / "a"):
        entered.append(1)
    assert not entered
    assert snapshot(tmp_path) == before


def test_force_replaces_our_own_work_and_nothing_of_it_stays(tmp_path: Path) -> None:
    finished(tmp_path / "a", old="old")
    with staged_directory(tmp_path / "a", force=True) as staged:
        assert (tmp_path / "a" / "old").read_text() == "old"  # until the new one is whole
        (staged / "new").write_text("new")
    assert snapshot(tmp_path) == {"a": None, "a/new": b"new"}


def test_force_keeps_our_own_work_when_the_block_fails(tmp_path: Path) -> None:
    finished(tmp_path / "a", old="old")
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "a", force=True):
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "files", [{"thesis.tex": "x"}, {"run.json": '{"laps": 12}', "thesis.tex": "x"}, {"run.json": "["}]
)
def test_force_leaves_strangers_alone(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "a").mkdir()
    for name, content in files.items():
        (tmp_path / "a" / name).write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(ArtefactError), staged_directory(tmp_path / "a", force=True):
        pass
    assert snapshot(tmp_path) == before


def test_files_and_links_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    finished(tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        for force in (False, True):
            with pytest.raises(ArtefactError, match=name):
                check_target(tmp_path / name, force)


def test_the_working_directory_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(ArtefactError, match="working directory"):
            check_target(Path(name), force=True)
    check_target(Path("out"), force=False)


def test_a_parent_that_is_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match="file/below"), staged_directory(tmp_path / "file" / "below"):
        pass


def test_the_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_directory(tmp_path / "a"):
            pass
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_relative_targets_survive_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path("a")) as staged:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        (staged / "file").write_text("x")
    assert (tmp_path / "a" / "file").read_text() == "x"


def test_the_next_free_name(tmp_path: Path) -> None:
    assert next_directory(tmp_path, "score") == tmp_path / "score"
    (tmp_path / "score").mkdir()
    assert next_directory(tmp_path, "score") == tmp_path / "score-2"
    (tmp_path / "score-2").write_text("a file counts")
    (tmp_path / "score-4").mkdir()
    assert next_directory(tmp_path, "score") == tmp_path / "score-3"


def test_json_is_sorted_readable_and_strict() -> None:
    assert to_json({"b": 1, "a": [1.5, None, "φ"]}) == '{\n  "a": [\n    1.5,\n    null,\n    "φ"\n  ],\n  "b": 1\n}\n'
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            to_json({"x": value})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe"])
def test_damaged_json_is_a_users_mistake(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_missing_json_and_good_json(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    value: dict[str, Any] = {"a": [1, {"b": "ü"}]}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value


def test_the_hash_tells_contents_names_and_borders_apart(tmp_path: Path) -> None:
    def hashed(**files: bytes) -> str:
        folder = tmp_path / hashlib.sha256(repr(files).encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        paths = [folder / name for name in files]
        assert hash_files(paths) == hash_files(reversed(paths))
        return hash_files(paths)

    big = os.urandom((1 << 20) + 3)
    different = [
        hashed(a=b"1", b=b"2"),
        hashed(a=b"2", b=b"1"),
        hashed(a=b"12", b=b""),
        hashed(a=b"", b=b"12"),
        hashed(a=b"1", c=b"2"),
        hashed(a=b"1"),
        hashed(a=big),
        hashed(a=big[:-1] + bytes([big[-1] ^ 1])),
        hashed(a=bytes([big[0] ^ 1]) + big[1:]),
    ]
    assert len(set(different)) == len(different)
    assert hashed(a=b"1", b=b"2") == different[0]


def test_suggestions() -> None:
    assert did_you_mean("entropie", ["gt-fep", "entropy"]) == "; did you mean 'entropy'?"
    assert did_you_mean("zzz", ["gt-fep", "entropy"]) == ""

"""Directories that appear whole or not at all, JSON that is the same for the same content, and run directories."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compressor.errors import ArtefactError

RUN_FILE = "run.json"  # marks a directory as the finished work of this package; written last


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint like `; did you mean 'entropy'?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def to_json(value: Any) -> str:
    """JSON with sorted keys; refuses NaN, which other readers reject."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtefactError: the file is missing, damaged or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def read_run(directory: Path) -> dict[str, Any] | None:
    """What a finished run of ours says of itself, or None where there is none."""
    try:
        facts = read_json(directory / RUN_FILE)
    except ArtefactError:
        return None
    wanted = {"verb": str, "model": str, "finished": int}
    return facts if all(isinstance(facts.get(name), kind) for name, kind in wanted.items()) else None


def is_directory(name: str | Path) -> bool:
    """Whether there is such a directory; a name that cannot be a path is none."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def is_file(name: str | Path) -> bool:
    """Whether there is such a file, in the same manner."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents of files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_target(target: Path, force: bool) -> None:
    """Refuse a target that would bury somebody's files.

    Raises:
        ArtefactError: `target` is a file, or a directory with content that may not be replaced.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtefactError(f"{target} is not a directory; choose another --output-dir")
    if Path.cwd().is_relative_to(target.resolve()):
        raise ArtefactError(f"{target} holds the working directory; choose an --output-dir inside it")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise ArtefactError(f"{target} is not empty; choose another --output-dir, or --force to replace it")
    if read_run(target) is None:
        raise ArtefactError(f"{target} was not written by compressor (see its {RUN_FILE}); --force leaves it alone")


@contextmanager
def staged_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block ends well, and vanishes otherwise.

    Raises:
        ArtefactError: `target` may not be written, or the disk refuses.
    """
    target = target.absolute()
    check_target(target, force)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ArtefactError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield staged
        _open_to_others(staged)
        _replace(staged, target)
    except OSError as error:
        raise ArtefactError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: somebody's work is in it
                parent.rmdir()


def next_directory(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of `parent/name-2`, `-3` … that does not exist."""
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def _replace(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / "old")
    staged.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _open_to_others(directory: Path) -> None:
    """Give files and directories the modes the user's umask asks for; temporary ones are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)

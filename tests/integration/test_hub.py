"""A model by its hub id, out of a cache of the hub's own form: found, identified by its commit, pruned and benched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import save_tiny, write_documents

NAME = "somebody/tiny"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache holding two commits of one model; `main` is the first."""
    folder = tmp_path / "home" / "hub" / "models--somebody--tiny"
    for seed, commit in enumerate(COMMITS):
        save_tiny("gpt2", folder / "snapshots" / commit, seed)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMITS[0])
    return folder


def test_a_hub_model_is_known_by_its_commit(cache: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    here = tmp_path / "here"
    here.mkdir()
    texts = write_documents(here / "texts.txt", 12, seed=0)
    texts = texts.rename(here / "texts.jsonl")
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def compress(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "compressor", *words]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)

    assert compress("score", "--model", NAME, "--data", str(texts)).returncode == 0
    facts = json.loads((here / "runs" / "somebody--tiny" / "score" / "scores.json").read_text())
    assert facts["identity"] == {"hub": NAME, "revision": COMMITS[0]}
    assert compress("prune", "--export").returncode == 0

    (cache / "refs" / "main").write_text(COMMITS[1])  # the model moves on
    moved = compress("prune", "--export")
    assert moved.returncode == 2
    assert "another model" in moved.stderr
    assert compress("prune", "--export", "--revision", COMMITS[0]).returncode == 0

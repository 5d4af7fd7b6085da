"""Ctrl-C in a real process: exit code 130, no traceback, and nothing half-written, not even a hidden directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import snapshot, write_documents


def interrupted(
    words: list[str], folder: Path, environment: dict[str, str], cue: str, number: int = signal.SIGINT
) -> tuple[int, str, str]:
    """Start a command, wait for a line of its log and for its hidden directory, and send a signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    try:
        log = ""
        while cue not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        time.sleep(1.0)  # well inside the epoch
        assert process.poll() is None
        assert list(folder.rglob(".*partial*"))
        os.kill(process.pid, number)
        out, rest = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    return process.returncode, out, log + rest


@pytest.mark.parametrize(
    ("words", "cue"),
    [
        (["score"], "counting pairs"),
        (["run", "--samples", "10", "--eval-samples", "0", "--batch-size", "1"], "evaluation:"),
    ],
)
def test_ctrl_c(
    tmp_path: Path, models: dict[str, str], environment: dict[str, str], words: list[str], cue: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_documents(data / "train.jsonl", 12000, seed=1)
    write_documents(data / "test.jsonl", 12000, seed=2)
    here = tmp_path / "here"
    here.mkdir()
    common = ["--model", models["gpt2"], "--data", str(data), "--batch-size", "1"]
    more = ["--samples", "0"] if words[0] == "score" else []
    code, out, err = interrupted([*words, *common, *more], here, environment, cue)
    assert code == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted")
    assert snapshot(here) == {}


def test_ctrl_c_with_force_keeps_the_earlier_result(
    tmp_path: Path, models: dict[str, str], environment: dict[str, str]
) -> None:
    write_documents(tmp_path / "few.jsonl", 10, seed=1)
    write_documents(tmp_path / "many.jsonl", 12000, seed=2)
    here = tmp_path / "here"
    here.mkdir()
    words = ["score", "--model", models["gpt2"], "--samples", "0", "--batch-size", "1", "-o", "mine", "--force"]
    first = [sys.executable, "-m", "compressor", *words, "--data", str(tmp_path / "few.jsonl")]
    subprocess.run(first, cwd=here, env=environment, check=True, capture_output=True)
    before = snapshot(here)
    assert before
    code, _, err = interrupted([*words, "--data", str(tmp_path / "many.jsonl")], here, environment, "counting pairs")
    assert (code, "Traceback" in err) == (130, False)
    assert snapshot(here) == before

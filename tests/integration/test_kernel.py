"""The fused kernel's answers: by Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def run_checks(**environment: str) -> None:
    """In another process: the interpreter must be chosen before anything imports Triton, and here transformers did."""
    quick = ("-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *quick, Path(__file__).with_name("kernel_checks.py")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    run_checks(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_kernel_on_a_gpu():
    pytest.importorskip("triton")
    run_checks()

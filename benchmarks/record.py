"""How results are kept: one JSON per suite and name, with the machine and the versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.console import log
from compressor.environment import machine, versions
from compressor.files import to_json

RESULTS = Path(__file__).parent / "results"


def write(document: dict[str, Any], name: str, device: str | torch.device = "cpu") -> None:
    """Write a result under a name such as "quality-stories260K"."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    whole = document | {"machine": machine(device), "versions": versions()}
    target.write_text(to_json(whole), encoding="utf-8")
    log.info(f"written: benchmarks/results/{target.name}")

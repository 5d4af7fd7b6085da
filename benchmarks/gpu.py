"""The fused attention probe on a GPU, beside the reference and beside attention itself.

    python benchmarks/gpu.py

Whether the kernel of `compressor.attention.kernel` finds the reference's keys, and what either costs in time and
memory where a model's own attention costs `scaled_dot_product_attention`. Writes `results/probe-<device>.json`; exits
with 2 where there is no GPU that the kernel runs on.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from compressor.attention import kernel
from compressor.attention.argmax import attended_keys
from compressor.environment import machine, versions
from compressor.files import to_json

RESULTS = Path(__file__).parent / "results"
SHAPE = (8, 12, 1024, 64)  # batch, heads, tokens, dimension: GPT-2 small's
WARM_UP, REPEATS = 5, 30
CASES = ("all", "causal", "padded")


def reference(*given: Any, **settings: Any) -> Any:
    """`attended_keys` without the kernel."""
    with patch.object(kernel, "usable", return_value=False):
        return attended_keys(*given, **settings)


def compare(case: str, device: torch.device) -> dict[str, Any]:
    """Agreement, and medians of interleaved repeats with their spread."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(SHAPE, generator=generator, device=device).bfloat16() for _ in range(3))
    causal, mask = case == "causal", None
    if case == "padded":  # causal and padded on the left by up to a quarter, as a mask
        place = torch.arange(SHAPE[2], device=device)
        real = place >= torch.arange(SHAPE[0], device=device)[:, None] * SHAPE[2] // 4 // SHAPE[0]
        mask = (place <= place[:, None]) & real[:, None, None]
    found = attended_keys(query, key, mask, causal=causal)
    expected = reference(query, key, mask, causal=causal)
    calls: dict[str, Callable[[], Any]] = {
        "fused": lambda: attended_keys(query, key, mask, causal=causal),
        "reference": lambda: reference(query, key, mask, causal=causal),
        "attention": lambda: functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    memory = {}
    for turn in range(WARM_UP + REPEATS):
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            memory[name] = torch.cuda.max_memory_allocated(device) - before
            if turn >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    spread = {name: [statistics.median(series), min(series), max(series)] for name, series in times.items()}
    seen = expected.first.isfinite()
    return {
        "case": case,
        "equal_keys": (found.key == expected.key)[seen].double().mean().item(),
        "largest_difference_in_mass": (found.first - expected.first)[seen].abs().max().item(),
        "milliseconds": {name: dict(zip(("median", "min", "max"), of, strict=True)) for name, of in spread.items()},
        "peak_bytes": memory,
    }


def main() -> int:
    """Run all cases and write the JSON."""
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or not kernel.usable(*torch.zeros(2, 1, 1, 1, 16, device=device), None):
        print("error: no CUDA device that Triton compiles for; run this where there is one", file=sys.stderr)
        return 2
    settings = {"shape": SHAPE, "dtype": "bfloat16", "warm_up": WARM_UP, "repeats": REPEATS}
    document = {"suite": "probe", "rows": [compare(case, device) for case in CASES], "settings": settings}
    document |= {"machine": machine(device), "versions": versions() | {"triton": version("triton")}}
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"probe-{name}.json").write_text(to_json(document), encoding="utf-8")
    print(f"written: benchmarks/results/probe-{name}.json", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

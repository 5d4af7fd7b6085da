"""Runs timed in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from compressor.console import log

Timer = Callable[[], float]


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, timer: Timer = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            begin = timer()
            run()
            seconds[name].append(timer() - begin)
        log.info(
            f"repeat {repeat + 1} of {repeats}: " + ", ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items())
        )
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Spread of own / other, repeat by repeat."""
    return spread([left / right for left, right in zip(own, other, strict=True)])

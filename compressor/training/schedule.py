"""How much training there may be, and how large its steps are."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP = 0.05  # share of the budget over which the learning rate rises


@dataclass(frozen=True)
class Budget:
    """What a training may spend: `steps` of the optimiser, and `seconds` on the wall clock (0 for no limit)."""

    steps: int
    seconds: float = 0.0

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the budget spent, 0 to 1: of whichever of the two ends first.

        Args:
            step: steps done.
            elapsed: seconds gone.
        """
        clock = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(step / self.steps, clock))


def learning_rate_factor(progress: float) -> float:
    """Share of the full learning rate: a linear warm-up, then half a cosine down to 0.

    Args:
        progress: share of the budget spent, 0 to 1.
    """
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))

"""How sure a difference of perplexities is: models on the same documents, which are drawn anew for all of them at once.

What makes a document hard makes it hard for every model, so a difference is surer than either perplexity. Documents are
drawn whole, with replacement, the same ones for both models: a paired bootstrap (P. Koehn 2004, Statistical
Significance Tests for Machine Translation Evaluation, EMNLP). The interval is the percentile one (B. Efron, R.
Tibshirani 1993, An Introduction to the Bootstrap, ch. 13): it is the same whether perplexities or their logarithms are
compared, and holds no fall by more than all; the ratio of sums has a bias, but a small one beside its spread. It is
about other documents of the kind, not about other calibration text, and too narrow where there are few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.game.resampling import draw_examples, interval
from compressor.measure import DocumentLosses

LEVEL = 0.95
RESAMPLES = 1000
ROUNDING = 1e-6  # relative difference of perplexities that rounding explains


class PairedBootstrap:
    """Perplexities of models on the same documents, and on documents drawn anew.

    Args:
        losses: by model; of the same documents and tokens.
        seed: of the draws.

    Raises:
        ValueError: the documents or their tokens are not the same.
    """

    def __init__(self, losses: Mapping[str, DocumentLosses], seed: int = 0) -> None:
        self._names = {name: place for place, name in enumerate(losses)}
        tokens = next(iter(losses.values())).tokens.numpy()
        for name, own in losses.items():
            if not np.array_equal(own.tokens.numpy(), tokens):
                raise ValueError(f"{name} was measured on other documents or tokens than {next(iter(losses))}")
        sums = np.stack([own.nll.numpy() for own in losses.values()], axis=1)  # [documents, models]
        self._found = sums.sum(0) / tokens.sum()
        counted = tokens > 0
        self._drawn: np.ndarray | None = None  # [resamples, models], mean nll in nats per token
        if counted.sum() > 1:
            draws = draw_examples(int(counted.sum()), RESAMPLES, seed).astype(np.float64)
            self._drawn = (draws @ sums[counted]) / (draws @ tokens[counted])[:, None]

    def change(self, name: str, base: str) -> float:
        """Relative change of perplexity from `base` to `name`."""
        return _relative(self._found[self._names[name]] - self._found[self._names[base]])

    def interval(self, name: str, base: str) -> dict[str, float] | None:
        """`level`, `low` and `high` of that change over documents drawn anew; None for a single document."""
        if self._drawn is None:
            return None
        difference = self._drawn[:, self._names[name]] - self._drawn[:, self._names[base]]
        low, high = interval(difference[:, None], LEVEL)
        return {"level": LEVEL, "low": _relative(low[0]), "high": _relative(high[0])}


def undecided(found: Mapping[str, Any] | None) -> bool:
    """Whether the interval of a change contains none, up to rounding; without an interval nothing is decided."""
    return found is None or found["low"] is None or (found["low"] <= ROUNDING and found["high"] >= -ROUNDING)


def _relative(difference: float) -> float:
    """Relative change of perplexity for a difference of mean nll in nats; as large as floats go, never infinite."""
    return math.expm1(min(float(difference), 700.0))

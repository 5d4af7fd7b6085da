"""How sure a score is: a bootstrap over documents, and what it says about values, ranks and the heads that go.

Tokens of one document depend on one another, documents hardly: so whole documents are drawn, never tokens. All draws
come from numpy's PCG64, so that equal seeds give equal results. Entropies are plug-in, in nats.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import ArrayLike

from compressor.game.entropy import as_symbols


def draw_examples(examples: int, resamples: int, seed: int) -> np.ndarray:
    """Draw documents with replacement: how often each was drawn, int64 [resamples, examples], rows of sum `examples`.

    The draw depends on these three numbers alone, so that layers seen over the same documents resample together.

    Raises:
        ValueError: there are no examples, or no resamples are asked for.
    """
    at_least_one("examples", examples)
    at_least_one("resamples", resamples)
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.stack(
        [np.bincount(generator.integers(examples, size=examples), minlength=examples) for _ in range(resamples)]
    )


def bootstrap_pairs(
    symbols: ArrayLike | torch.Tensor, examples: ArrayLike | torch.Tensor, resamples: int, seed: int
) -> np.ndarray:
    """Joint entropies of all pairs in resamples of the documents, float64 [resamples, heads, heads], in nats.

    The diagonal holds the single entropies, as in `pair_entropies`, which gives the same of a resample written out.

    Args:
        symbols: integers [observations, heads].
        examples: which document each observation is of, integers [observations]; the d-th lowest number is the d-th
            document of `draw_examples`.
        resamples: how many times documents are drawn, with replacement, as many as there are.
        seed: of the draws; the same seed draws the same documents in every layer.

    Raises:
        ValueError: symbols that `pair_entropies` refuses, examples that do not fit them, or no resamples.
    """
    columns = np.ascontiguousarray(as_symbols(symbols).cpu().numpy().T)
    documents = compact_labels("examples", examples, columns.shape[1])
    sizes = np.bincount(documents)
    draws = draw_examples(len(sizes), resamples, seed)
    totals = draws @ sizes
    result = np.empty((resamples, len(columns), len(columns)))
    for i, j in combinations_with_replacement(range(len(columns)), 2):
        codes = np.unique(join_ids(columns[i], columns[j]), return_inverse=True)[1]
        # How often each document has each code: all that a resample asks of the observations.
        cells, counts = np.unique(join_ids(codes, documents), return_counts=True)
        cell_codes, cell_documents = np.divmod(cells, len(sizes))
        for resample, draw in enumerate(draws):
            weighted = np.bincount(cell_codes, weights=draw[cell_documents] * counts)
            seen = weighted[weighted > 1]  # 1 · ln 1 = 0
            entropy = math.log(totals[resample]) - float((seen * np.log(seen)).sum()) / totals[resample]
            result[resample, i, j] = result[resample, j, i] = max(0.0, entropy)
    return result


def interval(samples: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over resamples: [resamples, …] → (low, high), float64 […].

    Source: B. Efron, R. Tibshirani (1993), An Introduction to the Bootstrap, ch. 13. It spans what resampling spreads
    and mends no bias: plug-in entropies fall further in every resample, which holds fewer distinct documents.

    Raises:
        ValueError: there are no resamples, or the level is not between 0 and 1.
    """
    values = _resampled("samples", samples)
    low, high = np.quantile(values, _tails(level), axis=0)
    return low, high


def rank_interval(samples: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of each head's rank within its layer, 0 the lowest: [resamples, heads] → (low, high), int64 [heads].

    Ties go to the lower head, as in a plan; where a percentile falls between two ranks the interval takes in both.

    Raises:
        ValueError: there are no resamples, or the level is not between 0 and 1.
    """
    ranks = np.argsort(np.argsort(_resampled("samples", samples), axis=-1, kind="stable"), axis=-1)
    low, high = _tails(level)
    return np.quantile(ranks, low, axis=0, method="lower"), np.quantile(ranks, high, axis=0, method="higher")


def share_removed(masks: ArrayLike) -> np.ndarray:
    """How often each head goes: what every resample removes, bool [resamples, heads] → shares, float64 [heads].

    Raises:
        ValueError: there are no resamples.
    """
    return np.asarray(_resampled("masks", masks).mean(axis=0))


def compact_labels(name: str, labels: ArrayLike | torch.Tensor, observations: int) -> np.ndarray:
    """Number one label per observation 0, 1, 2 … in the order of the labels: integers [observations] → int64.

    Raises:
        ValueError: they are not integers, or not one for each observation.
    """
    found = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if found.shape != (observations,) or found.dtype.kind not in "iu":
        raise ValueError(
            f"{name} are {found.dtype} {list(found.shape)}; expected {observations} integers, one per observation"
        )
    return np.unique(found, return_inverse=True)[1]


def join_ids(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One id for each pair of compact ids; both are below the number of observations, so their product fits int64."""
    joined: np.ndarray = left * (int(right.max()) + 1) + right
    return joined


def at_least_one(name: str, count: int) -> None:
    """Raise a ValueError where a count is below 1."""
    if count < 1:
        raise ValueError(f"{name} is {count}; expected at least 1")


def _resampled(name: str, samples: ArrayLike) -> np.ndarray:
    values = np.asarray(samples)
    if values.ndim < 2 or not values.shape[0]:
        raise ValueError(f"{name} are of shape {values.shape}; expected [resamples, heads] with at least one resample")
    return values


def _tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected a share between 0 and 1, both excluded")
    return (1 - level) / 2, (1 + level) / 2

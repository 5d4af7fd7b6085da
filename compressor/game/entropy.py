"""Joint Shannon entropies of coalitions of heads, in nats and float64. The default estimator is the plug-in.

Plug-in estimates keep every identity of the game exact. Equal counts are gathered before any sum, so the result depends
on which counts there are but not on where they lie or how they were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from operator import index

import numpy as np
import torch
from numpy.typing import ArrayLike

from compressor.game.counting import Column, columns_of, measure_coalitions, tally
from compressor.game.estimators import estimator as estimator_named

Coalition = tuple[int, ...]  # columns, each once, in any order


def plugin_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the distributions whose counts run along the last axis: int [..., K] → float64 [...] on the CPU.

    H = ln N − Σ c·ln c / N, and 0 where nothing was counted. Equal counts are gathered before the sum, so that the
    result depends on which counts there are but not on where they lie: dense and sparse histograms give the same bits.
    """
    rows = counts.reshape(-1, counts.shape[-1]).cpu().numpy()
    entropies = np.zeros(len(rows))
    for place, row in enumerate(rows):
        found = tally(row[row > 0])
        if found[0].size:
            entropies[place] = estimator_named("plug-in")(*found)
    return torch.from_numpy(entropies).reshape(counts.shape[:-1])


def as_symbols(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Turn an integer array [observations, heads] into compact ids, int64 on its own device: per head 0, 1, 2 ….

    Raises:
        ValueError: the array is not of integers, not two-dimensional, or empty.
    """
    ids = torch.from_numpy(np.stack([column.ids for column in columns_of(symbols)], axis=1)).long()
    return ids.to(symbols.device) if isinstance(symbols, torch.Tensor) else ids


def entropies(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Entropy H_i of each head's symbols: integers [observations, heads] → float64 [heads], in nats.

    Raises:
        ValueError: symbols that are no table of integers, or an estimator that there is not; so everywhere below.
    """
    columns = columns_of(symbols)
    return _measured(columns, [(head,) for head in range(len(columns))], estimator)


def pair_entropies(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Joint entropies H_ij of all pairs, float64 [heads, heads], in nats; the diagonal holds H_i."""
    columns = columns_of(symbols)
    first, second = np.triu_indices(len(columns))
    coalitions = [(i,) if i == j else (i, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    result = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    result[first, second] = result[second, first] = _measured(columns, coalitions, estimator)
    return result


def triple_entropies(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Joint entropies H_ijk of all triples i < j < k in lexicographic order, float64 [C(heads, 3)], in nats."""
    columns = columns_of(symbols)
    return _measured(columns, list(combinations(range(len(columns)), 3)), estimator)


def coalition_entropies(
    symbols: ArrayLike | torch.Tensor, coalitions: Iterable[Sequence[int]], *, estimator: str = "plug-in"
) -> torch.Tensor:
    """Joint entropies of coalitions of any sizes, float64 [coalitions], in nats; 0 for the empty one.

    A coalition names columns of `symbols`, each once. With the columns of several layers side by side, a coalition may
    reach across layers.

    Raises:
        ValueError: a coalition names a column that there is not, or names one twice.
    """
    columns = columns_of(symbols)
    return entropies_of(columns, checked_coalitions(coalitions, len(columns)), estimator)


def checked_coalitions(coalitions: Iterable[Sequence[int]], heads: int) -> list[Coalition]:
    """Coalitions as ascending tuples of columns.

    Raises:
        ValueError: a coalition names a column that there is not, or names one twice.
    """
    checked = []
    for coalition in coalitions:
        members = tuple(sorted(index(head) for head in coalition))
        if len(set(members)) < len(members) or (members and not 0 <= members[0] <= members[-1] < heads):
            raise ValueError(f"coalition {list(coalition)}; expected different columns from 0 to {heads - 1}")
        checked.append(members)
    return checked


def entropies_of(columns: Sequence[Column], coalitions: Sequence[Coalition], estimator: str) -> torch.Tensor:
    """Joint entropies of coalitions of columns, float64 [coalitions], in nats."""
    own = _measured(columns, [(head,) for head in range(len(columns))], "plug-in").tolist()
    order = [tuple(sorted(coalition, key=own.__getitem__, reverse=True)) for coalition in coalitions]
    return _measured(columns, order, estimator)  # telling heads first: observations are alone, and done with, sooner


def _measured(columns: Sequence[Column], coalitions: Sequence[Coalition], estimator: str) -> torch.Tensor:
    return torch.from_numpy(measure_coalitions(columns, coalitions, estimator_named(estimator)))

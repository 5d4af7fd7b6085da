"""Counts → plug-in Shannon entropies, in nats and float64. Plug-in estimates keep every identity of the game exact."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike


def plugin_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the distributions whose counts run along the last axis: int [..., K] → float64 [...] on the CPU.

    H = ln N − Σ c·ln c / N, and 0 where nothing was counted. Equal counts are gathered before the sum, so that the
    result depends on which counts there are but not on where they lie: dense and sparse histograms give the same bits.
    """
    rows = counts.reshape(-1, counts.shape[-1])
    return torch.stack([_entropy_of_counts(row) for row in rows]).reshape(counts.shape[:-1])


def _entropy_of_counts(row: torch.Tensor) -> torch.Tensor:
    values, multiplicity = (part.cpu().double() for part in torch.unique(row[row > 0], return_counts=True))
    total = (values * multiplicity).sum()
    if total == 0:
        return torch.zeros((), dtype=torch.float64)
    entropy: torch.Tensor = total.log() - (multiplicity * values * values.log()).sum() / total
    return entropy.clamp(min=0.0)


def as_symbols(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Turn an integer array [observations, heads] into compact ids, int64 on its own device: per head 0, 1, 2 ….

    Raises:
        ValueError: the array is not of integers, not two-dimensional, or empty.
    """
    table = symbols if isinstance(symbols, torch.Tensor) else torch.from_numpy(np.array(symbols))
    if table.ndim != 2 or table.is_floating_point() or table.is_complex() or not table.numel():
        raise ValueError(
            f"symbols are {table.dtype} {list(table.shape)}; expected integers [observations, heads], none of them 0"
        )
    columns = [torch.unique(column, return_inverse=True)[1] for column in table.unbind(1)]
    return torch.stack(columns, dim=1)


def entropies(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Entropy H_i of each head's symbols: integers [observations, heads] → float64 [heads], in nats."""
    return torch.stack([_entropy_of(column) for column in as_symbols(symbols).unbind(1)])


def pair_entropies(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Joint entropies H_ij of all pairs, float64 [heads, heads], in nats; the diagonal holds H_i."""
    columns = as_symbols(symbols).unbind(1)
    result = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for i, column in enumerate(columns):
        result[i, i] = _entropy_of(column)
    for i, j in combinations(range(len(columns)), 2):
        result[i, j] = result[j, i] = _entropy_of(_join(columns[i], columns[j]))
    return result


def triple_entropies(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Joint entropies H_ijk of all triples i < j < k in lexicographic order, float64 [C(heads, 3)], in nats."""
    columns = as_symbols(symbols).unbind(1)
    result = []
    for i, j in combinations(range(len(columns)), 2):
        if j + 1 == len(columns):
            continue
        pair = torch.unique(_join(columns[i], columns[j]), return_inverse=True)[1]  # compact: no product overflows
        result += [_entropy_of(_join(pair, column)) for column in columns[j + 1 :]]
    return torch.stack(result) if result else torch.zeros(0, dtype=torch.float64)


def _join(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """One id for each pair of compact ids; both are below the number of observations, so their product fits."""
    return left * (right.max() + 1) + right


def _entropy_of(ids: torch.Tensor) -> torch.Tensor:
    return plugin_entropy(torch.unique(ids, return_counts=True)[1])

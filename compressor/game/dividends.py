"""Entropies → Harsanyi dividends, with the signs of arXiv 2605.09515: minus the Möbius transform above size one.

So a pair's dividend is its mutual information, and a triple's is negative for redundancy and positive for synergy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from numpy.typing import ArrayLike

from compressor.game.counting import Column, columns_of
from compressor.game.entropy import Coalition, checked_coalitions, entropies_of, pair_entropies, triple_entropies
from compressor.game.lattice import MAX_HEADS, subsets


def dividends(symbols: ArrayLike | torch.Tensor, order: int, *, estimator: str = "plug-in") -> torch.Tensor:
    """Dividends of all coalitions of `order` heads in lexicographic order, float64 [C(heads, order)], in nats.

    Raises:
        ValueError: an order below 1 or above 16, symbols that are no table of integers, or no such estimator.
    """
    columns = columns_of(symbols)
    if not 1 <= order <= MAX_HEADS:
        raise ValueError(f"order is {order}; expected 1 to {MAX_HEADS}")
    return _dividends(columns, list(combinations(range(len(columns)), order)), estimator)


def coalition_dividends(
    symbols: ArrayLike | torch.Tensor, coalitions: Iterable[Sequence[int]], *, estimator: str = "plug-in"
) -> torch.Tensor:
    """Dividends of coalitions of up to 16 columns each, float64 [coalitions], in nats; 0 for the empty one.

    The entropies of all their sub-coalitions are found once, however many coalitions share them.

    Raises:
        ValueError: a coalition of more than 16, of columns that there are not, or with one twice.
    """
    columns = columns_of(symbols)
    return _dividends(columns, checked_coalitions(coalitions, len(columns)), estimator)


def pair_dividends(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Dividends Δ({i, j}) = H_i + H_j − H_ij of all pairs, float64 [heads, heads], in nats.

    The diagonal is 0: a head makes no pair with itself.
    """
    return pair_dividends_from(pair_entropies(symbols, estimator=estimator))


def triple_dividends(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Dividends of all triples i < j < k in lexicographic order, float64 [C(heads, 3)], in nats.

    Δ({i, j, k}) = −(H_i + H_j + H_k − H_ij − H_ik − H_jk + H_ijk).
    """
    pairs = pair_entropies(symbols, estimator=estimator)
    return triple_dividends_from(pairs, triple_entropies(symbols, estimator=estimator))


def pair_dividends_from(pairs: torch.Tensor) -> torch.Tensor:
    """Dividends of pairs from joint entropies [heads, heads] whose diagonal holds the single entropies."""
    singles = pairs.diagonal()
    return (singles[:, None] + singles[None, :] - pairs).fill_diagonal_(0.0)


def triple_dividends_from(pairs: torch.Tensor, triples: torch.Tensor) -> torch.Tensor:
    """Dividends of triples from pair entropies [heads, heads] and triple entropies [C(heads, 3)]."""
    i, j, k = triples_of(pairs.shape[0])
    singles = pairs.diagonal()
    return -(singles[i] + singles[j] + singles[k] - pairs[i, j] - pairs[i, k] - pairs[j, k] + triples)


def triples_of(heads: int) -> torch.Tensor:
    """Heads i < j < k of all triples in lexicographic order, int64 [3, C(heads, 3)]."""
    return torch.combinations(torch.arange(heads), 3).T


def _dividends(columns: Sequence[Column], coalitions: Sequence[Coalition], estimator: str) -> torch.Tensor:
    largest = max(map(len, coalitions), default=0)
    if largest > MAX_HEADS:
        raise ValueError(
            f"a coalition of {largest} has 2^{largest} sub-coalitions; expected at most {MAX_HEADS} in a coalition"
        )
    lattices = [subsets(coalition) for coalition in coalitions]
    places: dict[Coalition, int] = {}
    for lattice in lattices:
        for part in lattice:
            places.setdefault(part, len(places))
    values = entropies_of(columns, list(places), estimator)
    result = torch.zeros(len(coalitions), dtype=torch.float64)
    for size in {len(coalition) for coalition in coalitions}:
        those = [number for number, coalition in enumerate(coalitions) if len(coalition) == size]
        parts = torch.tensor([[places[part] for part in lattices[number]] for number in those])
        result[those] = (values[parts] * _signs(size)).sum(-1)
    return result


def _signs(size: int) -> torch.Tensor:
    """The paper's sign of each sub-coalition's entropy in the dividend of `size` heads, float64 [2^size]."""
    signs = torch.ones(1, dtype=torch.float64)
    for _ in range(size):
        signs = torch.cat([-signs, signs])
    return -signs if size > 1 else signs

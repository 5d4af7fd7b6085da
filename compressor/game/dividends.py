"""Entropies → Harsanyi dividends, with the signs of arXiv 2605.09515: minus the Möbius transform above size one.

So a pair's dividend is its mutual information, and a triple's is negative for redundancy and positive for synergy.
"""

from __future__ import annotations

from itertools import combinations

import torch
from numpy.typing import ArrayLike

from compressor.game.entropy import pair_entropies, triple_entropies


def pair_dividends(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Dividends Δ({i, j}) = H_i + H_j − H_ij of all pairs, float64 [heads, heads], in nats.

    The diagonal is 0: a head makes no pair with itself.
    """
    return pair_dividends_from(pair_entropies(symbols))


def triple_dividends(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Dividends of all triples i < j < k in lexicographic order, float64 [C(heads, 3)], in nats.

    Δ({i, j, k}) = −(H_i + H_j + H_k − H_ij − H_ik − H_jk + H_ijk).
    """
    return triple_dividends_from(pair_entropies(symbols), triple_entropies(symbols))


def pair_dividends_from(pairs: torch.Tensor) -> torch.Tensor:
    """Dividends of pairs from joint entropies [heads, heads] whose diagonal holds the single entropies."""
    singles = pairs.diagonal()
    return (singles[:, None] + singles[None, :] - pairs).fill_diagonal_(0.0)


def triple_dividends_from(pairs: torch.Tensor, triples: torch.Tensor) -> torch.Tensor:
    """Dividends of triples from pair entropies [heads, heads] and triple entropies [C(heads, 3)]."""
    if not triples.numel():
        return triples
    i, j, k = torch.tensor(list(combinations(range(pairs.shape[0]), 3))).unbind(1)
    singles = pairs.diagonal()
    return -(singles[i] + singles[j] + singles[k] - pairs[i, j] - pairs[i, k] - pairs[j, k] + triples)

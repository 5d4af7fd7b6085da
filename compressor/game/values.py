"""Dividends → one value per head."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike

from compressor.game.dividends import pair_dividends_from
from compressor.game.entropy import pair_entropies


def phi(symbols: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Score φ_i = H_i + ½ Σ_{j≠i} I(i; j) of each head (arXiv 2605.09515, eq. 4): → float64 [heads], in nats.

    The heads with the lowest φ are the ones that paper removes.
    """
    return phi_from(pair_entropies(symbols))


def phi_from(pairs: torch.Tensor) -> torch.Tensor:
    """φ from joint entropies [heads, heads] whose diagonal holds the single entropies."""
    return pairs.diagonal() + pair_dividends_from(pairs).sum(-1) / 2

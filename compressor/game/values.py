"""Entropies and dividends → one value per head, in nats. H is the joint entropy, I the mutual information.

Signs are those of arXiv 2605.09515 unless a function says otherwise: there a dividend above size one is minus the
Möbius transform of +H, so that redundancy with other heads raises a head's φ. Shapley values are the ordinary ones.
"""

from __future__ import annotations

from math import comb

import torch
from numpy.typing import ArrayLike

from compressor.game.counting import columns_of
from compressor.game.dividends import pair_dividends_from, triple_dividends_from, triples_of
from compressor.game.entropy import entropies_of, pair_entropies, triple_entropies
from compressor.game.lattice import heads_of, lattice_entropies, split


def phi(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Score φ_i = H_i + ½ Σ_{j≠i} I(i; j) of each head (arXiv 2605.09515, eq. 4): → float64 [heads], in nats.

    The heads with the lowest φ are the ones that paper removes.
    """
    return phi_from(pair_entropies(symbols, estimator=estimator))


def phi_from(pairs: torch.Tensor) -> torch.Tensor:
    """φ from joint entropies [heads, heads] whose diagonal holds the single entropies."""
    return pairs.diagonal() + pair_dividends_from(pairs).sum(-1) / 2


def second_order(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """H_i − ½ Σ_{j≠i} I(i; j) of each head, float64 [heads]: the Shapley value of +H without orders above two.

    This is φ under the sign that the entropies have, so redundancy lowers it.
    """
    return second_order_from(pair_entropies(symbols, estimator=estimator))


def second_order_from(pairs: torch.Tensor) -> torch.Tensor:
    """The same from joint entropies [heads, heads] whose diagonal holds the single entropies."""
    return pairs.diagonal() - pair_dividends_from(pairs).sum(-1) / 2


def third_order(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """φ_i + ⅓ Σ_{j<k} Δ({i, j, k}) of each head, float64 [heads]: arXiv 2605.09515, eq. 3, up to order three."""
    pairs = pair_entropies(symbols, estimator=estimator)
    return third_order_from(pairs, triple_entropies(symbols, estimator=estimator))


def third_order_from(pairs: torch.Tensor, triples: torch.Tensor) -> torch.Tensor:
    """The same from pair entropies [heads, heads] and triple entropies [C(heads, 3)] in lexicographic order."""
    result = phi_from(pairs)
    shares = triple_dividends_from(pairs, triples) / 3
    for members in triples_of(pairs.shape[0]):
        result.index_add_(0, members, shares)
    return result


def eta(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """η_i = Σ_{B∋i} Δ(B) / |B| of each of up to 16 heads, float64 [heads]: arXiv 2605.09515, eq. 3, over all orders.

    With the paper's signs this is 2·H_i less the Shapley value of +H.
    """
    return eta_from(lattice_entropies(symbols, estimator=estimator))


def eta_from(lattice: torch.Tensor) -> torch.Tensor:
    """η from the entropies of all coalitions, [2^heads] → [heads]."""
    singles = lattice[[1 << head for head in range(heads_of(lattice))]]
    return 2 * singles - shapley_values_from(lattice)


def shapley_values(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Shapley value of +H of each of up to 16 heads, exactly, float64 [heads]; they add up to H of all heads.

    Raises:
        ValueError: there are more heads than that; `sampled_shapley_values` takes any number.
    """
    return shapley_values_from(lattice_entropies(symbols, estimator=estimator))


def shapley_values_from(lattice: torch.Tensor) -> torch.Tensor:
    """Shapley values of any game from the values of all coalitions, [2^heads] → [heads].

    Sh_i = Σ_{C∌i} |C|! (heads − |C| − 1)! / heads! · (v(C ∪ i) − v(C)).
    """
    heads, lattice = heads_of(lattice), lattice.double()
    sizes = torch.zeros(1, dtype=torch.long)
    for _ in range(heads):
        sizes = torch.cat([sizes, sizes + 1])
    weights = torch.tensor([1 / (heads * comb(heads - 1, size)) for size in range(heads)], dtype=torch.float64)
    values = torch.zeros(heads, dtype=torch.float64)
    for head in range(heads):
        without, with_head = split(lattice, head)
        values[head] = ((with_head - without) * weights[split(sizes, head)[0]]).sum()
    return values


def marginal_contributions(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """What each head says that all others together do not: H(all) − H(all but i), float64 [heads]."""
    columns = columns_of(symbols)
    everyone = tuple(range(len(columns)))
    others = [everyone[:head] + everyone[head + 1 :] for head in everyone]
    values = entropies_of(columns, [everyone, *others], estimator)
    return values[0] - values[1:]


def marginal_contributions_from(lattice: torch.Tensor) -> torch.Tensor:
    """The same of any game from the values of all coalitions, [2^heads] → [heads]."""
    heads, everyone = heads_of(lattice), lattice.numel() - 1
    return lattice[-1] - lattice[[everyone ^ (1 << head) for head in range(heads)]]

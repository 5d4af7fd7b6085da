"""The game of arXiv 2605.09515 on bare arrays: v(C) = H(C), the joint entropy of a coalition of heads. All in nats.

Every function takes integers [observations, heads], as a torch or numpy array, and answers in float64. The keyword
`estimator` names how entropies are estimated from counts; the default, "plug-in", keeps every identity exact. What ends
in `_from` starts from entropies instead: of pairs [heads, heads], of triples, or of the whole lattice [2^heads].
"""

from compressor.game.dividends import (
    coalition_dividends,
    dividends,
    pair_dividends,
    pair_dividends_from,
    triple_dividends,
    triple_dividends_from,
)
from compressor.game.entropy import coalition_entropies, entropies, pair_entropies, triple_entropies
from compressor.game.lattice import lattice_entropies, mobius, mobius_from
from compressor.game.sampling import sampled_shapley_values
from compressor.game.values import (
    eta,
    eta_from,
    marginal_contributions,
    marginal_contributions_from,
    phi,
    phi_from,
    second_order,
    second_order_from,
    shapley_values,
    shapley_values_from,
    third_order,
    third_order_from,
)

__all__ = [
    "coalition_dividends",
    "coalition_entropies",
    "dividends",
    "entropies",
    "eta",
    "eta_from",
    "lattice_entropies",
    "marginal_contributions",
    "marginal_contributions_from",
    "mobius",
    "mobius_from",
    "pair_dividends",
    "pair_dividends_from",
    "pair_entropies",
    "phi",
    "phi_from",
    "sampled_shapley_values",
    "second_order",
    "second_order_from",
    "shapley_values",
    "shapley_values_from",
    "third_order",
    "third_order_from",
    "triple_dividends",
    "triple_dividends_from",
    "triple_entropies",
]

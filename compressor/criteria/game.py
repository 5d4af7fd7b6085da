"""The criteria that the game of arXiv 2605.09515 gives rise to. Eq. 3 and 4 are the paper's, with its signs."""

from __future__ import annotations

from compressor.criteria.registry import FORWARD, Values, register, register_value
from compressor.types import Scores


@register("gt-fep", "φ = H + ½ Σ mutual information with the layer's other heads (eq. 4)", cost=FORWARD, counted=True)
def gt_fep(scores: Scores, seed: int) -> Values:
    """The paper's φ."""
    return [layer.phi.tolist() for layer in scores.layers]


@register("entropy", "H, the entropy of the keys a head attends to most, alone", cost=FORWARD, counted=True)
def entropy(scores: Scores, seed: int) -> Values:
    """φ without its interactions."""
    return [layer.entropy.tolist() for layer in scores.layers]


@register("second-order", "H − ½ Σ mutual information: Shapley value of H to order two", cost=FORWARD, counted=True)
def second_order(scores: Scores, seed: int) -> Values:
    """φ with one sign for all sizes of coalitions."""
    return [(2 * layer.entropy - layer.phi).tolist() for layer in scores.layers]


for _name, _summary in (
    ("third-order", "φ + ⅓ Σ triple dividends: eq. 3 to third order"),
    ("eta", "η = Σ dividends ÷ size over all coalitions (eq. 3), which is 2 H − Shapley value"),
    ("shapley", "Shapley value of H: what a head adds to coalitions, on average"),
    ("marginal", "H(all) − H(all others): what only this head tells"),
):
    register_value(_name, _summary, cost=FORWARD, counted=True)

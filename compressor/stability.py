"""How sure a pruning decision is: over resampled documents, and as a scoring epoch goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compressor.errors import RecipeError
from compressor.game.counts import PairStatistics
from compressor.game.resampling import share_removed
from compressor.game.values import phi_from
from compressor.types import PruningPlan, Scores, UnitScores

WATCHED = ("gt-fep", "entropy", "second-order")  # what pairs of heads tell
FIRST_CHECK, GROWTH = 16, 1.25  # documents before the first check, and how many more before the next
Choose = Callable[[UnitScores], PruningPlan]


@dataclass
class StableMask:
    """Ends a scoring epoch once the same heads would go whether half of the documents so far are counted or all.

    `checks` records the documents at every look and the heads that would have gone.
    """

    criterion: str
    heads_per_layer: Sequence[int]
    choose: Choose
    checks: list[tuple[int, Mapping[int, tuple[int, ...]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.criterion not in WATCHED:
            raise RecipeError(f"until_stable watches {', '.join(WATCHED)}; the criterion is {self.criterion}; name one")

    def __call__(self, documents: int, statistics: Callable[[], dict[int, PairStatistics]]) -> bool:
        """Whether the epoch may end."""
        due = FIRST_CHECK if not self.checks else math.ceil(self.checks[-1][0] * GROWTH)
        if documents < due:
            return False
        found = statistics()
        layers = []
        for index in range(len(self.heads_per_layer)):
            pairs = found[index].entropies if index in found else torch.zeros(0, 0, dtype=torch.float64)
            layers.append(_values(self.criterion, phi_from(pairs), pairs.diagonal()))
        mask = self.choose(UnitScores(self.criterion, tuple(layers))).heads
        self.checks.append((documents, mask))
        return self.stable

    @property
    def stable(self) -> bool:
        """Whether the last check and all since half of its documents, of which there must be one, agree."""
        documents, mask = self.checks[-1]
        halves = [number for number, (earlier, _) in enumerate(self.checks) if earlier * 2 <= documents]
        return bool(halves) and all(other == mask for _, other in self.checks[halves[-1] :])

    def record(self) -> dict[str, object]:
        """JSON-ready: what was watched, and what came of it."""
        return {
            "criterion": self.criterion,
            "stable": bool(self.checks) and self.stable,
            "checks": [
                {"documents": documents, "heads": {str(layer): list(heads) for layer, heads in sorted(mask.items())}}
                for documents, mask in self.checks
            ],
        }


def _values(criterion: str, phi: torch.Tensor, entropy: torch.Tensor) -> tuple[float, ...]:
    """A watched criterion from the φ and the entropies of a layer's heads."""
    found: torch.Tensor = {"gt-fep": phi, "entropy": entropy, "second-order": 2 * entropy - phi}[criterion]
    return tuple(found.tolist())


def shares_removed(scores: Scores, criterion: str, choose: Choose) -> list[list[float]] | None:
    """How often each head would go if other documents of the same kind had been counted: `[layers][heads]`, 0 to 1.

    None where documents were not resampled, or where they do not decide the criterion.
    """
    needed = ("phi", "entropy") if criterion in WATCHED else (criterion,)
    layers = [layer.resampled for layer in scores.layers]
    told = [layer for layer, scored in zip(layers, scores.layers, strict=True) if len(scored.phi)]
    if not told or not all(name in layer for layer in told for name in needed):
        return None
    resamples = len(told[0][needed[0]])
    masks = [torch.zeros(resamples, len(layer.phi), dtype=torch.bool) for layer in scores.layers]
    for one in range(resamples):
        drawn = [[layer[name][one] for name in needed] if layer else [] for layer in layers]
        if criterion in WATCHED:
            values = [_values(criterion, *layer) if layer else () for layer in drawn]
        else:
            values = [tuple(layer[0].tolist()) if layer else () for layer in drawn]
        for index, heads in choose(UnitScores(criterion, tuple(values))).heads.items():
            masks[index][one, list(heads)] = True
    return [share_removed(mask.numpy()).tolist() for mask in masks]

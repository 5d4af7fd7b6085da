"""Plain rivals of the game. None of them sees the model's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressor.criteria.registry import FORWARD, NOTHING, Values, register
from compressor.types import Scores, UnitScores


@register("bos-sink", "1 − mean attention mass on the first key: sinks go first (after arXiv 2601.06787)", cost=FORWARD)
def bos_sink(scores: Scores, seed: int) -> Values:
    """What a head does besides attending to the first token."""
    return [(1.0 - layer.first_key_mass).tolist() for layer in scores.layers]


@register("magnitude", "L2 norm of the head's slice of the output projection", cost=NOTHING)
def magnitude(scores: Scores, seed: int) -> Values:
    """How much a head can write into the residual stream."""
    return [layer.output_norm.tolist() for layer in scores.layers]


@register("random", "a seeded draw: what any criterion has to beat", cost=NOTHING)
def random(scores: Scores, seed: int) -> Values:
    """Uniform draws, the same for the same seed and shape."""
    return [list(layer) for layer in random_scores([len(layer.phi) for layer in scores.layers], seed).values]


def random_scores(heads_per_layer: Sequence[int], seed: int) -> UnitScores:
    """Uniform draws for layers of so many heads."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.rand(heads, generator=generator, dtype=torch.float64) for heads in heads_per_layer)
    return UnitScores("random", tuple(tuple(layer.tolist()) for layer in draws))

"""Plain rivals of the game. None of them sees the model's loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from compressor.criteria.registry import FORWARD, NOTHING, Values, register
from compressor.types import Scores, UnitScores


@register("bos-sink", "1 − mean attention mass on the first key: sinks go first (after arXiv 2601.06787)", cost=FORWARD)
def bos_sink(scores: Scores, seed: int) -> Values:
    """What a head does besides attending to the first token."""
    return [(1.0 - layer.first_key_mass).tolist() for layer in scores.layers]


def _channel_norms(scores: Scores, seed: int) -> Values:
    return [mlp.output_norm.tolist() for mlp in scores.mlps]


@register("magnitude", "L2 norm of the head's slice of the output projection", cost=NOTHING, channels=_channel_norms)
def magnitude(scores: Scores, seed: int) -> Values:
    """How much a head can write into the residual stream."""
    return [layer.output_norm.tolist() for layer in scores.layers]


def _channel_draws(scores: Scores, seed: int) -> Values:
    return [list(mlp) for mlp in random_channel_scores([len(mlp.output_norm) for mlp in scores.mlps], seed).values]


@register("random", "a seeded draw: what any criterion has to beat", cost=NOTHING, channels=_channel_draws)
def random(scores: Scores, seed: int) -> Values:
    """Uniform draws, the same for the same seed and shape."""
    return [list(layer) for layer in random_scores([len(layer.phi) for layer in scores.layers], seed).values]


def random_scores(heads_per_layer: Sequence[int], seed: int) -> UnitScores:
    """Uniform draws for layers of so many heads."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.rand(heads, generator=generator, dtype=torch.float64) for heads in heads_per_layer)
    return UnitScores("random", tuple(tuple(layer.tolist()) for layer in draws))


def random_channel_scores(channels_per_layer: Sequence[int], seed: int) -> UnitScores:
    """Uniform draws for MLPs of so many channels, others than those that heads get from the same seed."""
    generator = np.random.default_rng([seed, 1])
    return UnitScores("random", tuple(tuple(generator.random(channels).tolist()) for channels in channels_per_layer))

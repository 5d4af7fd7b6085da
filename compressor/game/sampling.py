"""Shapley values by sampling, for more heads than the whole lattice allows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from compressor.game.counting import columns_of, measure_coalitions
from compressor.game.estimators import estimator as estimator_named

AT_ONCE = 64  # permutations whose prefixes are listed at a time


def sampled_shapley_values(
    symbols: ArrayLike | torch.Tensor, permutations: int, seed: int, *, estimator: str = "plug-in"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the Shapley values of +H of any number of heads → values and standard errors, float64 [heads], in nats.

    A sample is the mean of what a head adds in one random permutation of the heads and in the same one backwards
    (antithetic sampling): `permutations` counts these couples. Each sample adds up to H of all heads, and so do the
    values. The same seed gives the same numbers.

    Raises:
        ValueError: fewer than two permutations, which show no spread; symbols that are no table of integers.
    """
    columns = columns_of(symbols)
    if permutations < 2:
        raise ValueError(f"permutations is {permutations}; expected at least 2, for a standard error")
    heads, measure = len(columns), estimator_named(estimator)
    everyone = measure_coalitions(columns, [tuple(range(heads))], measure)[0]
    generator = np.random.default_rng(seed)
    orders = generator.permuted(np.tile(np.arange(heads), (permutations, 1)), axis=1)
    samples = np.zeros((permutations, heads))
    for start in range(0, permutations, AT_ONCE):
        block = orders[start : start + AT_ONCE]
        for both in (block, block[:, ::-1]):
            prefixes = [tuple(order[:size]) for order in both.tolist() for size in range(heads)]
            values = measure_coalitions(columns, prefixes, measure).reshape(len(block), heads)
            gains = np.diff(values, axis=1, append=everyone)
            samples[np.arange(start, start + len(block))[:, None], both] += gains / 2
    errors = samples.std(axis=0, ddof=1) / np.sqrt(permutations)
    return torch.from_numpy(samples.mean(axis=0)), torch.from_numpy(errors)

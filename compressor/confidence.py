"""How far a layer's scores can be believed: what was seen of the distribution, and what resamples and shuffles say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from compressor.criteria import criteria
from compressor.game.resampling import interval, rank_interval
from compressor.game.shuffling import verdicts
from compressor.types import LayerScores, MLPScores

LEVEL = 0.95
SATURATED = 0.99  # of ln N: a single head's entropy up here says that hardly any symbol was seen twice
NEGLIGIBLE = 1e-5  # nats per token: a hundred channels that promise no more come to a thousandth of a nat
COVERED = 0.9  # of a distribution; with more unseen, the entropy of a pair is anybody's guess


def is_saturated(layer: LayerScores) -> bool:
    """Whether a head's entropy is so near its ceiling, ln N, that the number of observations decides it."""
    return layer.observations > 1 and float(layer.entropy.max()) >= SATURATED * math.log(layer.observations)


def believed(layer: LayerScores) -> bool:
    """Whether the distributions of all pairs were seen well enough for φ to be about the heads."""
    return not len(layer.phi) or bool(layer.coverage.min() >= COVERED)


def phi_interval(layer: LayerScores) -> tuple[list[float], list[float]] | None:
    """Interval of each head's φ over resampled documents, `([heads], [heads])` in nats; None without resamples.

    The basic interval (Davison & Hinkley 1997, Bootstrap Methods, eq. 5.6): plug-in estimates fall in every resample,
    as they fell in the sample itself, so the spread is turned around the estimate.
    """
    if "phi" not in layer.resampled:
        return None
    low, high = (2 * layer.phi.numpy() - bound for bound in reversed(interval(layer.resampled["phi"].numpy(), LEVEL)))
    return low.tolist(), high.tolist()


def rank_intervals(layer: LayerScores) -> tuple[list[int], list[int]] | None:
    """Interval of each head's rank by φ within the layer, 0 the lowest; None without resamples."""
    if "phi" not in layer.resampled:
        return None
    low, high = rank_interval(layer.resampled["phi"].numpy(), LEVEL)
    return low.tolist(), high.tolist()


def triple_verdicts(layer: LayerScores) -> dict[str, dict[str, Any]]:
    """How many triples are negative, undecided and positive, by each kind of shuffling that was done.

    Triples whose distribution was not covered are undecided whatever the test says.
    """
    found = {}
    uncovered = (layer.triples["coverage"] < COVERED).numpy()
    for name, start in (("shuffled", ""), ("stratified", "stratified_")):
        if f"{start}p" in layer.triples:
            p_values = np.where(uncovered, 1.0, layer.triples[f"{start}p"].numpy())
            found[name] = verdicts(layer.triples[f"{start}excess"].numpy(), p_values)
    return found


def layer_report(layer: LayerScores) -> dict[str, Any]:
    """What is to be said of a layer, JSON-ready; the dividends themselves stay in the safetensors file."""
    interval, ranks = phi_interval(layer), rank_intervals(layer)
    ceiling = math.log(layer.observations) if layer.observations > 1 else None
    return {
        "observations": layer.observations,
        "phi": layer.phi.tolist(),
        "phi_interval": None if interval is None else {"level": LEVEL, "low": interval[0], "high": interval[1]},
        "rank_interval": None if ranks is None else {"level": LEVEL, "low": ranks[0], "high": ranks[1]},
        "entropy": layer.entropy.tolist(),
        "entropy_over_ceiling": None if ceiling is None else (layer.entropy / ceiling).tolist(),
        "coverage": layer.coverage.diagonal().tolist(),
        "least_pair_coverage": float(layer.coverage.min()) if len(layer.phi) else None,
        "believed": believed(layer),
        "saturated": is_saturated(layer),
        "values": {name: values.tolist() for name, values in layer.values.items()},
        "first_key_mass": layer.first_key_mass.tolist(),
        "output_norm": layer.output_norm.tolist(),
        "mean_pair_dividend": _mean_off_diagonal(layer.pair_dividends),
        "dividends": {
            order: _spread(values) | (_triples(layer) if order == "3" else {})
            for order, values in layer.dividends.items()
            if len(values)
        },
    }


def mlp_report(mlp: MLPScores) -> dict[str, Any]:
    """How the values of an MLP's channels spread, JSON-ready; the values themselves stay in the safetensors file."""
    in_loss = {entry.name for entry in criteria() if entry.in_loss}
    channels = len(mlp.output_norm)
    return {
        "channels": channels,
        "values": {name: _range(values, name in in_loss) for name, values in mlp.values.items() if channels},
        "output_norm": _range(mlp.output_norm, False) if channels else None,
    }


def _range(values: torch.Tensor, in_loss: bool) -> dict[str, Any]:
    least, median, most = (float(value) for value in (values.min(), values.median(), values.max()))
    found: dict[str, Any] = {"least": least, "median": median, "most": most}
    if in_loss:
        found["negligible"] = {"below": NEGLIGIBLE, "share": float((values < NEGLIGIBLE).double().mean())}
    return found


def _spread(values: torch.Tensor) -> dict[str, Any]:
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "negative": int((values < 0).sum()),
        "positive": int((values > 0).sum()),
    }


def _triples(layer: LayerScores) -> dict[str, Any]:
    ceiling = math.log(layer.observations) if layer.observations > 1 else None
    return {
        "least_coverage": float(layer.triples["coverage"].min()),
        "entropy_over_ceiling": None if ceiling is None else float(layer.triples["entropy"].max()) / ceiling,
        "tested": triple_verdicts(layer),
    }


def _mean_off_diagonal(matrix: torch.Tensor) -> float | None:
    heads = matrix.shape[0]
    return float(matrix.sum() / (heads * (heads - 1))) if heads > 1 else None

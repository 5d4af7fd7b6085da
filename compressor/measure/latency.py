"""Seconds that heads and channels are worth on this machine: timed on copies of a model that have fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from compressor.attention import AttentionLayer, attention_layers, prune_heads
from compressor.measure.prices import Layer, Portions, Prices, SavedAlong
from compressor.measure.throughput import measure_throughput
from compressor.mlp import MLPLayer, mlp_layers, prune_channels

SHARES = (0.75, 0.5, 0.25)  # of the heads, then of the channels, that the copies keep


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one prefill by the share of heads, or of channels, that every layer has left.

    `points[structure]` are (share left, seconds), from the dense model down; seconds never rise on the way, and copies
    with the same share are one point. `timed[structure]` are the medians as they were measured, which may rise. Where
    they do, `smoothed` names the structure.
    """

    batch_size: int
    prompt_length: int
    repeats: int
    points: Mapping[str, tuple[tuple[float, float], ...]]
    timed: Mapping[str, tuple[float, ...]]
    smoothed: tuple[str, ...] = ()

    @property
    def dense(self) -> float:
        """Seconds of the dense model."""
        return next(iter(self.points.values()))[0][1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_dict` wrote."""
        points = {
            name: tuple((float(left), float(seconds)) for left, seconds in of) for name, of in written["points"].items()
        }
        timed = {name: tuple(seconds) for name, seconds in written["timed"].items()}
        return cls(**{**written, "points": points, "timed": timed, "smoothed": tuple(written["smoothed"])})


def latency_table(
    model: PreTrainedModel,
    structures: Sequence[str],
    *,
    batch_size: int,
    prompt_length: int,
    repeats: int,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> LatencyTable:
    """Time a model against copies of which every layer has about 3/4, 1/2 and 1/4 of its heads, or of its channels.

    All are timed in turn, in prefill. Seven models are in memory at once where both structures are asked for.

    Raises:
        CompressorError: a model without heads or channels that can leave, or a prompt longer than it takes.
    """
    models: dict[str, PreTrainedModel] = {"dense": model}
    left: dict[str, list[float]] = {}
    for structure in structures:
        left[structure] = []
        for share in SHARES:
            copied = copy.deepcopy(model)
            left[structure].append(_reduce(copied, structure, share))
            models[f"{structure} {share}"] = copied
    timed = measure_throughput(
        models,
        causal=False,  # no decoding
        batch_size=batch_size,
        prompt_length=prompt_length,
        new_tokens=0,
        repeats=repeats,
        seed=seed,
        on_step=on_step,
    )
    seconds = {name: batch_size * prompt_length / found.prefill.median for name, found in timed.items()}
    found = {
        structure: (seconds["dense"], *(seconds[f"{structure} {share}"] for share in SHARES))
        for structure in structures
    }
    return table_of(left, found, batch_size=batch_size, prompt_length=prompt_length, repeats=repeats)


def table_of(
    left: Mapping[str, Sequence[float]], timed: Mapping[str, Sequence[float]], **settings: int
) -> LatencyTable:
    """A table from measured seconds, those of the dense model first; made monotone where it is not.

    Args:
        left: by structure, the shares left in the copies, descending.
        timed: by structure, seconds of the dense model and of the copies.
        settings: `batch_size`, `prompt_length` and `repeats` of the measurement.
    """
    points: dict[str, tuple[tuple[float, float], ...]] = {}
    smoothed = []
    for structure, seconds in timed.items():
        alike: dict[float, list[float]] = {1.0: [seconds[0]]}
        for share, second in zip(left[structure], seconds[1:], strict=True):
            if share < 1:  # a copy that lost nothing is no news of the dense model
                alike.setdefault(share, []).append(second)
        means = [fmean(times) for times in alike.values()]
        falling = _falling(means)
        if falling != means:
            smoothed.append(structure)
        # one dense model for both structures, and no more saved than was seen
        points[structure] = tuple(
            (share, min(second, seconds[0])) for share, second in zip(alike, falling, strict=True)
        )
    return LatencyTable(
        points=points,
        timed={structure: tuple(seconds) for structure, seconds in timed.items()},
        smoothed=tuple(smoothed),
        **settings,
    )


def latency_prices(model: PreTrainedModel, table: LatencyTable, macs: SavedAlong) -> Prices:
    """Seconds by a table: what a layer saves is its share of its structure's multiply-adds, times the structure's.

    Args:
        model: the dense model.
        table: what was timed.
        macs: `saved_along` of `flop_prices`.
    """
    layers: dict[str, Sequence[Layer]] = {}
    if "heads" in table.points:
        layers["heads"] = attention_layers(model)
    if "channels" in table.points:
        layers["channels"] = mlp_layers(model)
    weights: dict[tuple[str, int], float] = {}
    for structure, members in layers.items():
        whole = {layer.index: macs(layer, [range(_units(layer))])[-1] for layer in members if _units(layer)}
        weights |= {(structure, index): own / sum(whole.values()) for index, own in whole.items()}

    def saved_along(layer: Layer, portions: Portions) -> list[float]:
        structure = "heads" if isinstance(layer, AttentionLayer) else "channels"
        shares = 1 - np.cumsum([len(portion) for portion in portions]) / _units(layer)
        gained = table.dense - _interpolated(table.points[structure], shares)
        return [float(weights[structure, layer.index] * seconds) for seconds in gained]

    return Prices("latency", table.dense, saved_along)


def _units(layer: Layer) -> int:
    return layer.num_channels if isinstance(layer, MLPLayer) else layer.num_heads


def _interpolated(points: Sequence[tuple[float, float]], shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Seconds at shares left; below the least that was timed, as steep as just above it, and never below zero."""
    left, seconds = (np.array(numbers[::-1]) for numbers in zip(*points, strict=True))
    slope = (seconds[1] - seconds[0]) / (left[1] - left[0]) if len(left) > 1 else 0.0
    below = np.maximum(0.0, seconds[0] - slope * (left[0] - shares))
    found: np.ndarray[Any, Any] = np.where(shares < left[0], below, np.interp(shares, left, seconds))
    return found


def _falling(seconds: Sequence[float]) -> list[float]:
    """The closest numbers that never rise: neighbours out of order are replaced by their mean."""
    blocks: list[list[float]] = []
    for second in seconds:
        blocks.append([second])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) < sum(blocks[-1]) / len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [sum(block) / len(block) for block in blocks for _ in block]


def _reduce(model: PreTrainedModel, structure: str, share: float) -> float:
    """Leave about a share of the heads or channels of every layer, in place; the share that is left over all."""
    if structure == "channels":
        mlps = mlp_layers(model)
        channels = {
            mlp.index: range(max(1, round(share * mlp.num_channels)), mlp.num_channels)
            for mlp in mlps
            if mlp.num_channels
        }
        prune_channels(model, channels)
        return 1 - sum(map(len, channels.values())) / sum(mlp.num_channels for mlp in mlps)
    layers = attention_layers(model)
    heads = {layer.index: _leaving(layer, share) for layer in layers if layer.num_heads}
    prune_heads(model, heads)
    return 1 - sum(map(len, heads.values())) / sum(layer.num_heads for layer in layers)


def _leaving(layer: AttentionLayer, share: float) -> list[int]:
    """As many heads of every group, where heads share keys; all but one at most."""
    if len(layer.groups) == layer.num_heads:
        return list(range(max(1, round(share * layer.num_heads)), layer.num_heads))
    return [head for group in layer.groups for head in group[max(1, round(share * len(group))) :]]

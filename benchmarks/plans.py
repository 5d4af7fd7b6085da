"""Random plans for the sweep: which heads leave, by unit."""

from __future__ import annotations

import random
from collections.abc import Sequence

from compressor.attention import AttentionLayer

UNITS = ("head", "query", "group")


def units_of(layers: Sequence[AttentionLayer]) -> list[str]:
    """The units that mean something different for these layers."""
    return list(UNITS if any(shares(layer) for layer in layers) else UNITS[:1])


def shares(layer: AttentionLayer) -> bool:
    """Whether a layer has several groups of several heads."""
    return len(layer.groups) > 1 and max(map(len, layer.groups)) > 1


def draw_plan(layers: Sequence[AttentionLayer], unit: str, seed: str) -> dict[int, list[int]]:
    """One to three heads of every layer that has more than one, by unit; "head" leaves groups uneven."""
    draw, plan = random.Random(seed), {}
    for layer in layers:
        groups = [list(group) for group in layer.groups]
        gone: list[int] = []
        if not shares(layer) or unit == "head":
            most = min(3, layer.num_heads - 1)
            while most and (not gone or (shares(layer) and not uneven(groups, gone))):
                gone = draw.sample(range(layer.num_heads), draw.randint(1, most))
        elif unit == "query":
            count = draw.randint(1, max(1, min(map(len, groups)) - 1))
            gone = [head for group in groups for head in draw.sample(group, count)]
        else:
            gone = draw.choice(groups)
        if gone:
            plan[layer.index] = sorted(gone)
    return plan


def uneven(groups: Sequence[Sequence[int]], gone: Sequence[int]) -> bool:
    """Whether groups that are left are of different sizes."""
    return len({size for group in groups if (size := len(set(group) - set(gone)))}) > 1

"""What can leave a layer at one time: heads, heads of every group, groups, or chunks of channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

Portion = tuple[float, tuple[int, ...]]  # (mean score, its heads or channels)


def head_portions(values: Sequence[float], unit: str, groups: Sequence[int] | None) -> list[Portion]:
    """Portions of a layer's heads, the lowest first; `groups` has the group of each head."""
    heads = sorted(range(len(values)), key=values.__getitem__)
    portions = [(head,) for head in heads]
    if groups is not None and unit != "head" and len(set(groups)) < len(groups):
        members = [[head for head in heads if groups[head] == group] for group in sorted(set(groups))]
        portions = [tuple(group) for group in (members if unit == "group" else zip(*members, strict=False))]
    return sorted((fmean(values[head] for head in portion), portion) for portion in portions)


@lru_cache(maxsize=256)  # resamples of heads ask for the same again and again
def channel_portions(values: tuple[float, ...], align: int) -> tuple[Portion, ...]:
    """Chunks of an MLP's channels, the lowest first, such that whatever stays is a multiple of `align` wide.

    The first chunk is what the width has beyond such a multiple, where it has.
    """
    channels = sorted(range(len(values)), key=values.__getitem__)
    first = len(values) % align
    chunks = [channels[:first]] if first else []
    chunks += [channels[start : start + align] for start in range(first, len(values), align)]
    return tuple((fmean(values[channel] for channel in chunk), tuple(sorted(chunk))) for chunk in chunks)

"""A ratio of heads or channels: how many go, from where, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compressor.budget.portions import channel_portions, head_portions
from compressor.errors import PlanError
from compressor.types import PruningPlan, UnitScores

SCOPES = ("layer", "global")
UNITS = ("head", "query", "group")


def heads_to_remove(ratio: float, heads: int) -> int:
    """⌈ratio · heads⌉, the paper's rule: at 5 % one head of twelve, at 20 % three of twelve.

    Rounding up, not to nearest, lets small ratios remove at least one head. Floating-point dust (a product of
    1.0000000002) does not count as a further head.
    """
    return math.ceil(ratio * heads - 1e-9)


def allocate(
    scores: UnitScores,
    ratio: float,
    scope: str = "layer",
    *,
    unit: str = "head",
    groups: Sequence[Sequence[int]] | None = None,
    allow_empty: bool = False,
    seed: int | None = None,
) -> PruningPlan:
    """Choose the heads with the lowest scores; ties go to the lower layer, then the lower head.

    Heads leave in portions: single heads; whole groups; or one head of every group of a layer at a time, the lowest of
    each first. A portion's score is the mean of its heads'.

    Args:
        scores: one number per head, `[layers][heads]`.
        ratio: share of the portions to remove, between 0 and 1 exclusive.
        scope: "layer" removes ⌈ratio · P⌉ portions of every layer of P; "global" ⌈ratio · ΣP⌉ over all layers.
        unit: "head", "group", or "query" for as many heads of every group. Heads that share no keys are groups of one,
            and in layers of such groups every unit means single heads.
        groups: the group of each head, `[layers][heads]`; needed for units other than "head".
        allow_empty: let a layer lose its last portion; otherwise its best one always stays.
        seed: recorded in the plan, for criteria that draw.

    Raises:
        PlanError: a ratio, scope or unit out of range, scores that are not finite, or a target out of reach.
    """
    if not 0 < ratio < 1:
        raise PlanError(f"ratio is {ratio:g}; expected a share of heads between 0 and 1, both excluded")
    for name, value, choices in (("scope", scope, SCOPES), ("unit", unit, UNITS)):
        if value not in choices:
            raise PlanError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    check_finite(scores)
    if unit != "head" and groups is None:
        raise PlanError(f"unit {unit} needs to know which heads share keys, and the scores do not say; score again")
    spare = 0 if allow_empty else 1
    ranked = [
        head_portions(values, unit, None if groups is None else groups[index])
        for index, values in enumerate(scores.values)
    ]
    removable = [portions[: max(0, len(portions) - spare)] for portions in ranked]
    if scope == "layer":
        chosen = [portions[: heads_to_remove(ratio, len(ranked[index]))] for index, portions in enumerate(removable)]
    else:
        total = sum(map(len, ranked))
        wanted = heads_to_remove(ratio, total)
        pool = sorted((value, index, heads) for index, portions in enumerate(removable) for value, heads in portions)
        if wanted > len(pool):
            what = "heads" if unit == "head" else "portions of heads"
            raise PlanError(
                f"ratio {ratio:g} asks for {wanted} of {total} {what}, but only {len(pool)} can go while every layer "
                "keeps one; lower the ratio or allow empty layers"
            )
        chosen = [[] for _ in ranked]
        for score, index, heads in pool[:wanted]:
            chosen[index].append((score, heads))
    plan = {
        index: tuple(sorted(head for _, heads in portions for head in heads))
        for index, portions in enumerate(chosen)
        if portions
    }
    if not plan:
        what = "head" if unit == "head" else f"portion of heads (unit {unit})"
        raise PlanError(f"no layer has a {what} to spare: every layer would lose its last one")
    return PruningPlan(plan, scores.criterion, ratio, scope, scores.units_per_layer, allow_empty, seed, unit)


def allocate_channels(
    scores: UnitScores, ratio: float, scope: str, *, align: int, allow_empty: bool = False
) -> dict[int, tuple[int, ...]]:
    """The channels with the lowest scores, by MLP: ⌈ratio · F⌉ of each, or ⌈ratio · ΣF⌉ over all.

    They leave in chunks, so that what stays is a multiple of `align` wide, and at least so many leave as the ratio
    says; an MLP keeps its last chunk unless `allow_empty` is given.

    Raises:
        PlanError: scores that are not finite, or a ratio out of reach.
    """
    check_finite(scores)
    spare = 0 if allow_empty else 1
    ranked = [channel_portions(values, align) for values in scores.values]
    removable = [portions[: max(0, len(portions) - spare)] for portions in ranked]
    chosen: list[list[int]] = [[] for _ in ranked]
    if scope == "layer":
        for index, portions in enumerate(removable):
            wanted = heads_to_remove(ratio, scores.units_per_layer[index])
            for _, channels in portions:
                if len(chosen[index]) < wanted:
                    chosen[index] += channels
    else:
        total = sum(scores.units_per_layer)
        wanted = heads_to_remove(ratio, total)
        pool = sorted(
            (score, index, place)
            for index, portions in enumerate(removable)
            for place, (score, _) in enumerate(portions)
        )
        able = sum(len(channels) for portions in removable for _, channels in portions)
        if wanted > able:
            raise PlanError(
                f"ratio {ratio:g} asks for {wanted} of {total} channels, but only {able} can go while every MLP keeps "
                f"{align}; lower the ratio, --align, or allow empty layers"
            )
        for _, index, place in pool:
            if sum(map(len, chosen)) < wanted:
                chosen[index] += removable[index][place][1]
    plan = {index: tuple(sorted(channels)) for index, channels in enumerate(chosen) if channels}
    if not plan:
        raise PlanError(f"no MLP has {align} channels to spare: every one would lose its last ones; lower --align")
    return plan


def check_finite(scores: UnitScores) -> None:
    """Refuse scores that are not finite.

    Raises:
        PlanError: there are some.
    """
    if not all(math.isfinite(value) for layer in scores.values for value in layer):
        raise PlanError(
            f"criterion {scores.criterion} gave scores that are not finite; the model or its data is broken"
        )

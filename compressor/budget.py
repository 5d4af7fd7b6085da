"""Scores and a target → a plan: how many heads go, from where, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

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
    if not all(math.isfinite(value) for layer in scores.values for value in layer):
        raise PlanError(
            f"criterion {scores.criterion} gave scores that are not finite; the model or its data is broken"
        )
    if unit != "head" and groups is None:
        raise PlanError(f"unit {unit} needs to know which heads share keys, and the scores do not say; score again")
    spare = 0 if allow_empty else 1
    ranked = [
        _portions(values, unit, None if groups is None else groups[index]) for index, values in enumerate(scores.values)
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


def _portions(values: Sequence[float], unit: str, groups: Sequence[int] | None) -> list[tuple[float, tuple[int, ...]]]:
    """What can leave a layer at one time, with its score, the lowest first."""
    heads = sorted(range(len(values)), key=values.__getitem__)
    portions = [(head,) for head in heads]
    if groups is not None and unit != "head" and len(set(groups)) < len(groups):
        members = [[head for head in heads if groups[head] == group] for group in sorted(set(groups))]
        portions = [tuple(group) for group in (members if unit == "group" else zip(*members, strict=False))]
    return sorted((fmean(values[head] for head in portion), portion) for portion in portions)

"""Scores and a target → a plan: how many heads go, from where, and which."""

from __future__ import annotations

import math

from compressor.errors import PlanError
from compressor.types import HeadScores, PruningPlan

SCOPES = ("layer", "global")


def heads_to_remove(ratio: float, heads: int) -> int:
    """⌈ratio · heads⌉, the paper's rule: at 5 % one head of twelve, at 20 % three of twelve.

    Rounding up, not to nearest, lets small ratios remove at least one head. Floating-point dust (a product of
    1.0000000002) does not count as a further head.
    """
    return math.ceil(ratio * heads - 1e-9)


def allocate(
    scores: HeadScores, ratio: float, scope: str = "layer", *, allow_empty: bool = False, seed: int | None = None
) -> PruningPlan:
    """Choose the heads with the lowest scores; ties go to the lower layer, then the lower head.

    Args:
        scores: one number per head, `[layers][heads]`.
        ratio: share of the heads to remove, between 0 and 1 exclusive.
        scope: "layer" removes ⌈ratio · H⌉ heads of every layer of H; "global" ⌈ratio · ΣH⌉ over all layers.
        allow_empty: let a layer lose its last head; otherwise its best head always stays.
        seed: recorded in the plan, for criteria that draw.

    Raises:
        PlanError: a ratio or scope out of range, scores that are not finite, or a target out of reach.
    """
    if not 0 < ratio < 1:
        raise PlanError(f"ratio is {ratio:g}; expected a share of heads between 0 and 1, both excluded")
    if scope not in SCOPES:
        raise PlanError(f"scope is {scope!r}; expected one of {', '.join(SCOPES)}")
    if not all(math.isfinite(value) for layer in scores.values for value in layer):
        raise PlanError(
            f"criterion {scores.criterion} gave scores that are not finite; the model or its data is broken"
        )
    spare = 0 if allow_empty else 1
    ranked = [sorted(range(len(layer)), key=layer.__getitem__) for layer in scores.values]
    removable = [order[: max(0, len(order) - spare)] for order in ranked]
    if scope == "layer":
        heads = {
            index: tuple(sorted(order[: heads_to_remove(ratio, len(ranked[index]))]))
            for index, order in enumerate(removable)
        }
    else:
        wanted = heads_to_remove(ratio, sum(scores.heads_per_layer))
        pool = sorted(
            (scores.values[index][head], index, head) for index, order in enumerate(removable) for head in order
        )
        if wanted > len(pool):
            raise PlanError(
                f"ratio {ratio:g} asks for {wanted} of {sum(scores.heads_per_layer)} heads, but only {len(pool)} can "
                "go while every layer keeps one; lower the ratio or allow empty layers"
            )
        heads = dict.fromkeys(range(len(ranked)), ())
        for _, index, head in pool[:wanted]:
            heads[index] = tuple(sorted((*heads[index], head)))
    heads = {index: chosen for index, chosen in heads.items() if chosen}
    if not heads:
        raise PlanError("no layer has a head to spare: every layer would lose its last one")
    return PruningPlan(heads, scores.criterion, ratio, scope, scores.heads_per_layer, allow_empty, seed)

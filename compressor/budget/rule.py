"""Every way to say how much is to leave, in one rule that a plan records and its rivals follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.budget.aim import Costs, Queue, aim, chosen, queue_of
from compressor.budget.portions import channel_portions, head_portions
from compressor.budget.ratio import SCOPES, UNITS, allocate, allocate_channels, check_finite
from compressor.errors import PlanError
from compressor.types import PruningPlan, UnitScores

STRUCTURES = ("heads", "channels")
COSTS = ("flops", "params", "latency")
Counts = tuple[Mapping[int, int], Mapping[int, int]]  # heads and channels that leave, by layer


@dataclass(frozen=True)
class Rule:
    """How much leaves, and in which portions: a ratio, a target, or as many of every layer as a plan by hand takes.

    `target` is (kind, share of the dense model's that is left), see `COSTS`.
    """

    ratio: float | None = None
    target: tuple[str, float] | None = None
    counts: Counts | None = None
    scope: str = "layer"
    unit: str = "head"
    structures: tuple[str, ...] = ("heads",)
    align: int = 8
    allow_empty: bool = False

    def part(self, share: float) -> Rule:
        """The rule for a part of the way, such as half of a ratio."""
        if share == 1:
            return self  # 1 - (1 - 0.1) is not 0.1
        return replace(
            self,
            ratio=None if self.ratio is None else self.ratio * share,
            target=None if self.target is None else (self.target[0], 1 - (1 - self.target[1]) * share),
        )

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Rule:
        """The rule of a plan, from what `PruningPlan.to_dict` wrote; older ones knew heads alone."""
        counts: Counts | None = None
        if plan.get("edited"):
            heads, channels = ({int(i): len(gone) for i, gone in plan[name].items()} for name in STRUCTURES)
            counts = heads, channels
        target = plan.get("target")
        return cls(
            ratio=plan["ratio"] if counts is None else None,
            target=next(iter(target.items())) if target and counts is None else None,
            counts=counts,
            scope=plan["scope"],
            unit=plan["unit"],
            structures=tuple(plan.get("structures", ("heads",))),
            align=plan.get("align", 8),
            allow_empty=plan["allow_empty"],
        )


def choose(
    rule: Rule,
    heads: UnitScores,
    channels: UnitScores | None = None,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    costs: Costs | None = None,
    total: float = 0.0,
    in_loss: bool = False,
    seed: int | None = None,
) -> PruningPlan:
    """Choose heads, channels or both by a rule; the lowest scores go first.

    Args:
        rule: how much goes.
        heads: one number per head.
        channels: one number per channel, where the rule is about channels.
        groups: the group of each head, `[layers][heads]`; needed for units other than "head".
        costs: what portions save; needed for a target, with the `total` of what they save from.
        in_loss: whether values of different layers and structures are rises of the loss, and compare.
        seed: recorded in the plan, for criteria that draw.

    Raises:
        PlanError: scores that are not finite, or a rule that cannot be followed; the message says what can.
    """
    for name, value, known in (("scope", rule.scope, SCOPES), ("unit", rule.unit, UNITS)):
        if value not in known:
            raise PlanError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    check_finite(heads)
    if channels is not None:
        check_finite(channels)
    leaving: dict[int, tuple[int, ...]] = {}
    cut: dict[int, tuple[int, ...]] = {}
    predicted = None
    if rule.counts is not None:
        leaving = _lowest_portions(heads, rule.counts[0], rule.unit, groups)
        cut = _lowest(channels, rule.counts[1]) if channels is not None else {}
    elif rule.target is not None:
        assert costs is not None
        queues = _queues(rule, heads, channels, groups, costs)
        taken, predicted = aim(queues, total, rule.target, rule.scope, in_loss=in_loss, allow_empty=rule.allow_empty)
        leaving, cut = (chosen(queues, taken, structure) for structure in STRUCTURES)
    else:
        assert rule.ratio is not None
        empty = rule.allow_empty
        if "heads" in rule.structures:
            plan = allocate(heads, rule.ratio, rule.scope, unit=rule.unit, groups=groups, allow_empty=empty)
            leaving = dict(plan.heads)
        if channels is not None:
            cut = allocate_channels(channels, rule.ratio, rule.scope, align=rule.align, allow_empty=empty)
    return PruningPlan(
        heads=leaving,
        criterion=heads.criterion,
        ratio=rule.ratio,
        scope=rule.scope,
        heads_per_layer=heads.units_per_layer,
        allow_empty=rule.allow_empty,
        seed=seed,
        unit=rule.unit,
        channels=cut,
        channels_per_layer=channels.units_per_layer if channels is not None else (),
        target=rule.target,
        structures=rule.structures,
        align=rule.align,
        predicted=predicted,
        edited=rule.counts is not None,
    )


def _lowest(scores: UnitScores, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """So many units of every layer, those with the lowest scores."""
    ranked = {index: sorted(range(len(layer)), key=layer.__getitem__) for index, layer in enumerate(scores.values)}
    return {index: tuple(sorted(ranked[index][:count])) for index, count in counts.items() if count}


def _lowest_portions(
    heads: UnitScores, counts: Mapping[int, int], unit: str, groups: Sequence[Sequence[int]] | None
) -> dict[int, tuple[int, ...]]:
    """So many heads of every layer, in the lowest portions; the lowest heads where no whole portions are so many."""
    found = _lowest(heads, counts)
    for index, gone in found.items():
        leaving: list[int] = []
        for _, portion in head_portions(heads.values[index], unit, None if groups is None else groups[index]):
            leaving += portion if len(leaving) < len(gone) else ()
        if len(leaving) == len(gone):
            found[index] = tuple(sorted(leaving))
    return found


def _queues(
    rule: Rule,
    heads: UnitScores,
    channels: UnitScores | None,
    groups: Sequence[Sequence[int]] | None,
    costs: Costs,
) -> list[Queue]:
    if rule.unit != "head" and groups is None:
        raise PlanError(f"unit {rule.unit} needs to know which heads share keys, and the scores do not say")
    spare = 0 if rule.allow_empty else 1
    found = []
    for index, values in enumerate(heads.values if "heads" in rule.structures else ()):
        ranked = head_portions(values, rule.unit, None if groups is None else groups[index])
        portions = [gone for _, gone in ranked[: max(0, len(ranked) - spare)]]
        found.append(queue_of("heads", index, values, portions, costs))
    for index, values in enumerate(channels.values if channels is not None else ()):
        chunks = channel_portions(values, rule.align)
        portions = [gone for _, gone in chunks[: max(0, len(chunks) - spare)]]
        found.append(queue_of("channels", index, values, portions, costs))
    return found

"""Targets of costs against search over everything that could leave, and chunks of channels against their definition."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.budget import Rule, choose
from compressor.budget.portions import channel_portions
from compressor.budget.ratio import allocate_channels
from compressor.errors import PlanError
from compressor.types import PruningPlan, UnitScores

Unit = tuple[str, int, int]  # structure, layer, unit


def scores(layers: Sequence[Sequence[float]]) -> UnitScores:
    return UnitScores("test", tuple(tuple(map(float, layer)) for layer in layers))


def additive(prices: dict[str, float]) -> Callable[..., list[float]]:
    """Costs that are the same for every unit of a structure."""

    def costs(structure: str, index: int, portions: Sequence[Sequence[int]]) -> list[float]:
        counts = [sum(map(len, portions[: step + 1])) for step in range(len(portions))]
        return [prices[structure] * count for count in counts]

    return costs


def gone(plan: PruningPlan) -> set[Unit]:
    found = {("heads", index, unit) for index, units in plan.heads.items() for unit in units}
    return found | {("channels", index, unit) for index, units in plan.channels.items() for unit in units}


def aimed(
    heads: Sequence[Sequence[float]],
    channels: Sequence[Sequence[float]] | None,
    share: float,
    prices: dict[str, float],
    **rule: Any,
) -> PruningPlan:
    in_loss = rule.pop("in_loss", True)
    groups = rule.pop("groups", None)
    structures = tuple(name for name, given in (("heads", heads), ("channels", channels)) if given)
    made = Rule(target=("flops", share), structures=structures, **{"scope": "global", "align": 1, **rule})
    units = {"heads": sum(map(len, heads)), "channels": sum(map(len, channels or ()))}
    total = sum(prices[name] * units[name] for name in structures)
    return choose(
        made,
        scores(heads),
        scores(channels) if channels else None,
        groups=groups,
        costs=additive(prices),
        total=total,
        in_loss=in_loss,
    )


def subsets(heads: Sequence[Sequence[float]], channels: Sequence[Sequence[float]]) -> list[set[Unit]]:
    """All sets of units that leave one in every layer."""
    layers = [[("heads", i, u) for u in range(len(layer))] for i, layer in enumerate(heads)]
    layers += [[("channels", i, u) for u in range(len(layer))] for i, layer in enumerate(channels)]
    options = []
    for layer in layers:
        kept = [
            {unit for unit, out in zip(layer, flags, strict=True) if out}
            for flags in product([0, 1], repeat=len(layer))
        ]
        options.append([one for one in kept if len(one) < len(layer)])
    return [set().union(*parts) for parts in product(*options)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), percent=st.integers(15, 95))
def test_where_costs_are_equal_no_set_is_cheaper(seed: int, percent: int) -> None:
    """Greedy is then exact: of all sets that meet the target, none has a lower sum of values."""
    draw = random.Random(seed)
    heads = [[draw.random() for _ in range(3)], [draw.random() for _ in range(2)]]
    channels = [[draw.random() for _ in range(3)], [draw.random() for _ in range(2)]]
    prices = {"heads": 1.0, "channels": 1.0}
    value = {("heads", i, u): v for i, layer in enumerate(heads) for u, v in enumerate(layer)}
    value |= {("channels", i, u): v for i, layer in enumerate(channels) for u, v in enumerate(layer)}
    needed = 10 * (1 - percent / 100) - 1e-6
    feasible = [chosen for chosen in subsets(heads, channels) if len(chosen) >= needed]
    if not feasible:
        with pytest.raises(PlanError):
            aimed(heads, channels, percent / 100, prices)
        return
    found = gone(aimed(heads, channels, percent / 100, prices))
    best = min(sum(value[unit] for unit in chosen) for chosen in feasible)
    assert sum(value[unit] for unit in found) == pytest.approx(best)
    assert len(found) == math.ceil(needed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), percent=st.integers(15, 95))
def test_in_every_layer_the_counts_are_the_best_of_all(seed: int, percent: int) -> None:
    draw = random.Random(seed)
    heads = [[draw.uniform(-0.2, 1) for _ in range(4)] for _ in range(2)]
    channels = [[draw.uniform(-0.2, 1) for _ in range(6)] for _ in range(2)]
    prices = {"heads": 3.0, "channels": 1.0}

    def lost(k: int, m: int) -> float:
        return sum(sum(sorted(layer)[:k]) for layer in heads) + sum(sum(sorted(layer)[: 2 * m]) for layer in channels)

    needed = 36 * (1 - percent / 100) - 1e-6
    feasible = [(k, m) for k in range(4) for m in range(3) if 2 * (3 * k + 2 * m) >= needed]
    if not feasible:
        with pytest.raises(PlanError):
            aimed(heads, channels, percent / 100, prices, scope="layer", align=2)
        return
    plan = aimed(heads, channels, percent / 100, prices, scope="layer", align=2)
    counts = {len(plan.heads.get(i, ())) for i in range(2)}, {len(plan.channels.get(i, ())) for i in range(2)}
    assert [len(count) for count in counts] == [1, 1]  # equal in every layer
    k, m = counts[0].pop(), counts[1].pop() // 2
    assert (k, m) in feasible
    assert lost(k, m) == pytest.approx(min(lost(*pair) for pair in feasible))

    even = aimed(heads, channels, percent / 100, prices, scope="layer", align=2, in_loss=False)
    k, m = len(even.heads.get(0, ())), len(even.channels.get(0, ())) // 2
    assert (k, m) in feasible
    assert (k - 1, m) not in feasible
    assert (k, m - 1) not in feasible
    least = [(k, m) for k, m in feasible if not {(k - 1, m), (k, m - 1)} & set(feasible)]
    assert abs(k / 4 - m / 3) == pytest.approx(min(abs(k / 4 - m / 3) for k, m in least))


def test_what_saves_more_for_its_value_goes_first() -> None:
    """A head of value 2 and cost 10 before a channel of value 1 and cost 1."""
    prices = {"heads": 10.0, "channels": 1.0}
    assert gone(aimed([[2, 9]], [[1, 1, 9]], 0.99, prices)) == {("heads", 0, 0)}
    assert gone(aimed([[20, 99]], [[1, 1, 9]], 0.99, prices)) == {("channels", 0, 0)}


def test_what_does_not_compare_leaves_in_equal_shares() -> None:
    """The channels' values are tiny, and yet as large a share of heads goes; the lowest within each layer."""
    heads = [[5, 1, 2, 9], [8, 7, 1, 2]]
    channels = [[x / 1e6 for x in range(8)], [x / 1e6 for x in range(8)][::-1]]
    plan = aimed(heads, channels, 0.5, {"heads": 2.0, "channels": 1.0}, in_loss=False)
    assert plan.heads == {0: (1, 2), 1: (2, 3)}
    assert plan.channels == {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}
    assert plan.predicted == 0.5


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("in_loss", [True, False])
def test_heads_of_a_group_leave_together(scope: str, in_loss: bool) -> None:
    groups = [[0, 0, 1, 1], [0, 0, 1, 1]]
    values = [[1, 2, 3, 4], [5, 6, 7, 8]]
    prices = {"heads": 1.0, "channels": 0.0}
    rule: dict[str, Any] = {"groups": groups, "scope": scope, "in_loss": in_loss}
    assert aimed(values, None, 0.5, prices, unit="group", **rule).heads == {0: (0, 1), 1: (0, 1)}
    assert aimed(values, None, 0.5, prices, unit="query", **rule).heads == {0: (0, 2), 1: (0, 2)}


def test_costs_that_come_with_the_last_of_a_group_are_seen() -> None:
    """Keys leave with the last head that reads them: costs of a portion depend on what left before it."""

    def costs(structure: str, index: int, portions: Sequence[Sequence[int]]) -> list[float]:
        found, out = [], set()
        for portion in portions:
            out |= set(portion)
            found.append(len(out) + 5.0 * ({0, 1} <= out) + 5.0 * ({2, 3} <= out))
        return found

    rule = Rule(target=("params", 0.5), structures=("heads",), scope="global")
    plan = choose(rule, scores([[1, 2, 3, 4]]), costs=costs, total=14.0, in_loss=True)
    assert plan.heads == {0: (0, 1)}
    assert plan.predicted == 0.5


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("in_loss", [True, False])
def test_the_reachable_range_is_told_and_true(scope: str, in_loss: bool) -> None:
    heads, channels = [[1, 2, 3]] * 2, [[float(n) for n in range(20)]] * 2
    prices = {"heads": 7.0, "channels": 1.0}
    rule: dict[str, Any] = {"scope": scope, "align": 8, "in_loss": in_loss}
    with pytest.raises(PlanError) as caught:
        aimed(heads, channels, 0.1, prices, **rule)
    message = str(caught.value)
    assert "target_flops is 0.1; with heads and channels down to the last portion of every layer" in message
    assert "\n" not in message
    least = float(message.split("ask for ")[1].split()[0])
    plan = aimed(heads, channels, least, prices, **rule)
    assert (plan.removed, plan.removed_channels) == (4, 24)
    assert plan.predicted is not None
    assert plan.predicted == pytest.approx(30 / 82)
    assert least - 0.001 < plan.predicted <= least
    whole = aimed(heads, channels, 0.001, prices, allow_empty=True, **rule)
    assert (whole.removed, whole.removed_channels, whole.predicted) == (6, 40, 0.0)


def test_nothing_to_spare() -> None:
    with pytest.raises(PlanError, match="anything to spare"):
        aimed([[1], [2]], None, 0.9, {"heads": 1.0})


@pytest.mark.parametrize(("width", "align"), [(20, 8), (16, 8), (5, 8), (8, 8), (9, 1), (0, 8), (13, 4)])
def test_chunks_leave_widths_that_are_multiples(width: int, align: int) -> None:
    draw = random.Random(width)
    values = tuple(draw.random() for _ in range(width))
    chunks = [set(channels) for _, channels in channel_portions(values, align)]
    left = width
    for chunk in chunks:
        left -= len(chunk)
        assert left % align == 0
    assert left == 0
    order = sorted(range(width), key=values.__getitem__)
    assert [unit for chunk in chunks for unit in sorted(chunk, key=values.__getitem__)] == order
    if width:
        assert len(chunks[0]) == (width % align or align)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_ratio_of_channels(ratio: float, scope: str) -> None:
    draw = random.Random(3)
    values = [[draw.random() for _ in range(width)] for width in (20, 32, 16)]
    if scope == "global" and ratio > 0.6:
        with pytest.raises(PlanError, match="68 of 68 channels"):
            allocate_channels(scores(values), ratio, scope, align=8)
        return
    plan = allocate_channels(scores(values), ratio, scope, align=8)
    widths = [len(layer) - len(plan.get(i, ())) for i, layer in enumerate(values)]
    assert all(width % 8 == 0 or i not in plan for i, width in enumerate(widths))
    assert min(widths) >= 8
    for i, layer in enumerate(values):
        wanted = math.ceil(ratio * len(layer))
        removed = plan.get(i, ())
        assert set(removed) == set(sorted(range(len(layer)), key=layer.__getitem__)[: len(removed)])
        if scope == "layer":
            assert wanted <= len(removed) < wanted + 8 or widths[i] == 8
    if scope == "global":
        assert math.ceil(ratio * 68) <= sum(map(len, plan.values())) < math.ceil(ratio * 68) + 8


def test_a_ratio_of_both() -> None:
    rule = Rule(ratio=0.5, structures=("heads", "channels"), align=2)
    plan = choose(rule, scores([[1, 2, 3, 4]]), scores([[4, 3, 2, 1]]))
    assert (plan.heads, plan.channels) == ({0: (0, 1)}, {0: (2, 3)})
    alone = choose(Rule(ratio=0.5, structures=("channels",), align=2), scores([[1, 2, 3, 4]]), scores([[4, 3, 2, 1]]))
    assert (alone.heads, alone.channels, alone.heads_per_layer) == ({}, {0: (2, 3)}, (4,))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite(bad: float) -> None:
    with pytest.raises(PlanError, match="not finite"):
        aimed([[1, 2]], [[1, bad]], 0.9, {"heads": 1.0, "channels": 1.0})


def test_a_rule_comes_back_from_its_plan() -> None:
    plan = aimed([[1, 2, 3]], [[1, 2, 3, 4]], 0.7, {"heads": 1.0, "channels": 1.0}, align=2)
    expected = Rule(target=("flops", 0.7), structures=("heads", "channels"), align=2, scope="global")
    assert Rule.of(plan.to_dict()) == expected
    old = {"criterion": "x", "ratio": 0.2, "scope": "layer", "unit": "head", "allow_empty": False}
    assert Rule.of(old) == Rule(ratio=0.2)


def test_the_whole_way_is_the_rule_itself() -> None:
    for rule in (Rule(target=("flops", 0.1)), Rule(ratio=0.3)):
        assert rule.part(1.0) is rule
    assert Rule(target=("flops", 0.5)).part(0.5).target == ("flops", 0.75)


@pytest.mark.parametrize(
    ("unit", "count", "expected"),
    [
        ("group", 3, (3, 4, 5)),
        ("query", 2, (0, 3)),
        ("head", 3, (0, 1, 3)),
        ("group", 2, (0, 1)),
        ("query", 3, (0, 1, 3)),
    ],
)
def test_rivals_of_an_edited_plan_take_whole_portions(unit: str, count: int, expected: tuple[int, ...]) -> None:
    """Single heads only where no number of whole portions is as many."""
    rule = Rule(counts=({0: count}, {}), unit=unit)
    plan = choose(rule, scores([[1, 2, 30, 6, 7, 8]]), groups=[[0, 0, 0, 1, 1, 1]])
    assert (plan.heads, plan.unit) == ({0: expected}, unit)


def test_rivals_of_an_edited_plan_take_as_many_from_every_layer() -> None:
    document = aimed([[1, 2, 3], [1, 2, 3]], [[1, 2, 3, 4]], 0.7, {"heads": 1.0, "channels": 1.0}).to_dict()
    document |= {"edited": True, "heads": {"1": [0, 2]}, "channels": {"0": [3]}}
    plan = choose(Rule.of(document), scores([[3, 2, 1], [3, 2, 1]]), scores([[1, 2, 0, 4]]))
    assert (plan.heads, plan.channels, plan.edited) == ({1: (1, 2)}, {0: (2,)}, True)

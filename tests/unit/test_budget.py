"""Plans against the paper's rule worked out by hand, and against search over all subsets."""

import hashlib
import json
import math
from fractions import Fraction
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.budget import allocate, heads_to_remove
from compressor.errors import PlanError
from compressor.types import UnitScores


def scores(*layers: list[float]) -> UnitScores:
    return UnitScores("test", tuple(tuple(layer) for layer in layers))


@pytest.mark.parametrize(
    ("ratio", "heads", "expected"),
    [
        (0.05, 12, 1),
        (0.10, 12, 2),
        (0.20, 12, 3),
        (0.05, 8, 1),
        (0.10, 8, 1),
        (0.20, 8, 2),
        (0.25, 8, 2),
        (0.2, 5, 1),  # 1.0, and no more
        (0.1, 30, 3),  # 3.0000000000000004 in floating point
        (0.07, 100, 7),  # 7.000000000000001
        (0.29, 100, 29),  # 28.999999999999996
        (0.5, 1, 1),
        (0.001, 12, 1),
        (0.999, 12, 12),
        (0.3, 0, 0),
    ],
)
def test_the_rule_of_rounding_up(ratio, heads, expected):
    assert heads_to_remove(ratio, heads) == expected


@pytest.mark.parametrize("heads", [1, 5, 8, 12, 16, 32, 144, 1024])
def test_the_rule_in_exact_arithmetic(heads):
    """Per cent are what people type; floating-point dust must not remove a head more, nor spare one."""
    for percent in range(1, 100):
        assert heads_to_remove(percent / 100, heads) == math.ceil(Fraction(percent, 100) * heads)


LADDER = [float(value) for value in (5, 3, 8, 1, 9, 2, 7, 12, 4, 11, 6, 10)]


@pytest.mark.parametrize(("ratio", "removed"), [(0.05, (3,)), (0.1, (3, 5)), (0.2, (1, 3, 5))])
def test_the_lowest_of_every_layer_go(ratio, removed):
    plan = allocate(scores(LADDER, LADDER[::-1]), ratio)
    assert plan.heads == {0: removed, 1: tuple(sorted(11 - head for head in removed))}
    assert (plan.criterion, plan.ratio, plan.scope, plan.heads_per_layer) == ("test", ratio, "layer", (12, 12))
    assert (plan.removed, plan.total) == (2 * len(removed), 24)
    assert (plan.allow_empty, plan.seed) == (False, None)


def test_layers_of_different_sizes_lose_by_their_own_size():
    plan = allocate(scores([1, 2, 3, 4], [4, 3, 2, 1, 0, 5, 6, 7, 8, 9, 10, 11], [1], []), 0.2)
    assert plan.heads == {0: (0,), 1: (2, 3, 4)}
    assert plan.heads_per_layer == (4, 12, 1, 0)


@pytest.mark.parametrize(("ratio", "left"), [(0.7, 1), (0.99, 1), (0.5, 2)])
def test_the_best_head_of_a_layer_stays(ratio, left):
    plan = allocate(scores([3, 1, 4, 2]), ratio)
    assert len(plan.heads[0]) == 4 - left
    assert 2 not in plan.heads[0]


def test_layers_may_be_emptied_where_that_is_allowed():
    assert allocate(scores([3, 1, 4, 2]), 0.99, allow_empty=True).heads == {0: (0, 1, 2, 3)}
    assert allocate(scores([5], [1]), 0.5, allow_empty=True).heads == {0: (0,), 1: (0,)}
    assert allocate(scores([5], [1]), 0.5, "global", allow_empty=True).heads == {1: (0,)}
    assert allocate(scores([5], [1]), 0.5, allow_empty=True).allow_empty


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_go_to_the_lower_layer_then_the_lower_head(scope):
    plan = allocate(scores([1, 1, 1, 1], [1, 1, 1, 1]), 0.25, scope)
    assert plan.heads == ({0: (0,), 1: (0,)} if scope == "layer" else {0: (0, 1)})
    assert allocate(scores([1, 1, 1], [1, 1, 1]), 0.66, "global").heads == {0: (0, 1), 1: (0, 1)}


def cheapest(values: list[list[float]], wanted: int, allow_empty: bool) -> set[tuple[int, int]]:
    """Of all sets of `wanted` heads the one of the lowest sum, by trying them all."""
    heads = [(layer, head) for layer, row in enumerate(values) for head in range(len(row))]
    allowed = (
        chosen
        for chosen in combinations(heads, wanted)
        if allow_empty
        or all(sum(layer == index for layer, _ in chosen) < len(row) for index, row in enumerate(values) if row)
    )
    return set(min(allowed, key=lambda chosen: sum(values[layer][head] for layer, head in chosen)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    percent=st.integers(1, 99),
    allow_empty=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_the_global_plan_is_the_cheapest_of_all(sizes, percent, allow_empty, order):
    """Scores are powers of two, so that all sums differ and the cheapest set is the only one."""
    total = sum(sizes)
    powers = [2.0**power for power in range(total)]
    order.shuffle(powers)
    values = [[powers.pop() for _ in range(size)] for size in sizes]
    wanted = math.ceil(Fraction(percent, 100) * total)
    reachable = total if allow_empty else sum(size - 1 for size in sizes if size)
    if wanted > reachable or not total:
        with pytest.raises(PlanError):
            allocate(scores(*values), percent / 100, "global", allow_empty=allow_empty)
        return
    plan = allocate(scores(*values), percent / 100, "global", allow_empty=allow_empty)
    chosen = {(layer, head) for layer, heads in plan.heads.items() for head in heads}
    assert chosen == cheapest(values, wanted, allow_empty)
    assert plan.removed == wanted
    assert all(heads == tuple(sorted(heads)) for heads in plan.heads.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=3),
    percent=st.integers(1, 99),
    allow_empty=st.booleans(),
)
def test_no_head_goes_before_a_lower_one_of_its_layer(values, percent, allow_empty):
    if not allow_empty and all(len(row) == 1 for row in values):
        return
    plan = allocate(scores(*values), percent / 100, allow_empty=allow_empty)
    for layer, row in enumerate(values):
        gone = plan.heads.get(layer, ())
        expected = min(math.ceil(Fraction(percent, 100) * len(row)), len(row) - (not allow_empty))
        assert len(gone) == expected
        kept = [row[head] for head in range(len(row)) if head not in gone]
        assert not gone or not kept or max(row[head] for head in gone) <= min(kept)


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.1, 20, math.nan, math.inf, -math.inf])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(PlanError, match=r"ratio is .*between 0 and 1") as caught:
        allocate(scores([1, 2]), ratio)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scope", ["", "Layer", "model", None])
def test_unknown_scopes_are_refused(scope):
    with pytest.raises(PlanError, match="expected one of layer, global"):
        allocate(scores([1, 2]), 0.5, scope)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_that_are_not_finite_are_refused(value, scope):
    with pytest.raises(PlanError, match="criterion test gave scores that are not finite"):
        allocate(scores([1, 2], [3, value]), 0.5, scope)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_model_with_no_head_to_spare_is_refused(scope):
    with pytest.raises(PlanError):
        allocate(scores([1], [2]), 0.5, scope)


def test_an_unreachable_global_ratio_says_how_far_one_can_go():
    with pytest.raises(PlanError, match=r"asks for 6 of 6 heads, but only 4 can go") as caught:
        allocate(scores([1, 2, 3], [4, 5, 6]), 0.9, "global")
    assert "allow empty" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert allocate(scores([1, 2, 3], [4, 5, 6]), 0.66, "global").removed == 4


@pytest.mark.parametrize(("scope", "allow_empty"), list(product(["layer", "global"], [False, True])))
def test_plans_are_ready_for_json(scope, allow_empty):
    document = allocate(scores([2, 1, 3], [9, 7, 8]), 0.3, scope, allow_empty=allow_empty, seed=4).to_dict()
    gone = [[0, [1]], [1, [1]]] if scope == "layer" else [[0, [0, 1]]]
    rule = [0.3, None, scope, "head", ["heads"], 8, allow_empty]
    assert document == {
        "criterion": "test",
        "ratio": 0.3,
        "target": None,
        "predicted": None,
        "structures": ["heads"],
        "align": 8,
        "rounds": 1,
        "edited": False,
        "channels_per_layer": [],
        "removed_channels": 0,
        "total_channels": 0,
        "channels": {},
        "fingerprint": hashlib.sha256(json.dumps([[gone, []], rule, 1]).encode()).hexdigest()[:16],
        "scope": scope,
        "unit": "head",
        "allow_empty": allow_empty,
        "seed": 4,
        "heads_per_layer": [3, 3],
        "removed_heads": 2,
        "total_heads": 6,
        "heads": {"0": [1], "1": [1]} if scope == "layer" else {"0": [0, 1]},
    }

"""All coalitions at a time: Möbius transform, Shapley values, η and the rest, by definition and by axiom."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.game import (
    coalition_entropies,
    dividends,
    entropies,
    eta,
    eta_from,
    lattice_entropies,
    marginal_contributions,
    marginal_contributions_from,
    mobius,
    mobius_from,
    sampled_shapley_values,
    shapley_values,
    shapley_values_from,
)
from tests.unit.game.reference import LN2, SYMBOLS, arrivals, bits, coalitions_of, dividend, joint, moebius, shapley

ALL = pytest.mark.parametrize("rows", SYMBOLS.values(), ids=SYMBOLS)
TABLES = st.integers(1, 5).flatmap(
    lambda heads: st.lists(st.lists(st.integers(-2, 3), min_size=heads, max_size=heads), min_size=1, max_size=40).map(
        np.array
    )
)


@ALL
def test_everything_equals_its_definition(rows):
    heads = rows.shape[1]
    coalitions = coalitions_of(heads)
    lattice = lattice_entropies(rows)
    expected = [joint(rows, coalition) if coalition else 0.0 for coalition in coalitions]
    assert lattice.tolist() == pytest.approx(expected, abs=1e-12)
    expected = [moebius(rows, coalition) if coalition else 0.0 for coalition in coalitions]
    assert mobius(rows).tolist() == pytest.approx(expected, abs=1e-9)
    values = shapley(rows, heads)
    assert shapley_values(rows).tolist() == pytest.approx(values, abs=1e-9)
    for head in range(heads):
        shares = [dividend(rows, coalition) / len(coalition) for coalition in coalitions if head in coalition]
        assert float(eta(rows)[head]) == pytest.approx(math.fsum(shares), abs=1e-9)
        assert float(eta(rows)[head]) == pytest.approx(2 * joint(rows, [head]) - values[head], abs=1e-9)
        others = [other for other in range(heads) if other != head]
        expected_gain = joint(rows, range(heads)) - (joint(rows, others) if others else 0.0)
        assert float(marginal_contributions(rows)[head]) == pytest.approx(expected_gain, abs=1e-12)
    for result in (lattice, mobius(rows), shapley_values(rows), eta(rows), marginal_contributions(rows)):
        assert result.dtype == torch.float64


@ALL
def test_from_the_lattice_is_the_same(rows):
    lattice = lattice_entropies(rows)
    before = lattice.clone()
    assert torch.equal(mobius_from(lattice), mobius(rows))
    assert torch.equal(shapley_values_from(lattice), shapley_values(rows))
    assert torch.equal(eta_from(lattice), eta(rows))
    assert torch.equal(marginal_contributions_from(lattice), marginal_contributions(rows))
    assert torch.equal(lattice, before)


def test_xor_by_hand():
    """Singles ln 2, everything above 2 ln 2: m = ln 2, 0 and −ln 2; three equal players share 2 ln 2."""
    rows = SYMBOLS["xor"]
    assert lattice_entropies(rows).tolist() == pytest.approx([0, LN2, LN2, 2 * LN2, LN2] + [2 * LN2] * 3)
    assert mobius(rows).tolist() == pytest.approx([0, LN2, LN2, 0, LN2, 0, 0, -LN2], abs=1e-12)
    assert shapley_values(rows).tolist() == pytest.approx([2 / 3 * LN2] * 3)
    assert eta(rows).tolist() == pytest.approx([4 / 3 * LN2] * 3)
    assert marginal_contributions(rows).tolist() == pytest.approx([0] * 3, abs=1e-12)


def test_games_that_are_no_entropies():
    """Glove game: head 0 has a left glove, 1 and 2 right ones; Shapley values ⅔, ⅙, ⅙. Whole numbers are taken."""
    gloves = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])
    assert shapley_values_from(gloves).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert mobius_from(gloves).tolist() == [0, 0, 0, 1, 0, 1, 0, -1]
    assert marginal_contributions_from(gloves).tolist() == [1, 0, 0]
    strided = torch.stack([gloves, gloves], 1)[:, 0]
    assert shapley_values_from(strided).tolist() == shapley_values_from(gloves).tolist()
    assert mobius_from(strided).tolist() == mobius_from(gloves).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=TABLES, data=st.data())
def test_axioms(rows, data):
    heads = rows.shape[1]
    lattice, values, transform = lattice_entropies(rows), shapley_values(rows), mobius(rows)
    # Efficiency: all is shared out. Monotone: no head is worth less than it adds to all others, nor more than alone.
    assert float(values.sum()) == pytest.approx(joint(rows, range(heads)), abs=1e-9)
    assert (values >= marginal_contributions(rows) - 1e-9).all()
    assert (values <= entropies(rows) + 1e-9).all()
    # The transform adds up again: Σ_{B⊆C} m(B) = H(C).
    for place in range(1 << heads):
        inside = [part for part in range(1 << heads) if part & ~place == 0]
        assert float(transform[inside].sum()) == pytest.approx(float(lattice[place]), abs=1e-9)
    # Heads in another order keep their entropies to the bit, and their values.
    order = data.draw(st.permutations(range(heads)))
    moved = [sum(1 << order[head] for head in range(heads) if place >> head & 1) for place in range(1 << heads)]
    assert torch.equal(lattice_entropies(rows[:, order]), lattice[moved])
    assert torch.allclose(shapley_values(rows[:, order]), values[list(order)], rtol=0, atol=1e-12)
    # The labels and the order of observations mean nothing, to the bit.
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert torch.equal(lattice_entropies((-(2**33) * rows + 5)[shuffled]), lattice)
    # Symmetry: a copy of a head has the same value. Null player: a constant one has none and changes nobody's.
    twin = shapley_values(np.concatenate([rows, rows[:, :1]], 1))
    assert float(twin[0]) == pytest.approx(float(twin[-1]), abs=1e-12)
    null = shapley_values(np.concatenate([rows, np.full((len(rows), 1), 4)], 1))
    assert null.tolist() == pytest.approx([*values.tolist(), 0.0], abs=1e-12)


def test_orders_of_dividends_are_slices_of_the_lattice():
    rows = bits(150, 6, 3, seed=21)
    transform = dict(zip(coalitions_of(6), mobius(rows).tolist(), strict=True))
    for order in range(2, 7):
        expected = [-transform[coalition] for coalition in sorted(transform) if len(coalition) == order]
        assert dividends(rows, order).tolist() == pytest.approx(expected, abs=1e-9)


def test_sixteen_heads_and_no_more():
    rows = bits(12, 17, 2, seed=22)
    rows[:, 3] = rows[:, 11]
    lattice = lattice_entropies(rows[:, :16])
    assert lattice.shape == (65536,)
    for place in (0b1000_0000_0000_1001, 0b0000_1000_0000_1000, 65535):
        coalition = [head for head in range(16) if place >> head & 1]
        assert float(lattice[place]) == pytest.approx(joint(rows, coalition), abs=1e-12)
    assert float(shapley_values_from(lattice).sum()) == pytest.approx(float(lattice[-1]))
    for function in (lattice_entropies, mobius, shapley_values, eta):
        with pytest.raises(ValueError, match=r"17 heads .* sampled_shapley_values") as caught:
            function(rows)
        assert "\n" not in str(caught.value)
    assert marginal_contributions(rows).shape == (17,)


@pytest.mark.parametrize("shape", [(0,), (3,), (6,), (2, 2), ()])
@pytest.mark.parametrize("function", [mobius_from, shapley_values_from, eta_from, marginal_contributions_from])
def test_what_is_no_lattice_is_refused(function, shape):
    with pytest.raises(ValueError, match=r"expected one value per coalition, \[2\^heads\]"):
        function(torch.zeros(shape, dtype=torch.float64))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["skewed", "dependent", "random", "negative", "wide"])
def test_sampled_values_are_near_the_exact_ones(name):
    rows = SYMBOLS[name]
    values, errors = sampled_shapley_values(rows, 300, seed=1)
    away = (values - torch.tensor(shapley(rows, rows.shape[1]), dtype=torch.float64)).abs()
    assert (away <= 5 * errors + 1e-9).all()
    assert (errors < 0.05).all()
    assert values.dtype == errors.dtype == torch.float64


def test_standard_errors_are_those_of_the_sampling():
    """A sample's spread over all 5! permutations, by definition, over the root of the number of samples."""
    rows = SYMBOLS["skewed"][:80]
    added = {order: arrivals(rows, order) for order in permutations(range(5))}
    spread = [np.std([(added[o][head] + added[o[::-1]][head]) / 2 for o in added]) for head in range(5)]
    errors = sampled_shapley_values(rows, 400, seed=2)[1]
    assert errors.tolist() == pytest.approx([value / 20 for value in spread], rel=0.15)
    more = sampled_shapley_values(rows, 1600, seed=3)[1]
    assert more.tolist() == pytest.approx([value / 40 for value in spread], rel=0.1)


def test_every_sample_shares_out_everything():
    for permutations_, seed in ((2, 0), (3, 1), (65, 2), (130, 3)):  # also beyond one block
        values, _ = sampled_shapley_values(SYMBOLS["dependent"], permutations_, seed)
        assert float(values.sum()) == pytest.approx(joint(SYMBOLS["dependent"], range(5)), abs=1e-12)


def test_two_heads_and_one_leave_nothing_to_chance():
    """A permutation of two heads and its reverse are all there are."""
    for name in ("single", "couple"):
        values, errors = sampled_shapley_values(SYMBOLS[name], 5, seed=0)
        assert values.tolist() == pytest.approx(shapley(SYMBOLS[name], SYMBOLS[name].shape[1]), abs=1e-12)
        assert errors.abs().max().item() < 1e-12


def test_any_number_of_heads_can_be_sampled():
    """40 heads, of which 0 and 1 are copies, 2 is constant and the others are few bits: symmetry, null player, truth.

    Head 3 is independent of all others by design, so its value is its entropy.
    """
    design = np.array([[a, b] for a in range(64) for b in range(3)])
    masks = np.random.default_rng(5).integers(1, 64, 40)
    rows = np.stack([design[:, 0] & mask for mask in masks], 1)
    rows[:, 1], rows[:, 2], rows[:, 3] = rows[:, 0], 7, design[:, 1]
    values, errors = sampled_shapley_values(rows, 60, seed=4)
    assert float(values[3]) == pytest.approx(math.log(3), abs=1e-9)
    assert float(errors[3]) == pytest.approx(0, abs=1e-9)
    assert values[2] == errors[2] == 0
    assert float((values[0] - values[1]).abs()) <= 5 * float(errors[0] + errors[1])
    assert float(values.sum()) == pytest.approx(math.log(192), abs=1e-9)


def test_the_seed_decides():
    rows = SYMBOLS["dependent"]
    first, again, other = (sampled_shapley_values(rows, 20, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("permutations_", [-1, 0, 1])
def test_one_sample_has_no_standard_error(permutations_):
    with pytest.raises(ValueError, match=f"permutations is {permutations_}; expected at least 2"):
        sampled_shapley_values(SYMBOLS["random"], permutations_, 0)


def test_hundreds_of_columns_do_not_exhaust_the_stack():
    """Columns of many layers side by side: two joint symbols only, so that no observation is ever alone."""
    rows = np.tile(np.array([[0], [1]] * 3), (1, 1500))
    assert coalition_entropies(rows, [range(1500)]).item() == pytest.approx(LN2)

"""Entropies, dividends and values on bare arrays, against a second implementation by dictionary and against axioms."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.game import (
    coalition_dividends,
    coalition_entropies,
    dividends,
    entropies,
    pair_dividends,
    pair_entropies,
    phi,
    phi_from,
    second_order,
    second_order_from,
    third_order,
    third_order_from,
    triple_dividends,
    triple_entropies,
)
from compressor.game.entropy import plugin_entropy
from compressor.game.estimators import ESTIMATORS
from tests.unit.game.reference import (
    LN2,
    SYMBOLS,
    bits,
    coalitions_of,
    counts_of,
    dividend,
    joint,
    shapley,
)

ALL = pytest.mark.parametrize("rows", SYMBOLS.values(), ids=SYMBOLS)
FORMS = pytest.mark.parametrize(
    "form", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"]
)


@ALL
@FORMS
def test_everything_equals_the_dictionary_implementation(rows, form):
    heads = rows.shape[1]
    symbols = form(rows)
    singles = [joint(rows, [head]) for head in range(heads)]
    pairs = {pair: joint(rows, pair) for pair in combinations(range(heads), 2)}
    triples = list(combinations(range(heads), 3))
    assert entropies(symbols).tolist() == pytest.approx(singles, abs=1e-12)
    matrix, dividends = pair_entropies(symbols), pair_dividends(symbols)
    assert matrix.shape == dividends.shape == (heads, heads)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(dividends, dividends.T)
    assert matrix.diagonal().tolist() == pytest.approx(singles, abs=1e-12)
    assert dividends.diagonal().eq(0).all()
    for i, j in combinations(range(heads), 2):
        assert float(matrix[i, j]) == pytest.approx(pairs[i, j], abs=1e-12)
        assert float(dividends[i, j]) == pytest.approx(dividend(rows, (i, j)), abs=1e-11)
    assert triple_entropies(symbols).tolist() == pytest.approx([joint(rows, triple) for triple in triples], abs=1e-12)
    assert triple_dividends(symbols).tolist() == pytest.approx(
        [dividend(rows, triple) for triple in triples], abs=1e-11
    )
    expected = [
        singles[i] + sum(singles[i] + singles[j] - pairs[min(i, j), max(i, j)] for j in range(heads) if j != i) / 2
        for i in range(heads)
    ]
    assert phi(symbols).tolist() == pytest.approx(expected, abs=1e-11)
    for result in (entropies(symbols), matrix, dividends, triple_dividends(symbols), phi(symbols)):
        assert result.dtype == torch.float64


def test_xor_is_pure_synergy():
    """H = ln 2 each, 2 ln 2 for any two and for all three: Δ = −(3 − 6 + 2) ln 2 = ln 2; no pair has a share."""
    rows = SYMBOLS["xor"]
    assert entropies(rows).tolist() == pytest.approx([LN2] * 3)
    assert pair_dividends(rows).abs().max().item() == pytest.approx(0, abs=1e-12)
    assert triple_dividends(rows).tolist() == pytest.approx([LN2])
    assert phi(rows).tolist() == pytest.approx([LN2] * 3)


def test_copies_are_pure_redundancy():
    """I = H for every pair; Δ = −(3H − 3H + H) = −H; φ = H + ½ · 2H = 2H."""
    rows = SYMBOLS["copies"]
    entropy = joint(rows, [0])
    assert pair_dividends(rows)[0].tolist() == pytest.approx([0, entropy, entropy])
    assert triple_dividends(rows).tolist() == pytest.approx([-entropy])
    assert phi(rows).tolist() == pytest.approx([2 * entropy] * 3)


def test_constant_heads_are_worth_exactly_nothing():
    rows = SYMBOLS["constant"]
    assert entropies(rows).tolist() == [0.0] * 3
    assert pair_dividends(rows).eq(0).all()
    assert triple_dividends(rows).tolist() == [0.0]
    assert phi(rows).tolist() == [0.0] * 3


def test_a_full_factorial_design_is_independent():
    """Every combination once: entropies are ln of the alphabets and add up; no dividend above size one."""
    rows = SYMBOLS["independent"]
    assert entropies(rows).tolist() == pytest.approx([math.log(3), math.log(4), math.log(2)])
    assert triple_entropies(rows).tolist() == pytest.approx([math.log(24)])
    assert pair_dividends(rows).abs().max().item() < 1e-12
    assert triple_dividends(rows).tolist() == pytest.approx([0], abs=1e-12)


@pytest.mark.parametrize("observations", [2, 3, 500, 777])
def test_unique_symbols_give_ln_n_exactly(observations):
    """The paper's 500 examples: all entropies are ln 500 = 6.2146, every triple dividend −ln 500."""
    generator = np.random.default_rng(0)
    rows = np.stack([generator.permutation(observations) for _ in range(4)], 1)
    ceiling = torch.tensor(float(observations), dtype=torch.float64).log()
    assert entropies(rows).eq(ceiling).all()
    assert pair_entropies(rows).eq(ceiling).all()
    assert triple_entropies(rows).eq(ceiling).all()
    assert pair_dividends(rows)[0, 1:].eq(ceiling).all()
    assert triple_dividends(rows).tolist() == pytest.approx([-math.log(observations)] * 4, abs=1e-12)


def test_triples_come_in_lexicographic_order():
    """Heads 0, 2 and 4 are an XOR among independent bits; only their triple is synergetic."""
    design = np.array([[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
    rows = np.stack([design[:, 0], design[:, 1], design[:, 2], design[:, 3], design[:, 0] ^ design[:, 2]], 1)
    found = dict(zip(combinations(range(5), 3), triple_dividends(rows).tolist(), strict=True))
    assert found.pop((0, 2, 4)) == pytest.approx(LN2)
    assert max(map(abs, found.values())) < 1e-12


@pytest.mark.parametrize("name", ["xor", "copies", "random", "skewed", "dependent", "couple"])
def test_eta_is_twice_the_entropy_minus_the_shapley_value(name):
    """η_i = Σ_{B∋i} Δ(B)/|B| = 2·H_i − Sh_i with the paper's signs; orders above three by the dictionary."""
    rows = SYMBOLS[name]
    heads = rows.shape[1]
    singles, pairs = entropies(rows), pair_dividends(rows)
    triples = dict(zip(combinations(range(heads), 3), triple_dividends(rows).tolist(), strict=True))
    values = shapley(rows, heads)
    assert math.fsum(values) == pytest.approx(joint(rows, range(heads)))  # efficiency: the brute force is sane
    for head in range(heads):
        eta = float(singles[head]) + float(pairs[head].sum()) / 2
        eta += sum(value for triple, value in triples.items() if head in triple) / 3
        for size in range(4, heads + 1):
            eta += sum(dividend(rows, part) for part in combinations(range(heads), size) if head in part) / size
        assert eta == pytest.approx(2 * float(singles[head]) - values[head], abs=1e-10)


@ALL
def test_coalitions_of_every_size_equal_the_dictionary_implementation(rows):
    heads = rows.shape[1]
    coalitions = coalitions_of(heads)[::-1]
    found = coalition_entropies(torch.from_numpy(rows), coalitions)
    expected = [joint(rows, coalition) if coalition else 0.0 for coalition in coalitions]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.dtype == torch.float64
    shares = [dividend(rows, coalition) if coalition else 0.0 for coalition in coalitions]
    assert coalition_dividends(rows, coalitions).tolist() == pytest.approx(shares, abs=1e-9)
    for order in range(1, heads + 2):
        expected = [dividend(rows, coalition) for coalition in combinations(range(heads), order)]
        assert dividends(rows, order).tolist() == pytest.approx(expected, abs=1e-9)
        assert dividends(rows, order).shape == (math.comb(heads, order),)


@ALL
def test_values_truncated_at_orders_two_and_three(rows):
    heads = rows.shape[1]
    for head in range(heads):
        single = joint(rows, [head])
        pairs = math.fsum(dividend(rows, pair) for pair in combinations(range(heads), 2) if head in pair)
        triples = math.fsum(dividend(rows, triple) for triple in combinations(range(heads), 3) if head in triple)
        assert float(second_order(rows)[head]) == pytest.approx(single - pairs / 2, abs=1e-9)
        assert float(third_order(rows)[head]) == pytest.approx(single + pairs / 2 + triples / 3, abs=1e-9)
    matrix, triples = pair_entropies(rows), triple_entropies(rows)
    assert torch.equal(phi_from(matrix), phi(rows))
    assert torch.equal(second_order_from(matrix), second_order(rows))
    assert torch.equal(third_order_from(matrix, triples), third_order(rows))


def test_coalitions_are_sets_in_any_form_and_number():
    rows = SYMBOLS["skewed"]
    assert coalition_entropies(rows, []).shape == coalition_dividends(rows, []).shape == (0,)
    forms = [(0, 3, 4), [4, 0, 3], np.array([3, 4, 0]), range(5), (0, 3, 4), (), (2,)]
    found = coalition_entropies(rows, forms)
    expected = [joint(rows, [int(head) for head in form]) if len(form) else 0.0 for form in forms]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found[0] == found[1] == found[2] == found[4]
    assert torch.equal(coalition_entropies(rows, iter(forms)), found)
    shares = coalition_dividends(rows, iter(forms))
    assert shares[0] == shares[1] == shares[2] == shares[4]


def test_coalitions_reach_across_layers():
    """Heads 0 and 1 of one layer with head 0 of another, which is their sum, the columns side by side."""
    first, second = bits(500, 3, 4, seed=13), bits(500, 2, 4, seed=14)
    second[:, 0] = first[:, 0] + first[:, 1]
    both = np.concatenate([first, second], 1)
    assert float(coalition_entropies(both, [(0, 1, 3)])[0]) == pytest.approx(joint(first, (0, 1)), abs=1e-12)
    assert float(coalition_dividends(both, [(0, 1, 3)])[0]) == pytest.approx(dividend(both, (0, 1, 3)), abs=1e-9)


@pytest.mark.parametrize("function", [coalition_entropies, coalition_dividends])
@pytest.mark.parametrize("coalition", [(0, 3), (-1, 0), (1, 1), (99,)])
def test_coalitions_of_what_there_is_not_are_refused(function, coalition):
    with pytest.raises(ValueError, match="expected different columns from 0 to 2") as caught:
        function(bits(20, 3, 2, seed=0), [(0,), coalition])
    assert str(list(coalition)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dividends_of_too_many_are_refused():
    rows = bits(20, 17, 2, seed=0)
    with pytest.raises(ValueError, match="at most 16"):
        coalition_dividends(rows, [range(17)])
    for order in (-1, 0, 17):
        with pytest.raises(ValueError, match=f"order is {order}; expected 1 to 16"):
            dividends(rows, order)
    assert dividends(rows, 1).tolist() == pytest.approx(entropies(rows).tolist())
    assert coalition_entropies(rows, [range(17)]).item() == pytest.approx(joint(rows, range(17)))


def test_another_estimator_goes_through_every_order(monkeypatch):
    rows = SYMBOLS["skewed"]
    monkeypatch.setitem(ESTIMATORS, "distinct", lambda counts, multiplicity: float(multiplicity.sum()))
    coalitions = coalitions_of(5)[1:]
    expected = [len(counts_of(rows, coalition)) for coalition in coalitions]
    assert coalition_entropies(rows, coalitions, estimator="distinct").tolist() == expected


def test_phi_is_eta_where_there_are_but_two_heads():
    rows = SYMBOLS["couple"]
    expected = [2 * joint(rows, [head]) - value for head, value in enumerate(shapley(rows, 2))]
    assert phi(rows).tolist() == pytest.approx(expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_axioms(data):
    heads = data.draw(st.integers(2, 5))
    observations = data.draw(st.integers(1, 40))
    alphabet = data.draw(st.integers(1, 6))
    row = st.lists(st.integers(0, alphabet - 1), min_size=heads, max_size=heads)
    rows = np.array(data.draw(st.lists(row, min_size=observations, max_size=observations)))
    order = data.draw(st.permutations(range(heads)))
    singles, pairs, values = entropies(rows), pair_entropies(rows), phi(rows)
    # Symmetry: heads in another order have the same values.
    assert torch.allclose(phi(rows[:, order]), values[list(order)], rtol=0, atol=1e-12)
    # Null player: a constant head is worth nothing and changes nobody's value.
    with_null = np.concatenate([rows, np.full((observations, 1), 9)], 1)
    assert phi(with_null).tolist() == pytest.approx([*values.tolist(), 0.0], abs=1e-12)
    # Truncations bound one another: with two heads the second order is the Shapley value.
    if heads == 2:
        assert second_order(rows).tolist() == pytest.approx(shapley(rows, 2), abs=1e-12)
    # The labels and the order of observations mean nothing, to the bit.
    relabelled = (-17 * rows + 5)[np.random.default_rng(0).permutation(observations)]
    assert torch.equal(pair_entropies(relabelled), pairs)
    # Bounds: max(H_i, H_j) ≤ H_ij ≤ H_i + H_j, so 0 ≤ I; and H ≤ ln of the alphabet and of the sample.
    assert (pairs >= torch.maximum(singles[:, None], singles) - 1e-12).all()
    assert (pair_dividends(rows) >= -1e-12).all()
    assert (singles <= math.log(min(alphabet, observations)) + 1e-12).all()
    assert (singles >= 0).all()


def test_numpy_agrees_on_a_larger_sample():
    rows = np.random.default_rng(11).zipf(1.5, (4000, 4)).clip(max=300)
    for index, coalition in enumerate(combinations(range(4), 3)):
        counts = np.unique(rows[:, coalition], axis=0, return_counts=True)[1] / len(rows)
        assert float(triple_entropies(rows)[index]) == pytest.approx(-(counts * np.log(counts)).sum(), abs=1e-12)


def test_alphabets_whose_product_overflows_32_bits_do_not_collide():
    """Every pair (a, b) is unique, but a · 2¹⁷ + b and (a + 2¹⁵) · 2¹⁷ + b are equal in 32 bits."""
    index = np.arange(2**17)
    left = np.concatenate([index % 2**16, index[: 2**15] + 2**15])
    right = np.concatenate([index, index[: 2**15]])
    rows = np.stack([left, right, right[::-1]], 1)
    ceiling = math.log(2**17 + 2**15)
    assert float(pair_entropies(rows)[0, 1]) == pytest.approx(ceiling, abs=1e-12)
    assert float(triple_entropies(rows)[0]) == pytest.approx(ceiling, abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([1, 1], LN2),
        ([3, 1], 2 * LN2 - 0.75 * math.log(3)),
        ([5, 0, 0], 0.0),
        ([0, 0], 0.0),
        ([1] * 500, math.log(500)),
        ([10**12, 10**12], LN2),
    ],
)
def test_plugin_entropy_of_counts(counts, entropy):
    assert plugin_entropy(torch.tensor(counts)).item() == pytest.approx(entropy, abs=1e-12)
    assert plugin_entropy(torch.tensor([[counts, counts[::-1]]])).shape == (1, 2)


def test_entropies_never_fall_below_zero():
    """Rounding must not make a constant symbol worth less than nothing."""
    for count in range(1, 2000):
        assert plugin_entropy(torch.tensor([count])).item() >= 0

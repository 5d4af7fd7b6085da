"""The shuffle null against every permutation there is, heads with known ties, and confounds it should see through."""

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from compressor.game import triple_dividends
from compressor.game.shuffling import shuffle_null, verdicts

TRIPLE = [(0, 1, 2)]


def dividend(table) -> float:
    return float(triple_dividends(table)[0])


def enumerated(table, orders) -> tuple[float, float]:
    """Excess and p by all the orders a head's symbols can come in, the observed one among them."""
    observed = dividend(table)
    excesses, p_values = [], []
    for head in range(3):
        null = []
        for order in orders:
            shuffled = table.copy()
            shuffled[:, head] = table[list(order), head]
            null.append(dividend(shuffled))
        centre = math.fsum(null) / len(null)
        excesses.append(observed - centre)
        p_values.append(np.mean([abs(value - centre) >= abs(observed - centre) - 1e-9 for value in null]))
    agree = len({math.copysign(1, value) for value in excesses}) == 1 and min(map(abs, excesses)) > 1e-9
    return (min(excesses, key=abs) if agree else 0.0), max(p_values)


def within(groups) -> list[list[int]]:
    """All orders that exchange observations only within their groups."""
    orders = []
    for parts in product(*(permutations(group) for group in groups)):
        order = list(range(sum(map(len, groups))))
        for group, part in zip(groups, parts, strict=True):
            for place, source in zip(group, part, strict=True):
                order[place] = source
        orders.append(order)
    return orders


XOR = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
COPIES = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 0, 0], [1, 1, 1], [1, 1, 0]])
MIXED = np.random.default_rng(8).integers(0, 2, (12, 3))


@pytest.mark.parametrize(
    ("table", "groups", "settings"),
    [
        (XOR, [range(6)], {}),
        (COPIES, [range(6)], {}),
        (COPIES, [[0, 2, 4], [1, 3, 5]], {"strata": [5, -1, 5, -1, 5, -1]}),
        (MIXED, [[0, 1, 2, 3], [4, 5, 6], [7, 8], [9], [10, 11]], {"strata": [0] * 4 + [1] * 3 + [2] * 2 + [3, 4, 4]}),
    ],
    ids=["xor", "copies", "two strata", "five strata"],
)
def test_shuffles_are_a_fair_sample_of_all_permutations(table, groups, settings):
    found = shuffle_null(table, TRIPLE, 2000, seed=0, **settings)
    excess, p_value = enumerated(table, within(groups))
    assert found.dividend[0] == pytest.approx(dividend(table), abs=1e-12)
    assert found.excess[0] == pytest.approx(excess, abs=0.02)
    assert found.p_value[0] == pytest.approx(p_value, abs=0.04)


def whole_documents(count: int, tokens: int) -> np.ndarray:
    symbols = np.random.default_rng(3).integers(0, 3, (count, tokens, 3))
    symbols[..., 2] = (symbols[..., 0] + symbols[..., 1]) % 3
    return symbols.reshape(count * tokens, 3)


def test_documents_swap_their_symbols_as_wholes_and_turn():
    """Three documents of four tokens: all 6 orders of documents and all 4³ rotations."""
    table = whole_documents(3, 4)
    turned = [np.roll(np.arange(4), turn) for turn in range(4)]
    orders = [
        np.concatenate([4 * document + turned[turn] for document, turn in zip(order, turns, strict=True)])
        for order in permutations(range(3))
        for turns in product(range(4), repeat=3)
    ]
    found = shuffle_null(table, TRIPLE, 2000, seed=0, examples=np.repeat([9, 3, 4], 4))
    excess, p_value = enumerated(table, orders)
    assert found.excess[0] == pytest.approx(excess, abs=0.02)
    assert found.p_value[0] == pytest.approx(p_value, abs=0.04)


def test_within_places_documents_swap_their_symbols_as_wholes():
    """Five documents of four tokens: all 120 orders of documents, tokens staying in their places."""
    table, places = whole_documents(5, 4), np.tile(np.arange(4), 5)
    orders = [np.arange(20).reshape(5, 4)[list(order)].reshape(20) for order in permutations(range(5))]
    found = shuffle_null(table, TRIPLE, 2000, seed=0, strata=places, examples=np.repeat([9, 3, 4, 1, 7], 4))
    excess, p_value = enumerated(table, orders)
    assert found.excess[0] == pytest.approx(excess, abs=0.02)
    assert found.p_value[0] == pytest.approx(p_value, abs=0.04)
    mixed = np.random.default_rng(4).permutation(20)  # whatever order the observations come in, with a place for each
    again = shuffle_null(
        table[mixed], TRIPLE, 2000, seed=0, strata=places[mixed], examples=np.repeat(range(5), 4)[mixed]
    )
    assert again.excess[0] == pytest.approx(excess, abs=0.02)


def test_xor_is_positive_and_copies_are_negative():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 2, (2, 400))
    copy = generator.integers(0, 5, 400)
    table = np.stack([first, second, first ^ second, copy, copy, copy], axis=1)
    found = shuffle_null(table, [(0, 1, 2), (3, 4, 5), (0, 1, 3)], 39, seed=0)
    assert found.excess[0] == pytest.approx(math.log(2), abs=0.02)
    assert found.excess[1] == pytest.approx(-math.log(5), abs=0.05)
    assert found.p_value[:2].tolist() == [1 / 40, 1 / 40]
    assert found.p_value[2] > 0.05
    assert verdicts(found.excess, found.p_value) == {"negative": 1, "undecided": 1, "positive": 1}


def test_a_tie_of_two_heads_is_no_tie_of_three():
    """To shuffle all heads at once would make the dividend's bias look like synergy or redundancy."""
    generator = np.random.default_rng(1)
    tied, third = generator.integers(0, 6, (2, 500))
    found = shuffle_null(np.stack([tied, tied, third], axis=1), TRIPLE, 39, seed=0)
    assert found.p_value[0] > 0.1
    assert abs(found.excess[0]) < 0.02


def test_independent_heads_are_seldom_significant():
    """p is that of the least remarkable head: at most 5 % fall to 0.05, and the mean is above a uniform's half."""
    found = []
    for seed in range(100):
        table = np.random.default_rng(seed).integers(0, 4, (150, 3))
        found.append(shuffle_null(table, TRIPLE, 19, seed).p_value[0])
    assert np.mean(np.array(found) <= 0.05) <= 0.05
    assert 0.5 < np.mean(found) < 0.85
    assert len(set(found)) > 10


@pytest.mark.parametrize(("observations", "sign"), [(60, -1), (4000, 1)])
def test_the_estimators_bias_is_no_finding(observations, sign):
    """40 symbols: the plug-in dividend of independent heads is far from 0, of a sign that N decides."""
    table = np.random.default_rng(2).integers(0, 40, (observations, 3))
    found = shuffle_null(table, TRIPLE, 19, seed=0)
    assert sign * found.dividend[0] > 0.7
    assert abs(found.excess[0]) < 0.03
    assert found.p_value[0] > 0.05


def test_saturated_entropies_are_no_finding():
    """Where every symbol is unique the dividend is −ln N whatever is shuffled."""
    table = np.random.default_rng(0).permuted(np.tile(np.arange(300)[:, None], 3), axis=0)
    found = shuffle_null(table, TRIPLE, 9, seed=0)
    assert found.dividend[0] == pytest.approx(-math.log(300), abs=1e-12)
    assert (found.excess[0], found.p_value[0]) == (0.0, 1.0)


def test_ties_by_position_alone_go_with_strata():
    """Heads choose between the previous and the first token by coins of their own."""
    generator = np.random.default_rng(3)
    position = np.tile(np.arange(1, 13), 80)
    table = np.where(generator.random((len(position), 3)) < 0.5, position[:, None] - 1, 0)
    plain = shuffle_null(table, TRIPLE, 39, seed=0)
    assert plain.excess[0] < -0.1
    assert plain.p_value[0] == 1 / 40
    stratified = shuffle_null(table, TRIPLE, 39, seed=0, strata=position)
    assert stratified.p_value[0] > 0.05
    assert abs(stratified.excess[0]) < 0.02
    tied = table.copy()  # while a tie beyond the position stays one
    tied[:, 2] = np.where((tied[:, 0] > 0) ^ (tied[:, 1] > 0), position - 1, 0)
    assert shuffle_null(tied, TRIPLE, 39, seed=0, strata=position).p_value[0] == 1 / 40


def lingering(seed: int, documents: int = 40, heads: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Independent heads that mostly repeat their last symbol, in documents of unequal lengths."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 60, documents)
    moves = generator.random((lengths.sum(), heads)) < 0.1
    moves[np.cumsum(lengths) - lengths] = True
    latest = np.maximum.accumulate(np.where(moves, np.arange(len(moves))[:, None], 0), axis=0)
    symbols = np.take_along_axis(generator.integers(0, 3, moves.shape), latest, axis=0)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return symbols, np.repeat(np.arange(documents), lengths), positions


def test_heads_that_linger_look_tied_unless_documents_travel_as_wholes():
    by_token, by_document = [], []
    for seed in range(60):
        symbols, examples, positions = lingering(seed)
        by_token.append(shuffle_null(symbols, TRIPLE, 19, seed, strata=positions).p_value[0])
        by_document.append(shuffle_null(symbols, TRIPLE, 19, seed, strata=positions, examples=examples).p_value[0])
    assert np.mean(np.array(by_token) <= 0.05) > 0.7
    assert np.mean(np.array(by_document) <= 0.05) <= 0.07
    symbols, examples, positions = lingering(0)
    symbols[:, 2] = (symbols[:, 0] + symbols[:, 1]) % 3
    found = shuffle_null(symbols, TRIPLE, 19, seed=0, strata=positions, examples=examples)
    assert found.p_value[0] == 0.05
    assert found.excess[0] > 0.5


@pytest.mark.parametrize("settings", [{"examples": [4] * 12, "strata": [0] * 12}, {"strata": range(12)}])
def test_where_nothing_can_move_nothing_is_found(settings):
    found = shuffle_null(MIXED, TRIPLE, 9, seed=0, **{name: np.array(value) for name, value in settings.items()})
    assert (found.excess[0], found.p_value[0]) == (0.0, 1.0)


@pytest.mark.parametrize("documents", range(6, 18))
def test_swapping_documents_that_share_no_symbol_changes_nothing(documents):
    """Heads that only tell documents apart: whoever swaps, the same counts come in another order. All is a tie."""
    generator = np.random.default_rng(documents)
    examples = np.repeat(np.arange(documents), 101)
    table = np.stack([np.minimum(generator.geometric(0.1, len(examples)), 30), examples, examples], axis=1)
    found = shuffle_null(table, TRIPLE, 9, seed=0, examples=examples)
    assert (found.excess[0], found.p_value[0]) == (0.0, 1.0)


def test_one_shuffle_tells_nothing():
    """Two numbers lie equally far from their mean."""
    table = np.random.default_rng(0).integers(0, 4, (101, 3))
    assert shuffle_null(table, TRIPLE, 1, seed=0).p_value[0] == 1.0


def test_constant_heads_are_undecided():
    table = np.random.default_rng(0).integers(0, 3, (50, 3))
    table[:, 1] = 7
    found = shuffle_null(table, TRIPLE, 9, seed=0)
    assert (found.excess[0], found.p_value[0]) == (0.0, 1.0)


@pytest.mark.parametrize("alphabet", [2, 9, 60])
def test_dividends_are_the_games_and_each_triple_stands_for_itself(alphabet):
    table = np.random.default_rng(alphabet).integers(-1, alphabet, (200, 5))
    triples = list(combinations(range(5), 3))
    found = shuffle_null(table, triples, 6, seed=5)
    assert np.abs(found.dividend - triple_dividends(table).numpy()).max() < 1e-12
    alone = [shuffle_null(torch.from_numpy(table), [(k, i, j)], 6, seed=5) for i, j, k in triples]
    assert found.excess == pytest.approx([one.excess[0] for one in alone], abs=1e-12)
    assert found.p_value.tolist() == [one.p_value[0] for one in alone]
    again = shuffle_null(table, triples, 6, seed=5)
    assert np.array_equal(again.excess, found.excess)
    assert not np.array_equal(shuffle_null(table, triples, 6, seed=6).excess, found.excess)
    none = shuffle_null(table, [], 6, seed=5)
    assert none.dividend.shape == none.excess.shape == none.p_value.shape == (0,)


def test_verdicts_of_the_example_of_benjamini_and_hochberg():
    """Their fifteen p-values, section 3.2: the four smallest are decided at 0.05, Bonferroni would decide three."""
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.324,
        0.4262,
        0.5719,
        0.6528,
        0.759,
        1,
    ]
    order = np.random.default_rng(0).permutation(15)
    signs = np.array([-1, 1, -1, -1] + [1] * 11)
    assert verdicts(signs[order], np.array(p)[order]) == {"negative": 3, "undecided": 11, "positive": 1}
    assert verdicts(np.zeros(15), p) == {"negative": 0, "undecided": 15, "positive": 0}
    assert verdicts(np.ones(20), [0.05] * 20) == {"negative": 0, "undecided": 0, "positive": 20}
    assert verdicts(np.ones(20), [0.05] * 19 + [0.06])["undecided"] == 20
    assert verdicts([], []) == {"negative": 0, "undecided": 0, "positive": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shuffle_null(MIXED, TRIPLE, 0, 0), "shuffles is 0; expected at least 1"),
        (lambda: shuffle_null(MIXED, [(0, 1, 1)], 3, 0), r"a triple is \(0, 1, 1\); expected three different heads"),
        (lambda: shuffle_null(MIXED, [(0, 1, 3)], 3, 0), "heads from 0 to 2"),
        (lambda: shuffle_null(MIXED, [(0, 1)], 3, 0), "three different heads"),
        (lambda: shuffle_null(MIXED, TRIPLE, 3, 0, strata=np.zeros(5, int)), "strata are int64"),
        (lambda: shuffle_null(MIXED, TRIPLE, 3, 0, examples=np.zeros(12)), "examples are float64"),
        (lambda: shuffle_null(MIXED[:0], TRIPLE, 3, 0), "expected integers"),
        (lambda: verdicts([1.0, 2.0], [0.1]), "one for each dividend"),
        (lambda: verdicts([1.0], [0.1], level=0), "level is 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

"""Accumulated counts against one pass over bare arrays: bit for bit, however the observations arrive."""

import copy
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.game import counts, pair_entropies
from compressor.game.counts import DensePairs, PairHistogram, PairStatistics, SparsePairs, pair_statistics
from compressor.game.estimators import ESTIMATORS
from tests.unit.game.reference import counts_of, joint

ALPHABET = 9
BOTH = pytest.mark.parametrize("kind", [DensePairs, SparsePairs])


def symbols(observations: int, heads: int, seed: int = 0) -> torch.Tensor:
    """Skewed and dependent, so that neither all counts nor all heads are alike."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, 4, (observations, heads), generator=generator)
    shared = torch.randint(0, 6, (observations, 1), generator=generator)
    return torch.where(torch.rand(observations, heads, generator=generator) < 0.5, own, own + shared)


def filled(metric, parts):
    for part in parts:
        metric.update(part)
    return metric


def same(left: PairStatistics, right: PairStatistics) -> bool:
    """Bit for bit."""
    assert left.entropies.dtype == left.coverage.dtype == torch.float64
    assert left.entropies.shape == right.entropies.shape
    equal = torch.equal(left.entropies, right.entropies) and torch.equal(left.coverage, right.coverage)
    return equal and left.observations == right.observations


def table_of(metric: PairHistogram) -> np.ndarray:
    """Counts [pairs, alphabet, alphabet], however they are kept."""
    metric.compute()
    if isinstance(metric, DensePairs):
        return metric.pairs.numpy().reshape(-1, metric.alphabet, metric.alphabet)
    table = np.zeros((len(metric.pairs_of_heads), metric.alphabet, metric.alphabet), dtype=np.int64)
    (codes,), (found,) = metric.codes, metric.counts
    assert (np.diff(codes) > 0).all()
    assert (found > 0).all()
    table.reshape(-1)[codes] = found
    return table


# --- the same numbers every way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("observations", [1, 2, 257])
def test_dense_sparse_and_bare_arrays_give_the_same_bits(heads, observations):
    rows = symbols(observations, heads)
    after = pair_statistics(rows)
    assert torch.equal(after.entropies, pair_entropies(rows.numpy()))
    assert after.observations == observations
    for dense in (True, False):
        metric = PairHistogram.of(heads, ALPHABET, dense=dense)
        assert isinstance(metric, DensePairs if dense else SparsePairs)
        assert same(filled(metric, [rows]).statistics(), after)


@BOTH
def test_entropies_and_coverage_are_those_of_a_dictionary(kind):
    rows = symbols(150, 3)
    found = filled(kind(3, ALPHABET), rows.split(40)).statistics()
    for i, j in combinations_with_replacement(range(3), 2):
        once = sum(count == 1 for count in counts_of(rows, {i, j}).values())
        for a, b in ((i, j), (j, i)):
            assert found.entropies[a, b].item() == pytest.approx(joint(rows, {i, j}), abs=1e-13)
            assert found.coverage[a, b].item() == pytest.approx(1 - once / 150, abs=1e-13)
    assert found.coverage.min() < 1


@BOTH
def test_counts_are_those_of_numpy(kind):
    rows = symbols(300, 3)
    table = table_of(filled(kind(3, ALPHABET), rows.split(70)))
    for histogram, (i, j) in zip(table, combinations_with_replacement(range(3), 2), strict=True):
        expected = np.histogram2d(rows[:, i], rows[:, j], bins=ALPHABET, range=[[0, ALPHABET], [0, ALPHABET]])[0]
        assert np.array_equal(histogram, expected)
        if i == j:
            assert np.array_equal(histogram.diagonal(), np.bincount(rows[:, i], minlength=ALPHABET))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 120), max_size=5),
    seed=st.integers(0, 5),
    patience=st.sampled_from([1, 7, 50, 1 << 15]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_into_batches_in_any_order_gives_the_same_bits(heads, cuts, seed, patience, order):
    rows = symbols(120, heads, seed)
    bounds = [0, *sorted(cuts), 120]
    parts = [rows[start:stop] for start, stop in pairwise(bounds)]  # some are empty
    order.shuffle(parts)
    expected = pair_statistics(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "FOLDED", patience)
        for kind in (DensePairs, SparsePairs):
            assert same(filled(kind(heads, ALPHABET), parts).statistics(), expected)


@BOTH
def test_observations_do_not_pile_up(kind, monkeypatch):
    """Whenever there are enough they are counted; sparse counts wait until the merging is worth it."""
    monkeypatch.setattr(counts, "FOLDED", 32)
    metric, waiting = kind(2, ALPHABET), []
    for part in symbols(3000, 2).split(10):
        metric.update(part)
        waiting.append(sum(map(len, metric.pending)))
    assert max(waiting) < 32 + ALPHABET**2
    assert waiting.count(0) > 20


@BOTH
@pytest.mark.parametrize("name", ESTIMATORS)
def test_other_estimators(kind, name):
    rows = symbols(200, 3)
    found = filled(kind(3, ALPHABET, name), rows.split(60)).statistics()
    assert same(found, pair_statistics(rows, name))
    assert torch.equal(found.entropies, pair_entropies(rows, estimator=name))
    assert torch.equal(found.coverage, pair_statistics(rows).coverage)
    assert torch.equal(found.entropies, pair_entropies(rows)) == (name == "plug-in")


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_symbols_do_not_overflow(kind, dtype):
    rows = torch.tensor([[199, 198], [0, 199], [199, 198], [7, 0]])
    assert same(filled(kind(2, 200), [rows.to(dtype)]).statistics(), pair_statistics(rows))


# --- devices --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("folded", [False, True], ids=["pending", "counted"])
def test_merging_devices_equals_one_pass(kind, folded, monkeypatch):
    if folded:
        monkeypatch.setattr(counts, "FOLDED", 1)
    rows = symbols(200, 3)
    one, other = filled(kind(3, ALPHABET), [rows[:70]]), filled(kind(3, ALPHABET), [rows[70:150], rows[150:]])
    one.merge_state(other)
    assert same(one.statistics(), pair_statistics(rows))
    assert same(other.statistics(), pair_statistics(rows[70:]))


@BOTH
@pytest.mark.parametrize("idle", [0, 1])
def test_a_device_that_saw_nothing_adds_nothing(kind, idle):
    rows = symbols(50, 2)
    devices = [kind(2, ALPHABET), kind(2, ALPHABET)]
    devices[idle].update(rows[:0])
    devices[1 - idle].update(rows)
    devices[0].merge_state(devices[1])
    assert same(devices[0].statistics(), pair_statistics(rows))


@BOTH
def test_states_merge_by_the_reductions_they_declare(kind):
    """What torchmetrics does between processes: "sum" over tensors, "cat" over lists, already joined to one tensor."""
    rows = symbols(200, 3)
    left, right, merged = (filled(kind(3, ALPHABET), [part]) for part in (rows[:70], rows[70:], rows[:0]))
    for metric in (left, right):
        metric.compute()  # counts what is pending
        assert not metric.pending
    for name, reduction in merged._reductions.items():
        states = [getattr(left, name), getattr(right, name)]
        if isinstance(states[0], torch.Tensor):
            setattr(merged, name, reduction(torch.stack(states)))
        elif joined := [part for state in states for part in state]:
            setattr(merged, name, reduction(joined))
    assert same(PairStatistics(*merged.compute.__wrapped__()), pair_statistics(rows))


# --- the life of a histogram ----------------------------------------------------------------------------------------


@BOTH
def test_reset_forgets(kind, monkeypatch):
    monkeypatch.setattr(counts, "FOLDED", 60)
    metric = filled(kind(3, ALPHABET), symbols(100, 3, seed=1).split(70))  # partly counted, partly pending
    metric.reset()
    metric.update(symbols(80, 3, seed=2))
    metric.compute()
    metric.reset()
    rows = symbols(90, 3, seed=3)
    assert same(filled(metric, [rows]).statistics(), pair_statistics(rows))


@BOTH
def test_computing_does_not_stop_the_counting(kind):
    rows, metric = symbols(100, 3), kind(3, ALPHABET)
    seen = 0
    for part in rows.split(40):
        metric.update(part)
        seen += len(part)
        assert same(metric.statistics(), pair_statistics(rows[:seen]))
        assert same(metric.statistics(), pair_statistics(rows[:seen]))


@BOTH
def test_copies_count_for_themselves(kind):
    rows, more = symbols(50, 2), symbols(50, 2, seed=3)
    metric = filled(kind(2, ALPHABET), [rows])
    metric.compute()
    twin = copy.deepcopy(metric)
    twin.update(more)
    assert same(twin.statistics(), pair_statistics(torch.cat([rows, more])))
    assert same(metric.statistics(), pair_statistics(rows))


@BOTH
def test_the_batch_is_not_changed(kind):
    rows = symbols(20, 2)
    batch = rows.clone()
    filled(kind(2, ALPHABET), [batch]).compute()
    assert torch.equal(batch, rows)


# --- borders --------------------------------------------------------------------------------------------------------


@BOTH
def test_the_whole_alphabet_can_be_used(kind):
    rows = torch.tensor([[ALPHABET - 1, 0], [0, ALPHABET - 1], [ALPHABET - 1, ALPHABET - 1]])
    assert same(filled(kind(2, ALPHABET), [rows]).statistics(), pair_statistics(rows))


@BOTH
@pytest.mark.parametrize("bad", [-1, ALPHABET])
@pytest.mark.parametrize("head", [0, 1])
def test_symbols_outside_of_the_alphabet_are_not_counted_elsewhere(kind, bad, head):
    rows = torch.tensor([[0, 0], [1, 0]])
    rows[0, head] = bad
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        filled(kind(2, ALPHABET), [rows]).statistics()


@BOTH
def test_nothing_observed(kind):
    found = filled(kind(2, ALPHABET), [torch.zeros(0, 2, dtype=torch.int64)] * 2).statistics()
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert same(found, PairStatistics(nothing, nothing, 0))


@BOTH
@pytest.mark.parametrize("observations", [1, 2, 40])
def test_one_head(kind, observations):
    rows = symbols(observations, 1)
    found = filled(kind(1, ALPHABET), [rows]).statistics()
    assert found.entropies.shape == found.coverage.shape == (1, 1)
    assert same(found, pair_statistics(rows))
    assert found.entropies[0, 0].item() == pytest.approx(joint(rows, [0]), abs=1e-13)


@BOTH
def test_an_alphabet_of_one(kind):
    found = filled(kind(2, 1), [torch.zeros(5, 2, dtype=torch.int64)]).statistics()
    assert found.entropies.eq(0).all()
    assert found.coverage.eq(1).all()
    assert found.observations == 5


def test_sparse_codes_that_int64_cannot_number_are_refused():
    """Two heads have three pairs: 3 · 2⁶² is too much, 3 · 2⁶⁰ is not."""
    with pytest.raises(ValueError, match="more pairs than int64 can number") as caught:
        SparsePairs(2, 1 << 31)
    assert "\n" not in str(caught.value)
    rows = (1 << 30) - 1 - symbols(60, 2)
    assert same(filled(SparsePairs(2, 1 << 30), rows.split(13)).statistics(), pair_statistics(rows))


@pytest.mark.parametrize(("heads", "alphabet"), [(1, 5), (2, 5), (12, 64)])
def test_bytes_are_those_of_the_dense_state(heads, alphabet):
    metric = filled(DensePairs(heads, alphabet), [torch.zeros(1, heads, dtype=torch.int64)])
    metric.statistics()
    state = metric.pairs
    assert PairHistogram.bytes(heads, alphabet) == state.numel() * state.element_size()

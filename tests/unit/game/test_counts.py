"""Accumulated counts against one pass over bare arrays: bit for bit, however the observations arrive."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.game import pair_entropies, triple_entropies
from compressor.game.counts import PairHistogram, SymbolTable, TupleTable

ALPHABET = 9


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


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("observations", [1, 2, 257])
def test_histogram_table_and_bare_arrays_give_the_same_bits(heads, observations):
    rows = symbols(observations, heads)
    expected = pair_entropies(rows.numpy())
    assert torch.equal(filled(SymbolTable(), [rows]).pair_entropies(), expected)
    assert torch.equal(filled(PairHistogram(heads, ALPHABET), [rows]).pair_entropies(), expected)
    assert expected.dtype == torch.float64


def test_histograms_are_the_counts_of_numpy():
    rows = symbols(300, 3)
    metric = filled(PairHistogram(3, ALPHABET), [rows])
    for head in range(3):
        assert np.array_equal(metric.singles[head].numpy(), np.bincount(rows[:, head], minlength=ALPHABET))
    for index, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        expected = np.histogram2d(rows[:, i], rows[:, j], bins=ALPHABET, range=[[0, ALPHABET], [0, ALPHABET]])[0]
        assert np.array_equal(metric.pairs[index].numpy(), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 120), max_size=5),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_any_split_into_batches_in_any_order_gives_the_same_bits(heads, cuts, seed, order):
    rows = symbols(120, heads, seed)
    bounds = [0, *sorted(cuts), 120]
    parts = [rows[start:stop] for start, stop in pairwise(bounds)]  # some are empty
    order.shuffle(parts)
    expected = pair_entropies(rows)
    assert torch.equal(filled(SymbolTable(), parts).pair_entropies(), expected)
    assert torch.equal(filled(PairHistogram(heads, ALPHABET), parts).pair_entropies(), expected)


@pytest.mark.parametrize("make", [lambda: PairHistogram(3, ALPHABET), SymbolTable], ids=["histogram", "table"])
def test_merging_devices_equals_one_pass(make):
    rows = symbols(200, 3)
    one, other, whole = filled(make(), [rows[:70]]), filled(make(), [rows[70:150], rows[150:]]), filled(make(), [rows])
    expected = whole.pair_entropies().clone()
    one.merge_state(other)
    assert torch.equal(one.pair_entropies(), expected)
    assert one.observations == whole.observations == len(rows)
    assert torch.equal(expected, pair_entropies(rows))


def test_states_merge_by_the_reductions_they_declare():
    """What torchmetrics does between processes: "sum" over tensors, "cat" over lists, already joined to one tensor."""
    rows = symbols(200, 3)
    left, right = filled(PairHistogram(3, ALPHABET), [rows[:70]]), filled(PairHistogram(3, ALPHABET), [rows[70:]])
    merged = filled(PairHistogram(3, ALPHABET), [rows[:0]])
    for name, reduction in merged._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(left, name), getattr(right, name)])))
    assert torch.equal(merged.pair_entropies(), pair_entropies(rows))
    tables = [filled(SymbolTable(), [rows[:70]]), filled(SymbolTable(), [rows[70:90], rows[90:]])]
    joined = filled(SymbolTable(), [rows[:0]])
    joined.rows = joined._reductions["rows"]([part for table in tables for part in table.rows])
    assert torch.equal(joined.pair_entropies(), pair_entropies(rows))
    assert torch.equal(triple_entropies(joined.compute()), triple_entropies(rows))


def test_reset_forgets():
    first, second = symbols(100, 3, seed=1), symbols(80, 3, seed=2)
    histogram, table = filled(PairHistogram(3, ALPHABET), [first]), filled(SymbolTable(), [first])
    for metric in (histogram, table):
        metric.compute()
        metric.reset()
        metric.update(second)
    assert torch.equal(histogram.pair_entropies(), pair_entropies(second))
    assert torch.equal(table.pair_entropies(), pair_entropies(second))


def test_computing_does_not_stop_the_counting():
    rows = symbols(100, 3)
    histogram, table = PairHistogram(3, ALPHABET), SymbolTable()
    for part in rows.split(40):
        for metric in (histogram, table):
            metric.update(part)
            metric.compute()
    assert torch.equal(histogram.pair_entropies(), pair_entropies(rows))
    assert torch.equal(table.pair_entropies(), pair_entropies(rows))


def test_the_whole_alphabet_can_be_used():
    rows = torch.tensor([[ALPHABET - 1, 0], [0, ALPHABET - 1], [ALPHABET - 1, ALPHABET - 1]])
    assert torch.equal(filled(PairHistogram(2, ALPHABET), [rows]).pair_entropies(), pair_entropies(rows))


@pytest.mark.parametrize("bad", [-1, ALPHABET])
def test_symbols_outside_of_the_alphabet_are_not_counted_elsewhere(bad):
    metric = PairHistogram(2, ALPHABET)
    with pytest.raises((RuntimeError, ValueError)):
        metric.update(torch.tensor([[0, bad]]))


def test_tables_take_negative_and_large_symbols():
    rows = symbols(90, 3) - 4
    assert torch.equal(filled(SymbolTable(), [rows]).pair_entropies(), pair_entropies(rows))
    for large in (rows + 2**31 - 1 - 4, rows * 2**28, rows * 2**16):
        assert torch.equal(filled(SymbolTable(), [large]).pair_entropies(), pair_entropies(rows))


def test_whole_tuples_are_symbols():
    """[observations, heads, width]: two tuples are one symbol only if all of their elements are equal."""
    rows = torch.tensor(
        [
            [[0, 1, -1], [5, 5, 5]],
            [[0, 1, 2], [5, 5, 5]],
            [[0, 1, -1], [5, 5, 4]],
            [[1, 0, -1], [4, 5, 5]],
        ]
    )
    table = filled(SymbolTable(), rows.split(1))
    ids = table.compute()
    assert ids.shape == (4, 2)
    assert ids[0, 0] == ids[2, 0]
    assert len(ids[:, 0].unique()) == 3
    assert len(ids[:, 1].unique()) == 3
    half = 2 / 4 * math.log(2) + 2 * 1 / 4 * math.log(4)
    assert table.pair_entropies()[0, 0].item() == pytest.approx(half)
    assert table.pair_entropies()[0, 1].item() == pytest.approx(math.log(4))


@pytest.mark.parametrize(("heads", "alphabet"), [(1, 5), (2, 5), (12, 256)])
def test_bytes_are_those_of_the_states(heads, alphabet):
    metric = PairHistogram(heads, alphabet)
    state = sum(tensor.numel() * tensor.element_size() for tensor in (metric.singles, metric.pairs))
    assert PairHistogram.bytes(heads, alphabet) == state


def test_copies_count_for_themselves():
    rows = symbols(50, 2)
    metric = filled(PairHistogram(2, ALPHABET), [rows])
    twin = copy.deepcopy(metric)
    twin.update(symbols(50, 2, seed=3))
    assert torch.equal(metric.pair_entropies(), pair_entropies(rows))


def test_split_documents_are_put_together_again():
    """A document's symbol is the tuple of its windows' tuples, in their order, whatever the order of arrival."""
    generator = torch.Generator().manual_seed(3)
    windows = torch.randint(0, 2, (60, 3, 2), generator=generator)
    places = torch.tensor([(7 * (index // 3), index % 3) for index in range(60)])
    keep = places[:, 1] <= torch.randint(0, 3, (20,), generator=generator).repeat_interleave(3)  # one to three windows
    windows, places = windows[keep], places[keep]
    documents: dict[int, list[list[object]]] = {}
    for (document, _), window in zip(places.tolist(), windows.tolist(), strict=True):
        documents.setdefault(document, []).append(window)
    table = [
        [tuple(map(tuple, (window[head] for window in whole))) for head in range(3)] for whole in documents.values()
    ]
    numbers = {symbol: number for number, symbol in enumerate(sorted({symbol for row in table for symbol in row}))}
    expected = pair_entropies(torch.tensor([[numbers[symbol] for symbol in row] for row in table]))

    shuffled = torch.randperm(len(windows), generator=generator)
    metric = TupleTable()
    for part in shuffled.split(13):
        metric.update(windows[part], places[part])
    assert metric.observations == len(documents) == 20
    assert torch.equal(metric.pair_entropies(), expected)

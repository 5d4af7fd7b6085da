"""Counting: the same tallies, to the bit, on every path that speed may take."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.game import coalition_entropies, counting, entropies, lattice_entropies, pair_entropies
from compressor.game.counting import Partition, columns_of, measure_coalitions, tally
from tests.unit.game.reference import SYMBOLS, bits, coalitions_of, counts_of, joint

PATHS = {
    "compact always": {"COMPACT_AT": 1, "COMPACT_COUNTED_AT": 1},
    "compact never": {"COMPACT_AT": 10**9, "COMPACT_COUNTED_AT": 10**9},
    "drop always": {"COMPACT_AT": 1, "COMPACT_COUNTED_AT": 1, "DROP_AT": 0},
    "drop never": {"COMPACT_AT": 1, "COMPACT_COUNTED_AT": 1, "DROP_AT": 2},
    "64 bits": {"INT32_IDS": 1},
    "64 bits, drop never": {"INT32_IDS": 1, "DROP_AT": 2},
    "sort": {"_dense": lambda partition: False},
    "sort, compact": {"_dense": lambda partition: False, "COMPACT_AT": 1, "COMPACT_COUNTED_AT": 1},
    "sort, drop never": {"_dense": lambda partition: False, "COMPACT_AT": 1, "COMPACT_COUNTED_AT": 1, "DROP_AT": 2},
    "one at a time": {"TRANSPOSED_AT_ONCE": 1},
}


@pytest.mark.parametrize("changes", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("rows", SYMBOLS.values(), ids=SYMBOLS)
def test_every_path_gives_the_same_bits(changes, rows, monkeypatch):
    expected = lattice_entropies(rows), pair_entropies(rows)
    for name, value in changes.items():
        monkeypatch.setattr(counting, name, value)
    assert torch.equal(lattice_entropies(rows), expected[0])
    assert torch.equal(pair_entropies(rows), expected[1])


@pytest.mark.parametrize("rows", SYMBOLS.values(), ids=SYMBOLS)
def test_tallies_are_those_of_a_dictionary_in_any_order_of_joining(rows):
    seen = []

    def see(counts, multiplicity):
        seen.append(dict(zip(counts.tolist(), multiplicity.tolist(), strict=True)))
        return float(len(seen))

    coalitions = [part for part in coalitions_of(rows.shape[1]) if part]
    coalitions += [part[::-1] for part in coalitions]
    numbers = measure_coalitions(columns_of(rows), coalitions, see).astype(int)
    for coalition, number in zip(coalitions, numbers, strict=True):
        assert seen[number - 1] == Counter(counts_of(rows, coalition).values())
        assert list(seen[number - 1]) == sorted(seen[number - 1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.one_of(st.integers(0, 6), st.integers(0, 2**62)), max_size=30),
    lone=st.integers(0, 5),
)
def test_tally(counts, lone):
    expected = Counter(count for count in [*counts, *[1] * lone] if count)
    values, multiplicity = tally(np.array(counts, dtype=np.int64), lone)
    assert values.tolist() == sorted(expected)
    assert multiplicity.tolist() == [expected[value] for value in sorted(expected)]
    assert values.dtype == multiplicity.dtype == np.int64


@pytest.mark.parametrize("size", [10**4, 2**62], ids=["packed", "too large to pack"])
def test_sorted_ids_say_where_they_came_from(size):
    ids = bits(300, 1, size, seed=1)[:, 0]
    ordered, order = counting._sorted(ids, size)
    assert ordered.tolist() == sorted(ids.tolist())
    assert np.array_equal(ids[order], ordered)


@pytest.mark.parametrize("telling", range(10))
def test_alphabets_whose_product_overflows_64_bits_do_not_collide(telling):
    """256 symbols a head: packed into 64 bits, those of the ninth head and beyond would be shifted out."""
    ladder = np.tile(np.arange(256)[:, None], (1, 10))
    rows = np.zeros((1500, 10), dtype=np.int64)
    rows[:, telling] = np.random.default_rng(telling).integers(0, 256, 1500)
    rows = np.concatenate([ladder, rows])
    everyone = tuple(range(10))
    orders = [everyone, everyone[::-1], *(everyone[start:] + everyone[:start] for start in range(1, 10))]
    found = measure_coalitions(columns_of(rows), orders, lambda counts, multiplicity: float(multiplicity.sum()))
    assert found.tolist() == [len(counts_of(rows, everyone))] * len(orders)
    assert coalition_entropies(rows, [everyone]).item() == pytest.approx(joint(rows, everyone), abs=1e-12)


def test_many_symbols_in_many_heads():
    """Nearly every symbol is alone, over a range too large to count densely."""
    rows = np.random.default_rng(3).integers(-(2**62), 2**62, (400, 6))
    rows[::2] = rows[1::2]
    rows[::8, 0] = 5
    for size in (1, 2, 3, 6):
        coalitions = list(combinations(range(6), size))
        expected = [joint(rows, coalition) for coalition in coalitions]
        assert coalition_entropies(rows, coalitions).tolist() == pytest.approx(expected, abs=1e-12)


def test_columns_are_compact():
    rows = np.array([[3, 2**40, 1], [3, -(2**40), 0], [9, 7, 1], [4, 7, 1]], dtype=np.int64)
    columns = columns_of(rows)
    assert [column.ids.tolist() for column in columns] == [[0, 0, 2, 1], [2, 0, 1, 1], [1, 0, 1, 1]]
    assert [column.size for column in columns] == [3, 3, 2]
    assert all(column.ids.dtype == np.int32 for column in columns)


def test_lone_observations_leave_and_groups_are_numbered():
    ids = np.array([7, 0, 7, 3, 9, 0], dtype=np.int32)
    for size in (10, 1000):  # densely and by sorting
        partition, found = counting._compacted(Partition(ids, size, np.arange(10, 16)), lone=4)
        assert partition.rows.tolist() == [10, 11, 12, 15]
        assert partition.ids.tolist() == [1, 0, 1, 0]
        assert partition.size == 2
        assert [part.tolist() for part in found] == [[1, 2], [6, 2]]


def test_a_number_of_observations_beyond_the_blocks():
    rows = np.random.default_rng(4).geometric(0.2, (2 * counting.TRANSPOSED_AT_ONCE + 3, 3))
    assert entropies(rows).tolist() == pytest.approx([joint(rows, [head]) for head in range(3)], abs=1e-12)

"""Symbols → how often each joint symbol of a coalition occurs, in plain numpy.

A coalition's joint symbols part the observations into groups. The walk over many coalitions refines one partition
head by head, shares what coalitions begin with, and leaves out observations that are already alone in their group:
no further head can change that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Tally = tuple[Ints, Ints]  # distinct positive counts in ascending order, and how many symbols have each
Task = tuple[tuple[int, ...], int]  # the columns of a coalition in the order of joining, and the place of its result

INT32_IDS = 2**31  # so many ids fit into int32
COMPACT_AT = 16  # coalitions that begin alike, from which on compact ids pay for themselves,
COMPACT_COUNTED_AT = 3  # and where the beginning has to be counted anyway
DROP_AT = 1 / 8 / 8  # share of lone observations from which on leaving them out pays for itself
NOTHING = np.zeros(0, dtype=np.int64)
TRANSPOSED_AT_ONCE = 1024  # observations, so that a block stays in the cache


class Column(NamedTuple):
    """One head's symbols as compact ids: int32 [observations], each of 0 … size − 1 at least once."""

    ids: NDArray[np.int32]
    size: int


class Partition(NamedTuple):
    """Observations in groups; those in no group are alone."""

    ids: NDArray[Any]  # integers [n] below `size`: equal within a group, and only there
    size: int
    rows: NDArray[np.intp] | None  # the n observations; None for all, in order


def columns_of(symbols: ArrayLike | torch.Tensor) -> list[Column]:
    """Compact each head's symbols of an integer array [observations, heads].

    Raises:
        ValueError: the array is not of integers, not two-dimensional, or empty.
    """
    tensor = isinstance(symbols, torch.Tensor)
    table: Any = symbols if tensor else np.asarray(symbols)
    floating = table.is_floating_point() or table.is_complex() if tensor else table.dtype.kind not in "iub"
    if floating or table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"symbols are {table.dtype} {list(table.shape)}; expected integers [observations, heads], none of them 0"
        )
    array: NDArray[Any] = table.detach().cpu().numpy() if tensor else table
    narrow = int(array.min()) >= -INT32_IDS and int(array.max()) < INT32_IDS
    # Unsigned 64 bits wrap: other labels, as different from one another as before.
    columns = np.empty(array.shape[::-1], dtype=np.int32 if narrow else np.int64)
    for start in range(0, len(array), TRANSPOSED_AT_ONCE):
        rows = slice(start, start + TRANSPOSED_AT_ONCE)
        columns[:, rows] = array[rows].T
    return [_compact(column) for column in columns]


def tally(counts: NDArray[np.integer[Any]], lone: int = 0) -> Tally:
    """Gather equal counts [any], leaving out zeros; `lone` more symbols were counted once.

    The result depends on which counts there are, not on where they lie, so neither does any sum over it.
    """
    flat = np.asarray(counts, dtype=np.int64)
    if flat.size and int(flat.max()) <= 4 * flat.size:
        multiplicity = np.bincount(flat, minlength=2)
        multiplicity[0] = 0
        multiplicity[1] += lone
        values = np.flatnonzero(multiplicity)
        return values, multiplicity[values]
    values, multiplicity = np.unique(np.append(flat, 1), return_counts=True)  # the 1, so that there is one
    multiplicity[values == 1] += lone - 1
    keep = (values > 0) & (multiplicity > 0)
    return values[keep], multiplicity[keep]


def measure_coalitions(
    columns: Sequence[Column], coalitions: Sequence[tuple[int, ...]], measure: Callable[[Ints, Ints], float]
) -> NDArray[np.float64]:
    """Measure the tally of each coalition's joint symbols → float64 [coalitions]; 0 for the empty coalition.

    Heads are joined in the order in which a coalition names them, and coalitions that begin alike share the work.
    """
    result = np.zeros(len(coalitions))
    observations, widest = len(columns[0].ids), max(column.size for column in columns)
    tasks = sorted((coalition, place) for place, coalition in enumerate(coalitions) if coalition)
    everything = Partition(np.zeros(observations, dtype=np.int32), 1, None)
    left = [(everything, 0, group) for group in _by_head(tasks, 0)]  # first in, last out: few partitions at a time
    while left:
        partition, depth, group = left.pop()
        joined = _join(partition, columns[group[0][0][depth]])
        lone = observations - len(joined.ids)
        deeper = [task for task in group if len(task[0]) > depth + 1]
        done = group[: len(group) - len(deeper)]  # the shorter come first
        enough = COMPACT_COUNTED_AT if done else COMPACT_AT
        found = None
        if depth > 0 and deeper and (len(deeper) >= enough or joined.size * widest > INT32_IDS):
            joined, found = _compacted(joined, lone)
        if done:
            result[[place for _, place in done]] = measure(*(found or _tally_of(joined, lone)))
        if deeper and not len(joined.ids):  # all are alone, and more heads change nothing
            result[[place for _, place in deeper]] = measure(*tally(NOTHING, observations))
        elif deeper:
            left += [(joined, depth + 1, part) for part in _by_head(deeper, depth + 1)]
    return result


def _by_head(tasks: Sequence[Task], depth: int) -> list[list[Task]]:
    """Split ascending tasks by the head they join next."""
    return [list(group) for _, group in groupby(tasks, key=lambda task: task[0][depth])]


def _compact(symbols: NDArray[Any]) -> Column:
    """Number the symbols [observations] of one head."""
    low, high = int(symbols.min()), int(symbols.max())
    if high - low > 4 * len(symbols):
        values, ids = np.unique(symbols, return_inverse=True)
        return Column(ids.astype(np.int32), len(values))
    shifted = symbols - low
    labels = np.cumsum(_histogram(shifted) > 0, dtype=np.int32) - np.int32(1)
    return Column(labels.take(shifted), int(labels[-1]) + 1)


def _join(partition: Partition, column: Column) -> Partition:
    """Split the groups by one more head. `measure_coalitions` keeps the sizes so that no product overflows int64."""
    ids = column.ids if partition.rows is None else column.ids.take(partition.rows)
    if partition.size == 1:
        return Partition(ids, column.size, partition.rows)
    size = partition.size * column.size
    joined = np.multiply(partition.ids, column.size, dtype=np.int32 if size <= INT32_IDS else np.int64)
    joined += ids
    return Partition(joined, size, partition.rows)


def _histogram(ids: NDArray[Any]) -> Ints:
    """Count non-negative ids: numpy's bincount, in half the time."""
    counts: Ints = torch.bincount(torch.from_numpy(ids)).numpy()
    return counts


def _dense(partition: Partition) -> bool:
    """Whether a histogram over all ids is small beside the observations."""
    return partition.size <= 2 * len(partition.ids)


def _tally_of(partition: Partition, lone: int) -> Tally:
    """Count the groups, when nobody needs to know who is in which."""
    if _dense(partition):
        return tally(_histogram(partition.ids), lone)
    ids = np.sort(partition.ids)
    repeats = np.zeros(len(ids) + 1, dtype=bool)  # lone ids are many and need no length, only runs of two and more
    np.equal(ids[1:], ids[:-1], out=repeats[1:-1])
    bounds = np.flatnonzero(repeats[1:] != repeats[:-1])
    lengths = bounds[1::2] - bounds[::2] + 1
    return tally(lengths, lone + len(ids) - int(lengths.sum()))


def _compacted(partition: Partition, lone: int) -> tuple[Partition, Tally]:
    """Number the groups 0, 1, 2 …, leaving lone observations out where these are many; and count the groups."""
    ids, order = partition.ids, None
    if _dense(partition):
        counts = _histogram(ids)
    else:
        ordered, order = _sorted(ids, partition.size)
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        counts = np.diff(starts, append=len(ids))
    drop = np.count_nonzero(counts == 1) >= DROP_AT * len(ids)
    kept = np.flatnonzero(counts > (1 if drop else 0))
    numbers = np.full(len(counts), -1, dtype=np.int32)
    numbers[kept] = np.arange(len(kept), dtype=np.int32)
    if order is None:
        groups = numbers.take(ids)
    else:
        groups = np.empty(len(ids), dtype=np.int32)
        groups[order] = np.repeat(numbers, counts)
    rows = partition.rows
    if drop:
        places = np.flatnonzero(groups >= 0)
        groups, rows = groups.take(places), places if rows is None else rows.take(places)
    return Partition(groups, max(1, len(kept)), rows), tally(counts, lone)


def _sorted(ids: NDArray[Any], size: int) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Sort ids below `size`, and say where each came from."""
    bits = len(ids).bit_length()
    if size > 2 ** (63 - bits):
        order = np.argsort(ids)
        return ids[order], order
    packed = ids.astype(np.int64) << bits  # numpy sorts numbers much faster than it sorts places
    packed |= np.arange(len(ids))
    packed.sort()
    return packed >> bits, packed & (2**bits - 1)

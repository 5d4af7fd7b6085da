"""What a scoring epoch keeps: it comes back as it went in, by the disk too, and nothing is left open."""

import copy
import errno
import gc
import pickle
import tempfile
from itertools import pairwise

import pytest
import torch

from compressor.callbacks import tables
from compressor.callbacks.tables import Observations, SymbolTable, TupleTable
from compressor.errors import CompressorError
from compressor.game import pair_entropies


def symbols(observations: int, heads: int, alphabet: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, alphabet, (observations, heads), generator=torch.Generator().manual_seed(seed))


def filled(metric, parts):
    for part in parts:
        metric.update(part)
    return metric


def windows(count: int, start: int = 0) -> torch.Tensor:
    """Places of the only windows of so many documents."""
    return torch.stack([torch.arange(start, start + count), torch.zeros(count, dtype=torch.int64)], dim=1)


@pytest.fixture
def files(monkeypatch):
    """The temporary files that were opened."""
    opened = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tables.tempfile, "TemporaryFile", lambda *how: (opened.append(make(*how)), opened[-1])[1])
    return opened


# --- symbols --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphabet", "size"), [(1, 1), (2, 1), (255, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (1 << 31, 4)]
)
@pytest.mark.parametrize("budget", [None, 1], ids=["memory", "disk"])
def test_what_goes_in_comes_out(alphabet, size, budget):
    """In no more bytes than the alphabet needs."""
    ends = torch.tensor([[0, alphabet - 1, alphabet // 2], [alphabet - 1, 0, alphabet - 1]])
    rows = torch.cat([ends, symbols(20, 3, alphabet)])
    table = filled(SymbolTable(alphabet, budget), rows.split(7))
    assert torch.equal(table.compute(), rows)
    assert table.compute().dtype == torch.int64
    assert sum(row.numel() for row in table.rows) == rows.numel() * size
    assert {row.dtype for row in table.rows} == {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_symbols_of_any_width_are_taken(dtype):
    rows = symbols(30, 2, 200)
    rows = rows.clamp(max=torch.iinfo(dtype).max)
    assert torch.equal(filled(SymbolTable(300), [rows.to(dtype)]).symbols(), rows)


@pytest.mark.parametrize("alphabet", [256, 65536])
@pytest.mark.parametrize("below", [True, False])
def test_symbols_that_the_bytes_cannot_hold_are_not_kept_as_others(alphabet, below):
    bad = torch.tensor([[0, -1 if below else 1 << 32]])
    try:
        found = filled(SymbolTable(alphabet), [bad]).symbols()
    except (RuntimeError, ValueError):
        return
    assert torch.equal(found, bad)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (0, 3)])
def test_small_tables_keep_their_shape(shape):
    rows = symbols(*shape)
    found = filled(SymbolTable(9), [rows]).symbols()
    assert found.shape == shape
    assert torch.equal(found, rows)


def test_rows_of_strided_tensors_are_kept_as_they_are():
    rows = symbols(8, 6)
    assert torch.equal(filled(SymbolTable(9), [rows[::2, 1::2], rows.T[:4, :3]]).symbols()[:4], rows[::2, 1::2])


# --- by the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 30, 100, 599, 600])
@pytest.mark.parametrize("batch", [1, 13, 200])
def test_past_the_budget_symbols_go_by_the_disk_and_come_back_in_order(files, budget, batch):
    """600 bytes in all; in memory there are never more than the budget."""
    rows = symbols(200, 3)
    table = SymbolTable(9, budget)
    for part in rows.split(batch):
        table.update(part)
        assert sum(row.numel() for row in table.rows) <= budget
    assert len(files) == (budget < 600)
    assert torch.equal(table.compute(), rows)
    assert all(file.closed for file in files)


def test_several_spills_use_one_file(files, monkeypatch):
    spills = []
    spill = SymbolTable._spill
    monkeypatch.setattr(SymbolTable, "_spill", lambda self: (spills.append(1), spill(self))[1])
    rows = symbols(100, 3, 1000)
    table = filled(SymbolTable(1000, 100), rows.split(10))
    assert len(spills) > 3
    assert len(files) == 1
    assert torch.equal(table.symbols(), rows)


def test_computing_does_not_stop_the_keeping(files):
    rows = symbols(120, 2)
    table, seen = SymbolTable(9, 50), 0
    for part in rows.split(16):
        table.update(part)
        seen += len(part)
        assert torch.equal(table.symbols(), rows[:seen])
        assert torch.equal(table.symbols(), rows[:seen])
    assert len(files) > 1
    assert all(file.closed for file in files)


def test_reset_forgets_what_is_on_disk(files):
    table = filled(SymbolTable(9, 10), symbols(50, 3).split(10))
    assert not files[0].closed
    table.reset()
    assert files[0].closed
    rows = symbols(40, 2, seed=1)  # of other heads, even
    assert torch.equal(filled(table, rows.split(9)).symbols(), rows)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_copies_keep_for_themselves(files, twin_of):
    rows, more = symbols(60, 3), symbols(30, 3, seed=2)
    table = filled(SymbolTable(9, 40), rows.split(11))
    twin = twin_of(table)
    filled(twin, more.split(7))
    assert torch.equal(table.symbols(), rows)
    assert torch.equal(twin.symbols(), torch.cat([rows, more]))
    table.update(more[:5])
    table.reset()
    assert torch.equal(twin.symbols(), torch.cat([rows, more]))
    assert all(file.closed for file in files)


def test_a_table_that_is_dropped_closes_its_file(files):
    table = filled(SymbolTable(9, 10), symbols(50, 3).split(10))
    del table
    gc.collect()
    assert [file.closed for file in files] == [True]


def test_a_table_that_could_not_be_made_is_dropped_quietly():
    with pytest.raises(StopIteration):
        SymbolTable((1 << 63) + 1)
    gc.collect()  # a __del__ that failed would be a warning, and warnings are errors


class FullDisk:
    """A file that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.closed = False

    def write(self, content: bytes) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("when", ["at once", "at the first write", "later"])
@pytest.mark.parametrize("kind", [SymbolTable, TupleTable])
def test_a_full_disk_is_said_in_one_line(monkeypatch, when, kind):
    file = FullDisk(0 if when == "at the first write" else 100)

    def make(*how):
        if when == "at once":
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(tables.tempfile, "TemporaryFile", make)
    table = kind(9, 40)

    def keep() -> None:
        for number, part in enumerate(symbols(200, 3).split(10)):
            table.update(part) if kind is SymbolTable else table.update(part[..., None], windows(10, 10 * number))

    with pytest.raises(CompressorError, match="No space left on device") as caught:
        keep()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (tempfile.gettempdir(), "--memory-budget", "TMPDIR"))
    table.reset()
    assert file.closed == (when != "at once")


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budgets", [(None, None), (60, None), (None, 60), (60, 60)])
def test_merging_devices_keeps_the_rows_of_both(budgets):
    """Those of one device together, in their order."""
    rows = symbols(90, 3, 1000)
    one, other = SymbolTable(1000, budgets[0]), SymbolTable(1000, budgets[1])
    filled(one, rows[:40].split(9))
    filled(other, rows[40:].split(9))
    one.merge_state(other)
    found = one.symbols()
    assert any(torch.equal(found, torch.cat(parts)) for parts in ((rows[:40], rows[40:]), (rows[40:], rows[:40])))
    assert torch.equal(other.symbols(), rows[40:])


@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("empty_batch", [True, False])
def test_a_device_that_saw_nothing_adds_nothing(idle, empty_batch):
    rows = symbols(30, 3)
    devices = [SymbolTable(9), SymbolTable(9)]
    devices[1 - idle].update(rows)
    if empty_batch:
        devices[idle].update(rows[:0])
    devices[0].merge_state(devices[1])
    devices[0]._update_count = 1  # torchmetrics warns of metrics that were only merged
    assert torch.equal(devices[0].symbols(), rows)


def test_observations_and_symbols_merge_in_the_same_order():
    rows = symbols(60, 3)
    documents, places = torch.arange(60) // 7, torch.arange(60) % 7
    merged = []
    for metric, parts in (
        (SymbolTable, [(rows[:25],), (rows[25:],)]),
        (Observations, [(documents[:25], places[:25]), (documents[25:], places[25:])]),
    ):
        devices = [metric(9), metric(9)] if metric is SymbolTable else [metric(), metric()]
        for device, part in zip(devices, parts, strict=True):
            device.update(*part)
        devices[0].merge_state(devices[1])
        merged.append(devices[0].compute())
    for row, (document, place) in zip(*merged, strict=True):
        assert torch.equal(row, rows[7 * document + place])


# --- observations ---------------------------------------------------------------------------------------------------


def test_observations_come_back_in_their_order():
    documents, places = torch.tensor([5, 5, 0, 9, 9, 9, 2**31 - 1]), torch.tensor([0, 1, 0, 2, 1, 0, 4095])
    metric = Observations()
    for start, stop in pairwise([0, 2, 2, 3, 7]):
        metric.update(documents[start:stop], places[start:stop])
    assert torch.equal(metric.compute(), torch.stack([documents, places], dim=1))
    assert metric.compute().dtype == torch.int64
    metric.reset()
    metric.update(documents[:1], places[:1])
    assert metric.compute().tolist() == [[5, 0]]
    metric.reset()
    metric.update(documents[:0], places[:0])
    assert metric.compute().shape == (0, 2)


# --- tuples ---------------------------------------------------------------------------------------------------------


def test_whole_tuples_are_symbols():
    """[windows, heads, width]: two tuples are one symbol only if all of their elements are equal."""
    rows = torch.tensor(
        [
            [[0, 1, -1], [5, 5, 5]],
            [[0, 1, 2], [5, 5, 5]],
            [[0, 1, -1], [5, 5, 4]],
            [[1, 0, -1], [4, 5, 5]],
        ]
    )
    table = TupleTable(6)
    for number, row in enumerate(rows):
        table.update(row[None], windows(1, number))
    ids = table.symbols()
    assert ids.shape == (4, 2)
    assert ids.dtype == torch.int64
    first, second = ids.T.tolist()
    assert [first.index(number) for number in first] == [0, 1, 0, 3]
    assert [second.index(number) for number in second] == [0, 0, 2, 3]


@pytest.mark.parametrize("alphabet", [255, 256, 65535, 65536])
def test_the_filler_has_room_beside_the_whole_alphabet(alphabet):
    rows = torch.tensor([[[-1, -1]], [[alphabet - 1, -1]], [[-1, alphabet - 1]], [[alphabet - 1, alphabet - 1]]])
    table = TupleTable(alphabet)
    table.update(rows, windows(4))
    assert len(table.symbols().unique()) == 4


@pytest.mark.parametrize("budget", [None, 40], ids=["memory", "disk"])
def test_split_documents_are_put_together_again(budget):
    """A document's symbol is the tuple of its windows' tuples, in their order, whatever the order of arrival."""
    generator = torch.Generator().manual_seed(3)
    parts = torch.randint(0, 2, (60, 3, 2), generator=generator)
    places = torch.tensor([(7 * (index // 3), index % 3) for index in range(60)])
    keep = places[:, 1] <= torch.randint(0, 3, (20,), generator=generator).repeat_interleave(3)  # one to three windows
    parts, places = parts[keep], places[keep]
    documents: dict[int, list[list[object]]] = {}
    for (document, _), window in zip(places.tolist(), parts.tolist(), strict=True):
        documents.setdefault(document, []).append(window)
    table = [
        [tuple(map(tuple, (window[head] for window in whole))) for head in range(3)] for whole in documents.values()
    ]
    numbers = {symbol: number for number, symbol in enumerate(sorted({symbol for row in table for symbol in row}))}
    expected = torch.tensor([[numbers[symbol] for symbol in row] for row in table])
    assert len(expected.unique()) > 5

    shuffled = torch.randperm(len(parts), generator=generator)
    metric = TupleTable(2, budget)
    for part in shuffled.split(13):
        metric.update(parts[part], places[part])
    found = metric.symbols()
    assert found.shape == (20, 3)
    assert torch.equal(pair_entropies(found), pair_entropies(expected))
    for head in range(3):  # documents in the order of their numbers: equal ids for equal tuples, and only for these
        assert torch.equal(found[:, head, None] == found[:, head], expected[:, head, None] == expected[:, head])


def test_where_a_tuple_was_split_matters():
    """(a)(b, c) is not (a, b)(c), nor is one window the same as that window and another."""
    rows = torch.tensor([[[1, -1]], [[2, 3]], [[1, 2]], [[3, -1]], [[1, -1]]])
    table = TupleTable(4)
    table.update(rows, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]))
    assert len(table.symbols().unique()) == 3


@pytest.mark.parametrize(("documents", "heads"), [(1, 1), (1, 3), (4, 1), (0, 2)])
def test_few_documents_keep_their_shape(documents, heads):
    table = TupleTable(9)
    table.update(torch.zeros(documents, heads, 5, dtype=torch.int64), windows(documents))
    assert table.symbols().shape == (documents, heads)


def test_tuples_after_a_reset_are_of_the_new_documents_alone():
    table = TupleTable(9, 10)
    table.update(symbols(20, 6).reshape(20, 2, 3), windows(20))
    table.reset()
    rows = torch.tensor([[[1, 2]], [[1, 2]], [[3, 4]]])
    table.update(rows, windows(3, start=8))
    ids = table.symbols()[:, 0].tolist()
    assert [ids.index(number) for number in ids] == [0, 0, 2]


@pytest.mark.parametrize("budget", [None, 3], ids=["memory", "disk"])
def test_merging_devices_keeps_tuples_with_their_documents(budget):
    rows = torch.arange(8).reshape(8, 1, 1)
    devices = [TupleTable(9, budget), TupleTable(9, budget)]
    for number, row in enumerate(rows):
        devices[number // 5].update(row[None], windows(1, number))
    devices[0].merge_state(devices[1])
    assert devices[0].symbols().flatten().tolist() == list(range(8))

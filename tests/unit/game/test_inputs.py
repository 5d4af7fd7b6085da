"""What the functions on bare arrays take, what they refuse, and by which estimator they count."""

import numpy as np
import pytest
import torch

from compressor.game import (
    coalition_dividends,
    coalition_entropies,
    dividends,
    entropies,
    eta,
    lattice_entropies,
    marginal_contributions,
    mobius,
    pair_dividends,
    pair_entropies,
    phi,
    sampled_shapley_values,
    second_order,
    shapley_values,
    third_order,
    triple_dividends,
    triple_entropies,
)
from compressor.game.entropy import as_symbols
from compressor.game.estimators import ESTIMATORS
from tests.unit.game.reference import (
    bits,
    joint,
)

EVERYTHING = {
    "entropies": entropies,
    "pair_entropies": pair_entropies,
    "triple_entropies": triple_entropies,
    "coalition_entropies": lambda symbols, **how: coalition_entropies(symbols, [(0,)], **how),
    "lattice_entropies": lattice_entropies,
    "pair_dividends": pair_dividends,
    "triple_dividends": triple_dividends,
    "dividends": lambda symbols, **how: dividends(symbols, 2, **how),
    "coalition_dividends": lambda symbols, **how: coalition_dividends(symbols, [(0,)], **how),
    "mobius": mobius,
    "phi": phi,
    "second_order": second_order,
    "third_order": third_order,
    "eta": eta,
    "shapley_values": shapley_values,
    "sampled_shapley_values": lambda symbols, **how: sampled_shapley_values(symbols, 2, 0, **how),
    "marginal_contributions": marginal_contributions,
}
ANY_FUNCTION = pytest.mark.parametrize("function", EVERYTHING.values(), ids=EVERYTHING)


@ANY_FUNCTION
def test_the_estimator_is_asked_by_name(function, monkeypatch):
    """One that counts distinct symbols takes the place of entropy everywhere; plug-in is the default."""
    rows = bits(60, 3, 3, seed=15)

    def distinct(counts: np.ndarray, multiplicity: np.ndarray) -> float:
        assert counts.dtype == multiplicity.dtype == np.int64
        assert (np.diff(counts) > 0).all()
        assert (counts > 0).all()
        assert (multiplicity > 0).all()
        assert int(counts @ multiplicity) == 60
        return float(multiplicity.sum())

    monkeypatch.setitem(ESTIMATORS, "distinct", distinct)
    assert str(function(rows, estimator="plug-in")) == str(function(rows))
    assert str(function(rows, estimator="distinct")) != str(function(rows))
    with pytest.raises(ValueError, match="plug-in"):
        function(rows, estimator="no such")


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64]
)
def test_all_integer_types_are_taken(dtype):
    rows = bits(80, 3, 2, seed=9)
    assert torch.equal(pair_entropies(rows.astype(dtype)), pair_entropies(rows))


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "read-only"])
def test_any_memory_layout_is_taken(layout):
    rows = bits(80, 3, 4, seed=10)
    changed = {
        "fortran": np.asfortranarray(rows),
        "strided": np.repeat(rows, 2, axis=0)[::2],
        "reversed": rows[::-1][::-1],
        "read-only": rows.copy(),
    }[layout]
    changed.setflags(write=layout != "read-only")
    assert torch.equal(pair_entropies(changed), pair_entropies(rows))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 2)),
        torch.zeros(4, 2, dtype=torch.bfloat16),
        np.zeros((4, 2), dtype=complex),
        np.zeros((0, 3), dtype=int),
        np.zeros((3, 0), dtype=int),
        np.zeros(5, dtype=int),
        np.zeros((2, 2, 2), dtype=int),
        [],
        [[0.5, 1.0]],
        [["a", "b"]],
        np.array([[1, None]], dtype=object),
        np.zeros((2, 2), dtype="datetime64[s]"),
        7,
    ],
    ids=[
        "float",
        "bfloat16",
        "complex",
        "no observations",
        "no heads",
        "vector",
        "cube",
        "empty list",
        "float list",
        "text",
        "objects",
        "dates",
        "number",
    ],
)
@ANY_FUNCTION
def test_what_is_not_a_table_of_integers_is_refused(function, bad):
    with pytest.raises(ValueError, match="expected integers") as caught:
        function(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("unsigned", [False, True])
def test_all_integer_types_of_torch_are_taken(dtype, unsigned):
    rows = torch.from_numpy(bits(80, 3, 2, seed=9))
    wider = {torch.int16: torch.uint16, torch.int32: torch.uint32, torch.int64: torch.uint64}
    typed = rows.to(wider.get(dtype, dtype) if unsigned else dtype)
    assert torch.equal(pair_entropies(typed), pair_entropies(rows))
    assert torch.equal(as_symbols(typed), rows)


def test_the_ends_of_a_type_are_different_symbols():
    for dtype in (np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64):
        ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1], dtype=dtype)
        rows = np.stack([ends, ends[::-1]], 1)
        assert entropies(rows).tolist() == pytest.approx([joint(rows, [0])] * 2, abs=1e-12)
        assert float(pair_entropies(rows)[0, 1]) == pytest.approx(joint(rows, [0, 1]), abs=1e-12)


def test_ids_are_compact_and_keep_the_order():
    rows = torch.tensor([[5, -3, 2**40], [7, -3, 0], [5, 9, -(2**40)]])
    assert as_symbols(rows).tolist() == [[0, 0, 2], [1, 0, 1], [0, 1, 0]]
    assert as_symbols(rows).dtype == torch.int64


def test_the_input_is_not_changed():
    rows = bits(50, 3, 4, seed=12)
    before, tensor = rows.copy(), torch.from_numpy(rows.copy())
    for function in (pair_entropies, triple_dividends, phi):
        function(rows)
        function(tensor)
    assert np.array_equal(rows, before)
    assert np.array_equal(tensor.numpy(), before)

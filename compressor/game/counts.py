"""What a scoring epoch accumulates: joint histograms, and tables of symbols where those would not fit or not do."""

from __future__ import annotations

from itertools import combinations
from typing import cast

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from compressor.game.entropy import pair_entropies, plugin_entropy


class PairHistogram(Metric):
    """Dense joint histograms of all pairs of one layer's heads, on the metric's device; merging devices is a sum.

    State: `singles` [heads, alphabet] and `pairs` [C(heads, 2), alphabet, alphabet], int64.
    """

    full_state_update = False
    singles: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, num_heads: int, alphabet: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.alphabet = alphabet
        index = torch.tensor(list(combinations(range(num_heads), 2)), dtype=torch.long).reshape(-1, 2)
        self.register_buffer("index", index.T.contiguous(), persistent=False)
        self.add_state("singles", torch.zeros(num_heads, alphabet, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state(
            "pairs", torch.zeros(index.shape[0], alphabet, alphabet, dtype=torch.int64), dist_reduce_fx="sum"
        )

    @staticmethod
    def bytes(num_heads: int, alphabet: int) -> int:
        """Size of the state."""
        return 8 * alphabet * (num_heads + num_heads * (num_heads - 1) // 2 * alphabet)

    def update(self, symbols: torch.Tensor) -> None:
        """Count symbols [observations, heads], integers from 0 to alphabet − 1."""
        columns = symbols.T
        self._count(self.singles, columns)
        first, second = cast(torch.Tensor, self.index)
        self._count(self.pairs, columns[first] * self.alphabet + columns[second])

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint entropies of all pairs, float64 [heads, heads] on the CPU, and the number of observations."""
        result = torch.diag(plugin_entropy(self.singles))
        if self.num_heads > 1:
            first, second = cast(torch.Tensor, self.index).cpu()
            result[first, second] = result[second, first] = plugin_entropy(self.pairs.flatten(1))
        return result, self.singles[0].sum()

    def pair_entropies(self) -> torch.Tensor:
        """Joint entropies of all pairs, float64 [heads, heads] on the CPU, in nats; the diagonal holds the singles."""
        return self.compute()[0].reshape(self.num_heads, self.num_heads)  # torchmetrics squeezes a 1 × 1

    @property
    def observations(self) -> int:
        """Number of observations, over all devices."""
        return int(self.compute()[1])

    @staticmethod
    def _count(histograms: torch.Tensor, symbols: torch.Tensor) -> None:
        """Add symbols [rows, observations] to as many histograms."""
        flat = histograms.flatten(1)
        flat.scatter_add_(1, symbols, torch.ones_like(symbols))


class SymbolTable(Metric):
    """The symbols themselves, for joint entropies of any order; merging devices is a concatenation."""

    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, symbols: torch.Tensor) -> None:
        """Keep symbols [observations, heads], integers below 2³¹."""
        self.rows.append(symbols.to(torch.int32))

    def compute(self) -> torch.Tensor:
        """Compact ids of the symbols, int64 [observations, heads]: equal ids for equal symbols of a head."""
        rows = dim_zero_cat(self.rows)  # after a merge over devices it is one tensor already
        return torch.stack([_ids(column) for column in rows.unbind(1)], dim=1)

    def symbols(self) -> torch.Tensor:
        """What `compute` gives, also where torchmetrics would squeeze a 1 × 1."""
        return self.compute().reshape(-1, dim_zero_cat(self.rows).shape[1])

    def pair_entropies(self) -> torch.Tensor:
        """The same as `PairHistogram.pair_entropies`, from the table."""
        return pair_entropies(self.symbols())

    @property
    def observations(self) -> int:
        """Number of observations, over all devices."""
        return len(self.symbols())


class TupleTable(SymbolTable):
    """Whole tuples as symbols, one observation per document, put together again where it was split into windows."""

    places: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, symbols: torch.Tensor, places: torch.Tensor) -> None:  # type: ignore[override]
        """Keep the tuples [windows, heads, width] of windows whose places [windows, 2] are (document, part)."""
        super().update(symbols)
        self.places.append(places)

    def compute(self) -> torch.Tensor:
        """Compact ids of the documents' tuples, int64 [documents, heads]."""
        rows, places = dim_zero_cat(self.rows), dim_zero_cat(self.places)
        if not len(rows):
            return rows.new_zeros(0, rows.shape[1], dtype=torch.long)
        documents, parts = torch.unique(places[:, 0], return_inverse=True)[1], places[:, 1]
        columns = []
        for column in rows.unbind(1):
            whole = documents.new_full((int(documents.max()) + 1, int(parts.max()) + 1), -1)
            whole[documents, parts] = _ids(column)
            columns.append(_ids(whole))
        return torch.stack(columns, dim=1)


def _ids(symbols: torch.Tensor) -> torch.Tensor:
    """Number what lies along the first axis: equal numbers for what is equal."""
    numbers: torch.Tensor = torch.unique(symbols, dim=0, return_inverse=True)[1]
    return numbers

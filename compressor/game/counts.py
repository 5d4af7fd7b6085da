"""Joint histograms of pairs of heads, dense or sparse: what a scoring epoch accumulates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from compressor.game.counting import columns_of, measure_coalitions, tally
from compressor.game.estimators import coverage, estimator

FOLDED = 1 << 15  # observations that are counted at one time, for a histogram is swept once each time


class PairStatistics(NamedTuple):
    """What joint histograms come to, float64 on the CPU; the diagonals speak of single heads.

    `entropies` [heads, heads] in nats, `coverage` [heads, heads] the share of the distribution that was seen (Good and
    Turing), `observations` how many.
    """

    entropies: torch.Tensor
    coverage: torch.Tensor
    observations: int


class PairHistogram(Metric):
    """Joint histograms of all pairs of one layer's heads, on the metric's device; merging devices is a sum.

    `PairHistogram.of` chooses between the two ways to keep them, which give the same numbers: `DensePairs` and
    `SparsePairs`.
    """

    full_state_update = False
    pending: list[torch.Tensor]

    def __init__(self, num_heads: int, alphabet: int, estimator: str = "plug-in") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.alphabet = alphabet
        self.estimator = estimator
        self.pairs_of_heads = list(combinations_with_replacement(range(num_heads), 2))
        self.add_state("pending", [], dist_reduce_fx="cat")  # symbols [n, heads] that are not counted yet

    @staticmethod
    def of(num_heads: int, alphabet: int, *, dense: bool, estimator: str = "plug-in") -> PairHistogram:
        """A histogram kept in one way or the other."""
        return (DensePairs if dense else SparsePairs)(num_heads, alphabet, estimator)

    @staticmethod
    def bytes(num_heads: int, alphabet: int) -> int:
        """Size of a dense histogram."""
        return 8 * num_heads * (num_heads + 1) // 2 * alphabet**2

    def update(self, symbols: torch.Tensor) -> None:
        """Count symbols [observations, heads], integers from 0 to alphabet − 1."""
        self.pending.append(symbols)
        if sum(map(len, self.pending)) >= self._patience():
            self._fold()

    def compute(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Joint entropies and coverage, float64 [heads, heads] on the CPU, and the number of observations."""
        self._fold()
        entropy = estimator(self.estimator)
        entropies, covered = torch.zeros(2, self.num_heads, self.num_heads, dtype=torch.float64)
        observations = 0
        for (i, j), counts in zip(self.pairs_of_heads, self._histograms(), strict=True):
            values, multiplicity = tally(counts)
            observations = int(values @ multiplicity)
            if observations:
                entropies[i, j] = entropies[j, i] = entropy(values, multiplicity)
                covered[i, j] = covered[j, i] = coverage(values, multiplicity)
        return entropies, covered, torch.tensor(observations)

    def statistics(self) -> PairStatistics:
        """What `compute` gives, also where torchmetrics would squeeze a 1 × 1."""
        entropies, covered, observations = self.compute()
        shape = (self.num_heads, self.num_heads)
        return PairStatistics(entropies.reshape(shape), covered.reshape(shape), int(observations))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Count what is pending before devices are merged: a device may have nothing else."""
        self._fold()
        super().sync(*args, **kwargs)

    def _fold(self) -> None:
        pending = dim_zero_cat(self.pending) if len(self.pending) else None
        self.pending = []
        if pending is not None and len(pending):
            if int(pending.min()) < 0 or int(pending.max()) >= self.alphabet:
                span = f"{int(pending.min())} to {int(pending.max())}"
                raise ValueError(f"symbols run from {span}; expected 0 to {self.alphabet - 1}")
            self._add(pending.T.long().contiguous())

    def _codes(self, columns: torch.Tensor) -> Iterator[torch.Tensor]:
        """One number for each pair of symbols, pair by pair: [observations] each."""
        for i, j in self.pairs_of_heads:
            yield columns[i] * self.alphabet + columns[j]

    def _patience(self) -> int:
        return FOLDED

    @abstractmethod
    def _add(self, columns: torch.Tensor) -> None:
        """Count symbols [heads, observations]."""

    @abstractmethod
    def _histograms(self) -> Iterator[np.ndarray]:
        """Counts of each pair."""


class DensePairs(PairHistogram):
    """State: `pairs` [heads · (heads + 1) / 2, alphabet²], int64; nothing until something is counted or merged."""

    pairs: torch.Tensor

    def __init__(self, num_heads: int, alphabet: int, estimator: str = "plug-in") -> None:
        super().__init__(num_heads, alphabet, estimator)
        self.add_state("pairs", torch.zeros(0, alphabet**2, dtype=torch.int64), dist_reduce_fx="sum")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merge devices that have counted nothing, too."""
        self._fold()
        self._make_room()
        super().sync(*args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge with what has counted nothing, too."""
        for metric in (self, incoming_state):
            if isinstance(metric, DensePairs):
                metric._make_room()
        super().merge_state(incoming_state)

    def _make_room(self) -> None:
        # Not in the constructor: torchmetrics keeps a copy of what a state starts with.
        if not len(self.pairs):
            self.pairs = self.pairs.new_zeros(len(self.pairs_of_heads), self.alphabet**2)

    def _add(self, columns: torch.Tensor) -> None:
        self._make_room()
        # Pair by pair, since one histogram stays in a processor's cache, and all of them do not.
        one = torch.ones_like(columns[0])
        for row, codes in zip(self.pairs, self._codes(columns), strict=True):
            row.scatter_add_(0, codes, one)

    def _histograms(self) -> Iterator[np.ndarray]:
        self._make_room()
        return iter(self.pairs.cpu().numpy())


class SparsePairs(PairHistogram):
    """State: `codes`, sorted and unique, and their `counts`, int64; the code of a pair starts at pair · alphabet²."""

    codes: list[torch.Tensor]
    counts: list[torch.Tensor]

    def __init__(self, num_heads: int, alphabet: int, estimator: str = "plug-in") -> None:
        super().__init__(num_heads, alphabet, estimator)
        if len(self.pairs_of_heads) * alphabet**2 >= 1 << 63:
            raise ValueError(f"{num_heads} heads of {alphabet} symbols have more pairs than int64 can number")
        self.add_state("codes", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merge devices that have counted nothing, too."""
        self._fold()
        if not len(self.codes):
            self.codes, self.counts = ([torch.zeros(0, dtype=torch.int64, device=self.device)] for _ in range(2))
        super().sync(*args, **kwargs)

    def _patience(self) -> int:
        # What is counted is merged with as much as there is, so that the merging stays a small part of the work.
        return max(FOLDED, sum(map(len, self.codes)) // len(self.pairs_of_heads))

    def _add(self, columns: torch.Tensor) -> None:
        for pair, codes in enumerate(self._codes(columns)):
            found, counts = torch.unique(codes, return_counts=True)
            self.codes.append(found + pair * self.alphabet**2)
            self.counts.append(counts)
        self._merge()

    def _merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        codes, counts = dim_zero_cat(self.codes), dim_zero_cat(self.counts)
        found, place = torch.unique(codes, return_inverse=True)
        summed = torch.zeros_like(found).scatter_add_(0, place, counts)
        self.codes, self.counts = [found], [summed]
        return found, summed

    def _histograms(self) -> Iterator[np.ndarray]:
        if not len(self.codes):
            return iter([np.zeros(0, dtype=np.int64)] * len(self.pairs_of_heads))
        codes, counts = (part.cpu().numpy() for part in self._merge())
        starts = np.arange(1, len(self.pairs_of_heads)) * self.alphabet**2
        return iter(np.split(counts, np.searchsorted(codes, starts)))


def pair_statistics(symbols: torch.Tensor, kind: str = "plug-in") -> PairStatistics:
    """What histograms of symbols [observations, heads] would come to, from the symbols themselves."""
    heads = symbols.shape[1]
    if not len(symbols):
        nothing = torch.zeros(2, heads, heads, dtype=torch.float64)
        return PairStatistics(nothing[0], nothing[1], 0)
    pairs = list(combinations_with_replacement(range(heads), 2))
    columns, entropy = columns_of(symbols), estimator(kind)
    both = torch.zeros(2, heads, heads, dtype=torch.float64)
    i, j = torch.tensor(pairs).unbind(1)
    for result, measure in zip(both, (entropy, coverage), strict=True):
        coalitions = [tuple(sorted({*pair})) for pair in pairs]
        result[i, j] = result[j, i] = torch.from_numpy(measure_coalitions(columns, coalitions, measure))
    return PairStatistics(both[0], both[1], len(symbols))

"""The scoring epoch: watch every layer's attention, count which keys its heads attend to most, and play the game."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch

from compressor.analysis import Analysis, Evidence, Findings, analyse
from compressor.attention.layout import output_norms
from compressor.attention.nouns import AttentionLayer
from compressor.attention.probe import (
    SYMBOLS,
    Attended,
    AttentionProbe,
    positions,
    sequence_symbols,
    token_symbols,
)
from compressor.callbacks.tables import Observations, SymbolTable, TupleTable
from compressor.console import log, track
from compressor.errors import DataError, ModelError, RecipeError
from compressor.game.counts import PairHistogram, PairStatistics, pair_statistics
from compressor.game.dividends import pair_dividends_from
from compressor.game.values import phi_from
from compressor.measure.sums import WideSums
from compressor.module import LanguageModel
from compressor.types import LayerScores

GUESSED_MEMORY = 4 << 30
NOTHING = "there is nothing to score: no token was observed; give at least one document"
# Whether to end the epoch, given how many documents were seen and a way to ask what they come to, by layer.
Stop = Callable[[int, Callable[[], dict[int, PairStatistics]]], bool]


class FirstKeyMass(WideSums):
    """Mean attention mass of each head on the first key, over the real queries (after arXiv 2601.06787): [heads]."""

    mass: torch.Tensor
    queries: torch.Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.add_state("mass", torch.zeros(num_heads, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mass: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Add masses [batch, heads, queries] where the mask [batch, queries] is 1."""
        real = attention_mask[:, None].bool()
        self.mass += torch.where(real, mass, 0).sum((0, 2), dtype=self.mass.dtype)  # padded queries may hold NaN
        self.queries += attention_mask.sum()

    def compute(self) -> torch.Tensor:
        """The mean per head, float64 on the CPU."""
        return (self.mass / self.queries).cpu()


class LayerCounts(torch.nn.Module):
    """Everything counted about one layer: pair counts, symbols, or both, and the mass on the first key."""

    def __init__(self, pairs: PairHistogram | None, symbols: SymbolTable | None, first: FirstKeyMass) -> None:
        super().__init__()
        self.pairs = pairs
        self.symbols = symbols
        self.first = first


class HeadScoring(L.Callback):
    """Score attention heads while `Trainer.predict` runs over calibration text; `layers_scored` holds the outcome.

    The pair counts are histograms on the model's device: dense while all of them fit the memory budget, sparse
    otherwise; both give the same numbers. Symbols are kept where more is asked than pairs tell.

    Args:
        layers: the model's attention layers.
        longest: the longest sequence, in tokens.
        symbol: "key", "offset" (one observation per token) or "sequence" (one per document; batches say by `places`
            [batch, 2] which windows are of one document, and without that every row is one).
        analysis: what to find out beyond φ; by default the triple dividends of layer 0.
        memory_budget: bytes for the pair counts, and as many for symbols; by default a quarter of what is free.
        stop: asked after every batch whether the epoch may end.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        longest: int,
        symbol: str = "key",
        analysis: Analysis | None = None,
        memory_budget: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        if symbol not in SYMBOLS:
            raise RecipeError(f"symbol is {symbol!r}; expected one of {', '.join(SYMBOLS)}")
        self.analysis = Analysis() if analysis is None else analysis
        self.analysis.check([layer.num_heads for layer in layers])
        self.layers = [layer for layer in layers if layer.num_heads]
        self.num_layers = len(layers)
        self.longest = longest
        self.symbol = symbol
        self.memory_budget = memory_budget
        self.stop = stop
        self.layers_scored: tuple[LayerScores, ...] = ()
        self._shift = 0
        self._documents = 0
        self._seen: set[int] = set()
        self._probe: AttentionProbe | None = None
        self._counts: dict[int, LayerCounts] = {}
        self._observed = Observations()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for the counts and attach the probe."""
        assert isinstance(pl_module, LanguageModel)
        # Where queries see later keys too, offsets run from 1 − longest to longest − 1; counts want them from 0 on.
        self._shift = self.longest - 1 if self.symbol == "offset" and pl_module.task == "masked" else 0
        alphabet = self.longest + self._shift
        needed = sum(PairHistogram.bytes(layer.num_heads, alphabet) for layer in self.layers)
        budget = free_memory(pl_module.device) // 4 if self.memory_budget is None else self.memory_budget
        dense = needed <= budget
        if self.symbol != "sequence":
            log.info(
                f"counting pairs in {'dense' if dense else 'sparse'} joint histograms on {pl_module.device}: dense "
                f"ones take {needed / 2**20:,.0f} MiB, and the budget is {budget / 2**20:,.0f} MiB"
            )
        self._documents = 0
        self._seen = set()
        self._observed = Observations().to(pl_module.device)
        share = budget // max(1, len(self.layers))
        self._counts = {
            layer.index: LayerCounts(
                None
                if self.symbol == "sequence"
                else PairHistogram.of(layer.num_heads, alphabet, dense=dense, estimator=self.analysis.estimator),
                self._table(layer.index, alphabet, share),
                FirstKeyMass(layer.num_heads),
            ).to(pl_module.device)
            for layer in self.layers
        }
        probe = AttentionProbe(pl_module.model, self.layers, in_passing=True)
        if probe.fallback:
            log.warning(
                f"{type(pl_module.model).__name__} bypasses the attention interface: reading its attention matrices "
                "instead, which needs more memory"
            )
        self._probe = probe.__enter__()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, torch.Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what the batch showed."""
        assert self._probe is not None
        mask, places = batch["attention_mask"], batch.get("places")
        if places is None:  # every row is a document of its own
            documents = torch.arange(len(mask), device=mask.device) + self._documents
            places = torch.stack([documents, torch.zeros_like(documents)], dim=1)
        self._documents += len(mask)
        real = batch["real"] if "real" in batch else mask.flatten().nonzero().squeeze(1)
        if self.symbol != "sequence":
            rows = torch.div(real, mask.shape[1], rounding_mode="floor")
            self._observed.update(places[rows, 0], positions(mask).flatten()[real])
        for index, attended in self._probe.take().items():
            self._count(self._counts[index], attended, mask, places, real)
        if self.stop is not None:
            self._seen.update(places[:, 0].tolist())
            if self.stop(len(self._seen), self._statistics):
                raise StopIteration  # which ends Lightning's loop over the batches, and nothing else

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Detach the probe and turn the counts into scores."""
        assert isinstance(pl_module, LanguageModel)
        self._detach()
        scored = {}
        with track("analysing", len(self.layers)) as done:
            for layer in self.layers:
                scored[layer.index] = self._score(pl_module, layer)
                self._counts[layer.index].pairs = None  # the largest part of what is held; the symbols may be wanted
                done()
        self.layers_scored = tuple(scored.get(index, _nothing()) for index in range(self.num_layers))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was, however the run ended."""
        self._detach()

    def _detach(self) -> None:
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._probe = None

    def symbols_of(self, layers: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The symbols of layers that were kept, [observations, heads] each, in the order of the observations."""
        tables = [self._counts[index].symbols for index in layers]
        return tuple(table.symbols() for table in tables if table is not None)

    def _table(self, layer: int, alphabet: int, budget: int) -> SymbolTable | None:
        if self.symbol == "sequence":
            return TupleTable(alphabet, budget)
        return SymbolTable(alphabet, budget) if self.analysis.wants_symbols(layer) else None

    def _count(
        self, counts: LayerCounts, uses: list[Attended], mask: torch.Tensor, places: torch.Tensor, real: torch.Tensor
    ) -> None:
        """Count one batch; a layer that is applied several times is observed as often."""
        tokens = mask.shape[1]
        for attended in uses:
            if (attended.key.shape[-1], attended.keys) != (tokens, tokens):
                raise ModelError(
                    f"a layer attends from {attended.key.shape[-1]} queries to {attended.keys} keys where the text has "
                    f"{tokens} tokens: its queries or keys are not the tokens, and cannot be scored"
                )
        for attended in uses:
            counts.first.update(attended.first, mask)
        if isinstance(counts.symbols, TupleTable):
            tuples = [sequence_symbols(attended.key, mask, self.longest) for attended in uses]
            counts.symbols.update(torch.cat(tuples, dim=-1), places)
            return
        found = [token_symbols(attended.key, mask, self.symbol, real) + self._shift for attended in uses]
        symbols = torch.stack(found, dim=1).flatten(0, 1)  # the uses of one token together
        if counts.pairs is not None:
            counts.pairs.update(symbols)
        if counts.symbols is not None:
            counts.symbols.update(symbols)

    def _statistics(self) -> dict[int, PairStatistics]:
        """What the pairs of each layer come to so far."""
        return {layer.index: self._pairs(layer) for layer in self.layers}

    def _pairs(self, layer: AttentionLayer) -> PairStatistics:
        counts = self._counts[layer.index]
        if counts.pairs is not None:
            return counts.pairs.statistics()
        assert counts.symbols is not None
        symbols = counts.symbols.symbols()
        if not len(symbols):
            raise DataError(NOTHING)
        return pair_statistics(symbols, self.analysis.estimator)

    def _origins(self, layer: AttentionLayer, observations: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of which documents, and of which places there, the symbols of a layer are."""
        if self.symbol == "sequence":
            return torch.arange(observations), None
        documents, places = self._observed.compute().repeat_interleave(layer.uses, 0).unbind(1)
        return documents, places

    def _score(self, module: LanguageModel, layer: AttentionLayer) -> LayerScores:
        counts = self._counts[layer.index]
        pairs = self._pairs(layer)
        if not pairs.observations:
            raise DataError(NOTHING)
        found: Findings = {}
        if counts.symbols is not None:
            symbols = counts.symbols.symbols()
            evidence = Evidence(symbols, pairs.entropies, *self._origins(layer, len(symbols)))
            found = analyse(evidence, layer.index, self.analysis)
        return LayerScores(
            phi=phi_from(pairs.entropies),
            entropy=pairs.entropies.diagonal().clone(),
            pair_dividends=pair_dividends_from(pairs.entropies),
            coverage=pairs.coverage,
            first_key_mass=counts.first.compute().reshape(-1),  # torchmetrics squeezes a lone head's
            output_norm=output_norms(module.model, layer),
            observations=pairs.observations,
            **found,
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; the machine's free memory, or a guess, where the device does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system counts its free pages
        return GUESSED_MEMORY


def _nothing() -> LayerScores:
    """The scores of a layer without heads."""
    none = torch.zeros(0, dtype=torch.float64)
    return LayerScores(none, none, none.reshape(0, 0), none.reshape(0, 0), none, none, 0)

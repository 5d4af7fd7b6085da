"""The scoring epoch: watch every layer's attention, count which keys its heads attend to most, and play the game."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from compressor.attention.layout import output_norms
from compressor.attention.nouns import AttentionLayer
from compressor.attention.probe import SYMBOLS, Attended, AttentionProbe, sequence_symbols, token_symbols
from compressor.console import log
from compressor.errors import DataError, ModelError, RecipeError
from compressor.game.counts import PairHistogram, SymbolTable, TupleTable
from compressor.game.dividends import pair_dividends_from, triple_dividends_from
from compressor.game.entropy import triple_entropies
from compressor.game.values import phi_from
from compressor.measure.sums import WideSums
from compressor.module import LanguageModel
from compressor.types import LayerScores

GUESSED_MEMORY = 4 << 30


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

    The pair counts are dense histograms on the model's device while all of them fit a quarter of its free memory, and
    tables of symbols otherwise; both give the same numbers.

    Args:
        layers: the model's attention layers.
        longest: the longest sequence, in tokens.
        symbol: "key", "offset" (one observation per token) or "sequence" (one per document; batches say by `places`
            [batch, 2] which windows are of one document, and without that every row is one).
        triple_layers: layers whose triple dividends are computed.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        longest: int,
        symbol: str = "key",
        triple_layers: Sequence[int] = (0,),
    ) -> None:
        if symbol not in SYMBOLS:
            raise RecipeError(f"symbol is {symbol!r}; expected one of {', '.join(SYMBOLS)}")
        for index in triple_layers:
            if not 0 <= index < len(layers):
                raise RecipeError(f"triple_layers names layer {index}; the model has layers 0 to {len(layers) - 1}")
        self.layers = [layer for layer in layers if layer.num_heads]
        self.num_layers = len(layers)
        self.longest = longest
        self.symbol = symbol
        self.triple_layers = frozenset(triple_layers)
        self.layers_scored: tuple[LayerScores, ...] = ()
        self._shift = 0
        self._documents = 0
        self._probe: AttentionProbe | None = None
        self._counts: dict[int, LayerCounts] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for the counts and attach the probe."""
        assert isinstance(pl_module, LanguageModel)
        # Where queries see later keys too, offsets run from 1 − longest to longest − 1; counts want them from 0 on.
        self._shift = self.longest - 1 if self.symbol == "offset" and pl_module.task == "masked" else 0
        alphabet = self.longest + self._shift
        needed = sum(PairHistogram.bytes(layer.num_heads, alphabet) for layer in self.layers)
        dense = self.symbol != "sequence" and needed <= free_memory(pl_module.device) // 4
        if self.symbol != "sequence":
            how = "dense joint histograms" if dense else "tables of symbols, for dense histograms would need"
            log.info(f"counting pairs in {how} ({needed / 2**20:,.0f} MiB) on {pl_module.device}")
        self._documents = 0
        self._counts = {
            layer.index: LayerCounts(
                PairHistogram(layer.num_heads, alphabet) if dense else None,
                self._table(dense, layer.index),
                FirstKeyMass(layer.num_heads),
            ).to(pl_module.device)
            for layer in self.layers
        }
        probe = AttentionProbe(pl_module.model, self.layers)
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
        for index, attended in self._probe.take().items():
            self._count(self._counts[index], attended, mask, places)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Detach the probe and turn the counts into scores."""
        assert isinstance(pl_module, LanguageModel)
        self._detach()
        scored = {layer.index: self._score(pl_module, layer) for layer in self.layers}
        self.layers_scored = tuple(scored.get(index, _nothing()) for index in range(self.num_layers))
        self._counts = {}

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

    def _table(self, dense: bool, layer: int) -> SymbolTable | None:
        if self.symbol == "sequence":
            return TupleTable()
        return SymbolTable() if not dense or layer in self.triple_layers else None

    def _count(self, counts: LayerCounts, uses: list[Attended], mask: torch.Tensor, places: torch.Tensor) -> None:
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
        for attended in uses:
            symbols = token_symbols(attended.key, mask, self.symbol) + self._shift
            if counts.pairs is not None:
                counts.pairs.update(symbols)
            if counts.symbols is not None:
                counts.symbols.update(symbols)

    def _score(self, module: LanguageModel, layer: AttentionLayer) -> LayerScores:
        counts = self._counts[layer.index]
        store = counts.pairs if counts.pairs is not None else counts.symbols
        assert store is not None
        observations = store.observations
        if not observations:
            raise DataError("there is nothing to score: no token was observed; give at least one document")
        pairs = store.pair_entropies()
        triples = None
        if layer.index in self.triple_layers:
            assert counts.symbols is not None
            triples = triple_dividends_from(pairs, triple_entropies(counts.symbols.symbols()))
        return LayerScores(
            phi=phi_from(pairs),
            entropy=pairs.diagonal().clone(),
            pair_dividends=pair_dividends_from(pairs),
            triple_dividends=triples,
            first_key_mass=counts.first.compute().reshape(-1),  # torchmetrics squeezes a lone head's
            output_norm=output_norms(module.model, layer),
            observations=observations,
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
    return LayerScores(none, none, none.reshape(0, 0), None, none, none, 0)

"""What a scoring epoch costs beside the model itself: GPT-2 small's shape, random weights and token ids, no padding.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --tokens 1024 --batch-size 4 --batches 9

Four epochs over the same batches, one after the other in every repeat: the whole model; its backbone alone, which is
all that scoring needs of it; the scoring epoch, φ included; and the same φ by the obvious way, which keeps whole
attention matrices, takes their argmax and counts pairs with NumPy. Memory is that of one batch: live tensors at most,
beyond parameters and, in the scoring epoch, the histograms. Writes benchmarks/results/scoring-gpt2-shape-TOKENS.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from clock import interleaved, ratios, spread
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.analysis import Analysis
from compressor.attention import AttentionLayer, attention_layers
from compressor.callbacks import HeadScoring
from compressor.console import log, show_logs
from compressor.environment import machine, versions
from compressor.files import to_json
from compressor.game.values import phi_from
from compressor.measure.memory import parameter_bytes, peak_bytes
from compressor.module import Batch, LanguageModel
from compressor.trainer import run_scoring

RESULTS = Path(__file__).parent / "results"


class Batches(L.LightningDataModule):
    """Ready-made batches."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def predict_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class Weighed(HeadScoring):
    """A scoring epoch that also tells what its histograms weigh at the end."""

    histogram_bytes = 0

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        for counts in self._counts.values():
            counts.pairs._fold()
            states = (getattr(counts.pairs, name) for name in counts.pairs._defaults)
            self.histogram_bytes += sum(tensor.nbytes for tensor in tree_leaves(list(states)))
        super().on_predict_end(trainer, pl_module)


def scored(model: GPT2LMHeadModel, layers: Sequence[AttentionLayer], batches: list[Batch]) -> Weighed:
    """The scoring epoch."""
    scoring = Weighed(layers, batches[0]["input_ids"].shape[1], analysis=Analysis(layers=()))
    run_scoring(LanguageModel(model, "causal"), Batches(batches), scoring, model.device)  # type: ignore[arg-type]
    return scoring


@torch.inference_mode()
def naive(model: GPT2LMHeadModel, batches: list[Batch]) -> list[torch.Tensor]:
    """φ of every layer from whole attention matrices, an np.unique for every pair of heads."""
    symbols: list[list[np.ndarray]] = [[] for _ in range(model.config.num_hidden_layers)]
    for batch in batches:
        for index, weights in enumerate(model(**batch, output_attentions=True).attentions):
            found = weights.argmax(-1).transpose(1, 2).flatten(0, 1)
            symbols[index].append(found.cpu().numpy())
    return [phi_from(_entropies(np.concatenate(parts))) for parts in symbols]


def _entropies(symbols: np.ndarray) -> torch.Tensor:
    """Joint entropies of all pairs of the columns of [observations, heads], in nats."""
    heads = symbols.shape[1]
    table = torch.zeros(heads, heads, dtype=torch.float64)
    for left, right in [*combinations(range(heads), 2), *((head, head) for head in range(heads))]:
        joint = symbols[:, left] * (symbols.max() + 1) + symbols[:, right]
        shares = np.unique(joint, return_counts=True)[1] / len(joint)
        table[left, right] = table[right, left] = float(-(shares * np.log(shares)).sum())
    return table


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds, and the ratios of every repeat to the model and to its backbone: median, minimum and maximum."""
    row: dict[str, Any] = {"name": name, "seconds": spread(seconds[name])}
    for base in ("model", "backbone"):
        row[f"to_{base}"] = ratios(seconds[name], seconds[base])
    log.info(
        f"{name}: {row['to_model']['median']:.3f} of the model, {row['to_backbone']['median']:.3f} of its backbone"
    )
    return row


def peak(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes of live tensors at most during a run, beyond the model's own."""
    return peak_bytes(run, model.parameters()) - parameter_bytes(model)


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    show_logs(quiet=False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="sdpa").eval()
    eager = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    ids = torch.randint(model.config.vocab_size, (args.batches, args.batch_size, args.tokens))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]

    layers = attention_layers(model)

    @torch.inference_mode()
    def forward(part: torch.nn.Module, batches: list[Batch]) -> None:
        for batch in batches:
            part(**batch, use_cache=False)

    ways: dict[str, Callable[[list[Batch]], Any]] = {
        "model": lambda batches: forward(model, batches),
        "backbone": lambda batches: forward(model.base_model, batches),
        "scoring": lambda batches: scored(model, layers, batches),
        "naive": lambda batches: naive(eager, batches),
    }
    ours = ways["scoring"](batches)
    pairs = zip([layer.phi for layer in ours.layers_scored], ways["naive"](batches), strict=True)
    apart = max((mine - theirs).abs().max().item() for mine, theirs in pairs)
    memory = {name: peak(partial(way, batches[:1]), eager if name == "naive" else model) for name, way in ways.items()}
    # Over the whole epoch, for histograms come into being as it goes on.
    memory["scoring"] = peak(partial(ways["scoring"], batches), model) - ours.histogram_bytes
    seconds = interleaved({name: partial(way, batches) for name, way in ways.items()}, args.repeats)
    document = {
        "suite": "scoring",
        "rows": [row(name, seconds) | {"memory_bytes": memory[name]} for name in ways],
        "histogram_bytes": ours.histogram_bytes,
        "largest_difference_of_phi": apart,
        "settings": {**vars(args), "dtype": str(model.dtype)},
        "model": "GPT-2 small's shape, random weights",
        "machine": machine(),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"scoring-gpt2-shape-{args.tokens}.json"
    target.write_text(to_json(document), encoding="utf-8")
    log.info(f"written: benchmarks/results/{target.name}")


if __name__ == "__main__":
    main()

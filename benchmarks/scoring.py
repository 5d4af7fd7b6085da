"""What a scoring epoch costs beside the model itself: GPT-2 small's shape, random weights and token ids, no padding.

    python benchmarks/scoring.py

Four epochs over the same batches, one after the other in every repeat: the whole model; its backbone alone, which is
all that scoring needs of it; the scoring epoch, φ included; and the same φ by the obvious way, which keeps whole
attention matrices, takes their argmax and counts pairs with NumPy. Writes benchmarks/results/scoring-gpt2-shape.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.analysis import Analysis
from compressor.attention import AttentionLayer, attention_layers
from compressor.callbacks import HeadScoring
from compressor.console import log, show_logs
from compressor.environment import machine, versions
from compressor.files import to_json
from compressor.game.values import phi_from
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


def scored(model: GPT2LMHeadModel, layers: Sequence[AttentionLayer], batches: list[Batch]) -> list[torch.Tensor]:
    """φ of every layer by the scoring epoch."""
    scoring = HeadScoring(layers, batches[0]["input_ids"].shape[1], analysis=Analysis(layers=()))
    run_scoring(LanguageModel(model, "causal"), Batches(batches), scoring, model.device)  # type: ignore[arg-type]
    return [layer.phi for layer in scoring.layers_scored]


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


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run in every repeat, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
        log.info(
            f"repeat {repeat + 1} of {repeats}: " + ", ".join(f"{name} {s[-1]:.1f} s" for name, s in seconds.items())
        )
    return seconds


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds, and the ratios of every repeat to the model and to its backbone: median, minimum and maximum."""
    row: dict[str, Any] = {"name": name, "seconds": _spread(seconds[name])}
    for base in ("model", "backbone"):
        row[f"to_{base}"] = _spread([own / other for own, other in zip(seconds[name], seconds[base], strict=True)])
    log.info(
        f"{name}: {row['to_model']['median']:.3f} of the model, {row['to_backbone']['median']:.3f} of its backbone"
    )
    return row


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
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
    def forward(part: torch.nn.Module) -> None:
        for batch in batches:
            part(**batch, use_cache=False)

    runs: dict[str, Callable[[], Any]] = {
        "model": lambda: forward(model),
        "backbone": lambda: forward(model.base_model),
        "scoring": lambda: scored(model, layers, batches),
        "naive": lambda: naive(eager, batches),
    }
    pairs = zip(runs["scoring"](), runs["naive"](), strict=True)
    apart = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    seconds = measure(runs, args.repeats)
    document = {
        "suite": "scoring",
        "rows": [row(name, seconds) for name in runs],
        "largest_difference_of_phi": apart,
        "settings": {**vars(args), "dtype": str(model.dtype)},
        "model": "GPT-2 small's shape, random weights",
        "machine": machine(),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "scoring-gpt2-shape.json"
    target.write_text(to_json(document), encoding="utf-8")
    log.info(f"written: benchmarks/results/{target.name}")


if __name__ == "__main__":
    main()

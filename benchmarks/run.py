"""The benchmarks of record: one JSON per suite and model in benchmarks/results/, with machine, versions and settings.

    python benchmarks/run.py quality NAME --model DIR --data CALIBRATION --eval-data HELD_OUT
    python benchmarks/run.py quality NAME-groups --model DIR --data CALIBRATION --unit query --ratio 0.25
    python benchmarks/run.py speed NAME --model DIR --data CALIBRATION
    python benchmarks/run.py speed gpt2-shape

`quality` removes a fifth of the heads by every criterion and at random, of every layer or model-wide, and measures
perplexity on the same held-out documents, as cut and repaired, and costs; Torch-Pruning's choice is another row where
that package is installed. `speed` times the dense model against φ's pruned ones, and one that heads and channels left
until a target of FLOPs was met, interleaved; without `--model` it does so on a model of GPT-2 small's shape with random
weights, heads chosen by magnitude: a time does not depend on which heads go.
`python benchmarks/tables.py` turns the JSON into the tables of the documentation.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import record
import torch
import torch_pruner
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from compressor import comparison
from compressor.attention import attention_layers, prune_heads
from compressor.attention.layout import output_norms
from compressor.budget import UNITS, Rule, allocate
from compressor.budget import choose as choose_by
from compressor.config import Recipe
from compressor.console import log, show_logs
from compressor.criteria import criteria, criterion, random_scores
from compressor.data import TextDataModule
from compressor.loading import LoadedModel, load_model
from compressor.measure.costs import measure_costs
from compressor.measure.prices import flop_prices
from compressor.mlp import mlp_layers
from compressor.mlp.layout import output_norms as channel_norms
from compressor.module import Batch, LanguageModel
from compressor.preparation import data_for
from compressor.removal import remove
from compressor.rounds import in_rounds
from compressor.scoring import score_model
from compressor.trainer import run_perplexity
from compressor.types import PruningPlan, Scores, UnitScores

RATIOS = (0.05, 0.1, 0.2)
SCOPES = ("layer", "global")
TARGET = 0.82  # of the FLOPs, left by speed's last model
REFERENCE = "loss-game"  # what every other criterion is compared with, document by document
TWICE = f"{REFERENCE} in 2 rounds"


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and costs by every criterion and at random, as cut and repaired, for both scopes."""
    recipe = Recipe(
        model=args.model,
        data=args.data,
        eval_data=args.eval_data,
        samples=args.samples,
        eval_samples=args.eval_samples,
        random_seeds=args.random_seeds,
        device=args.device,
        values=[rival.needs for rival in criteria() if rival.needs],
    )
    dense = _dense(args)
    scores = score_model(dense, recipe)
    data = data_for(dense, recipe)
    calibration = list(data.loss_dataloader())
    log.info(data.describe()[1])
    rows: list[dict[str, Any]] = []
    summaries: dict[str, Any] = {}
    groups = [layer["groups"] for layer in scores.facts["layers"]]
    choose = partial(allocate, unit=args.unit, groups=groups)
    for scope in SCOPES:
        plans: dict[str, PruningPlan] = {}
        for rival in criteria():
            if rival.name != "random":
                plans[rival.name] = choose(rival(scores), args.ratio, scope=scope)
        for seed in range(args.random_seeds):
            draw = random_scores([len(layer.phi) for layer in scores.layers], seed)
            plans[f"random (seed {seed})"] = choose(draw, args.ratio, scope=scope, seed=seed)
        plans[TWICE] = _in_rounds(dense, scores, partial(choose, scope=scope), args.ratio, calibration)
        others = torch_pruner.cuts(dense, calibration, args.ratio, scope) if args.unit == "head" else {}
        plans |= {name: cut.plan for name, cut in others.items()}
        notes = {name: _own(name, cut, dense, data) for name, cut in others.items()}
        for repaired in (False, True):
            found, losses = comparison.measure_quality(
                dense, plans, data, calibration=calibration if repaired else None, seed=recipe.seed
            )
            column = f"{scope}{' repaired' if repaired else ''}"
            summaries[column] = comparison.summarise(found, losses, REFERENCE, recipe.seed)
            for row in found:
                plan = plans[row["name"]].to_dict() if row["name"] in plans else None
                rows.append({**row, **notes.get(row["name"], {}), "repaired": repaired, "plan": plan})
    return {
        "suite": "quality",
        "rows": rows,
        "summaries": summaries,
        "rank_correlation_with_loo": _ranks(scores),
        "costs_per_example": {
            **{rival.name: rival.cost for rival in criteria()},
            TWICE: f"twice {criterion(REFERENCE).cost}, and a repair",
            **{name: cost for name, (_, cost) in torch_pruner.IMPORTANCES.items()},
        },
        "calibration": _text(data.calibration),
        "evaluation": _text(data.evaluation),
        "settings": {
            "symbol": recipe.symbol,
            "ratio": args.ratio,
            "unit": args.unit,
            "reference": REFERENCE,
            "seed": recipe.seed,
            "dtype": str(dense.model.dtype),
        },
    }


def _own(name: str, cut: torch_pruner.Cut, dense: LoadedModel, data: TextDataModule) -> dict[str, Any]:
    """What was done for a row of another toolkit's, and the perplexity of the very model that it cut."""
    module = LanguageModel(cut.model, dense.task)
    own = run_perplexity(module, data, dense.model.device, f"perplexity of {name}, as it cuts").perplexity
    return {"own_perplexity": own, "how": torch_pruner.HOW, "version": version("torch-pruning")}


def _in_rounds(
    dense: LoadedModel,
    scores: Scores,
    choose: Callable[[UnitScores, float], PruningPlan],
    ratio: float,
    calibration: Sequence[Batch],
) -> PruningPlan:
    """The plan of two rounds, between which what stays is repaired."""

    def part(heads: UnitScores, channels: UnitScores | None, share: float) -> PruningPlan:
        return choose(heads, ratio * share)

    first = part(criterion(REFERENCE)(scores), None, 0.5)
    return in_rounds(dense, first, part, calibration, 2, repaired=True, seed=0)


def _ranks(scores: Scores) -> dict[str, float]:
    """Spearman's correlation of every criterion with the loss without each head alone, over all heads of the model."""
    loo = _ranked([value for layer in criterion("loo")(scores).values for value in layer])
    found = {}
    for rival in criteria():
        own = _ranked([value for layer in rival(scores).values for value in layer])
        found[rival.name] = float(torch.corrcoef(torch.stack([own, loo]))[0, 1])
    return found


def _ranked(values: list[float]) -> torch.Tensor:
    """Ranks, the mean of them where values tie."""
    table = torch.tensor(values, dtype=torch.float64)
    below, equal = (compare(table[:, None], table).sum(0).double() for compare in (torch.lt, torch.eq))
    return below + (equal - 1) / 2


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the dense and the pruned models, interleaved."""
    if args.model is None:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config()).to(args.device).eval()
        norms = [tuple(output_norms(model, layer).tolist()) for layer in attention_layers(model)]
        ranking = UnitScores("magnitude", tuple(norms))
    else:
        dense = _dense(args)
        ranking = criterion("gt-fep")(
            score_model(dense, Recipe(model=args.model, data=args.data, samples=args.samples))
        )
        model = dense.model
    models: dict[str, PreTrainedModel] = {"dense": model}
    for ratio in RATIOS:
        plan = allocate(ranking, ratio)
        models[f"{ranking.criterion} {ratio:g}"] = prune_heads(copy.deepcopy(model), plan.heads)
    models[f"{TARGET:.0%} of the FLOPs"] = _to_target(model)
    settings = {
        "batch_size": args.batch_size,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
    }
    timings = comparison.measure_speed(models, causal=True, seed=0, **settings)
    rows = [
        {"name": name, "costs": measure_costs(candidate, 256, causal=True), "throughput": timings[name]}
        for name, candidate in models.items()
    ]
    return {"suite": "speed", "rows": rows, "settings": {**settings, "dtype": str(model.dtype)}}


def _to_target(dense: PreTrainedModel) -> PreTrainedModel:
    """Without as large a share of every layer's heads and channels, those of the lowest norm, as a target asks for."""
    layers = {"heads": attention_layers(dense), "channels": mlp_layers(dense)}
    heads = [tuple(output_norms(dense, layer).tolist()) for layer in layers["heads"]]
    channels = [tuple(channel_norms(dense, layer).tolist()) for layer in layers["channels"]]
    prices = flop_prices(dense, 256)

    def costs(structure: str, index: int, portions: tuple[tuple[int, ...], ...]) -> Sequence[float]:
        return prices.saved_along(layers[structure][index], portions)

    rule = Rule(target=("flops", TARGET), scope="global", structures=("heads", "channels"))
    scores = [UnitScores("magnitude", tuple(values)) for values in (heads, channels)]
    slim = copy.deepcopy(dense)
    remove(slim, "causal", choose_by(rule, *scores, costs=costs, total=prices.total), None)
    return slim


def _dense(args: argparse.Namespace) -> LoadedModel:
    loaded = load_model(args.model, device=args.device)
    return replace(loaded, name=Path(args.model).name)  # results say which model, not where somebody keeps it


def _text(windows: Any) -> dict[str, Any]:
    names = ("name", "fingerprint", "documents", "split_documents", "tokens")
    return {name: getattr(windows, name) for name in names}


def main() -> None:
    """Run one suite and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("quality", "speed"))
    parser.add_argument("name", help="of the JSON file, after the suite's")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--samples", type=int, default=0, help="calibration documents, 0 for all")
    parser.add_argument("--eval-samples", type=int, default=0, help="evaluation documents, 0 for all")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of heads that quality removes")
    parser.add_argument("--unit", choices=UNITS, default="head", help="what leaves at one time in quality")
    parser.add_argument("--random-seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    show_logs(quiet=False)
    document = {"quality": quality, "speed": speed}[args.suite](args)
    document["model"] = Path(args.model).name if args.model else "GPT-2 small's shape, random weights"
    record.write(document, f"{args.suite}-{args.name}", args.device)


if __name__ == "__main__":
    main()

"""Whether pair dividends of the loss game choose better heads than single rises, and than pruning in rounds.

    python benchmarks/pairs.py gsm-gpt2-6x8 --model DIR --data calibration.jsonl --eval-data heldout.jsonl

The loss game's slopes at random coalitions tell more than each head's own rise: how the slope along one head moves with
the removal of another is the pair's dividend, by ridge regression of what the heads' own lines leave over, made
symmetric. Heads then leave one by one, the lowest rise given those that are gone first. That is done with the slopes of
one pass over the calibration text, and of several, and set beside single rises from as many passes, and beside two
rounds of pruning; all repaired, and measured on the same held-out documents.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch

from compressor import comparison
from compressor.attention import attention_layers
from compressor.budget import Rule, choose, heads_to_remove
from compressor.config import Recipe
from compressor.console import show_logs
from compressor.damage import Slopes, loss_game, site_of, slopes
from compressor.damage.values import SHARE
from compressor.loading import load_model
from compressor.module import LanguageModel
from compressor.preparation import data_for
from compressor.rounds import in_rounds
from compressor.types import PruningPlan, UnitScores

RIDGES = (10.0, 100.0)  # windows' worth of slopes that say there is no pair


def pair_dividends(found: Slopes, ridge: float) -> torch.Tensor:
    """How the rise without one head changes when another is gone, in nats per token: symmetric [units, units]."""
    slope = found.slope / found.tokens[:, None]
    share = (found.tokens / found.tokens.sum())[:, None]
    away = found.removed - (share * found.removed).sum(0)
    level = (share * slope).sum(0)
    own = (share * away * slope).sum(0) / (share * away.square()).sum(0)
    left = slope - level - own * away
    weight = share * len(slope)
    system = away.T @ (weight * away) + ridge * away.square().mean() * torch.eye(slope.shape[1], dtype=slope.dtype)
    dividends = torch.linalg.solve(system, away.T @ (weight * left))
    dividends.fill_diagonal_(0)
    return (dividends + dividends.T) / 2


def greedy(rise: torch.Tensor, pairs: torch.Tensor, widths: list[int], ratio: float, scope: str) -> list[int]:
    """Heads that leave one by one, the lowest rise given the others first; every layer keeps one."""
    layer_of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    room = [heads_to_remove(ratio, width) if scope == "layer" else width - 1 for width in widths]
    wanted = sum(room) if scope == "layer" else heads_to_remove(ratio, sum(widths))
    gone: list[int] = []
    while len(gone) < wanted:
        given = rise + pairs[gone].sum(0)
        open_ = [
            unit
            for unit in range(len(rise))
            if unit not in gone and room[layer_of[unit]] > sum(layer_of[unit] == layer_of[one] for one in gone)
        ]
        gone.append(min(open_, key=lambda unit: float(given[unit])))
    return gone


def pairs(args: argparse.Namespace) -> dict[str, Any]:
    """Plans by single rises, by pairs and in rounds, and what becomes of the perplexity."""
    recipe = Recipe(
        model=args.model,
        data=args.data,
        eval_data=args.eval_data,
        samples=args.samples,
        eval_samples=args.eval_samples,
        bootstrap=0,
        batch_size=args.batch_size,
        device=args.device,
    )
    dense = replace(load_model(args.model, device=args.device), name=Path(args.model).name)
    data = data_for(dense, recipe)
    text = list(data.loss_dataloader())
    sites = [site_of(layer, layer.num_heads) for layer in attention_layers(dense.model)]
    widths = [site.units for site in sites]
    module = LanguageModel(dense.model, dense.task)
    passes = [slopes(module, text, sites, SHARE, seed) for seed in range(args.passes)]
    plans: dict[str, PruningPlan] = {}

    def plan(units: list[int], scope: str) -> PruningPlan:
        heads: dict[int, tuple[int, ...]] = {}
        for index, width in enumerate(widths):
            start = sum(widths[:index])
            heads[index] = tuple(sorted(unit - start for unit in units if start <= unit < start + width))
        left = {index: own for index, own in heads.items() if own}
        return PruningPlan(left, "loss-game", args.ratio, scope, tuple(widths))

    nothing = torch.zeros(sum(widths), sum(widths), dtype=torch.float64)
    for scope in ("layer", "global"):
        for count in sorted({1, args.passes}):
            found = joined(passes[:count])
            rise = loss_game(found).rise
            what = f"{scope}, {count} pass{'es' if count > 1 else ''}"
            plans[f"{what}, singles"] = plan(greedy(rise, nothing, widths, args.ratio, scope), scope)
            for ridge in RIDGES:
                chosen = greedy(rise, pair_dividends(found, ridge), widths, args.ratio, scope)
                plans[f"{what}, pairs, ridge {ridge:g}"] = plan(chosen, scope)
        rule = Rule(ratio=args.ratio, scope=scope)
        values = torch.split(loss_game(passes[0]).rise, widths)
        heads = UnitScores("loss-game", tuple(tuple(layer.tolist()) for layer in values))
        plans[f"{scope}, 2 rounds"] = in_rounds(
            dense,
            choose(rule.part(0.5), heads),
            lambda again, channels, part, rule=rule: choose(rule.part(part), again),  # type: ignore[misc]
            text,
            2,
            repaired=True,
            seed=0,
        )
    rows, losses = comparison.measure_quality(dense, plans, data, calibration=text)
    differences = {
        scope: comparison.summarise(
            [row for row in rows if row["name"].startswith((scope, "dense"))], losses, f"{scope}, 1 pass, singles"
        )["differences"]
        for scope in ("layer", "global")
    }
    for row in rows:
        row["plan"] = plans[row["name"]].to_dict() if row["name"] in plans else None
    settings = {"ratio": args.ratio, "share": SHARE, "ridges": list(RIDGES), "passes": args.passes}
    return {
        "suite": "pairs",
        "rows": rows,
        "differences": differences,
        "calibration": {"name": data.calibration.name, "documents": data.calibration.documents},
        "evaluation": {name: getattr(data.evaluation, name) for name in ("name", "documents", "tokens")},
        "settings": settings,
    }


def joined(passes: list[Slopes]) -> Slopes:
    """Slopes of several passes as if they were of one."""
    fields = ("slope", "removed", "tokens", "documents")
    return replace(passes[0], **{name: torch.cat([getattr(one, name) for one in passes]) for name in fields})


def main() -> None:
    """Run the suite and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the JSON file, after the suite's")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--passes", type=int, default=4, help="over the calibration text, with other coalitions each")
    parser.add_argument("--samples", type=int, default=0, help="calibration documents, 0 for all")
    parser.add_argument("--eval-samples", type=int, default=0, help="evaluation documents, 0 for all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    show_logs(quiet=False)
    document = pairs(args)
    record.write(document | {"model": Path(args.model).name}, f"pairs-{args.name}", args.device)


if __name__ == "__main__":
    main()

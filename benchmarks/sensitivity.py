"""How much the calibration text matters to the default criterion and the repair: how many documents, and which.

    python benchmarks/sensitivity.py gsm-gpt2-6x8 --model DIR --data calibration.jsonl --eval-data heldout.jsonl \
        --trained-on train.jsonl --texts stories.jsonl embedded

A fifth of the heads leaves by `loss-game`, of every layer or model-wide, and the rest is repaired on the same text. The
text of `--data` is taken in several sizes, the smaller ones drawn with several seeds (of one seed, a larger size holds
every smaller one), and whole; other `--texts` once, as many documents of each as of the whole, and 1,000 of what the
model was trained on. All are measured on the same documents, held out from all of them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
from transformers import PreTrainedModel

from compressor import comparison
from compressor.budget import allocate
from compressor.config import Recipe
from compressor.console import log, show_logs
from compressor.criteria import criterion
from compressor.loading import LoadedModel, load_model
from compressor.preparation import data_for
from compressor.removal import remove
from compressor.scoring import score_model

CRITERION = "loss-game"
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Text:
    """Calibration text: where it is from, how many documents at most (0 for all), and the seed that draws them."""

    data: str
    samples: int
    seed: int = 0
    role: str = "size"  # "size", "whole", "trained on" or "other"


def texts(args: argparse.Namespace, whole: int) -> Iterator[Text]:
    """What to calibrate on; `whole` is the number of documents of the main text."""
    for size in args.sizes:
        for seed in range(args.seeds):
            yield Text(args.data, size, seed)
    yield Text(args.data, 0, role="whole")
    if args.trained_on:
        yield Text(args.trained_on, args.trained_samples, role="trained on")
    for other in args.texts:
        yield Text(other, whole, role="other")


def sensitivity(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate on every text, prune and repair, and measure all models on the same documents."""
    dense = replace(load_model(args.model, device=args.device), name=Path(args.model).name)
    held_out = Recipe(
        model=args.model, data=args.data, eval_data=args.eval_data, samples=0, eval_samples=args.eval_samples
    )
    evaluation = data_for(dense, held_out)
    log.info(evaluation.describe()[1])
    pruned: dict[str, PreTrainedModel] = {}
    facts: dict[str, dict[str, Any]] = {}
    for text in texts(args, evaluation.calibration.documents):
        recipe = replace(
            held_out, data=text.data, samples=text.samples, seed=text.seed, bootstrap=0, values=[CRITERION]
        )
        for model, told in calibrated(dense, recipe, args.ratio):
            name = f"{told['text']['name']} {told['text']['documents']}, seed {text.seed}, {told['scope']}"
            pruned[name] = model
            facts[name] = {**told, "role": text.role, "seed": text.seed}
    measured, losses = comparison.measure_quality(dense, {}, evaluation, pruned)
    rows = [{**row, **facts.get(row["name"], {})} for row in measured]
    summaries = {}
    for scope in SCOPES:
        own = [row for row in rows if row.get("scope", scope) == scope]
        whole = next(row["name"] for row in own if row.get("role") == "whole")
        summaries[scope] = comparison.summarise(own, losses, whole)["differences"]
    windows = evaluation.evaluation
    return {
        "suite": "sensitivity",
        "rows": rows,
        "differences": summaries,
        "evaluation": {name: getattr(windows, name) for name in ("name", "fingerprint", "documents", "tokens")},
        "settings": {
            "criterion": CRITERION,
            "ratio": args.ratio,
            "sizes": args.sizes,
            "seeds": args.seeds,
            "batch_size": held_out.batch_size,
            "dtype": str(dense.model.dtype),
        },
    }


def calibrated(dense: LoadedModel, recipe: Recipe, ratio: float) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """The models that are left, one for each scope, with what they were calibrated on and what left them."""
    scores = score_model(dense, recipe)
    data = data_for(dense, recipe)
    batches = list(data.loss_dataloader())
    facts = data.calibration.facts()
    text = {name: facts[name] for name in ("name", "fingerprint", "documents", "tokens")}
    for scope in SCOPES:
        plan = allocate(criterion(CRITERION)(scores, recipe.seed), ratio, scope)
        model = copy.deepcopy(dense.model)
        repairs = remove(model, dense.task, plan, batches)
        told = {"scope": scope, "text": text, "plan": plan.to_dict(), "repair": repairs}
        yield model, told


def main() -> None:
    """Run the suite and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the JSON file, after the suite's")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="the main calibration text")
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-samples", type=int, default=0, help="evaluation documents, 0 for all")
    parser.add_argument("--texts", nargs="*", default=[], help="other calibration texts")
    parser.add_argument("--trained-on", help="text that the model was trained on")
    parser.add_argument("--trained-samples", type=int, default=1000, help="documents of that text")
    parser.add_argument("--sizes", nargs="*", type=int, default=[32, 64, 128])
    parser.add_argument("--seeds", type=int, default=3, help="draws of each of the sizes")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    show_logs(quiet=False)
    document = sensitivity(args) | {"model": Path(args.model).name}
    record.write(document, f"sensitivity-{args.name}", args.device)


if __name__ == "__main__":
    main()

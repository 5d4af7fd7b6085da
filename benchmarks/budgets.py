"""What a target of FLOPs over heads and channels costs: as cut, repaired, in rounds, and after recovery.

    python benchmarks/budgets.py gsm-gpt2-6x8 --model DIR --data calibration.jsonl --eval-data heldout.jsonl \
        --train-data train.jsonl

Runs the verbs as a user would: `score`, then `prune --target-flops` without and with repair, in rounds, and of heads
alone; `recover` of the repaired one for some minutes; and `bench` of all of them with the other criteria and random
pruning, by the same rule, on the same held-out documents.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import record

import compressor
from compressor.console import log, show_logs
from compressor.criteria import criteria


def budgets(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Score, prune in several ways, recover and bench."""
    text = {"data": args.data, "eval_data": args.eval_data, "samples": args.samples}
    text |= {"batch_size": args.batch_size, "device": args.device}
    asked = [rival.needs for rival in criteria() if rival.needs and rival.channels is not None]
    scores = compressor.score(model=args.model, **text, values=asked, output_dir=work / "scores").directory
    ways: dict[str, dict[str, Any]] = {
        "repaired": {},
        **{f"repaired, {rounds} rounds": {"rounds": rounds} for rounds in args.rounds},
        "as cut": {"repair": False},
        "heads alone, repaired": {"structures": ["heads"]},
    }
    runs: dict[str, Any] = {}
    for name, settings in ways.items():
        log.info(f"pruning: {name}")
        runs[name] = compressor.prune(
            scores=scores,
            target_flops=args.target_flops,
            export=True,
            output_dir=work / name.replace(" ", "-"),
            device=args.device,
            batch_size=args.batch_size,
            **settings,
        )
    checkpoints = {name: run.checkpoint for name, run in runs.items()}
    recovered = None
    if args.minutes:
        recovered = compressor.recover(
            checkpoint=checkpoints["repaired"],
            data=args.train_data or args.data,
            train_samples=args.train_samples,
            max_minutes=args.minutes,
            epochs=args.epochs,
            batch_size=args.batch_size,
            device=args.device,
            output_dir=work / "recovered",
        )
        checkpoints["repaired, recovered"] = recovered.checkpoint
    measured = compressor.bench(
        against=list(checkpoints.values()),
        scores=scores,
        **text,
        eval_samples=args.eval_samples,
        random_seeds=args.random_seeds,
        repeats=args.repeats,
        output_dir=work / "bench",
    ).document
    rows, names = iter(measured["rows"][1:]), dict[str, str]()
    for name in checkpoints:
        row = next(rows)
        names[row["name"]] = row["name"] = name
        run = runs.get(name)
        if run is not None:
            row["plan"] = {**run.plan.to_dict(), "heads": None, "channels": None}
            row["target"] = run.document["target"]
            row["channels_removed"] = {str(index): len(gone) for index, gone in run.plan.channels.items()}
    return {
        "suite": "budgets",
        **{name: measured[name] for name in ("rows", "data", "settings")},
        "random": _draws_renamed(measured["random"], names),
        "differences": _renamed(measured["differences"], names),
        "target_flops": args.target_flops,
        "calibration": {name: runs["repaired"].document["scores"]["data"][name] for name in ("name", "documents")},
        "recovery": None if recovered is None else _recovery(recovered.document["recovery"], args),
    }


def _renamed(differences: dict[str, Any] | None, names: dict[str, str]) -> dict[str, Any] | None:
    """Differences under the names of ways, not of checkpoints, which tell where these were."""
    if differences is None:
        return None
    against = {names.get(name, name): found for name, found in differences["against"].items()}
    return {**differences, "reference": names[differences["reference"]], "against": against}


def _draws_renamed(random: dict[str, Any] | None, names: dict[str, str]) -> dict[str, Any] | None:
    """What is said of random draws, likewise."""
    if random is None:
        return None
    beaten = {names.get(name, name): count for name, count in random["draws_beaten"].items()}
    best = [names.get(name, name) for name in random["best_draw_beaten_by"]]
    return {**random, "draws_beaten": beaten, "best_draw_beaten_by": best}


def _recovery(record: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What is to be known of a recovery, without the hashes of its documents."""
    short = {name: value for name, value in record.items() if name not in ("data", "held_out")}
    return {**short, "max_minutes": args.minutes, "text": record["data"]["name"]}


def main() -> None:
    """Run the suite and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the JSON file, after the suite's")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--train-data", help="what recovery trains on; by default what was scored")
    parser.add_argument("--target-flops", type=float, default=0.82)
    parser.add_argument("--rounds", type=int, nargs="*", default=[2])
    parser.add_argument("--minutes", type=float, default=10.0, help="of recovery; 0 for none")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=0, help="calibration documents, 0 for all")
    parser.add_argument("--eval-samples", type=int, default=0, help="evaluation documents, 0 for all")
    parser.add_argument("--train-samples", type=int, default=0, help="documents of recovery, 0 for all")
    parser.add_argument("--random-seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    show_logs(quiet=False)
    with tempfile.TemporaryDirectory() as work:
        document = budgets(args, Path(work))
    record.write(document | {"model": Path(args.model).name}, f"budgets-{args.name}", args.device)


if __name__ == "__main__":
    main()

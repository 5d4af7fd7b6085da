"""Dense against pruned: the same documents and machine, interleaved timings, and random pruning with its spread."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from compressor.config import Recipe
from compressor.console import log, track
from compressor.data import TextDataModule
from compressor.errors import ModelError, RecipeError
from compressor.loading import LoadedModel
from compressor.measure import DocumentLosses, Samples, Throughput, measure_throughput, speedup, throughput_steps
from compressor.measure.costs import measure_costs
from compressor.module import Batch, LanguageModel
from compressor.paired import LEVEL, ROUNDING, PairedBootstrap, undecided
from compressor.removal import remove
from compressor.trainer import run_perplexity
from compressor.types import PruningPlan


def compare(
    dense: LoadedModel,
    contenders: Mapping[str, LoadedModel],
    plans: Mapping[str, PruningPlan],
    data: TextDataModule,
    recipe: Recipe,
    unranked: Collection[str] = (),
    calibration: Sequence[Batch] | None = None,
) -> dict[str, Any]:
    """Measure a dense model, pruned checkpoints of it, and what other plans would make of it.

    Args:
        dense: the reference.
        contenders: pruned models by name; they are timed along with the dense one.
        plans: plans for the dense model by name, such as those of other criteria and of random draws. Their perplexity
            and costs are measured; they are not timed.
        data: set up; its evaluation windows are what everything is measured on.
        recipe: batch size, repeats and lengths.
        unranked: contenders that lost more or less than the plans remove; the verdict leaves them out.
        calibration: text to repair on what the plans make, where the contenders were repaired.

    Returns:
        JSON-ready: `rows`, one per model, the dense one first; what `summarise` says of them, its reference the first
        contender that is ranked; `data` and `settings`.
    """
    vocabulary = dense.tokenizer.get_vocab()
    for name, contender in contenders.items():
        if contender.tokenizer.get_vocab() != vocabulary:
            raise ModelError(f"{name} has another tokenizer than {dense.name}: their perplexities cannot be compared")
    settings = {
        "batch_size": recipe.batch_size,
        "prompt_length": prompt_length_of(dense, recipe),
        "new_tokens": recipe.new_tokens,
        "repeats": recipe.repeats,
        "seed": recipe.seed,
    }
    models = {name: contender.model for name, contender in contenders.items()}
    rows, losses = measure_quality(dense, plans, data, models, calibration, recipe.seed)
    timings = measure_speed({"dense": dense.model, **models}, causal=dense.task == "causal", **settings)
    for row in rows:
        row["throughput"] = timings.get(row["name"])
    ranked = [row for row in rows if row["name"] not in unranked]
    reference = next((row["name"] for row in ranked if row["kind"] == "pruned"), None)
    return {
        "task": dense.task,
        "rows": rows,
        **summarise(ranked, losses, reference, recipe.seed),
        "data": {
            "name": data.evaluation.name,
            "fingerprint": data.evaluation.fingerprint,
            "documents": data.evaluation.documents,
            "tokens": data.evaluation.tokens,
        },
        "settings": {**settings, "max_length": data.max_length},
    }


def measure_quality(
    dense: LoadedModel,
    plans: Mapping[str, PruningPlan],
    data: TextDataModule,
    pruned: Mapping[str, PreTrainedModel] | None = None,
    calibration: Sequence[Batch] | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, DocumentLosses]]:
    """Perplexity and costs of a dense model, of pruned ones, and of what plans would make of it; one row each.

    With `calibration`, batches with labels, what the plans make is repaired on it. `seed` is of the documents drawn
    for intervals.

    Returns:
        Rows with `name`, `kind` ("dense", "pruned", "rival" or "random"), `perplexity`, its relative
        `perplexity_change` against the dense model with `perplexity_change_interval` (`level`, `low` and `high`, see
        `PairedBootstrap`; None for the dense model, and from a single document), and the `costs` of `measure_costs`;
        and by name what each document adds, for `summarise`.
    """
    rows: list[dict[str, Any]] = []
    losses: dict[str, DocumentLosses] = {}

    def add(name: str, kind: str, model: PreTrainedModel) -> None:
        losses[name] = _losses(name, model, dense, data)
        costs = measure_costs(model, min(256, dense.context), causal=dense.task == "causal")
        rows.append({"name": name, "kind": kind, "perplexity": losses[name].perplexity, "costs": costs})

    add("dense", "dense", dense.model)
    for name, model in (pruned or {}).items():
        add(name, "pruned", model)
    for name, plan in plans.items():
        model = copy.deepcopy(dense.model)
        remove(model, dense.task, plan, calibration)
        add(name, "random" if plan.criterion == "random" else "rival", model)
    paired = PairedBootstrap(losses, seed)
    for row in rows:
        row["perplexity_change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        against = None if row["kind"] == "dense" else paired.interval(row["name"], "dense")
        row["perplexity_change_interval"] = against
    return rows, losses


def summarise(
    rows: list[dict[str, Any]], losses: Mapping[str, DocumentLosses], reference: str | None, seed: int = 0
) -> dict[str, Any]:
    """What rows say about one another.

    Args:
        rows: of `measure_quality`, or some of them, the dense one first.
        losses: what came with them.
        reference: the row that others are compared with, if any.
        seed: of the documents drawn for intervals.

    Returns:
        `random`: number, mean, sd, minimum and maximum of the random draws' perplexities, `draws_beaten`, how many of
        them each pruned model and rival beats, and `best_draw_beaten_by`, the names of those that beat all; None with
        fewer than two draws. `differences`: the `reference`, the `level`, and `against` every other row, by name, the
        relative `change` of perplexity from that row to the reference with its `low` and `high` (None from a single
        document); None without a reference. `verdict`: who wins, in a sentence.
    """
    random = _spread([row["perplexity"] for row in rows if row["kind"] == "random"])
    if random is not None:
        random |= _beaten(rows)
    differences = None
    if reference is not None:
        paired = PairedBootstrap({row["name"]: losses[row["name"]] for row in rows}, seed)
        against = {
            row["name"]: {"low": None, "high": None}
            | (paired.interval(reference, row["name"]) or {})
            | {"change": paired.change(reference, row["name"])}
            for row in rows
            if row["name"] != reference
        }
        differences = {"reference": reference, "level": LEVEL, "against": against}
    return {"random": random, "differences": differences, "verdict": _verdict(rows, random, differences)}


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    causal: bool,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of models timed in turn, and their speed-ups over the one named "dense", repeat by repeat."""
    with track("throughput", throughput_steps(len(models), repeats, causal=causal)) as step:
        measured = measure_throughput(
            models,
            causal=causal,
            batch_size=batch_size,
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            repeats=repeats,
            seed=seed,
            on_step=step,
        )
    return {name: _throughput(timed, measured["dense"]) for name, timed in measured.items()}


def _losses(name: str, model: PreTrainedModel, dense: LoadedModel, data: TextDataModule) -> DocumentLosses:
    device = dense.model.device
    losses = run_perplexity(LanguageModel(model, dense.task), data, device, f"perplexity of {name}")
    model.to(device)  # type: ignore[arg-type]  # the Trainer leaves its model on the CPU
    log.info(f"{name}: perplexity {losses.perplexity:.4g}")
    return losses


def prompt_length_of(dense: LoadedModel, recipe: Recipe) -> int:
    """Tokens of prefill that fit the context with what is decoded after them.

    Raises:
        RecipeError: there is no room for any.
    """
    room = dense.context - (recipe.new_tokens if dense.task == "causal" else 0)
    if room < 1:
        raise RecipeError(
            f"new_tokens is {recipe.new_tokens}; {dense.name} takes {dense.context} tokens, and the prompt needs one"
        )
    if recipe.prompt_length > room:
        log.info(f"prompts of {room} tokens instead of {recipe.prompt_length}: more does not fit the context")
    return min(recipe.prompt_length, room)


def _throughput(timed: Throughput, reference: Throughput) -> dict[str, Any]:
    both = {"prefill": (timed.prefill, reference.prefill)}
    if timed.decode is not None and reference.decode is not None:
        both["decode"] = (timed.decode, reference.decode)
    return {
        phase: {"tokens_per_second": _summary(own), "speedup": _summary(speedup(own, dense))}
        for phase, (own, dense) in both.items()
    }


def _summary(samples: Samples) -> dict[str, Any]:
    return {"median": samples.median, "min": samples.minimum, "max": samples.maximum, **asdict(samples)}


def _spread(values: list[float]) -> dict[str, Any] | None:
    if len(values) < 2:
        return None
    return {
        "draws": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
    }


def _beaten(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many random draws each model beats, and which models beat them all."""
    draws = [row["perplexity"] for row in rows if row["kind"] == "random"]
    ranked = {row["name"]: row["perplexity"] for row in rows if row["kind"] in ("pruned", "rival")}
    beaten = {name: sum(value * (1 + ROUNDING) < draw for draw in draws) for name, value in ranked.items()}
    return {
        "draws_beaten": beaten,
        "best_draw_beaten_by": [name for name, count in beaten.items() if count == len(draws)],
    }


def _verdict(rows: list[dict[str, Any]], random: dict[str, Any] | None, differences: dict[str, Any] | None) -> str:
    """Who wins, whoever it is, and what cannot be told apart from the reference."""
    base = rows[0]["perplexity"]
    reference = differences["reference"] if differences else None
    against = differences["against"] if differences else {}
    entries = [(row["perplexity"], row["name"]) for row in rows if row["kind"] in ("pruned", "rival")]
    places: list[tuple[float, list[str]]] = []
    for value, name in sorted(entries):
        if places and value <= places[-1][0] * (1 + ROUNDING):  # the same heads removed, up to rounding
            places[-1][1].append(name)
        else:
            places.append((value, [name]))
    phrases = []
    for value, names in places:
        near = random is not None and abs(value - random["mean"]) <= random["sd"]
        note = ", within random's spread" if near else ""
        other = "dense" if reference in names else reference
        asked = "dense" if reference in names else names[0]
        if asked in against and undecided(against[asked]):
            note += f", not told apart from {other}"
        phrases.append((value, f"{' and '.join(names)} ({value / base - 1:+.1%}{note})"))
    if random is not None:
        spread = f"{random['mean'] / base - 1:+.1%} ± {random['sd'] / base:.1%}, {random['draws']} draws"
        phrases.append((random["mean"], f"random ({spread})"))
    words = [phrase for _, phrase in sorted(phrases)]
    rank = ""
    if random is not None and reference in random["draws_beaten"]:
        rank = f"; {reference} beats {random['draws_beaten'][reference]} of the {random['draws']} random draws"
    if len(words) == 1:
        return f"{words[0]} against the dense model{rank}"
    return f"lowest perplexity: {words[0]}; then {', '.join(words[1:])}{rank}"

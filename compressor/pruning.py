"""A pruning run: what it decides by scores and a recipe, and what came of a decision when it was carried out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compressor.artefact import load_scores
from compressor.comparison import measure_speed
from compressor.config import Recipe
from compressor.console import log
from compressor.contenders import check_same_model, history_of
from compressor.criteria import criterion
from compressor.environment import versions
from compressor.errors import RecipeError
from compressor.loading import LoadedModel
from compressor.measure.costs import measure_costs
from compressor.module import Batch
from compressor.planning import (
    channel_scores,
    chooser,
    counted_length,
    prefill_length,
    pricing_of,
    rule_of_recipe,
    structures_of,
    time_structures,
)
from compressor.preparation import calibration_of, data_for, load_for
from compressor.removal import remove
from compressor.rounds import check_rounds, in_rounds, rounds_worth_making
from compressor.stability import shares_removed
from compressor.types import PruningPlan, Scores, UnitScores

MISSED = 0.005  # of the target: more than this above it is said


@dataclass(frozen=True)
class Decision:
    """A plan, what `plan.json` says of it so far, and the model where it was needed.

    `scored` are `data`, `settings` and `seed` of the text to repair on; None where a recipe has to name it.
    """

    plan: PruningPlan
    document: dict[str, Any]
    loaded: LoadedModel | None
    scored: Mapping[str, Any] | None


def check_choice(recipe: Recipe) -> None:
    """Refuse what no scores can answer, before a scoring epoch is spent on it.

    Raises:
        RecipeError: there is no such criterion, or it knows no rounds or no channels where these are asked for.
    """
    by = criterion(recipe.criterion)
    check_rounds(by.name, recipe.rounds)
    if "channels" in (recipe.structures or ()):
        by.check_channels()


def decide(evidence: Scores, directory: Path, recipe: Recipe, dry_run: bool) -> Decision:
    """Choose what leaves by the scores in a directory. A dry run loads the model only where a target needs prices.

    Raises:
        CompressorError: the scores do not fit the recipe or the model, or the target is out of reach.
    """
    by = criterion(recipe.criterion)
    structures = structures_of(recipe, by, evidence)
    rule = rule_of_recipe(recipe, structures)
    heads, channels = by(evidence, recipe.seed), channel_scores(by, evidence, structures, recipe.seed)
    loaded = None
    if not dry_run or rule.target is not None or recipe.rounds > 1:
        loaded = load_as_stored(recipe)
        check_same_model(loaded, evidence, directory)
    table = None
    if loaded is not None and rule.target is not None and rule.target[0] == "latency":
        table = time_structures(loaded, structures, recipe)
    pricing = None if loaded is None else pricing_of(rule, loaded, table)
    groups = [layer["groups"] for layer in evidence.facts["layers"]]
    drawn = recipe.seed if recipe.criterion == "random" else None

    def choose(heads: UnitScores, channels: UnitScores | None, part: float = 1.0) -> PruningPlan:
        return chooser(rule.part(part), groups, pricing, in_loss=by.in_loss, seed=drawn)(heads, channels)

    rounds = rounds_worth_making(choose, heads, channels, recipe.rounds) if recipe.rounds > 1 else 1
    plan = choose(heads, channels, 1 / rounds)
    if rounds > 1 and loaded is not None:
        text = calibration_of(loaded, recipe, evidence.facts)
        plan = in_rounds(loaded, plan, choose, text, rounds, repaired=recipe.repair, seed=recipe.seed)
    shares = None
    if "heads" in structures and rounds == 1:
        shares = shares_removed(evidence, recipe.criterion, lambda resampled: choose(resampled, channels))
    saturated = evidence.facts.get("saturated_layers")
    if saturated and by.counted:
        log.warning(
            f"the scores of {len(saturated)} layers are saturated: {recipe.criterion} says nothing about their heads, "
            "and which of them go is arbitrary"
        )
    document = {
        "plan": plan.to_dict(),
        "removed_in_resamples": shares,
        "base": base_of(recipe, evidence.facts["identity"], evidence.facts["task"]),
        "scores": {name: evidence.facts[name] for name in ("data", "settings", "seed")},
        **({} if table is None else {"latency_table": table.to_dict()}),
    }
    return Decision(plan, document, loaded, evidence.facts)


def carry_out(decision: Decision, recipe: Recipe) -> dict[str, Any]:
    """Repair the model of a decision and remove what it says, in place; the document with what came of it.

    Raises:
        PlanError: the plan cannot be carried out; the model is then as it was.
    """
    loaded, plan = decision.loaded, decision.plan
    assert loaded is not None
    length, causal = counted_length(loaded), loaded.task == "causal"
    costs = {"dense": measure_costs(loaded.model, length, causal=causal)}
    text, facts = _text_for(loaded, decision, recipe) if recipe.repair else (None, {})
    by_clock = plan.target is not None and plan.target[0] == "latency"
    dense = copy.deepcopy(loaded.model) if by_clock else None
    repairs = remove(loaded.model, loaded.task, plan, text)
    costs["pruned"] = measure_costs(loaded.model, length, causal=causal)
    timed = None if dense is None else _time_both(dense, loaded, recipe)
    return {
        **decision.document,
        **facts,
        "repair": repairs,
        "costs": costs,
        "target": _outcome(plan, costs, timed),
        "versions": versions(),
    }


def _text_for(loaded: LoadedModel, decision: Decision, recipe: Recipe) -> tuple[list[Batch], dict[str, Any]]:
    """Calibration text for the repair, what was scored or what the recipe names, and what identifies the latter."""
    if decision.scored is not None:
        settings = decision.scored["settings"]
        if recipe.data is not None and recipe.data != settings["data"]:
            log.warning(
                f"the repair is on the text that was scored, {settings['data'] or 'the default'}, not {recipe.data}"
            )
        return calibration_of(loaded, recipe, decision.scored), {}
    data = data_for(loaded, recipe)
    log.info(data.describe()[0])
    names = ("data", "eval_data", "part", "samples", "revision")
    settings = {name: getattr(recipe, name) for name in names} | {"max_length": data.max_length}
    facts = {"data": data.calibration.facts(), "settings": settings, "seed": recipe.seed}
    return list(data.loss_dataloader()), {"scores": facts}


def _outcome(plan: PruningPlan, costs: Mapping[str, Any], timed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What came of a target: the share that was asked for, the one that was predicted, and the one that was found.

    `found` is None where latency was not timed.
    """
    kind, wanted = plan.target or ("flops", None)
    dense, pruned = costs["dense"], costs["pruned"]
    if kind == "latency":
        found = None if timed is None else timed["share"]["median"]
    elif kind == "params":
        found = pruned["parameters"] / dense["parameters"]
    else:
        found = pruned["macs"]["total"] / dense["macs"]["total"]
    wanted = None if plan.edited else wanted
    missed = wanted is not None and found is not None and found > wanted * (1 + MISSED)
    if missed:
        assert found is not None
        log.warning(f"target_{kind} is {wanted:g}, but {found:.4f} is left")
    return {
        "kind": kind,
        "target": wanted,
        "predicted": plan.predicted,
        "found": found,
        "missed": missed,
        **({} if timed is None else {"timed": timed}),
    }


def _time_both(dense: PreTrainedModel, loaded: LoadedModel, recipe: Recipe) -> dict[str, Any]:
    """Prefill of the dense and the pruned model, timed in turn: tokens per second, and the share of time left."""
    timed = measure_speed(
        {"dense": dense, "pruned": loaded.model},
        causal=False,
        batch_size=recipe.batch_size,
        prompt_length=prefill_length(loaded, recipe),
        new_tokens=0,
        repeats=recipe.repeats,
        seed=recipe.seed,
    )
    gain = timed["pruned"]["prefill"]["speedup"]
    share = {"median": 1 / gain["median"], "min": 1 / gain["max"], "max": 1 / gain["min"]}
    return {"share": share, **{name: of["prefill"]["tokens_per_second"] for name, of in timed.items()}}


def load_as_stored(recipe: Recipe) -> LoadedModel:
    """Load a model in the dtype it came in, which a checkpoint keeps, even where computing in it is slow."""
    return load_for(replace(recipe, dtype="stored" if recipe.dtype == "auto" else recipe.dtype))


def scores_in(directory: str | Path | None) -> Scores | None:
    """The scores in a directory, where one is named."""
    return None if directory is None else load_scores(Path(directory))


def of_the_model(recipe: Recipe, evidence: Scores | None, given: Mapping[str, Any] | None) -> Recipe:
    """Fill in the model, from the scores or else from a plan's document.

    Raises:
        RecipeError: neither names one, nor does the recipe.
    """
    if evidence is not None:
        known = {name: evidence.facts[name] for name in ("model", "task")}
        known["revision"] = evidence.facts["settings"].get("revision")
    else:
        known = dict((given or {}).get("base", {}))
    model, task, revision = (getattr(recipe, name) or known.get(name) for name in ("model", "task", "revision"))
    if model is None:
        raise RecipeError("the plan does not say which model it is for; give --model")
    return replace(recipe, model=model, task=task, revision=revision)


def base_of(recipe: Recipe, identity: Any, task: str) -> dict[str, Any]:
    """What a document says of the model that is pruned."""
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "identity": identity,
        "task": task,
        **history_of(recipe.model or ""),
    }

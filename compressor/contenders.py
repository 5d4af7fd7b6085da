"""The checkpoints of a comparison: what they were pruned from, and the plans they are ranked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.artefact import load_scores
from compressor.attention import attention_layers
from compressor.budget import Rule
from compressor.config import Recipe
from compressor.criteria import criteria, random_channel_scores, random_scores
from compressor.data import TextDataModule
from compressor.errors import ArtefactError, DataError, RecipeError
from compressor.export import RECORD
from compressor.files import is_directory, read_json
from compressor.loading import LoadedModel
from compressor.measure.latency import LatencyTable
from compressor.planning import channel_scores, chooser, pricing_of
from compressor.runs import CHECKPOINT
from compressor.types import PruningPlan, Scores


def check_same_model(loaded: LoadedModel, scores: Scores, directory: Path) -> None:
    """Refuse scores of another model, or of other weights.

    Raises:
        ArtefactError: they are.
    """
    if scores.facts["identity"] != loaded.identity:
        raise ArtefactError(
            f"the scores in {directory} are of another model ({scores.facts['model']}) than {loaded.name}, or its "
            "weights have changed since; score the model again"
        )


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of what was pruned, where a checkpoint has one."""
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    base, plan = record.get("base"), record.get("plan")
    known = isinstance(base, dict) and {"model", "identity"} <= base.keys()
    wanted = {"criterion", "ratio", "scope", "unit", "allow_empty", "heads_per_layer", "removed_heads", "total_heads"}
    trained = record.get("recovery", {})
    if not known or not isinstance(plan, dict) or not wanted <= plan.keys() or not isinstance(trained, dict):
        raise ArtefactError(f"{folder / RECORD} is damaged; prune and export the model again")
    return record


def history_of(model: str) -> dict[str, Any]:
    """What a record says of a base that is a checkpoint itself: its recovery, and the texts it was scored on."""
    for folder in (Path(model) / CHECKPOINT, Path(model)):
        if is_directory(folder) and (record := record_of(folder)) is not None:
            base = record["base"]
            recovery = record.get("recovery") or base.get("recovery")
            return {"recovery": recovery, "scored": [_scored(record), *base.get("scored", ())]}
    return {"recovery": None, "scored": []}


def _scored(record: dict[str, Any]) -> dict[str, Any]:
    """What is known of the text that chose what left."""
    found: dict[str, Any] = record.get("scores", {}).get("data", {})
    return found


def as_recorded(recipe: Recipe, record: dict[str, Any]) -> Recipe:
    """Fill what a bench was not told with what the checkpoint's record knows: the model, and the text."""
    if recipe.model is None:
        base = record["base"]
        recipe = replace(recipe, model=base["model"], revision=recipe.revision or base.get("revision"))
    settings = record.get("scores", {}).get("settings", {})
    if recipe.data is None:
        part = settings.get("part", recipe.part) if recipe.part == Recipe.part else recipe.part
        eval_data = recipe.eval_data or settings.get("eval_data")
        recipe = replace(recipe, data=settings.get("data"), eval_data=eval_data, part=part)
    return recipe


def check_unseen(name: str, record: dict[str, Any], data: TextDataModule) -> None:
    """Refuse to report on documents that chose the heads, or that the model was trained on or chosen by."""
    seen = {"calibrated": [_scored(record), *record["base"].get("scored", ())], "recovered": []}
    for recovery in (record.get("recovery"), record["base"].get("recovery")):
        while recovery:
            seen["recovered"] += [recovery.get("data", {}), recovery.get("held_out", {})]
            recovery = recovery.get("earlier")
    for verb, texts in seen.items():
        hashes = {document for text in texts for document in text.get("hashes", ())}
        shared = sum(document in hashes for document in data.evaluation.hashes)
        if shared:
            raise DataError(
                f"{shared} of the {data.evaluation.documents} documents of {data.evaluation.name} {verb} {name}: "
                "a report on them would flatter it; give other --eval-data"
            )


def rule_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how much goes, and whether the rest was repaired: such models can be ranked with each other."""
    plan = record["plan"]
    shapes = (tuple(plan.get(name, ())) for name in ("heads_per_layer", "channels_per_layer"))
    return Rule.of(plan), *shapes, record.get("repair") is not None


def named_checkpoints(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each checkpoint: what was pruned, where that tells them apart, else where it is."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RecipeError("--against names the same checkpoint twice; give each once")
    named: dict[str, Path] = {}
    taken = {"dense", *(rival.name for rival in criteria())}
    for folder in folders:
        record = record_of(folder)
        name = folder.name
        if record is not None:
            plan = record["plan"]
            name = f"{plan['criterion']} {plan['removed_heads']}/{plan['total_heads']}"
            if "channels" in plan.get("structures", ()):
                name += f", {plan['removed_channels']}/{plan['total_channels']} channels"
            name += f" in {plan['rounds']} rounds" if plan.get("rounds", 1) > 1 else ""
            name += " edited" if plan.get("edited") else ""
            name += " recovered" if "recovery" in record else ""
        named[f"{name} ({folder})" if name in taken or name in named else name] = folder
    return named


def rival_plans(
    record: dict[str, Any], recipe: Recipe, dense: LoadedModel, scores: Path | None
) -> dict[str, PruningPlan]:
    """Plans by the rule of a record's plan, for as much: by the other criteria, given scores, and at random.

    Criteria that say nothing of what the rule is about are left out. Of an edited plan, rivals take as many heads and
    channels from every layer.
    """
    plan = record["plan"]
    rule = Rule.of(plan)
    table = LatencyTable.of(record["latency_table"]) if "latency_table" in record else None
    pricing = pricing_of(rule, dense, table)
    groups = [layer.group_index for layer in attention_layers(dense.model)]
    plans = {}
    if scores is not None:
        evidence = load_scores(scores)
        check_same_model(dense, evidence, scores)
        own = () if plan.get("edited") else (plan["criterion"],)
        for rival in criteria():
            if rival.name in (*own, "random") or not rival.answered_by(evidence):
                continue
            if "channels" not in rule.structures or rival.answers_channels(evidence):
                channels = channel_scores(rival, evidence, rule.structures, recipe.seed)
                choose = chooser(rule, groups, pricing, in_loss=rival.in_loss)
                plans[rival.name] = choose(rival(evidence), channels)
    for seed in range(recipe.seed, recipe.seed + recipe.random_seeds):
        heads = random_scores(plan["heads_per_layer"], seed)
        drawn = random_channel_scores(plan["channels_per_layer"], seed) if "channels" in rule.structures else None
        plans[f"random (seed {seed})"] = chooser(rule, groups, pricing, in_loss=False, seed=seed)(heads, drawn)
    return plans

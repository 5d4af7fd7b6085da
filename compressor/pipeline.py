"""The verbs: score, prune, bench and run. Each is one function; the command line only parses flags and prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor import comparison
from compressor.artefact import load_scores, save_scores
from compressor.attention import attention_layers, prune_heads
from compressor.budget import allocate
from compressor.config import Recipe, resolve
from compressor.console import log
from compressor.criteria import criteria, criterion, random_scores
from compressor.data import TextDataModule
from compressor.environment import machine, versions
from compressor.errors import ArtefactError, DataError, RecipeError
from compressor.export import RECORD, write_checkpoint
from compressor.files import read_json, to_json
from compressor.loading import EMBEDDED, LoadedModel
from compressor.measure.costs import measure_costs
from compressor.preparation import data_for, load_for
from compressor.runs import check_output, newest_run, result_directory
from compressor.scoring import score_model
from compressor.types import PruningPlan, Scores

CHECKPOINT = "checkpoint"
COUNTED = ("gt-fep", "entropy")  # the criteria made from counts, which saturate


@dataclass(frozen=True)
class ScoreRun:
    """What `score` found, and where it was written."""

    scores: Scores
    directory: Path


@dataclass(frozen=True)
class PruneRun:
    """What `prune` decided and did. `document` is `plan.json`; `checkpoint` is None without export."""

    plan: PruningPlan
    document: dict[str, Any]
    directory: Path | None
    checkpoint: Path | None


@dataclass(frozen=True)
class BenchRun:
    """What `bench` measured. `document` is `bench.json`."""

    document: dict[str, Any]
    directory: Path


@dataclass(frozen=True)
class WholeRun:
    """The runs that `run` is made of."""

    score: ScoreRun
    prune: PruneRun
    bench: BenchRun
    directory: Path


def score(
    *, config: str | Path | None = None, output_dir: str | Path | None = None, force: bool = False, **settings: Any
) -> ScoreRun:
    """Run a scoring epoch over the calibration documents and write the scores of every head.

    Args:
        config: a YAML recipe.
        output_dir: where to write; `runs/<model>/score` by default.
        force: replace an earlier result there.
        settings: fields of `Recipe`.

    Raises:
        CompressorError: anything a user can mend.
    """
    recipe = _naming(resolve(config, settings), EMBEDDED)
    with result_directory("score", recipe, output_dir, force) as (staged, target):
        scores = score_model(load_for(recipe), recipe)
        save_scores(scores, staged)
    return ScoreRun(scores, target)


def prune(
    *,
    scores: str | Path | None = None,
    export: bool = False,
    dry_run: bool = False,
    config: str | Path | None = None,
    output_dir: str | Path | None = None,
    force: bool = False,
    **settings: Any,
) -> PruneRun:
    """Choose heads by a criterion, remove them, say what that saves, and export the slimmer model if asked to.

    Args:
        scores: a scoring run; by default the newest one (of the model, where one is named), made first if there is
            none.
        export: write a checkpoint that `compressor.load` opens.
        dry_run: only say which heads would go; nothing is loaded or written.
        config, output_dir, force, settings: as for `score`.
    """
    recipe = resolve(config, settings)
    rule = criterion(recipe.criterion)
    if not dry_run:
        check_output(output_dir, force)
    if scores is None:
        scores = newest_run("score", recipe.model)
        if scores is None and dry_run:
            raise ArtefactError("there is no score run, and a dry run makes none; run `compress score` first")
        if scores is None:
            log.info(f"there is no score run{f' of {recipe.model}' if recipe.model else ''} yet: scoring first")
            scores = score(config=config, **settings).directory
        else:
            log.info(f"taking up the newest score run, {scores}")
    evidence = load_scores(Path(scores))
    recipe = _naming(recipe, evidence.facts["model"])
    recipe = replace(
        recipe,
        task=recipe.task or evidence.facts["task"],
        revision=recipe.revision or evidence.facts["settings"].get("revision"),
    )
    plan = allocate(
        rule(evidence, recipe.seed),
        recipe.ratio,
        recipe.scope,
        unit=recipe.unit,
        groups=[layer["groups"] for layer in evidence.facts["layers"]],
        allow_empty=recipe.allow_empty,
        seed=recipe.seed if recipe.criterion == "random" else None,
    )
    document: dict[str, Any] = {"plan": plan.to_dict()}
    saturated = evidence.facts.get("saturated_layers")
    if saturated and recipe.criterion in COUNTED:
        log.warning(
            f"the scores of {len(saturated)} layers are saturated: {recipe.criterion} says nothing about their heads, "
            "and which of them go is arbitrary"
        )
    if dry_run:
        return PruneRun(plan, document, None, None)
    with result_directory("prune", recipe, output_dir, force) as (staged, target):
        # A checkpoint keeps the dtype it came in, even where computing in it is slow.
        loaded = load_for(replace(recipe, dtype="stored" if recipe.dtype == "auto" else recipe.dtype))
        _check_same_model(loaded, evidence, Path(scores))
        length = min(256, loaded.context)
        causal = loaded.task == "causal"
        dense = measure_costs(loaded.model, length, causal=causal)
        prune_heads(loaded.model, plan.heads, allow_empty=plan.allow_empty)
        document |= {
            "base": {
                "model": recipe.model,
                "revision": recipe.revision,
                "identity": loaded.identity,
                "task": loaded.task,
            },
            "scores": {"data": evidence.facts["data"], "settings": evidence.facts["settings"]},
            "costs": {"dense": dense, "pruned": measure_costs(loaded.model, length, causal=causal)},
            "versions": versions(),
        }
        if export:
            document = write_checkpoint(loaded, document, staged / CHECKPOINT)
        (staged / "plan.json").write_text(to_json(document), encoding="utf-8")
    return PruneRun(plan, document, target, target / CHECKPOINT if export else None)


def bench(
    *,
    against: Sequence[str | Path] = (),
    scores: str | Path | None = None,
    config: str | Path | None = None,
    output_dir: str | Path | None = None,
    force: bool = False,
    **settings: Any,
) -> BenchRun:
    """Measure a dense model against pruned ones and against random pruning, on the same held-out text.

    Args:
        against: checkpoints to compare with the dense `model`; by default the newest one that `prune` exported. Random
            pruning removes as many heads as the first of them lost, by the same rule; checkpoints pruned by another
            rule are measured, but not ranked with it.
        scores: a scoring run of the dense model: the other criteria are then measured too, at the same ratio.
        config, output_dir, force, settings: as for `score`.
    """
    recipe = resolve(config, settings)
    check_output(output_dir, force)
    if not against:
        newest = newest_run("prune", recipe.model, holding=CHECKPOINT)
        if newest is None:
            raise ArtefactError(
                "there is nothing to compare with; give --against, or run `compress prune --export` first"
            )
        log.info(f"comparing with the newest pruned checkpoint, {newest / CHECKPOINT}")
        against = (newest / CHECKPOINT,)
    folders = [folder / CHECKPOINT if (folder / CHECKPOINT).is_dir() else folder for folder in map(Path, against)]
    named = _named(folders)
    records = {name: _record(folder) for name, folder in named.items()}
    first = next((record for record in records.values() if record is not None), None)
    if recipe.model is None and first is None:
        raise RecipeError(f"{folders[0]} does not say which model it was pruned from; give --model")
    if first is not None:
        recipe = _as_recorded(recipe, first)
    with result_directory("bench", recipe, output_dir, force) as (staged, target):
        dense = load_for(recipe)
        contenders = {
            name: load_for(replace(recipe, model=str(folder), revision=None, task=dense.task), name)
            for name, folder in named.items()
        }
        data = data_for(dense, recipe)
        log.info(data.describe()[1])
        own = {
            name: record for name, record in records.items() if record and record["base"]["identity"] == dense.identity
        }
        for name, record in own.items():
            _check_unseen(name, record, data)
        plans: dict[str, PruningPlan] = {}
        unranked = set(contenders)
        if own:
            reference = next(iter(own.values()))["plan"]
            plans = _rival_plans(reference, recipe, dense, Path(scores) if scores else None)
            unranked -= {name for name, record in own.items() if _rule(record["plan"]) == _rule(reference)}
        document = {
            **comparison.compare(dense, contenders, plans, data, recipe, unranked if own else set()),
            "machine": machine(dense.model.device),
            "versions": versions(),
        }
        for name in sorted(unranked):
            log.warning(
                f"no random pruning{' and no other criteria' if scores else ''} to rank {name} with: it does not say "
                f"that it was pruned from {dense.name}"
                + (f" by the rule of {next(iter(own))}, which the verdict is about" if own else "")
            )
        (staged / "bench.json").write_text(to_json(document), encoding="utf-8")
    return BenchRun(document, target)


def run(
    *, config: str | Path | None = None, output_dir: str | Path | None = None, force: bool = False, **settings: Any
) -> WholeRun:
    """Score, prune, export and bench in one directory: `scores/`, `pruned/checkpoint/` and `bench/`."""
    recipe = _naming(resolve(config, settings), EMBEDDED)
    criterion(recipe.criterion)  # a misspelt name should not cost a scoring epoch
    with result_directory("run", recipe, output_dir, force) as (staged, target):
        common = {name: value for name, value in asdict(recipe).items() if value is not None}
        scored = score(output_dir=staged / "scores", **common)
        pruned = prune(scores=scored.directory, export=True, output_dir=staged / "pruned", **common)
        assert pruned.checkpoint is not None
        measured = bench(against=[pruned.checkpoint], scores=scored.directory, output_dir=staged / "bench", **common)
    return WholeRun(
        replace(scored, directory=target / "scores"),
        replace(pruned, directory=target / "pruned", checkpoint=target / "pruned" / CHECKPOINT),
        replace(measured, directory=target / "bench"),
        target,
    )


def _naming(recipe: Recipe, default: str) -> Recipe:
    return replace(recipe, model=recipe.model or default)


def _check_same_model(loaded: LoadedModel, scores: Scores, directory: Path) -> None:
    if scores.facts["identity"] != loaded.identity:
        raise ArtefactError(
            f"the scores in {directory} are of another model ({scores.facts['model']}) than {loaded.name}, or its "
            "weights have changed since; score the model again"
        )


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of what was pruned, where a checkpoint has one."""
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    base, plan = record.get("base"), record.get("plan")
    known = isinstance(base, dict) and {"model", "identity"} <= base.keys()
    wanted = {"criterion", "ratio", "scope", "unit", "allow_empty", "heads_per_layer", "removed_heads", "total_heads"}
    if not known or not isinstance(plan, dict) or not wanted <= plan.keys():
        raise ArtefactError(f"{folder / RECORD} is damaged; prune and export the model again")
    return record


def _as_recorded(recipe: Recipe, record: dict[str, Any]) -> Recipe:
    """Fill what a bench was not told with what the checkpoint's record knows: the model, and the text."""
    if recipe.model is None:
        base = record["base"]
        recipe = replace(recipe, model=base["model"], revision=recipe.revision or base.get("revision"))
    settings = record.get("scores", {}).get("settings", {})
    if recipe.data is None:
        recipe = replace(recipe, data=settings.get("data"), eval_data=recipe.eval_data or settings.get("eval_data"))
    return recipe


def _check_unseen(name: str, record: dict[str, Any], data: TextDataModule) -> None:
    """Refuse to report on documents that chose the heads."""
    seen = set(record.get("scores", {}).get("data", {}).get("hashes", ()))
    shared = sum(document in seen for document in data.evaluation.hashes)
    if shared:
        raise DataError(
            f"{shared} of the {data.evaluation.documents} documents of {data.evaluation.name} calibrated {name}: "
            "a report on them would flatter it; give other --eval-data"
        )


def _rule(plan: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how many heads go: plans of one rule can be ranked against each other."""
    return plan["ratio"], plan["scope"], plan["unit"], plan["allow_empty"], tuple(plan["heads_per_layer"])


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each checkpoint: what was pruned, where that tells them apart, else where it is."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RecipeError("--against names the same checkpoint twice; give each once")
    named: dict[str, Path] = {}
    taken = {"dense", *(rival.name for rival in criteria())}
    for folder in folders:
        record = _record(folder)
        name = folder.name
        if record is not None:
            plan = record["plan"]
            name = f"{plan['criterion']} {plan['removed_heads']}/{plan['total_heads']}"
        named[f"{name} ({folder})" if name in taken or name in named else name] = folder
    return named


def _rival_plans(
    plan: dict[str, Any], recipe: Recipe, dense: LoadedModel, scores: Path | None
) -> dict[str, PruningPlan]:
    """Plans that remove as much as `plan` by the same rule: by the other criteria, given scores, and at random."""
    rule: dict[str, Any] = {name: plan[name] for name in ("ratio", "scope", "unit", "allow_empty")}
    rule["groups"] = [layer.group_index for layer in attention_layers(dense.model)]
    plans = {}
    if scores is not None:
        evidence = load_scores(scores)
        _check_same_model(dense, evidence, scores)
        for rival in criteria():
            if rival.name not in (plan["criterion"], "random"):
                plans[rival.name] = allocate(rival(evidence), **rule)
    for seed in range(recipe.seed, recipe.seed + recipe.random_seeds):
        plans[f"random (seed {seed})"] = allocate(random_scores(plan["heads_per_layer"], seed), **rule, seed=seed)
    return plans

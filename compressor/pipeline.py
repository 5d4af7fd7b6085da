"""The verbs: score, prune, bench and run. Each is one function; the command line only parses flags and prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressor import comparison
from compressor.artefact import load_scores, save_scores
from compressor.attention import attention_layers, prune_heads
from compressor.budget import allocate
from compressor.callbacks import HeadScoring
from compressor.config import Recipe, resolve
from compressor.console import log
from compressor.context import vocabulary_size
from compressor.criteria import criteria, criterion, random_scores
from compressor.data import TextDataModule
from compressor.environment import machine, versions
from compressor.errors import ArtefactError, ModelError, RecipeError
from compressor.export import RECORD, write_checkpoint
from compressor.files import read_json, to_json
from compressor.loading import EMBEDDED, LoadedModel, choose_device, load_model
from compressor.measure.costs import measure_costs
from compressor.module import LanguageModel
from compressor.runs import check_output, newest_run, result_directory
from compressor.trainer import run_scoring
from compressor.types import LayerScores, PruningPlan, Scores

CHECKPOINT = "checkpoint"
WINDOW = 2048  # tokens of a sequence, unless more are asked for: attention over a long context is another benchmark
SATURATED = 0.99  # of ln N: a single head's entropy up here says that hardly any symbol was seen twice


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
        scores = score_model(_load(recipe), recipe)
        save_scores(scores, staged)
    return ScoreRun(scores, target)


def score_model(loaded: LoadedModel, recipe: Recipe) -> Scores:
    """Score a model that is already loaded."""
    layers = attention_layers(loaded.model)
    data = _data(loaded, recipe)
    log.info(data.describe()[0])
    windows = data.calibration
    triple_layers = recipe.triple_layers if recipe.triple_layers is not None else [0]
    scoring = HeadScoring(layers, windows.longest, recipe.symbol, triple_layers)
    run_scoring(LanguageModel(loaded.model, loaded.task), data, scoring, loaded.model.device)
    scored = scoring.layers_scored
    if not all(torch.isfinite(torch.cat([layer.first_key_mass, layer.output_norm])).all() for layer in scored):
        raise ModelError(f"the attention of {loaded.name} is not finite; its weights are broken")
    saturated = [index for index, layer in enumerate(scored) if is_saturated(layer)]
    if saturated:
        observations = scored[saturated[0]].observations
        log.warning(
            f"the entropies of {len(saturated)} of {len(layers)} layers are saturated: with {observations:,} "
            f"observations nearly every symbol is unique, and the estimate is close to ln {observations:,} = "
            f"{math.log(observations):.4f} whatever the heads do; it is no finding about them"
        )
    facts = {
        "model": loaded.name,
        "identity": loaded.identity,
        "task": loaded.task,
        "layers": [
            {"name": layer.name, "heads": layer.num_heads, "key_value_heads": layer.num_key_value_heads}
            for layer in layers
        ],
        "data": {
            "name": windows.name,
            "fingerprint": windows.fingerprint,
            "documents": windows.documents,
            "split_documents": windows.split_documents,
            "windows": len(windows.input_ids),
            "tokens": windows.tokens,
        },
        "settings": {
            "symbol": recipe.symbol,
            "triple_layers": triple_layers,
            "part": recipe.part,
            "samples": recipe.samples,
            "batch_size": recipe.batch_size,
            "max_length": data.max_length,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "estimator": "plug-in",
            "unit": "nats",
        },
        "saturated_layers": saturated,
        "seed": recipe.seed,
        "versions": versions(),
    }
    return Scores(scored, facts)


def is_saturated(layer: LayerScores) -> bool:
    """Whether a head's entropy is so near its ceiling, ln N, that the number of observations decides it."""
    return layer.observations > 1 and float(layer.entropy.max()) >= SATURATED * math.log(layer.observations)


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
    recipe = replace(recipe, task=recipe.task or evidence.facts["task"])
    plan = allocate(
        rule(evidence, recipe.seed),
        recipe.ratio,
        recipe.scope,
        allow_empty=recipe.allow_empty,
        seed=recipe.seed if recipe.criterion == "random" else None,
    )
    document: dict[str, Any] = {"plan": plan.to_dict()}
    if dry_run:
        return PruneRun(plan, document, None, None)
    with result_directory("prune", recipe, output_dir, force) as (staged, target):
        # A checkpoint keeps the dtype it came in, even where computing in it is slow.
        loaded = _load(replace(recipe, dtype="stored" if recipe.dtype == "auto" else recipe.dtype))
        _check_same_model(loaded, evidence, Path(scores))
        length = min(256, loaded.context)
        causal = loaded.task == "causal"
        dense = measure_costs(loaded.model, length, causal=causal)
        prune_heads(loaded.model, plan.heads, allow_empty=plan.allow_empty)
        document |= {
            "base": {"model": recipe.model, "identity": loaded.identity, "task": loaded.task},
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
            pruning removes as many heads as the first of them lost, by the same rule.
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
    record = _record(folders[0])
    if recipe.model is None and record is None:
        raise RecipeError(f"{folders[0]} does not say which model it was pruned from; give --model")
    recipe = _naming(recipe, record["base"]["model"] if record else "")
    with result_directory("bench", recipe, output_dir, force) as (staged, target):
        dense = _load(recipe)
        contenders = {
            name: _load(replace(recipe, model=str(folder), revision=None, task=dense.task), name)
            for name, folder in _named(folders).items()
        }
        data = _data(dense, recipe)
        log.info(data.describe()[1])
        plans: dict[str, PruningPlan] = {}
        if record is not None and record["base"]["identity"] == dense.identity:
            plans = _rival_plans(record["plan"], recipe, dense, Path(scores) if scores else None)
        document = {
            **comparison.compare(dense, contenders, plans, data, recipe),
            "machine": machine(dense.model.device),
            "versions": versions(),
        }
        if not plans:
            log.warning(
                f"no random pruning{' and no other criteria' if scores else ''} to compare with: {folders[0]} does not "
                f"say that it was pruned from {dense.name}"
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


def _load(recipe: Recipe, label: str | None = None) -> LoadedModel:
    assert recipe.model is not None
    device, why = choose_device(recipe.device)
    loaded = load_model(
        recipe.model,
        task=recipe.task,  # type: ignore[arg-type]  # the recipe has checked it
        revision=recipe.revision,
        device=str(device),
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )
    attention_layers(loaded.model)  # a model without attention is refused before anything else happens
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    log.info(f"{label or recipe.model}: {type(loaded.model).__name__}, {loaded.task}, {dtype} on {device} ({why})")
    return loaded


def _data(loaded: LoadedModel, recipe: Recipe) -> TextDataModule:
    if recipe.max_length is not None and recipe.max_length > loaded.context:
        raise RecipeError(f"max_length is {recipe.max_length}; {loaded.name} takes {loaded.context} tokens at most")
    data = TextDataModule(
        loaded.tokenizer,
        task=loaded.task,
        data=recipe.calibration_data,
        eval_data=recipe.eval_data,
        part=recipe.part,  # type: ignore[arg-type]  # the recipe has checked it
        samples=recipe.samples,
        eval_samples=recipe.eval_samples,
        batch_size=recipe.batch_size,
        max_length=recipe.max_length or min(loaded.context, WINDOW),
        seed=recipe.seed,
    )
    data.setup()
    rows = vocabulary_size(loaded.model)
    highest = max(int(window.max()) for windows in (data.calibration, data.evaluation) for window in windows.input_ids)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {loaded.name} gives token {highest}, but the model knows {rows}; is it the model's own?"
        )
    return data


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
    wanted = {"criterion", "ratio", "scope", "allow_empty", "heads_per_layer", "removed_heads", "total_heads"}
    if not known or not isinstance(plan, dict) or not wanted <= plan.keys():
        raise ArtefactError(f"{folder / RECORD} is damaged; prune and export the model again")
    return record


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
    rule: dict[str, Any] = {name: plan[name] for name in ("ratio", "scope", "allow_empty")}
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

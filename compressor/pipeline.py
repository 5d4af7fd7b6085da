"""The verbs: score, prune, recover, bench, run, paper. One function each; the command line only parses and prints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor import comparison
from compressor.artefact import save_scores
from compressor.confidence import layer_report, mlp_report
from compressor.config import Recipe, resolve
from compressor.console import log
from compressor.contenders import (
    as_recorded,
    check_unseen,
    named_checkpoints,
    record_of,
    rival_plans,
    rule_of,
)
from compressor.criteria import criterion
from compressor.environment import machine, versions
from compressor.errors import ArtefactError, RecipeError
from compressor.export import write_checkpoint
from compressor.files import to_json
from compressor.given import follow, read_plan, refuse_rules
from compressor.loading import EMBEDDED
from compressor.preparation import calibration_of, data_for, load_for
from compressor.pruning import carry_out, check_choice, decide, of_the_model, scores_in
from compressor.recovery import recover_checkpoint
from compressor.reproduction import published_figures, reproduce
from compressor.resumption import request_of, state_directory
from compressor.runs import CHECKPOINT, check_output, newest_run, result_directory
from compressor.scoring import score_model
from compressor.types import PruningPlan, Scores


@dataclass(frozen=True)
class ScoreRun:
    """What `score` found, and where it was written."""

    scores: Scores
    directory: Path

    @property
    def document(self) -> dict[str, Any]:
        """The facts, and what is to be said of each layer and of each MLP: JSON-ready."""
        layers = [{"layer": index, **layer_report(layer)} for index, layer in enumerate(self.scores.layers)]
        mlps = [{"mlp": index, **mlp_report(mlp)} for index, mlp in enumerate(self.scores.mlps)]
        return {"facts": dict(self.scores.facts), "layers": layers, "mlps": mlps}


@dataclass(frozen=True)
class PruneRun:
    """What `prune` decided and did. `document` is `plan.json`; `checkpoint` is None without export."""

    plan: PruningPlan
    document: dict[str, Any]
    directory: Path | None
    checkpoint: Path | None


@dataclass(frozen=True)
class RecoverRun:
    """What `recover` came to. `document` is `recover.json`, and the checkpoint's record."""

    document: dict[str, Any]
    directory: Path
    checkpoint: Path


@dataclass(frozen=True)
class BenchRun:
    """What `bench` measured. `document` is `bench.json`."""

    document: dict[str, Any]
    directory: Path


@dataclass(frozen=True)
class PaperRun:
    """What came of the paper's protocol. `document` is `paper.json`."""

    score: ScoreRun
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
    recipe = _asking(_naming(resolve(config, settings), EMBEDDED))
    with result_directory("score", recipe, output_dir, force) as (staged, target):
        scores = score_model(load_for(recipe), recipe)
        save_scores(scores, staged)
    return ScoreRun(scores, target)


def prune(
    *,
    scores: str | Path | None = None,
    plan: str | Path | None = None,
    export: bool = False,
    dry_run: bool = False,
    config: str | Path | None = None,
    output_dir: str | Path | None = None,
    force: bool = False,
    **settings: Any,
) -> PruneRun:
    """Choose heads and channels by a criterion, remove them, say what that saves, and export the slimmer model.

    Args:
        scores: a scoring run; by default the newest one (of the model, where one is named), made first if there is
            none.
        plan: a JSON document with a plan, such as a dry run prints, perhaps edited: what it lists is removed, and
            nothing is chosen. Repair is then for the text of `scores`, or that the document names, or else `data`.
        export: write a checkpoint that `compressor.load` opens.
        dry_run: only say what would go; nothing is written, and the model is loaded for a target or a plan alone.
        config, output_dir, force, settings: as for `score`.
    """
    recipe = resolve(config, settings)
    if plan is None:
        check_choice(recipe)
    if not dry_run:
        check_output(output_dir, force)
    given = None
    if plan is not None:
        refuse_rules(settings)
        given = read_plan(Path(plan))
    elif scores is None:
        scores = newest_run("score", recipe.model)
        if scores is None and dry_run:
            raise ArtefactError("there is no score run, and a dry run makes none; run `compress score` first")
        if scores is None:
            log.info(f"there is no score run{f' of {recipe.model}' if recipe.model else ''} yet: scoring first")
            scores = score(config=config, **settings).directory
        else:
            log.info(f"taking up the newest score run, {scores}")
    evidence = scores_in(scores)
    recipe = of_the_model(recipe, evidence, given)
    with nullcontext((Path(), Path())) if dry_run else result_directory("prune", recipe, output_dir, force) as places:
        staged, target = places
        if given is not None:
            decision = follow(given, Path(plan or ""), evidence, Path(scores or ""), recipe)
        else:
            assert evidence is not None
            decision = decide(evidence, Path(scores or ""), recipe, dry_run)
        if dry_run:
            return PruneRun(decision.plan, decision.document, None, None)
        document = carry_out(decision, recipe)
        assert decision.loaded is not None
        if export:
            document = write_checkpoint(decision.loaded, document, staged / CHECKPOINT)
        (staged / "plan.json").write_text(to_json(document), encoding="utf-8")
    return PruneRun(decision.plan, document, target, target / CHECKPOINT if export else None)


def recover(
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    config: str | Path | None = None,
    output_dir: str | Path | None = None,
    force: bool = False,
    **settings: Any,
) -> RecoverRun:
    """Train a pruned checkpoint back towards its dense model, and export what has the lowest held-out perplexity.

    Args:
        checkpoint: what to recover; by default the newest one that `prune` exported.
        resume: go on with an interrupted recovery, with the settings it was begun with.
        config, output_dir, force, settings: as for `score`. `model` is the dense model, by default the one that the
            checkpoint was pruned from; `data` is what to train on, by default what it was scored on.
    """
    request = request_of(checkpoint, resume, config, output_dir, force, settings)
    with result_directory("recover", request.recipe, request.target, force) as (staged, target):
        state = state_directory(request, target, force)
        recovered, document = recover_checkpoint(request, state)
        document = write_checkpoint(recovered, document, staged / CHECKPOINT)
        (staged / "recover.json").write_text(to_json(document), encoding="utf-8")
    shutil.rmtree(state, ignore_errors=True)
    return RecoverRun(document, target, target / CHECKPOINT)


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
        against: checkpoints to compare with the dense `model`; by default the newest one that `prune` or `recover`
            wrote. Random pruning removes as many heads as the first of them lost, by the same rule; checkpoints pruned
            by another rule are measured, but not ranked with it.
        scores: a scoring run of the dense model: the other criteria are then measured too, at the same ratio.
        config, output_dir, force, settings: as for `score`.
    """
    recipe = resolve(config, settings)
    check_output(output_dir, force)
    if not against:
        newest = newest_run(("prune", "recover"), recipe.model, holding=CHECKPOINT)
        if newest is None:
            raise ArtefactError(
                "there is nothing to compare with; give --against, or run `compress prune --export` first"
            )
        log.info(f"comparing with the newest pruned checkpoint, {newest / CHECKPOINT}")
        against = (newest / CHECKPOINT,)
    folders = [folder / CHECKPOINT if (folder / CHECKPOINT).is_dir() else folder for folder in map(Path, against)]
    named = named_checkpoints(folders)
    records = {name: record_of(folder) for name, folder in named.items()}
    first = next((record for record in records.values() if record is not None), None)
    if recipe.model is None and first is None:
        raise RecipeError(f"{folders[0]} does not say which model it was pruned from; give --model")
    if first is not None:
        recipe = as_recorded(recipe, first)
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
            check_unseen(name, record, data)
        plans: dict[str, PruningPlan] = {}
        unranked, calibration = set(contenders), None
        if own:
            reference = next(iter(own.values()))
            plans = rival_plans(reference, recipe, dense, Path(scores) if scores else None)
            unranked -= {name for name, record in own.items() if rule_of(record) == rule_of(reference)}
            if reference.get("repair") is not None:  # then its rivals are repaired too
                calibration = calibration_of(dense, recipe, reference["scores"])
        for name in sorted(set(own) - unranked):
            if "recovery" in own[name]:
                log.warning(f"{name} was trained after pruning; random pruning was not trained: the verdict is on both")
        document = {
            **comparison.compare(dense, contenders, plans, data, recipe, unranked if own else set(), calibration),
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
    check_choice(recipe)
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


def paper(
    name: str = "gpt2",
    *,
    config: str | Path | None = None,
    output_dir: str | Path | None = None,
    force: bool = False,
    **settings: Any,
) -> PaperRun:
    """Follow the protocol of arXiv 2605.09515 and set its published figures beside what is found.

    Args:
        name: a model of the paper's: gpt2, bert or tinyllama.
        config: a YAML recipe; by default the shipped `paper-<name>.yaml`.
        output_dir, force, settings: as for `score`; `model` and `data` put others in the place of the paper's.
    """
    published_figures(name)
    recipe = _asking(resolve(config or f"paper-{name}.yaml", settings))
    with result_directory("paper", recipe, output_dir, force) as (staged, target):
        loaded = load_for(recipe)
        scores = score_model(loaded, recipe)
        save_scores(scores, staged)
        document = {
            **reproduce(name, scores, loaded, recipe),
            "machine": machine(loaded.model.device),
            "versions": versions(),
        }
        (staged / "paper.json").write_text(to_json(document), encoding="utf-8")
    return PaperRun(ScoreRun(scores, target), document, target)


def _naming(recipe: Recipe, default: str) -> Recipe:
    return replace(recipe, model=recipe.model or default)


def _asking(recipe: Recipe) -> Recipe:
    """A recipe that asks for the values that its criterion needs."""
    needed = criterion(recipe.criterion).needs
    values = {*(recipe.values or ()), *([needed] if needed else ())}
    return replace(recipe, values=sorted(values) if values else recipe.values)

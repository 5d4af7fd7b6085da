"""A pruned checkpoint, trained back towards its dense model: what it is trained on, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compressor.callbacks import Recovering
from compressor.config import Recipe
from compressor.console import log
from compressor.contenders import as_recorded
from compressor.data import (
    StepBatches,
    TrainingText,
    evaluation_hashes,
    held_out_batches,
    load_training_text,
    training_batches,
)
from compressor.environment import versions
from compressor.errors import ArtefactError, DataError, ModelError
from compressor.loading import LoadedModel, load_model
from compressor.module import LanguageModel
from compressor.preparation import check_tokens, load_for, window_length
from compressor.resumption import Request
from compressor.trainer import run_recovery
from compressor.training import Budget, Recovery, StateFiles, adapt, held_out_perplexity, read_state

WIDTH_RATE = 0.05  # learning rate × width of the hidden states: wider models take smaller steps (Yang et al. 2022)
LORA_RATE = 10.0  # adapters start at zero, and take larger ones


def recover_checkpoint(request: Request, state: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """Train a pruned checkpoint towards its dense model; the training is kept in `state` while it lasts.

    Returns:
        The recovered model, in the dtype of the checkpoint, and the checkpoint's record with `recovery` in it.

    Raises:
        CompressorError: anything a user can mend.
    """
    recipe = request.recipe
    pruned = load_for(_opening(request, "float64" if recipe.dtype == "float64" else "float32"), str(request.folder))
    dense = _dense(request) if recipe.objective == "distill" else None
    text = _text(pruned, request)
    for line in text.describe():
        log.info(line)
    files = StateFiles(state, _facts(request, pruned, text))
    _check_unchanged(files)
    rate = recipe.learning_rate or _default_rate(pruned, recipe.lora)
    adapted = None if recipe.lora is None else adapt(pruned.model, recipe.lora, recipe.seed)
    module = Recovery(pruned.model, pruned.task, dense.model if dense else None, rate, recipe.hidden_weight)
    held_out = held_out_batches(text.held_out, pruned.tokenizer, pruned.task, recipe.batch_size, recipe.seed)
    batches = StepBatches(text.train.input_ids, recipe.batch_size, recipe.seed, recipe.epochs)
    budget = Budget(batches.steps, 60 * recipe.max_minutes)
    recovering = Recovering(budget, recipe.eval_every, lambda: held_out_perplexity(module, held_out), files)
    batches.start = recovering.standing.step
    if not recovering.standing.ended:
        loader = training_batches(text.train, pruned.tokenizer, pruned.task, batches)
        run_recovery(module, loader, recovering, pruned.model.device)
    standing = recovering.standing
    if not standing.history:
        raise ModelError(f"the held-out perplexity of {request.folder} is not finite; its weights are broken")
    files.restore_best(module.trained)
    if adapted is not None:
        adapted.merge()
    recovered = _as_stored(request, pruned)
    before = standing.before
    perplexity = {"before": before, "after": held_out_perplexity(module, held_out)}
    if perplexity["after"] > before:  # by what rounding and merging cost, where nothing was gained
        recovered, perplexity["after"] = _open(request), before
    if dense is not None:
        perplexity["dense"] = held_out_perplexity(LanguageModel(dense.model, dense.task), held_out)
    recovery = {
        "objective": recipe.objective,
        "settings": {
            "hidden_weight": recipe.hidden_weight,
            "learning_rate": rate,
            "epochs": recipe.epochs,
            "max_minutes": recipe.max_minutes,
            "eval_every": recipe.eval_every,
            "batch_size": recipe.batch_size,
            "max_length": text.train.max_length,
            "lora": recipe.lora,
            "seed": recipe.seed,
        },
        "data": text.train.facts(),
        "held_out": text.held_out.facts(),
        "perplexity": perplexity,
        "steps": standing.step,
        "steps_planned": budget.steps,
        "best_step": standing.best[0],
        "ended": standing.ended,
        "minutes": round(standing.seconds / 60, 3),
        "history": [list(entry) for entry in standing.history],
        "earlier": request.record.get("recovery"),
    }
    return recovered, {**request.record, "versions": versions(), "recovery": recovery}


def _opening(request: Request, dtype: str) -> Recipe:
    return replace(request.recipe, model=str(request.folder), revision=None, dtype=dtype)


def _open(request: Request) -> LoadedModel:
    """The checkpoint in the dtype that its successor is to have."""
    recipe = _opening(request, "stored" if request.recipe.dtype == "auto" else request.recipe.dtype)
    return load_model(
        str(request.folder),
        task=recipe.task,  # type: ignore[arg-type]  # the recipe has checked it
        device=recipe.device,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )


def _as_stored(request: Request, trained: LoadedModel) -> LoadedModel:
    """The trained weights in the checkpoint's dtype; the trained model gets them back as rounding left them."""
    stored = _open(request)
    stored.model.load_state_dict(trained.model.state_dict())
    trained.model.load_state_dict(stored.model.state_dict())
    return stored


def _dense(request: Request) -> LoadedModel:
    base = request.record["base"]
    loaded = load_for(request.recipe)
    if loaded.identity != base["identity"]:
        raise ArtefactError(
            f"{request.folder} was not pruned from {loaded.name}, or its weights have changed since; "
            "give the dense model with --model, or --objective loss to do without"
        )
    return loaded


def _text(pruned: LoadedModel, request: Request) -> TrainingText:
    """What is trained on; nothing that pruning is reported on may be among it."""
    recipe = request.recipe
    part: Any = recipe.part  # the recipe has checked it
    length = window_length(pruned, recipe.max_length)
    text = load_training_text(
        pruned.tokenizer,
        pruned.task,
        recipe.calibration_data,
        recipe.eval_data,
        part,
        recipe.train_samples,
        length,
        recipe.seed,
    )
    check_tokens(pruned, text.train, text.held_out)
    recorded = as_recorded(Recipe(model=recipe.model), request.record)
    if recipe.eval_data is None and recipe.data != recorded.data:
        _check_apart(text, recorded, part)
    return text


def _check_apart(text: TrainingText, recorded: Recipe, part: Any) -> None:
    """Refuse documents that `bench` would report on if it were not told otherwise."""
    try:
        reported = evaluation_hashes(recorded.calibration_data, recorded.eval_data, part)
    except DataError as error:
        log.warning(f"what pruning would be reported on cannot be read ({error}); `bench` will compare documents")
        return
    hashes = (*text.train.hashes, *text.held_out.hashes)
    shared = sum(document in reported for document in hashes)
    if shared:
        raise DataError(
            f"{shared} of the {len(hashes)} documents of {text.train.name} are in the evaluation set of "
            f"{recorded.eval_data or recorded.calibration_data}, which pruning is reported on; give other --data, or "
            "say with --eval-data what to report on"
        )


def _facts(request: Request, pruned: LoadedModel, text: TrainingText) -> dict[str, Any]:
    """What tells a recovery from every other."""
    return {
        "recipe": asdict(request.recipe),
        "checkpoint": str(request.folder),
        "identity": pruned.identity,
        "data": [windows.fingerprint for windows in (text.train, text.held_out)],
    }


def _check_unchanged(files: StateFiles) -> None:
    document = read_state(files.directory)
    if document is not None and document["facts"] != files.facts:
        raise ArtefactError(
            f"the checkpoint or the text of the interrupted recovery in {files.directory} has changed since; "
            "start anew without --resume"
        )


def _default_rate(loaded: LoadedModel, lora: int | None) -> float:
    width = int(loaded.model.config.get_text_config().hidden_size)
    return WIDTH_RATE / width * (1.0 if lora is None else LORA_RATE)

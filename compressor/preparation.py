"""A recipe → the model it names and the text it is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressor.attention import attention_layers
from compressor.config import Recipe
from compressor.console import log
from compressor.context import vocabulary_size
from compressor.data import TextDataModule, Windows
from compressor.errors import ArtefactError, DataError, ModelError, RecipeError
from compressor.loading import LoadedModel, load_model
from compressor.module import Batch

TEXT_SETTINGS = ("data", "eval_data", "part", "samples", "max_length")  # what says which text a model was scored on
WINDOW = 2048  # tokens of a sequence, unless more are asked for: attention over a long context is another benchmark


def load_for(recipe: Recipe, label: str | None = None) -> LoadedModel:
    """Load the model of a recipe and log what was chosen for it; `label` stands for its name in the log.

    Raises:
        CompressorError: there is no such model, or it has no attention heads that can be found.
    """
    assert recipe.model is not None
    loaded = load_model(
        recipe.model,
        task=recipe.task,  # type: ignore[arg-type]  # the recipe has checked it
        revision=recipe.revision,
        device=recipe.device,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )
    attention_layers(loaded.model)  # a model without attention is refused before anything else happens
    log.info(f"{label or recipe.model}: {type(loaded.model).__name__}, {loaded.task}, {loaded.choice}")
    return loaded


def data_for(loaded: LoadedModel, recipe: Recipe) -> TextDataModule:
    """Read and tokenise the text of a recipe for a model.

    Raises:
        CompressorError: the text cannot be used, or does not fit the model.
    """
    data = TextDataModule(
        loaded.tokenizer,
        task=loaded.task,
        data=recipe.calibration_data,
        eval_data=recipe.eval_data,
        part=recipe.part,  # type: ignore[arg-type]  # the recipe has checked it
        samples=recipe.samples,
        eval_samples=recipe.eval_samples,
        batch_size=recipe.batch_size,
        max_length=window_length(loaded, recipe.max_length),
        seed=recipe.seed,
        shuffled=recipe.until_stable,
    )
    data.setup()
    check_tokens(loaded, data.calibration, data.evaluation)
    return data


def calibration_of(loaded: LoadedModel, recipe: Recipe, scored: Mapping[str, Any]) -> list[Batch]:
    """The very text that a model was scored on, as batches with labels.

    Args:
        loaded: the model.
        recipe: how to load and to batch.
        scored: `settings`, `seed` and `data` of the scoring run.

    Raises:
        ArtefactError: the text is not what it was.
        CompressorError: it cannot be read.
    """
    settings = {name: scored["settings"][name] for name in TEXT_SETTINGS}
    try:
        data = data_for(loaded, replace(recipe, **settings, seed=scored["seed"], until_stable=False))
    except DataError as error:
        raise DataError(f"a repair needs the text that was scored, or prune with --no-repair: {error}") from error
    if data.calibration.fingerprint != scored["data"]["fingerprint"]:
        raise ArtefactError(
            f"{data.calibration.name} has changed since {loaded.name} was scored on it, so a repair would be for other "
            "text; score it again, or prune with --no-repair"
        )
    return list(data.loss_dataloader())


def window_length(loaded: LoadedModel, wanted: int | None) -> int:
    """Tokens of a sequence: as many as are wanted, else what the model takes, `WINDOW` at most.

    Raises:
        RecipeError: the model does not take so many.
    """
    if wanted is not None and wanted > loaded.context:
        raise RecipeError(f"max_length is {wanted}; {loaded.name} takes {loaded.context} tokens at most")
    return wanted or min(loaded.context, WINDOW)


def check_tokens(loaded: LoadedModel, *texts: Windows) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        ModelError: there is one.
    """
    highest = max(int(window.max()) for windows in texts for window in windows.input_ids)
    if highest >= vocabulary_size(loaded.model):
        raise ModelError(
            f"the tokenizer of {loaded.name} gives token {highest}, but the model knows "
            f"{vocabulary_size(loaded.model)}; is it the model's own?"
        )

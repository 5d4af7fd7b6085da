"""A model and its calibration text → scores, with the facts that identify them."""

from __future__ import annotations

import math

import torch

from compressor.attention import attention_layers
from compressor.callbacks import HeadScoring
from compressor.config import Recipe
from compressor.console import log
from compressor.environment import versions
from compressor.errors import ModelError
from compressor.loading import LoadedModel
from compressor.module import LanguageModel
from compressor.preparation import data_for
from compressor.trainer import run_scoring
from compressor.types import LayerScores, Scores

SATURATED = 0.99  # of ln N: a single head's entropy up here says that hardly any symbol was seen twice


def score_model(loaded: LoadedModel, recipe: Recipe) -> Scores:
    """Score a model that is already loaded."""
    layers = attention_layers(loaded.model)
    data = data_for(loaded, recipe)
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
            {
                "name": layer.name,
                "heads": layer.num_heads,
                "key_value_heads": layer.num_key_value_heads,
                "groups": list(layer.group_index),
            }
            for layer in layers
        ],
        "data": {
            "name": windows.name,
            "fingerprint": windows.fingerprint,
            "documents": windows.documents,
            "split_documents": windows.split_documents,
            "windows": len(windows.input_ids),
            "tokens": windows.tokens,
            "hashes": list(windows.hashes),
        },
        "settings": {
            "symbol": recipe.symbol,
            "triple_layers": triple_layers,
            "data": recipe.data,
            "eval_data": recipe.eval_data,
            "part": recipe.part,
            "samples": recipe.samples,
            "revision": recipe.revision,
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

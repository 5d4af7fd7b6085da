"""A model and its calibration text → scores, with the facts that identify them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compressor.analysis import VALUES, Analysis, Coalition
from compressor.attention import AttentionLayer, attention_layers
from compressor.budget import allocate
from compressor.callbacks import HeadScoring
from compressor.confidence import COVERED, believed, is_saturated
from compressor.config import Recipe
from compressor.console import log
from compressor.criteria import criteria
from compressor.damage import DAMAGES, OF_CHANNELS, damages, linear_at, not_by_token, site_of
from compressor.environment import versions
from compressor.errors import ModelError, RecipeError
from compressor.files import did_you_mean
from compressor.game import coalition_dividends, coalition_entropies
from compressor.game.counting import columns_of, measure_coalitions
from compressor.game.estimators import coverage
from compressor.game.lattice import MAX_HEADS
from compressor.loading import LoadedModel
from compressor.mlp import MLPLayer, mlp_layers
from compressor.mlp.layout import output_norms
from compressor.module import LanguageModel
from compressor.preparation import data_for
from compressor.stability import StableMask
from compressor.trainer import run_scoring
from compressor.types import MLPScores, Scores

PAPERS = "gt-fep"  # the criterion that is watched where the one in force cannot be


def score_model(loaded: LoadedModel, recipe: Recipe) -> Scores:
    """Score a model that is already loaded."""
    layers = attention_layers(loaded.model)
    stop = _stop(recipe, layers) if recipe.until_stable else None
    data = data_for(loaded, recipe)
    log.info(data.describe()[0])
    windows = data.calibration
    analysis = analysis_of(recipe)
    budget = None if recipe.memory_budget is None else int(recipe.memory_budget * 2**30)
    scoring = HeadScoring(layers, windows.longest, recipe.symbol, analysis, budget, stop)
    module, device = LanguageModel(loaded.model, loaded.task), loaded.model.device
    asked = sorted(set(recipe.values or ()) & set(DAMAGES))
    sites = {layer.index: site_of(layer, layer.num_heads) for layer in layers if layer.num_heads and asked}
    for site in sites.values():
        linear_at(loaded.model, site)  # what cannot be gated is refused before anything is run
    mlps, no_channels = _mlps_of(loaded, recipe)
    run_scoring(module, data, scoring, loaded.model.device)
    scored = scoring.layers_scored
    of_channels: list[dict[str, torch.Tensor]] = [{} for _ in mlps]
    if sites:
        module.to(device)  # the Trainer leaves its model on the CPU
        batches = list(data.loss_dataloader())
        channels = [site_of(mlp, mlp.num_channels) for mlp in mlps if set(asked) & set(OF_CHANNELS)]
        if channels and (odd := not_by_token(module, batches[0], channels)):
            no_channels = f"{odd} of {loaded.name} is not given one row for each token, so that no loss tells of it"
            log.info(f"channels of MLPs get no values from the loss: {no_channels}")
            channels = []
        found = damages(
            module,
            batches,
            list(sites.values()),
            asked,
            channels=channels,
            resamples=recipe.bootstrap,
            seed=recipe.seed,
        )
        told = list(scored)
        for place, index in enumerate(sites):
            values, resampled = (
                {name: parts[place] for name, parts in of.items()} for of in (found.values, found.resampled)
            )
            told[index] = replace(
                told[index],
                values={**told[index].values, **values},
                resampled={**told[index].resampled, **resampled},
            )
        scored = tuple(told)
        of_channels = [{name: parts[place] for name, parts in found.channels.items()} for place in range(len(mlps))]
    mlps_scored = tuple(
        MLPScores(output_norms(loaded.model, mlp), values) for mlp, values in zip(mlps, of_channels, strict=True)
    )
    _check_finite(
        f"the attention of {loaded.name}",
        [[layer.first_key_mass, layer.output_norm, *layer.values.values()] for layer in scored],
    )
    _check_finite(f"an MLP of {loaded.name}", [[mlp.output_norm, *mlp.values.values()] for mlp in mlps_scored])
    saturated = [index for index, layer in enumerate(scored) if is_saturated(layer)]
    if saturated:
        observations = scored[saturated[0]].observations
        log.warning(
            f"the entropies of {len(saturated)} of {len(layers)} layers are saturated: with {observations:,} "
            f"observations nearly every symbol is unique, and the estimate is close to ln {observations:,} = "
            f"{math.log(observations):.4f} whatever the heads do; it is no finding about them"
        )
    uncovered = [index for index, layer in enumerate(scored) if not believed(layer)]
    if set(uncovered) - set(saturated):
        log.info(
            f"{len(uncovered)} of {len(layers)} layers have pairs of heads less than {COVERED:.0%} of whose joint "
            "distribution was seen; their dividends, and with them φ, depend on how much was counted"
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
        "mlps": [{"name": mlp.name, "channels": mlp.num_channels, "projection": mlp.down_projection} for mlp in mlps],
        "data": windows.facts(),
        "settings": {
            "symbol": recipe.symbol,
            "triple_layers": list(analysis.layers),
            "order": recipe.order,
            "values": list(recipe.values or ()),
            "bootstrap": recipe.bootstrap,
            "shuffles": recipe.shuffles,
            "data": recipe.data,
            "eval_data": recipe.eval_data,
            "part": recipe.part,
            "samples": recipe.samples,
            "revision": recipe.revision,
            "batch_size": recipe.batch_size,
            "max_length": data.max_length,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "estimator": recipe.estimator,
            "unit": "nats",
        },
        "saturated_layers": saturated,
        "uncovered_layers": uncovered,
        "coalitions": [_coalition(scoring, coalition, recipe.estimator) for coalition in analysis.coalitions],
        "seed": recipe.seed,
        "versions": versions(),
    }
    if no_channels is not None:
        facts["no_channels"] = no_channels
    if stop is not None:
        facts["stability"] = stop.record()
        _log_stability(stop, windows.documents)
    return Scores(scored, facts, mlps_scored)


def _mlps_of(loaded: LoadedModel, recipe: Recipe) -> tuple[tuple[MLPLayer, ...], str | None]:
    """The MLPs to look at, none where nothing asks for them; and why there are none, where something does."""
    asking = {recipe.criterion, *(recipe.values or ())}
    if not any(entry.name in asking for entry in criteria() if entry.channels is not None):
        return (), None
    try:
        return mlp_layers(loaded.model), None
    except ModelError as error:
        log.info(f"heads alone are scored: {error}")
        return (), str(error)


def _check_finite(what: str, scored: Sequence[Sequence[torch.Tensor]]) -> None:
    if not all(bool(torch.isfinite(torch.cat(list(told))).all()) for told in scored):
        raise ModelError(f"{what} is not finite; its weights are broken")


def analysis_of(recipe: Recipe) -> Analysis:
    """What a recipe asks of a scoring epoch.

    Raises:
        RecipeError: it asks for a value that nobody knows.
    """
    known = (*VALUES, *DAMAGES)
    for value in recipe.values or ():
        if value not in known:
            raise RecipeError(f"unknown value {value!r}{did_you_mean(value, known)}; known: {', '.join(known)}")
    return Analysis(
        estimator=recipe.estimator,
        layers=tuple(recipe.triple_layers if recipe.triple_layers is not None else [0]),
        order=recipe.order,
        shuffles=recipe.shuffles,
        values=tuple(value for value in recipe.values or () if value in VALUES),
        resamples=recipe.bootstrap,
        coalitions=tuple(_parsed(text) for text in recipe.coalitions or ()),
        seed=recipe.seed,
    )


def _parsed(text: str) -> Coalition:
    """(layer, head) of each member of a coalition like "0.1+3.2"."""
    members = [member.split(".") for member in text.split("+")]
    if not all(len(member) == 2 and all(part.isdecimal() for part in member) for member in members):
        raise RecipeError(f"coalition {text!r} is not of layers and heads; expected one like 0.1+3.2")
    coalition = tuple((int(layer), int(head)) for layer, head in members)
    if len(set(coalition)) < len(coalition) or len(coalition) > MAX_HEADS:
        raise RecipeError(f"coalition {text!r}: expected different heads, {MAX_HEADS} at most")
    return coalition


def _coalition(scoring: HeadScoring, coalition: Coalition, estimator: str) -> dict[str, Any]:
    """Entropy and dividend of a coalition, whose heads may be of several layers."""
    indices = sorted({layer for layer, _ in coalition})
    tables = dict(zip(indices, scoring.symbols_of(indices), strict=True))
    if len({len(table) for table in tables.values()}) > 1:
        raise RecipeError("coalitions reach into a layer that is applied several times, and others that are not")
    symbols = torch.stack([tables[layer][:, head] for layer, head in coalition], dim=1)
    everyone = [tuple(range(len(coalition)))]
    return {
        "heads": [list(member) for member in coalition],
        "entropy": float(coalition_entropies(symbols, everyone, estimator=estimator)),
        "coverage": float(measure_coalitions(columns_of(symbols), everyone, coverage)[0]),
        "dividend": float(coalition_dividends(symbols, everyone, estimator=estimator)),
    }


def _stop(recipe: Recipe, layers: Sequence[AttentionLayer]) -> StableMask:
    if recipe.ratio is None:
        raise RecipeError("until_stable watches the heads that a ratio removes; give no target while scoring")
    choose = partial(
        allocate,
        ratio=recipe.ratio,
        scope=recipe.scope_in_force,
        unit=recipe.unit_in_force,
        groups=[layer.group_index for layer in layers],
        allow_empty=recipe.allow_empty,
    )
    watched = recipe.criterion
    if watched in DAMAGES:  # which is asked once, when all text that counts is known
        watched = PAPERS
        log.info(f"{recipe.criterion} is not known while scoring: watching the heads that {watched} would remove")
    return StableMask(watched, [layer.num_heads for layer in layers], choose)


def _log_stability(stop: StableMask, documents: int) -> None:
    if stop.checks and stop.stable:
        log.info(f"the heads to remove stayed the same from half of {stop.checks[-1][0]:,} documents on")
    else:
        log.warning(f"the heads to remove did not stay the same over {documents:,} documents; give more --samples")

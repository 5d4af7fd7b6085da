"""A plan made flesh: what will feed no longer is made up for, and then it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from compressor.attention import attention_layers, check_heads, prune_heads
from compressor.attention.linear import side
from compressor.damage import Site, linear_at, site_of
from compressor.errors import ModelError
from compressor.mlp import check_channels, mlp_layers, prune_channels
from compressor.module import Batch, LanguageModel
from compressor.repair import is_shared, repair
from compressor.types import PruningPlan, Task


def remove(
    model: PreTrainedModel, task: Task, plan: PruningPlan, calibration: Sequence[Batch] | None
) -> list[dict[str, Any]] | None:
    """Remove what a plan says from a model, in place, after a repair on calibration text, where there is any.

    The plan is checked on copies first: where it cannot be carried out, the model stays as it is.

    Returns:
        What came of the repair, `Repair` by `Repair` with its structure and layer, JSON-ready; None without
        calibration text.

    Raises:
        PlanError: the plan does not fit the model, or cannot be carried out.
        ModelError: a repair met what is not finite; maps before that are changed.
    """
    done: list[dict[str, Any]] | None = None
    if calibration is not None or (plan.heads and plan.channels):
        if plan.heads:
            check_heads(model, plan.heads, allow_empty=plan.allow_empty)
        if plan.channels:
            check_channels(model, plan.channels, allow_empty=plan.allow_empty)
    if calibration is not None:
        done = _repair(model, task, plan, calibration)
    if plan.heads:
        prune_heads(model, plan.heads, allow_empty=plan.allow_empty)
    if plan.channels:
        prune_channels(model, plan.channels, allow_empty=plan.allow_empty)
    return done


def silence(model: PreTrainedModel, task: Task, plan: PruningPlan, calibration: Sequence[Batch] | None) -> None:
    """Give what a plan removes zero weights, after a repair on calibration text, where there is any; cut nothing.

    Raises:
        ModelError: another module holds such a weight too.
    """
    sites = sites_of(model)
    for structure, layer, site in sites:
        if getattr(plan, structure).get(layer) and is_shared(model, site):
            raise ModelError(
                f"{site.module} shares its weight with another module, which may keep what leaves; prune in one round"
            )
    if calibration is not None:
        _repair(model, task, plan, calibration)
        return
    for structure, layer, site in sites:
        part, entries = linear_at(model, site), site.entries
        places = [place for unit in getattr(plan, structure).get(layer, ()) for place in entries[unit]]
        weight = part.get_parameter("weight").detach()
        weight.index_fill_(side(part, "inputs"), torch.tensor(places, dtype=torch.long, device=weight.device), 0)


def _repair(
    model: PreTrainedModel, task: Task, plan: PruningPlan, calibration: Sequence[Batch]
) -> list[dict[str, Any]]:
    sites = sites_of(model)
    losing = [(site, getattr(plan, structure).get(layer, ())) for structure, layer, site in sites]
    places = {site.module: {"structure": structure, "layer": layer} for structure, layer, site in sites}
    repaired = repair(LanguageModel(model, task), calibration, losing, [site for *_, site in sites])
    return [{**places[entry.site], **entry.to_dict()} for entry in repaired]


def sites_of(model: PreTrainedModel) -> list[tuple[str, int, Site]]:
    """(structure, layer, where it hands on what it found) of every layer of heads, and every MLP."""
    layers = [layer for layer in attention_layers(model) if layer.num_heads]  # an emptied one hands nothing on
    found = [("heads", layer.index, site_of(layer, layer.num_heads)) for layer in layers]
    try:
        mlps = mlp_layers(model)
    except ModelError:  # such as one of experts
        return found
    return [*found, *(("channels", layer.index, site_of(layer, layer.num_channels)) for layer in mlps)]

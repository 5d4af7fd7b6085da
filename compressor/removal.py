"""A plan made flesh: what will feed no longer is made up for, and then it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from compressor.attention import attention_layers, prune_heads
from compressor.damage import Site, site_of
from compressor.mlp import mlp_layers, prune_channels
from compressor.module import Batch, LanguageModel
from compressor.repair import repair
from compressor.types import PruningPlan, Task


def remove(
    model: PreTrainedModel, task: Task, plan: PruningPlan, calibration: Sequence[Batch] | None
) -> list[dict[str, Any]] | None:
    """Remove what a plan says from a model, in place, after a repair on calibration text, where there is any.

    Returns:
        What came of the repair, `Repair` by `Repair` with its structure and layer, JSON-ready; None without
        calibration text.
    """
    done: list[dict[str, Any]] | None = None
    if calibration is not None:
        places: dict[str, dict[str, Any]] = {}
        losing: list[tuple[Site, Sequence[int]]] = []
        layers = attention_layers(model)
        for index, gone in plan.heads.items():
            losing.append((site_of(layers[index], layers[index].num_heads), gone))
            places[losing[-1][0].module] = {"structure": "heads", "layer": index}
        mlps = mlp_layers(model) if plan.channels else ()
        for index, gone in plan.channels.items():
            losing.append((site_of(mlps[index], mlps[index].num_channels), gone))
            places[losing[-1][0].module] = {"structure": "channels", "layer": index}
        repaired = repair(LanguageModel(model, task), calibration, losing)
        done = [{**places[entry.site], **entry.to_dict()} for entry in repaired]
    if plan.heads:
        prune_heads(model, plan.heads, allow_empty=plan.allow_empty)
    if plan.channels:
        prune_channels(model, plan.channels, allow_empty=plan.allow_empty)
    return done

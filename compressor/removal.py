"""A plan made flesh: what will feed no longer is made up for, and then it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from compressor.attention import attention_layers, prune_heads
from compressor.damage import site_of
from compressor.module import Batch, LanguageModel
from compressor.repair import repair
from compressor.types import PruningPlan, Task


def remove(
    model: PreTrainedModel, task: Task, plan: PruningPlan, calibration: Sequence[Batch] | None
) -> list[dict[str, Any]] | None:
    """Remove what a plan says from a model, in place, after a repair on calibration text, where there is any.

    Returns:
        What came of the repair, `Repair` by `Repair` with its layer, JSON-ready; None without calibration text.
    """
    done: list[dict[str, Any]] | None = None
    if calibration is not None:
        layers = attention_layers(model)
        sites = {index: site_of(layers[index], layers[index].num_heads) for index in plan.heads}
        repaired = repair(LanguageModel(model, task), calibration, [(sites[i], gone) for i, gone in plan.heads.items()])
        numbers = {site.module: index for index, site in sites.items()}
        done = [{"layer": numbers[entry.site], **entry.to_dict()} for entry in repaired]
    prune_heads(model, plan.heads, allow_empty=plan.allow_empty)
    return done

"""Can channels of MLPs go as heads can? What the sweep asks of every class, whatever became of its heads."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from aftermath import check_reload, check_sizes, check_training, numbers_of
from parity import Mismatch, Plan, compare_cached, compare_logits, effects
from tiny_models import inputs
from transformers import PreTrainedModel

from compressor.errors import CompressorError
from compressor.mlp import MLPLayer, mlp_layers, prune_channels, removed_channels
from compressor.types import Task

# Names that configs have for the width of MLPs; those for other things never had the width of all layers.
FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "d_inner", "dff", "dim_ff")
Row = dict[str, Any]


def examine_channels(
    model: PreTrainedModel, task: Task, seed: str, seen: float, fault: Callable[[Exception], str]
) -> Row:
    """What can be said of the channels of one class: "channels" is "pass" or the reason why not.

    Args:
        model: the model.
        task: what it does.
        seed: of the plan.
        seen: how far silencing channels has to move the logits, or parity would say little.
        fault: a line for what should not have happened.
    """
    try:
        layers = mlp_layers(model)
        plan = draw_channels(layers, seed)
        pruned = prune_channels(copy.deepcopy(model), plan)
        parity = compare(model, pruned, layers, plan, task, seen)
        alike = {index: gone[:1] for index, gone in plan.items()}  # which a config can tell in one number
        check_channel_books(model, prune_channels(copy.deepcopy(model), alike), layers, alike)
    except Mismatch as reason:
        return {"channels": f"fault: {reason}"}
    except CompressorError as reason:
        return {"channels": phrase(str(reason))}
    except Exception as error:
        return {"channels": fault(error)}
    return {"channels": "pass", "mlps": mlps_found(layers), "channels_parity": float(f"{parity:.0e}")}


def draw_channels(layers: Sequence[MLPLayer], seed: str) -> dict[int, list[int]]:
    """A quarter to a half of the channels of every MLP, another number in each."""
    draw = random.Random(seed)
    return {
        layer.index: sorted(
            draw.sample(range(layer.num_channels), draw.randint(layer.num_channels // 4, layer.num_channels // 2))
        )
        for layer in layers
    }


def compare(
    model: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[MLPLayer], plan: Plan, task: Task, seen: float
) -> float:
    """Put every question to a model without some channels; returns its largest deviation.

    Raises:
        Mismatch: an answer is wrong.
    """
    worst: list[float] = []
    for padding in ("right", "left"):
        given = inputs(model, padding=padding)
        if min(moved := effects(model, layers, plan, given)) < seen:
            raise Mismatch(f"silencing the channels of an MLP moves the logits by {min(moved):.0e} only")
        worst.append(compare_logits(model, pruned, layers, plan, given))
        worst.append(compare_cached(model, pruned, layers, plan, given) or 0.0)
    check_channel_books(model, pruned, layers, plan)
    check_reload(pruned, model, task, inputs(model))
    check_training(pruned, model, layers, inputs(model))
    return max(worst)


def check_channel_books(
    dense: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[MLPLayer], plan: Plan
) -> None:
    """MLPs, modules and the config of a pruned model all count the channels that are left."""
    left = {layer.index: layer.num_channels - len(plan.get(layer.index, ())) for layer in layers}
    if [layer.num_channels for layer in mlp_layers(pruned)] != list(left.values()):
        raise Mismatch(f"its MLPs have other numbers of channels than {list(left.values())}")
    if {index: list(gone) for index, gone in removed_channels(pruned).items()} != dict(plan):
        raise Mismatch(f"config.pruned_channels is {removed_channels(pruned)}, and the plan was {dict(plan)}")
    check_sizes(pruned)
    before, after = (model.config.get_text_config(decoder=True).to_dict() for model in (dense, pruned))
    numbers = numbers_of(dense, layers)
    own = {int(number): told for number, told in (after.get("per_layer_config") or {}).items()}
    for name in FIELDS:
        if any(before.get(name) != layer.num_channels for layer in layers):
            continue
        told = [own.get(numbers[layer.index], {}).get(name, after[name]) for layer in layers]
        if told != list(left.values()) and len(set(numbers)) == len(layers):
            raise Mismatch(f"config.{name} says {told} of MLPs with {list(left.values())} channels")


def mlps_found(layers: Sequence[MLPLayer]) -> str:
    """Like "2 × 40": MLPs × channels."""
    kinds = [f"{layer.num_channels}" + (f" ({layer.uses} times)" if layer.uses > 1 else "") for layer in layers]
    return ", ".join(f"{len(list(same))} × {kind}" for kind, same in groupby(kinds))


def phrase(reason: str) -> str:
    """A reason without what is true of the tiny model alone: names and numbers of layers, sizes."""
    text = re.sub(r"^\S+ \((\w+)\)", r"\1", " ".join(reason.split()))
    text = re.sub(r"^\w+ (has (its|no) MLP)", r"\1", text)
    text = re.sub(r"^the plan .*, (which|whose code)", r"its MLP, \1", text)
    return re.sub(r"\bits \d+ hidden channels", "its hidden channels", text)

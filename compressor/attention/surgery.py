"""A pruning plan made flesh: heads leave the projection weights, and every number that counted them follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.attention.grouping import uneven_implementation
from compressor.attention.layout import AttentionLayer, EmptyAttention, attention_layers, features, part_widths
from compressor.errors import PlanError

Model = TypeVar("Model", bound=PreTrainedModel)


def prune_heads(model: Model, heads: Mapping[int, Iterable[int]], *, allow_empty: bool = False) -> Model:
    """Remove attention heads from the weights of a model, in place.

    A key/value head goes when the last query head that reads it goes. The plan is checked as a whole before anything
    is changed. `model.config.pruned_heads` records, in the numbering of the dense model, all that was ever removed;
    `save_pretrained` writes it, and `compressor.load` reads it.

    Args:
        model: a model whose heads `attention_layers` finds.
        heads: query heads to remove by layer index, in the numbering of the model as it is now.
        allow_empty: let a layer lose all of its heads; what remains of it is the bias of its output projection.

    Returns:
        The same model, smaller.

    Raises:
        PlanError: a layer or head that does not exist, a head named twice, or a layer left without heads.
    """
    layers = attention_layers(model)
    plan = _checked(layers, heads, allow_empty)
    record = removed_heads(model)
    for index, removed in plan.items():
        layer = layers[index]
        originals = surviving_heads(layer.num_heads, record.get(index, ()))
        record[index] = tuple(sorted((*record.get(index, ()), *(originals[head] for head in removed))))
        _prune_layer(model, layer, removed)
    if record:
        model.config.pruned_heads = {str(index): list(removed) for index, removed in sorted(record.items())}
    if any(getattr(model.get_submodule(layer.name), "key_value_index", None) for layer in attention_layers(model)):
        model.set_attn_implementation(uneven_implementation(model.config._attn_implementation))
    return model


def removed_heads(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """Heads that a model has lost, by layer, in the numbering of the dense model it came from."""
    record = getattr(model.config, "pruned_heads", None) or {}
    return {int(index): tuple(removed) for index, removed in record.items()}


def surviving_heads(num_heads: int, removed: Sequence[int]) -> list[int]:
    """Original numbers of the `num_heads` heads that a layer still has after it lost those in `removed`."""
    gone = set(removed)
    return [head for head in range(num_heads + len(gone)) if head not in gone]


def _checked(
    layers: Sequence[AttentionLayer], heads: Mapping[int, Iterable[int]], allow_empty: bool
) -> dict[int, tuple[int, ...]]:
    plan: dict[int, tuple[int, ...]] = {}
    for index, requested in heads.items():
        removed = tuple(requested)
        if not _is_number(index) or not 0 <= index < len(layers):
            raise PlanError(f"the plan names layer {index!r}; the model has layers 0 to {len(layers) - 1}")
        count = layers[index].num_heads
        for head in removed:
            if not _is_number(head) or not 0 <= head < count:
                span = f"heads 0 to {count - 1}" if count else "no heads left"
                raise PlanError(f"the plan names head {head!r} of layer {index}, which has {span}")
        if len(set(removed)) < len(removed):
            raise PlanError(f"the plan names a head of layer {index} twice: {sorted(removed)}")
        if removed and len(removed) == count and not allow_empty:
            raise PlanError(f"the plan removes all {count} heads of layer {index}; leave one, or allow empty layers")
        if removed:
            plan[int(index)] = tuple(sorted(int(head) for head in removed))
    return plan


def _is_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _prune_layer(model: PreTrainedModel, layer: AttentionLayer, removed: Sequence[int]) -> None:
    gone = set(removed)
    kept = {"query": [head for head in range(layer.num_heads) if head not in gone]}
    kept["key"] = kept["value"] = sorted({layer.key_value_index[head] for head in kept["query"]})
    for projection in layer.projections:
        rows: list[int] = []
        start = 0
        for part in projection.parts:
            rows += [start + row for row in _rows(kept[part], layer.head_dim)]
            start += part_widths(layer)[part] * layer.head_dim
        _select(model.get_submodule(projection.name), "outputs", rows)
    output = model.get_submodule(layer.output_projection)
    _select(output, "inputs", _rows(kept["query"], layer.head_dim))

    module = model.get_submodule(layer.name)
    if not kept["query"]:
        inside = layer.output_projection.startswith(f"{layer.name}.")
        parent = layer.name.rpartition(".")[0]
        relative = layer.output_projection.removeprefix(f"{layer.name if inside else parent}.")
        relative = relative if inside else f"..{relative}"
        empty = EmptyAttention(layer.head_dim, module.layer_idx, relative, output if inside else None)  # type: ignore[arg-type]
        model.set_submodule(layer.name, empty.train(module.training))
        return
    position = {head: place for place, head in enumerate(kept["key"])}
    _update_bookkeeping(module, layer.head_dim, [position[layer.key_value_index[head]] for head in kept["query"]])


def _rows(heads: Iterable[int], head_dim: int) -> list[int]:
    return [head * head_dim + offset for head in heads for offset in range(head_dim)]


def _select(module: nn.Module, side: str, rows: list[int]) -> None:
    """Keep some inputs or outputs of a linear module, in place."""
    transposed = isinstance(module, Conv1D)
    dim = int((side == "inputs") != transposed)

    def cut(parameter: nn.Parameter, dim: int) -> nn.Parameter:
        index = torch.tensor(rows, dtype=torch.long, device=parameter.device)
        return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)

    module.weight = cut(module.weight, dim)  # type: ignore[arg-type]
    if side == "outputs" and module.bias is not None:
        module.bias = cut(module.bias, 0)  # type: ignore[arg-type]
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    for name, size in zip(names, features(module), strict=True):
        setattr(module, name, size)


def _update_bookkeeping(module: nn.Module, head_dim: int, mapping: list[int]) -> None:
    """Tell an attention module how many heads it has; `mapping[h]` is the key/value head that query head h reads."""
    heads, key_value_heads = len(mapping), max(mapping) + 1
    counts = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "all_head_size": heads * head_dim,
        "split_size": heads * head_dim,
    }
    for name, value in counts.items():
        if hasattr(module, name):
            setattr(module, name, value)
    module.__dict__.pop("key_value_index", None)
    module.__dict__.pop("_key_value_index_on", None)
    even = mapping == [head * key_value_heads // heads for head in range(heads)] and heads % key_value_heads == 0
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = heads // key_value_heads if even else 1  # type: ignore[assignment]
    if not even:
        module.__dict__["key_value_index"] = tuple(mapping)

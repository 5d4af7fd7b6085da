"""What leaves a model with heads and channels: parameters and multiply-adds, told before anything is removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.attention import AttentionLayer, attention_layers
from compressor.attention.linear import channel_axis
from compressor.attention.nouns import Slice
from compressor.measure._forward import evaluating
from compressor.measure.flops import count_flops
from compressor.measure.memory import parameter_count
from compressor.mlp import MLPLayer

Layer = AttentionLayer | MLPLayer
Portions = Sequence[Sequence[int]]
SavedAlong = Callable[[Layer, Portions], list[float]]


@dataclass(frozen=True)
class Prices:
    """What a model costs in all, and what of it leaves with heads or channels.

    `kind` is "params", "flops" (multiply-adds) or "latency" (seconds). `saved_along` takes a layer and portions of its
    units in the order in which they leave, and tells what is saved after each. Savings of layers add up.
    """

    kind: str
    total: float
    saved_along: SavedAlong

    def saved(self, layer: Layer, removed: Iterable[int]) -> float:
        """What leaves with some units of a layer."""
        return self.saved_along(layer, [tuple(removed)])[-1]


def parameter_prices(model: PreTrainedModel) -> Prices:
    """Parameters, tied ones counted once; exact. A tensor that other modules hold too stays for them."""
    holders: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].add(id(module))

    def saved_along(layer: Layer, portions: Portions) -> list[float]:
        names = {f"{part.module}.{part.name}" for part in layer.slices if part.kind == "tensor"}
        weights = {name: (_tensor(model, name), 1.0) for name in names}
        weights = {name: weight for name, weight in weights.items() if len(holders.get(id(weight[0]), ())) == 1}
        found = _cut(layer, portions, weights)
        if _emptied(layer, portions):
            gone = set(_subtree(model, layer))
            apart = {name: weight for name, weight in weights.items() if name not in gone}
            modules = {id(model.get_submodule(name.rpartition(".")[0])) for name in gone}
            inside = {id(tensor): tensor for tensor in (_tensor(model, name) for name in gone)}
            whole = sum(tensor.numel() for place, tensor in inside.items() if holders[place] <= modules)
            found[-1] = whole + _cut(layer, portions, apart)[-1]
        return [float(value) for value in found]

    return Prices("params", parameter_count(model), saved_along)


def flop_prices(model: PreTrainedModel, length: int) -> Prices:
    """Multiply-adds of one forward pass over `length` tokens, as `count_flops` counts them.

    The model is run once to see how often each weight is applied. What attention computes beyond its linear maps,
    norms left out, is shared out among the heads as two products of `length` by `length` for each attention map.
    """
    rows = _rows(model, length)
    weights = {name: (_tensor(model, name), times) for name, times in rows.items()}
    layers = attention_layers(model)
    inside = [name for layer in layers for name in layer.modules]
    counted, without = (count_flops(model, names, batch_size=1, length=length) for names in ((), inside))
    linear = {name for part in inside for name in weights if name.startswith(f"{part}.")}
    beyond = counted.mlp - without.mlp - sum(_macs(*weights[name]) for name in linear)
    expected = sum(_products(layer, range(layer.num_heads)) for layer in layers)
    scale = beyond / expected if expected else 0.0

    def saved_along(layer: Layer, portions: Portions) -> list[float]:
        found = _cut(layer, portions, weights)
        if isinstance(layer, AttentionLayer):
            if _emptied(layer, portions):
                gone = weights.keys() & set(_subtree(model, layer))
                apart = {name: weight for name, weight in weights.items() if name not in gone}
                found[-1] = sum(_macs(*weights[name]) for name in gone) + _cut(layer, portions, apart)[-1]
            found += scale * np.cumsum([_products(layer, portion) for portion in portions])
        return [float(value) for value in found]

    return Prices("flops", counted.total, saved_along)


def _macs(weight: torch.Tensor, times: float) -> float:
    return weight.numel() * times


def _products(layer: AttentionLayer, heads: Iterable[int]) -> int:
    """Multiply-adds of the attention maps of some heads, for one query and one key."""
    return layer.uses * (layer.head_dim + layer.value_dim) * sum(len(layer.maps[head]) for head in heads)


def _cut(layer: Layer, portions: Portions, weights: Mapping[str, tuple[torch.Tensor, float]]) -> np.ndarray[Any, Any]:
    """Entries of some tensors that are gone after each portion, times the weight of their tensor: [portions].

    A tensor that gets smaller along several dimensions loses what is not in the product.
    """
    steps = {unit: step for step, portion in enumerate(portions) for unit in portion}
    left: dict[str, dict[int, np.ndarray[Any, Any]]] = defaultdict(dict)
    for part in layer.slices:
        name = f"{part.module}.{part.name}"
        if part.kind == "tensor" and name in weights:
            lost = _lost(part, steps, len(portions))
            left[name][part.dim] = left[name].get(part.dim, weights[name][0].shape[part.dim]) - lost
    total = np.zeros(len(portions))
    for name, dims in left.items():
        tensor, times = weights[name]
        share = np.prod([sizes / max(1, tensor.shape[dim]) for dim, sizes in dims.items()], axis=0)
        total += times * tensor.numel() * (1 - share)
    return np.round(total)


def _lost(part: Slice, steps: Mapping[int, int], portions: int) -> np.ndarray[Any, Any]:
    """Entries along one dimension that are gone after each portion: those all of whose units are."""
    lost = np.zeros(portions, dtype=np.int64)
    for units, length in part.runs:
        if units and all(unit in steps for unit in units):
            lost[max(steps[unit] for unit in units)] += length
    return np.cumsum(lost)


def _emptied(layer: Layer, portions: Portions) -> bool:
    """Whether an attention layer is left without heads: then all of its module leaves but the output projection."""
    return isinstance(layer, AttentionLayer) and len({unit for part in portions for unit in part}) == layer.num_heads


def _subtree(model: nn.Module, layer: Layer) -> list[str]:
    """Names of the parameters that leave with an emptied attention module."""
    assert isinstance(layer, AttentionLayer)
    own = [f"{layer.name}.{name}" for name, _ in model.get_submodule(layer.name).named_parameters()]
    return [name for name in own if not name.startswith(f"{layer.output_projection}.")]


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    module, _, tensor = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(module), tensor)
    return found


def _rows(model: PreTrainedModel, length: int) -> dict[str, float]:
    """How often one forward pass applies every entry of the weight of each linear map, by the weight's name."""
    rows: dict[str, float] = defaultdict(float)

    def note(name: str, part: nn.Module, args: object, output: torch.Tensor) -> None:
        rows[name] += output.numel() // max(1, output.shape[channel_axis(part)])

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for name, part in model.named_modules():
            if isinstance(part, nn.Linear | Conv1D | nn.Conv1d):
                stack.callback(part.register_forward_hook(partial(note, f"{name}.weight")).remove)
        model(input_ids=torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=False)
    return dict(rows)

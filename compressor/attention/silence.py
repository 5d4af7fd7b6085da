"""Heads kept in the model but silenced: what they add to the layer's output is zero. The yardstick of their removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.layout import attention_layers
from compressor.attention.linear import channel_axis, is_linear
from compressor.attention.nouns import Layer


@contextmanager
def silenced_heads(model: PreTrainedModel, heads: Mapping[int, Iterable[int]]) -> Iterator[PreTrainedModel]:
    """Within the context, heads `{layer: [head, …]}` contribute nothing: the model gives what it would give without."""
    layers = attention_layers(model)
    with ExitStack() as stack:
        for index, gone in heads.items():
            stack.callback(silence(model.get_submodule(layers[index].output_projection), layers[index], gone))
        yield model


def silence(module: nn.Module, layer: Layer, heads: Iterable[int]) -> Callable[[], None]:
    """Have the module that holds a projection ignore some heads or channels, until what is returned is called."""
    projection, entries = layer.slices[0], layer.entries(heads)
    if is_linear(module):

        def zero(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            index = torch.tensor(entries, device=args[0].device)
            return (args[0].index_fill(channel_axis(module), index, 0), *args[1:])

        return module.register_forward_pre_hook(zero).remove
    before = module.get_parameter(projection.name)
    index = torch.tensor(entries, device=before.device)
    silent = before.detach().index_fill(projection.dim, index, 0)
    setattr(module, projection.name, nn.Parameter(silent, requires_grad=before.requires_grad))
    return partial(setattr, module, projection.name, before)

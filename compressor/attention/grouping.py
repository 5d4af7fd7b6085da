"""Attention for layers whose query heads share key/value heads unevenly, as pruning of grouped queries may leave them.

Stock implementations repeat every key/value head equally often. A pruned layer that no longer fits that keeps its small
projections and its small cache, and its keys and values are spread over the query heads just before attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
PREFIX = "compressor_uneven_"


def spread(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Give each query head its key/value head: [batch, kv heads, tokens, dim] → [batch, heads, tokens, dim].

    Layers with even groups are returned untouched; the attention function repeats those itself.
    """
    index = getattr(module, "key_value_index", None)
    if index is None:
        return states
    cache: dict[torch.device, torch.Tensor] = module.__dict__.setdefault("_key_value_index_on", {})
    if states.device not in cache:
        with torch.inference_mode(False):  # or training would choke on a tensor that inference made
            cache[states.device] = torch.tensor(index, device=states.device)
    return states.index_select(1, cache[states.device])


def attention_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """The function that transformers calls for `implementation`; "eager" stands beside the module's class."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]


def register(name: str, function: AttentionFunction, like: str) -> None:
    """Make an attention function known to transformers, with masks in the form that implementation `like` takes."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


def uneven_implementation(current: str) -> str:
    """Name of the implementation that stands in for `current` in a model with uneven groups."""
    if current.startswith(PREFIX):
        return current
    return PREFIX + ("eager" if current == "eager" else "sdpa")


def _uneven(base: str) -> AttentionFunction:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        function = attention_function(base, module)
        return function(module, query, spread(module, key), spread(module, value), attention_mask, **kwargs)

    return attend


for _base in ("sdpa", "eager"):
    register(PREFIX + _base, _uneven(_base), like=_base)

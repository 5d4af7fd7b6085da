"""Between a model and its attention function: calls can be observed, and unevenly shared key/value heads spread.

Models ask transformers' `AttentionInterface` for the function of their implementation. What they get here goes through
`_attend`, whatever the implementation, and under its own name: some models compute otherwise when they read a name
they do not know. Modules that are neither observed nor uneven notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressor.attention.slim import index_on
from compressor.errors import ModelError

Output = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., Output]
Observer = Callable[..., torch.Tensor | None]
WATCHED = ("attention_observer", "attention_substitute")  # attributes of a module while somebody looks


def spread(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Give each query head its key/value head: [batch, kv heads, tokens, dim] → [batch, heads, tokens, dim].

    Pruning of grouped queries may leave groups of different sizes. Such a layer keeps its small projections and its
    small cache, and its keys and values are spread over the query heads just before attention. Layers with even groups
    are returned untouched; the attention function repeats those itself.
    """
    index = getattr(module, "key_value_index", None)
    return states if index is None else states.index_select(1, index_on(module, "keys", index, states.device))


@contextmanager
def observing(modules: Iterable[nn.Module], observer: Observer, substitute: Observer | None = None) -> Iterator[None]:
    """Show `observer` every call that one of the modules makes to its attention function.

    After the call the observer gets (module, query, key, value, mask, output, **options), keys and values before they
    are spread; what it returns, unless None, takes the place of the output. A `substitute` is asked before the sdpa
    function is called, without an output, and what it returns, unless None, makes that call needless: [batch, queries,
    heads, dim].

    Raises:
        ModelError: one of the modules is being observed already.
    """
    observed = list(modules)
    for module in observed:
        if "attention_observer" in vars(module):
            raise ModelError(f"{type(module).__name__} is being watched already; one probe at a time")
    for module in observed:
        module.__dict__.update(zip(WATCHED, (observer, substitute), strict=True))
    try:
        yield
    finally:
        for module in observed:
            for name in WATCHED:
                del module.__dict__[name]


@contextmanager
def readable_masks(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, sdpa stands in for flash and flex attention, which take masks of other forms.

    Raises:
        ModelError: the model does not let its implementation be changed.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [(part, part.config._attn_implementation) for part in parts if part._can_set_attn_implementation()]
    changed = [(part, name) for part, name in before if name not in (None, "eager", "sdpa")]
    try:
        for part, _ in changed:
            part.set_attn_implementation("sdpa")
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{type(model).__name__} cannot be watched: {reason}") from error
    finally:
        for part, name in changed:  # the outermost first: it sets those inside it too
            part.set_attn_implementation(name)


def _attend(
    function: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Output:
    if function is sdpa_attention_forward and (substitute := getattr(module, "attention_substitute", None)) is not None:
        output = substitute(module, query, key, value, attention_mask, **kwargs)
        if output is not None:
            return output, None
    output, weights = function(module, query, spread(module, key), spread(module, value), attention_mask, **kwargs)
    if (observer := getattr(module, "attention_observer", None)) is not None:
        shown = observer(module, query, key, value, attention_mask, output, **kwargs)
        output = output if shown is None else shown
    return output, weights


def _install() -> None:
    """Let every attention function that a model asks for go through `_attend`."""
    stock = AttentionInterface.get_interface

    @wraps(stock)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> AttentionFunction:
        return partial(_attend, stock(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


_install()

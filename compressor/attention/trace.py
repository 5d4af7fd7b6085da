"""One small forward pass that shows which modules of a model attend, over how many heads, and how they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from compressor.attention.empty import EmptyAttention
from compressor.attention.interface import observing, readable_masks
from compressor.context import vocabulary_size
from compressor.errors import ModelError

BATCH, TOKENS = 2, 11
# Names under which attention modules keep their number of heads.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_SOFTMAX = (torch.softmax, nn.functional.softmax, torch.Tensor.softmax)
_FUSED = nn.functional.scaled_dot_product_attention
# What an attention function was seen to do: (its module, what it gave, the axis of the heads in that).
Event = Callable[[nn.Module, torch.Tensor, int], torch.Tensor | None]


@dataclass(frozen=True)
class Frame:
    """A module that was running when attention took place, and what it had been called with."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Site:
    """An attention module and its first use; `stack` runs from the module itself outwards.

    `keys` counts the key heads that the attention function was given, None where the model attends by itself.
    """

    stack: tuple[Frame, ...]
    heads: int
    keys: int | None = None
    key_width: int = 0
    cached: int = 0  # numbers kept for every token: keys and values
    uses: int = 1
    storage: int = 0  # of the keys
    shares_keys: bool = False  # with another site, so that neither may cut them

    @property
    def name(self) -> str:
        """Qualified name of the attention module."""
        return self.stack[0].name


class WatchAttention(TorchFunctionMode):
    """Shows attention that modules compute by themselves.

    Args:
        current: the module that is running.
        heads: how many heads a module has, None if it does not tell.
        event: is shown what a softmax over keys, or fused attention, gave; it may return something to take its place.
        fused: if given, is shown the arguments of fused attention instead, which gives no attention matrix.
    """

    def __init__(
        self,
        current: Callable[[], nn.Module | None],
        heads: Callable[[nn.Module], int | None],
        event: Event,
        fused: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        self.current = current
        self.heads = heads
        self.event = event
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; where it attends, show it."""
        result = func(*args, **(kwargs or {}))
        if (func is not _FUSED and func not in _SOFTMAX) or (module := self.current()) is None:
            return result
        if func is _FUSED and self.fused is not None:
            self.fused(module, *args, **(kwargs or {}))
            return result
        dim = -1 if func is _FUSED else _softmax_dim(args, kwargs or {})
        axis = _axis_of_heads(self.heads(module), result) if dim in (-1, result.ndim - 1) else None
        shown = None if axis is None else self.event(module, result, axis)
        return result if shown is None else shown


def named_heads(module: nn.Module) -> int | None:
    """How many heads a module says it has."""
    return next((vars(module)[name] for name in HEAD_COUNTS if name in vars(module)), None)


def _softmax_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim if isinstance(dim, int) else None


def _axis_of_heads(heads: int | None, result: torch.Tensor) -> int | None:
    """Where a softmax keeps its heads: 1 in [B, H, queries, keys], 2 in [B, queries, H, keys], 0 in [B·H, …].

    None is the softmax of something else, such as a router.
    """
    if result.ndim == 4:
        if heads is None:
            return 1 if result.shape[1] != TOKENS else None
        return next((axis for axis in (1, 2) if result.shape[axis] == heads), None)
    if result.ndim != 3:
        return None
    if heads is None:
        several = result.shape[0] > BATCH and result.shape[0] % BATCH == 0
        return 0 if several and result.shape[-1] >= TOKENS else None
    return 0 if result.shape[0] % heads == 0 else None


@contextmanager
def running(modules: Iterable[tuple[str, nn.Module]], stack: list[Frame]) -> Iterator[None]:
    """Keep `stack` filled with the modules that are running, the innermost last."""
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: stack.append(Frame(name, module, args, kwargs))

    def leave(*_: object) -> None:
        stack.pop()

    try:
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def attending(stack: list[Frame]) -> nn.Module | None:
    """The innermost running module that has parameters: a softmax in a module of its own has none."""
    for frame in reversed(stack):
        if next(frame.module.parameters(), None) is not None:
            return frame.module
    return None


@contextmanager
def tracing(model: PreTrainedModel) -> Iterator[list[Site]]:
    """The places where a model attends, and its emptied layers, in the order of their first use.

    Within the context, copies of the model's modules can be watched as they were.

    Raises:
        ModelError: the model cannot be run on a few token ids alone.
    """
    with torch.inference_mode(False), readable_masks(model):
        yield _trace(model)


def _trace(model: PreTrainedModel) -> list[Site]:
    sites: dict[nn.Module, Site] = {}
    stack: list[Frame] = []
    calls: dict[nn.Module, set[int]] = {}
    kept: list[Any] = []

    def seen(module: nn.Module, heads: int) -> Site:
        depth = max(place for place, frame in enumerate(stack) if frame.module is module)
        site = sites.get(module)
        if site is None:
            frames = (Frame(f.name, f.module, snapshot(f.args), snapshot(f.kwargs)) for f in stack[depth::-1])
            site = sites[module] = Site(tuple(frames), heads)
        kept.append(stack[depth])
        calls.setdefault(module, set()).add(id(stack[depth]))
        site.uses = len(calls[module])
        return site

    def alone(module: nn.Module, result: torch.Tensor, axis: int) -> None:
        seen(module, result.shape[axis] if axis else result.shape[0] // BATCH)

    def asked(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: Any, mask: Any, output: Any, **_: object
    ) -> None:
        site = seen(module, query.shape[1])  # its softmax may have been seen already, by `alone`
        site.heads, site.keys, site.key_width = query.shape[1], key.shape[1], key.shape[-1]
        site.cached = key.shape[1] * (key.shape[-1] + value.shape[-1])
        kept.append(key)  # or another tensor might come to lie where it lay
        site.storage = key.untyped_storage().data_ptr()

    def emptied(module: nn.Module, *_: object) -> None:
        seen(module, 0)

    empty = [module for module in model.modules() if isinstance(module, EmptyAttention)]
    with evaluating(model), running(model.named_modules(), stack):
        handles = [module.register_forward_pre_hook(emptied) for module in empty]
        try:
            with observing(model.modules(), asked), WatchAttention(lambda: attending(stack), named_heads, alone):
                model(**trial_inputs(model))
        except ModelError:
            raise
        except Exception as error:  # whatever a model may trip over
            raise ModelError(
                f"{type(model).__name__} cannot be run on token ids alone, so its heads cannot be found: "
                + " ".join(str(error).split())
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    found = list(sites.values())
    first: dict[int, Site] = {}
    for site in found:
        owner = first.setdefault(site.storage, site) if site.storage else site
        if owner is not site:
            owner.shares_keys = site.shares_keys = True
            site.cached = 0  # nothing of its own
    return found


def trial_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A batch of token ids that mean nothing in particular."""
    special = {value for config in _configs(model) for value in _special_tokens(config)}
    plain = [token for token in range(vocabulary_size(model)) if token not in special][: 4 * BATCH * TOKENS]
    embeddings = model.get_input_embeddings()
    rows = BATCH * (len(embeddings) if isinstance(embeddings, nn.ModuleList) else 1)  # one for every stream of codes
    ids = torch.tensor([plain[(5 * place) % len(plain)] for place in range(rows * TOKENS)], device=model.device)
    return {"input_ids": ids.view(rows, TOKENS), "use_cache": False}


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with every leaf of its lists, tuples and mappings, of whatever class, replaced."""
    if isinstance(value, MutableMapping):
        mapped = copy.copy(value)
        for key in value:
            mapped[key] = map_leaves(function, value[key])
        return mapped
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map_leaves(function, entry) for entry in value)
    return function(value)


def snapshot(value: Any) -> Any:
    """Tensors as they are now; caches left out, for a call that is repeated would find its own keys in them."""

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, Cache):
            return None
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    return map_leaves(keep, value)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    return list(
        {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}.values()
    )


def _special_tokens(config: PreTrainedConfig) -> set[int]:
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    values = [value for entry in named for value in (entry if isinstance(entry, list) else [entry])]
    return {value for value in values if isinstance(value, int)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode and without gradients, then as it was."""
    training = [module for module in model.modules() if module.training]
    nn.Module.eval(model)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True

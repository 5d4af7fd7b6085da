"""An attention function that also yields the key each query attends to most, without ever holding the T×T matrix."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.grouping import PREFIX, AttentionFunction, attention_function, register, spread
from compressor.attention.layout import AttentionLayer
from compressor.errors import ModelError

PROBE = "compressor_probe_"
QUERY_BLOCK = 128  # queries whose attention scores exist at one time
SYMBOLS = ("key", "offset", "sequence")


@dataclass(frozen=True)
class Attended:
    """What one layer attended to in one batch, for every query including padding.

    `key` [batch, heads, queries] int64: index of the key with the highest score, ties to the lowest index.
    `first` [batch, heads, queries]: attention mass on the first real key.
    """

    key: torch.Tensor
    first: torch.Tensor


@torch.no_grad()
def attended_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    first_key: torch.Tensor | None = None,
    block: int = QUERY_BLOCK,
) -> Attended:
    """Find the key that each query attends to most, a block of queries at a time.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, kv heads, keys, dim]; consecutive query heads share a key/value head equally.
        mask: broadcastable to [batch, heads, queries, keys]: boolean (True may be seen) or additive; None sees all.
        scaling: factor on the scores; 1/√dim by default.
        causal: without a mask, query t sees keys 0 … t.
        softcap: scores are bent to softcap · tanh(score / softcap), as in Gemma 2.
        first_key: [batch] index of the first real key of each sequence; 0 by default.
        block: queries per block; memory grows with `batch · heads · block · keys`.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    transposed = key.to(dtype).transpose(-1, -2)
    scale = dim**-0.5 if scaling is None else scaling
    index = query.new_zeros(batch, dtype=torch.long) if first_key is None else first_key
    best, first = [], []
    for start in range(0, queries, block):
        rows = query[:, :, start : start + block].to(dtype)
        size = rows.shape[2]
        # The query heads of a group are laid end to end, so that keys are never repeated.
        scores = rows.reshape(batch, kv_heads, -1, dim) @ transposed * scale
        scores = scores.reshape(batch, heads, size, keys)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if mask is not None:
            seen = mask if mask.shape[-2] == 1 else mask[..., start : start + block, :]
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        elif causal:
            place = torch.arange(keys, device=key.device)
            future = place[None, :] > place[start : start + size, None]
            scores = scores.masked_fill(future, -torch.inf)
        best.append(scores.argmax(-1))
        column = index.view(batch, 1, 1, 1).expand(batch, heads, size, 1)
        first.append((scores.gather(-1, column).squeeze(-1) - scores.logsumexp(-1)).exp())
    return Attended(torch.cat(best, -1), torch.cat(first, -1))


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token of [batch, tokens] counted without padding; meaningless where the mask is 0."""
    return attention_mask.long().cumsum(-1) - 1


def first_keys(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of the first real token of each sequence, [batch]."""
    return attention_mask.long().argmax(-1)


def token_symbols(key: torch.Tensor, attention_mask: torch.Tensor, symbol: str) -> torch.Tensor:
    """Symbols of the real queries of a batch, [observations, heads] int64, one observation per token.

    Args:
        key: [batch, heads, tokens] index of the most attended key.
        attention_mask: [batch, tokens], 1 for real tokens; padding on either side never shifts a symbol.
        symbol: "key", the key's position; "offset", the query's position minus the key's.
    """
    where = positions(attention_mask)
    found = where[:, None, :].expand_as(key).gather(-1, key)
    if symbol == "offset":
        found = where[:, None, :] - found
    return found.transpose(1, 2)[attention_mask.bool()]


def sequence_symbols(key: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Each head's whole tuple of key positions over a sequence, [batch, heads, width] int64, filled up with −1.

    The paper's own symbol: one observation per example.
    """
    batch, heads, _ = key.shape
    where = positions(attention_mask)
    found = where[:, None, :].expand_as(key).gather(-1, key)
    tuples = key.new_full((batch, heads, width + 1), -1)
    # Padding is written to a spare last column, real tokens to their own positions.
    place = torch.where(attention_mask.bool(), where, width)[:, None, :].expand_as(key)
    return tuples.scatter_(-1, place, found)[..., :width]


class AttentionProbe:
    """Context manager under which a model's forward passes also tell what their heads attend to.

    After a forward pass `observed[layer index]` holds an `Attended`; `take()` hands it over and empties it. Models
    whose attention bypasses transformers' AttentionInterface are asked for their attention matrices, one layer's at a
    time; `fallback` tells. On leaving, by whatever way, the model is as it was.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
        self.model = model
        self.layers = [layer for layer in layers if layer.num_heads]
        self.fallback = not model._can_set_attn_implementation()
        self.attention_mask: torch.Tensor | None = None
        self.observed: dict[int, Attended] = {}
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()

    def take(self) -> dict[int, Attended]:
        """Hand over what the last forward pass showed, by layer index.

        Raises:
            ModelError: a layer was not seen, so that counts would be wrong without anybody noticing.
        """
        observed, self.observed = self.observed, {}
        for layer in self.layers:
            if layer.index not in observed:
                raise ModelError(f"{layer.name} never told what it attends to; its attention cannot be scored")
        return observed

    def observe(
        self,
        index: int,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> None:
        """Record what a layer attends to, given the arguments of its attention function."""
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        self.observed[index] = attended_keys(
            query,
            spread(module, key),
            mask,
            scaling=scaling,
            causal=causal and query.shape[2] > 1,  # as sdpa has it: a single query behind a cache sees all keys
            softcap=softcap,
            first_key=self._first_key(),
        )

    def _first_key(self) -> torch.Tensor | None:
        return None if self.attention_mask is None else first_keys(self.attention_mask)

    def _attach(self) -> None:
        modules = {layer.index: self.model.get_submodule(layer.name) for layer in self.layers}
        implementation = self.model.config._attn_implementation
        if implementation.startswith(PROBE):
            raise ModelError(f"{type(self.model).__name__} is being watched already; one probe at a time")
        self._undo.append(self.model.register_forward_pre_hook(self._remember_mask, with_kwargs=True).remove)
        if self.model.base_model is not self.model:
            hook = self.model.base_model.register_forward_pre_hook(self._remember_mask, with_kwargs=True)
            self._undo.append(hook.remove)
        if not self.fallback:
            for index, module in modules.items():
                _ACTIVE[module] = (self, index, implementation)
                self._undo.append(partial(_ACTIVE.pop, module, None))
            self._undo.append(lambda: self.model.set_attn_implementation(implementation))
            # Flash and flex attention take masks of other forms; while they are watched, sdpa stands in for them.
            try:
                self.model.set_attn_implementation(PROBE + ("eager" if implementation.endswith("eager") else "sdpa"))
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise ModelError(f"{type(self.model).__name__} cannot be watched: {reason}") from error
            return
        if implementation != "eager":
            raise ModelError(
                f"{type(self.model).__name__} bypasses the attention interface and runs {implementation!r}, which does "
                "not tell what it attends to; load it with attn_implementation='eager'"
            )
        for index, module in modules.items():
            hook = module.register_forward_hook(self._read_weights(index))
            self._undo.append(hook.remove)
        wanted = self.model.config.output_attentions
        self._undo.append(lambda: setattr(self.model.config, "output_attentions", wanted))
        self.model.config.output_attentions = True

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.observed = {}
        self.attention_mask = None

    def _remember_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        self.attention_mask = given.get("attention_mask")

    def _read_weights(self, index: int) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                return  # take() names the layer
            batch, heads, queries, _ = weights.shape
            index_of_first = self._first_key()
            if index_of_first is None:
                index_of_first = weights.new_zeros(batch, dtype=torch.long)
            column = index_of_first.view(batch, 1, 1, 1).expand(batch, heads, queries, 1)
            self.observed[index] = Attended(weights.argmax(-1), weights.gather(-1, column).squeeze(-1))

        return read


_ACTIVE: weakref.WeakKeyDictionary[nn.Module, tuple[AttentionProbe, int, str]] = weakref.WeakKeyDictionary()


def _probed(form: str) -> AttentionFunction:
    """The probe for masks of one form, sdpa's or eager's; the model's own implementation of that form does the work."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        base = form
        if (active := _ACTIVE.get(module)) is not None:
            probe, index, implementation = active
            probe.observe(index, module, query, key, attention_mask, **kwargs)
            base = implementation if implementation.startswith(PREFIX) else form
        return attention_function(base, module)(module, query, key, value, attention_mask, **kwargs)

    return attend


for _form in ("sdpa", "eager"):
    register(PROBE + _form, _probed(_form), like=_form)

"""An attention function that also yields the key each query attends to most, without ever holding the T×T matrix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.argmax import Attended as Attended
from compressor.attention.argmax import attended_keys
from compressor.attention.interface import observing, readable_masks, spread
from compressor.attention.nouns import AttentionLayer
from compressor.attention.trace import Frame, WatchAttention, attending, running
from compressor.errors import ModelError

# Tensors that attention functions are given and that leave the scores alone: what they say is in the mask already.
_HARMLESS = {"position_ids", "indices", "block_indices", "cu_seq_lens_q", "cu_seq_lens_k"}
_MORE = ("softcap", "position_bias", "s_aux", "sinks", "cache")  # what is no scaled softmax of products
SYMBOLS = ("key", "offset", "sequence")


def _unknown(name: str, given: object) -> bool:
    return isinstance(given, torch.Tensor) and name not in _HARMLESS


def _causal(module: nn.Module, query: torch.Tensor, told: bool | None) -> bool:
    """Whether attention without a mask is causal, as sdpa has it: a single query behind a cache sees all keys."""
    return query.shape[2] > 1 and (bool(getattr(module, "is_causal", True)) if told is None else told)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token of [batch, tokens] counted without padding; meaningless where the mask is 0."""
    return attention_mask.long().cumsum(-1) - 1


def first_keys(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of the first real token of each sequence, [batch]."""
    return attention_mask.long().argmax(-1)


def token_symbols(key: torch.Tensor, attention_mask: torch.Tensor, symbol: str, real: torch.Tensor) -> torch.Tensor:
    """Symbols of the real queries of a batch, [observations, heads] int64, one observation per token.

    Args:
        key: [batch, heads, tokens] index of the most attended key.
        attention_mask: [batch, tokens], 1 for real tokens; padding on either side never shifts a symbol.
        symbol: "key", the key's position; "offset", the query's position minus the key's.
        real: [observations] where the real tokens are in the flattened mask; finding them would wait for the device.
    """
    where = positions(attention_mask)
    found = where[:, None, :].expand_as(key).gather(-1, key)
    if symbol == "offset":
        found = where[:, None, :] - found
    return found.transpose(1, 2).flatten(0, 1)[real]


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

    After a forward pass `observed[layer index]` holds one `Attended` for every use of the layer; `take()` hands them
    over. Where a model does not look its attention function up (`fallback` tells), its softmax over the keys is read,
    or what it gives to fused attention. On leaving, by whatever way, the model is as it was.

    Looking does not change what the model computes by a bit, unless `in_passing`: then sdpa attention on a CPU is
    computed along with what it attends to, in one pass instead of two, and is the same up to rounding.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], *, in_passing: bool = False) -> None:
        self.model = model
        self.in_passing = in_passing
        self.layers = [layer for layer in layers if layer.num_heads]
        self.fallback = not all(layer.interface for layer in self.layers)
        self.attention_mask: torch.Tensor | None = None
        self.observed: dict[int, list[Attended]] = {}
        self._modules: dict[nn.Module, AttentionLayer] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._attach(stack)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        self.observed = {}
        self.attention_mask = None

    def take(self) -> dict[int, list[Attended]]:
        """Hand over what the last forward pass showed, by layer index.

        Raises:
            ModelError: a layer was not seen, so that counts would be wrong without anybody noticing.
        """
        observed, self.observed = self.observed, {}
        for layer in self.layers:
            if layer.index not in observed:
                raise ModelError(f"{layer.name} never told what it attends to; its attention cannot be scored")
            # Differential attention calls its function twice with the same queries and keys.
            seen = observed[layer.index]
            if len(seen) % layer.uses:
                raise ModelError(f"{layer.name} attended {len(seen)} times where {layer.uses} were expected")
            observed[layer.index] = seen[:: len(seen) // layer.uses]
        return observed

    def observe(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        position_bias: torch.Tensor | None = None,
        s_aux: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        **others: object,
    ) -> None:
        """Record what a layer attends to, given the arguments of its attention function.

        Raises:
            ModelError: there is an argument that may change the scores in a way that is not known here.
        """
        for name, other in others.items():
            if _unknown(name, other):
                raise ModelError(
                    f"{type(module).__name__} gives its attention function {name}, of which scoring knows nothing"
                )
        attended = attended_keys(
            query,
            spread(module, key),
            mask,
            scaling=scaling,
            causal=_causal(module, query, is_causal),
            softcap=softcap,
            bias=position_bias,
            sinks=sinks if s_aux is None else s_aux,
            first_key=self._first_key(),
        )
        self._record(module, attended)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: object,
    ) -> torch.Tensor | None:
        """Record what a layer attends to and give its attention, [batch, queries, heads, dim]; None if that is not all.

        That is so with anything but a scaled softmax on a CPU, and where gradients or dropout are wanted.
        """
        more = [
            name for name, other in others.items() if other is not None and (name in _MORE or _unknown(name, other))
        ]
        usual = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
        seen = mask is None or mask.dtype == torch.bool
        if more or not (usual and seen) or dropout or torch.is_grad_enabled():
            return None
        attended = attended_keys(
            query,
            spread(module, key),
            mask,
            scaling=scaling,
            causal=_causal(module, query, is_causal),
            first_key=self._first_key(),
            value=spread(module, value),
        )
        self._record(module, attended)
        return attended.output

    def _record(self, module: nn.Module, attended: Attended) -> None:
        layer = self._modules[module]
        if len(layer.maps[0]) > 1:  # of the maps that make a head, the first speaks for it
            leading = [maps[0] for maps in layer.maps]
            attended = Attended(attended.key[:, leading], attended.first[:, leading], attended.keys)
        self.observed.setdefault(layer.index, []).append(attended)

    def _first_key(self) -> torch.Tensor | None:
        return None if self.attention_mask is None else first_keys(self.attention_mask)

    def _attach(self, stack: ExitStack) -> None:
        self._modules = {self.model.get_submodule(layer.name): layer for layer in self.layers}
        for model in {self.model, self.model.base_model}:
            stack.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.enter_context(readable_masks(self.model))
        asking = [module for module, layer in self._modules.items() if layer.interface]
        stack.enter_context(observing(asking, self.observe, self.attend if self.in_passing else None))
        if self.fallback:
            frames: list[Frame] = []
            stack.enter_context(running(self.model.named_modules(), frames))
            stack.enter_context(
                WatchAttention(lambda: attending(frames), self._heads, self._read_weights, self._read_arguments)
            )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        self.observed = {}  # a new forward pass begins
        mask = given.get("attention_mask")
        self.attention_mask = mask if mask is not None and mask.ndim == 2 else None  # others do not tell padding

    def _heads(self, module: nn.Module) -> int | None:
        layer = self._modules.get(module)
        return None if layer is None else layer.num_heads * len(layer.maps[0])

    def _read_weights(self, module: nn.Module, weights: torch.Tensor, axis: int) -> None:
        """Record what a layer attends to, given its attention matrices, [batch, heads, …] or [batch · heads, …]."""
        layer = self._modules.get(module)
        if layer is None or layer.interface:
            return
        if axis == 0:
            weights = weights.reshape(-1, layer.num_heads * len(layer.maps[0]), *weights.shape[1:])
        batch, heads, queries, _ = weights.shape
        first = self._first_key()
        column = (weights.new_zeros(batch, dtype=torch.long) if first is None else first).view(batch, 1, 1, 1)
        mass = weights.gather(-1, column.expand(batch, heads, queries, 1)).squeeze(-1)
        self._record(module, Attended(weights.argmax(-1), mass, weights.shape[-1]))

    def _read_arguments(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: object,
    ) -> None:
        """Record what a layer attends to, given the arguments of fused attention."""
        if module in self._modules and not self._modules[module].interface:
            self.observe(module, query, key, mask=attn_mask, scaling=scale, is_causal=is_causal)

"""Is a pruned model the full model with exactly those heads silenced? What the sweep asks of every class."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention import AttentionLayer, AttentionProbe, attention_layers
from compressor.attention.probe import token_symbols
from compressor.mlp import MLPLayer

TOLERANCE = 1e-5  # of the largest logit: many classes round to single precision somewhere inside
STEPS = 4  # single tokens behind the prompt
CACHES = ("past_key_values", "past_buckets_states")

Given = dict[str, torch.Tensor]
Plan = Mapping[int, Sequence[int]]
Layer = AttentionLayer | MLPLayer


class Mismatch(Exception):  # noqa: N818 - a finding, not a fault
    """A pruned model is not what it should be; the message says in what."""


def logits(model: PreTrainedModel, given: Given, **more: Any) -> torch.Tensor:
    """What a model gives for a padded batch, without a cache."""
    if model.config.is_encoder_decoder:
        more |= {"decoder_input_ids": given["input_ids"]}
    with torch.no_grad():
        found: torch.Tensor = model(**given, **{"use_cache": False} | more).logits
    return found


def cached_logits(model: PreTrainedModel, given: Given) -> torch.Tensor | None:
    """The same by a prompt and single tokens behind it; None if the class keeps no cache."""
    tokens, parts = given["attention_mask"].shape[1], []
    cache: dict[str, Any] = {}
    start = 0
    for stop in range(tokens - STEPS, tokens + 1):
        ids = given["input_ids"][:, start:stop]
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": given["attention_mask"][:, :stop]}
        if model.config.is_encoder_decoder:
            call = given | {"decoder_input_ids": ids}
        with torch.no_grad():
            output = model(**call, **cache, use_cache=True)
        cache = {name: output[name] for name in CACHES if output.get(name) is not None}
        if not cache:
            return None
        parts.append(output.logits)
        start = stop
    return torch.cat(parts, 1)


def real(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The entries of [batch, tokens, …] that are no padding; everything where the shape is another."""
    if values.shape[1] != mask.shape[1] or values.shape[0] % mask.shape[0]:
        return values
    return values[mask.repeat_interleave(values.shape[0] // mask.shape[0], 0).bool()]


def deviation(expected: torch.Tensor, found: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference at real tokens, relative to the largest value."""
    if expected.shape != found.shape:
        return float("inf")
    expected, found = real(expected, mask), real(found, mask)
    relative = float((expected - found).abs().max() / expected.abs().max())
    return relative if relative == relative else float("inf")


@contextmanager
def silenced(model: PreTrainedModel, layers: Sequence[Layer], plan: Plan) -> Iterator[None]:
    """Zero what some heads or channels contribute, just before the map that takes them, or in it if a bare tensor."""
    with contextlib.ExitStack() as stack:
        for index, heads in plan.items():
            projection, entries = model.get_submodule(projection_of(layers[index])), layers[index].entries(heads)
            if not hasattr(projection, "weight"):
                weight, before = output_weight(model, layers[index]), output_weight(model, layers[index]).data
                stack.callback(setattr, weight, "data", before)
                weight.data = before.index_fill(layers[index].slices[0].dim, torch.tensor(entries), 0)
                continue
            axis = 1 if isinstance(projection, nn.Conv1d) else -1

            def zero(
                module: nn.Module, args: tuple[torch.Tensor, ...], entries: list[int] = entries, axis: int = axis
            ) -> tuple[torch.Tensor, ...]:
                return (args[0].index_fill(axis, torch.tensor(entries), 0), *args[1:])

            stack.callback(projection.register_forward_pre_hook(zero).remove)
        yield


def projection_of(layer: Layer) -> str:
    """Name of the linear map that takes what heads or channels give."""
    return layer.output_projection if isinstance(layer, AttentionLayer) else layer.down_projection


def output_weight(model: PreTrainedModel, layer: Layer) -> nn.Parameter:
    """The weight of that map."""
    return model.get_submodule(projection_of(layer)).get_parameter(layer.slices[0].name)


def effects(dense: PreTrainedModel, layers: Sequence[Layer], plan: Plan, given: Given) -> list[float]:
    """How far the logits move when the heads or channels of each layer in turn are silenced."""
    full, moved = logits(dense, given), []
    for index, heads in plan.items():
        with silenced(dense, layers, {index: heads}):
            moved.append(deviation(full, logits(dense, given), given["attention_mask"]))
    return moved


def compare_logits(
    dense: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[Layer], plan: Plan, given: Given
) -> float:
    """The largest deviation of a pruned model from its silenced twin.

    Raises:
        Mismatch: it is above the tolerance.
    """
    with silenced(dense, layers, plan):
        expected = logits(dense, given)
    return within(deviation(expected, logits(pruned, given), given["attention_mask"]), "logits differ")


def compare_cached(
    dense: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[Layer], plan: Plan, given: Given
) -> float | None:
    """The same with a cache, step by step; None if the class has none, or fails with it on its own.

    Where the full model gives the same with and without a cache, so must the pruned one.
    """
    mask = given["attention_mask"]
    try:
        stepwise = cached_logits(dense, given)
    except Exception:  # whatever the class trips over, unpruned
        return None
    if stepwise is None:
        return None
    consistent = deviation(logits(dense, given), stepwise, mask) <= TOLERANCE
    with silenced(dense, layers, plan):
        expected, whole = cached_logits(dense, given), logits(dense, given)
    found = cached_logits(pruned, given)
    if expected is None or found is None:
        raise Mismatch("the pruned model keeps no cache")
    worst = within(deviation(expected, found, mask), "logits differ with a cache")
    if not consistent:
        return worst
    return max(worst, within(deviation(whole, found, mask), "logits differ with and without a cache"))


def within(found: float, what: str) -> float:
    """FOUND, if it is within the tolerance."""
    if found > TOLERANCE:
        raise Mismatch(f"{what} by {found:.0e}")
    return found


def symbols(model: PreTrainedModel, layers: Sequence[AttentionLayer], given: Given) -> list[list[torch.Tensor]]:
    """By layer and use, the key that each head attends to most, [real tokens, heads].

    Raises:
        Mismatch: the queries are not the tokens.
    """
    mask = given["attention_mask"]
    with AttentionProbe(model, layers) as probe:
        logits(model, given)
        observed = probe.take()
    keys = [[attended.key for attended in observed[layer.index]] for layer in layers]
    for key in (key for uses in keys for key in uses):
        if (key.shape[0], key.shape[-1]) != tuple(mask.shape):
            raise Mismatch("its queries are not one for each token")
        if int(real(key.transpose(1, 2), mask).max()) >= mask.shape[1]:
            raise Mismatch("its keys are not the tokens alone")
    return [[key_symbols(key, mask) for key in uses] for uses in keys]


def key_symbols(key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Positions of the most attended keys, for the real tokens of a batch."""
    return token_symbols(key, mask, "key", mask.flatten().nonzero().squeeze(1))


def compare_symbols(
    dense: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[AttentionLayer], plan: Plan, given: Given
) -> None:
    """Heads that stay look where they looked: in the first layer as in the full model, then as in its silenced twin.

    Raises:
        Mismatch: one does not.
    """
    full, found = symbols(dense, layers, given), symbols(pruned, attention_layers(pruned), given)
    with silenced(dense, layers, plan):
        twin = symbols(dense, layers, given)
    for layer, before, after in zip(layers, [full[0], *twin[1:]], found, strict=True):
        stay = [head for head in range(layer.num_heads) if head not in plan.get(layer.index, ())]
        uses = zip(before[:1], after[:1], strict=True) if before is full[0] else zip(before, after, strict=True)
        if not all(torch.equal(old[:, stay], new) for old, new in uses):
            raise Mismatch(f"heads that stay in layer {layer.index} look elsewhere")


def compare_matrices(model: PreTrainedModel, layers: Sequence[AttentionLayer], given: Given) -> bool:
    """Whether the class hands out its attention matrices, which then have to say what the probe says.

    Raises:
        Mismatch: they say something else.
    """
    found = [key for uses in symbols(model, layers, given) for key in uses]
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            output = eager(**given, output_attentions=True)
    except (TypeError, ValueError, AttributeError, NotImplementedError):
        return False
    if not deviation(logits(model, given), output.logits, given["attention_mask"]) <= TOLERANCE:
        return False  # the class's ways of attending are not of one mind
    told = [own for own in output.get("attentions") or () if isinstance(own, torch.Tensor) and own.ndim == 4]
    if len(told) != len(found) or (len(layers) > 1 and any(layer.uses > 1 for layer in layers)):
        return False
    for layer, matrix, key in zip(list(layers) * len(told), told, found, strict=False):
        if matrix.shape[1] != sum(map(len, layer.maps)):
            return False
        leading = [maps[0] for maps in layer.maps]
        if not torch.equal(key_symbols(matrix.argmax(-1)[:, leading], given["attention_mask"]), key):
            raise Mismatch("its heads' symbols are not those of its own attention matrices")
    return True

"""The key that each query attends to most and the mass on the first key, in memory that no size of the inputs moves.

Attention itself can be computed in passing, from the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from compressor.attention import kernel

LOG2_E = math.log2(math.e)
# Numbers at hand at one time: on a CPU what its caches hold, elsewhere enough for kernels to be few and large.
CPU_SCRATCH, DEVICE_SCRATCH = 1 << 22, 1 << 24
CAUSAL_QUERIES = 64  # in a block at most: the fewer, the less is computed of what none of them may see


@dataclass(frozen=True)
class Attended:
    """What one layer attended to in one batch, for every query including padding.

    `key` [batch, heads, queries] int64: index of the key with the highest score, ties to the lowest index.
    `first` [batch, heads, queries]: attention mass on the first real key. `keys`: number of keys. `output` [batch,
    queries, heads, value dim]: the values weighed by the attention, where values were given.
    """

    key: torch.Tensor
    first: torch.Tensor
    keys: int
    output: torch.Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Some sequences, some of the key/value heads and a run of the queries, which see no more than the first `keys`."""

    sequences: slice
    kv_heads: slice
    queries: slice
    keys: int


@torch.no_grad()
def attended_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    scratch: int | None = None,
) -> Attended:
    """Find the key that each query attends to most, block by block, in float32 or the wider dtype of the inputs.

    Args:
        query: [batch, heads, queries, dim].
        key: [batch, kv heads, keys, dim]; consecutive query heads share a key/value head equally.
        mask: broadcastable to [batch, heads, queries, keys]: boolean (True may be seen) or additive; None sees all.
        scaling: factor on the scores; 1/√dim by default.
        causal: without a mask, query t sees keys 0 … t.
        softcap: scores are bent to softcap · tanh(score / softcap), as in Gemma 2.
        bias: added to the scores, broadcastable to [batch, heads, queries, keys].
        sinks: a score that takes its share of the attention without being a key, [heads] or [batch, heads, queries, 1].
        first_key: [batch] index of the first real key of each sequence; 0 by default.
        value: [batch, kv heads, keys, value dim], if attention itself is wanted too; queries that see nothing get 0.
        scratch: numbers that may be at hand at one time; a single query of one key/value head has to fit, which takes
            (heads / kv heads + dim) · (keys + dim). By default what suits the device.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if value is None and kernel.usable(query, key, mask, bias, sinks):
        fused = partial(kernel.attended_keys_fused, scaling=scaling, causal=causal, softcap=softcap)
        return Attended(*fused(query, key, mask, sinks=sinks, first_key=first_key), keys)
    group, causal = heads // kv_heads, causal and mask is None
    if scratch is None:
        scratch = CPU_SCRATCH if query.device.type == "cpu" else DEVICE_SCRATCH
    width = dim + (0 if value is None else value.shape[3])
    scratch = max(scratch, (group + width) * (keys + width))
    room = query.new_empty(scratch, dtype=torch.promote_types(query.dtype, torch.float32))
    never = room.new_full((), -torch.inf)
    future = never.repeat(CAUSAL_QUERIES, CAUSAL_QUERIES).tril_(-1)  # [keys, queries], to be added
    scale = dim**-0.5 if scaling is None else scaling
    if sinks is not None:
        sinks = (sinks.view(1, heads, 1, 1) if sinks.ndim == 1 else sinks).to(room.dtype)
    best = query.new_empty((batch, heads, queries), dtype=torch.long)
    first = room.new_empty((batch, heads, queries))
    start = best.new_zeros(batch) if first_key is None else first_key
    output = None if value is None else value.new_empty((batch, queries, heads, value.shape[3]))

    for block in _blocks((batch, kv_heads, queries, keys), group, width, causal, scratch):
        size = block.queries.stop - block.queries.start
        rows = (block.sequences, slice(block.kv_heads.start * group, block.kv_heads.stop * group), block.queries)
        part = (*rows, slice(block.keys))
        scores = _products(query[rows], key[block.sequences, block.kv_heads, : block.keys], scale, room)
        usual = scores.permute(0, 1, 3, 4, 2)  # [sequences, kv heads, group, queries, keys]
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            usual += _cut(bias, part, group)
        if mask is not None:
            seen = _cut(mask, part, group)
            if seen.dtype == torch.bool:
                torch.where(seen, usual, never, out=usual)
            else:
                usual += seen
        elif causal:  # only the last of these keys are in the future of any of these queries
            late = scores[:, :, block.queries.start :]
            late += future[: late.shape[2], None, :size]
        highest, where = _highest(scores)
        sink = None if sinks is None else _cut(sinks, part, group).squeeze(-1)
        best[rows] = where.view(best[rows].shape)
        mass, whole = _weigh(scores, highest, sink, start[block.sequences])
        first[rows] = mass.view(best[rows].shape)
        if value is not None and output is not None:
            found = _weighed(scores, whole, value[block.sequences, block.kv_heads, : block.keys])
            output[rows[0], rows[2], rows[1]] = found
    return Attended(best, first, keys, output)


def _blocks(sizes: tuple[int, int, int, int], group: int, dim: int, causal: bool, scratch: int) -> Iterator[Block]:
    """Cut attention of `sizes` batch, kv heads, queries and keys into blocks that fit in `scratch`.

    (group · queries + dim) · (keys + dim) numbers make room for the queries, keys and scores of one key/value head.
    """
    batch, kv_heads, queries, keys = sizes
    most = (scratch // (keys + dim) - dim) // group
    for part in _runs(queries, min(most, CAUSAL_QUERIES) if causal else most):
        visible = min(keys, part.stop) if causal else keys
        fitting = scratch // ((group * (part.stop - part.start) + dim) * (visible + dim))
        for sequences in _runs(batch, fitting // kv_heads):
            for heads in _runs(kv_heads, fitting):
                yield Block(sequences, heads, part, visible)


def _runs(total: int, most: int) -> Iterator[slice]:
    """Cut `total` things into runs of about the same length, of `most` or, where that is nothing, of one."""
    size = -(-total // -(-total // max(1, most))) if total else 1
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _cut(tensor: torch.Tensor, part: tuple[slice, ...], group: int) -> torch.Tensor:
    """A part of something broadcastable to [batch, heads, queries, keys], with the heads as [kv heads, group]."""
    tensor = tensor[(None,) * (4 - tensor.ndim)]
    tensor = tensor[tuple(slice(None) if size == 1 else cut for size, cut in zip(tensor.shape, part, strict=True))]
    heads = tensor.shape[1]
    group = 1 if heads == 1 else group
    return tensor.view(len(tensor), heads // group, group, *tensor.shape[2:])


def _products(query: torch.Tensor, key: torch.Tensor, scale: float, room: torch.Tensor) -> torch.Tensor:
    """Multiply scale · key · queryᵀ in `room`: [batch, kv heads, keys, group, queries].

    With the keys outside, whatever runs over them does so for many queries in one instruction.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    units, rows = batch * kv_heads, heads // kv_heads * queries
    sizes = [units * rows * dim, units * keys * dim, units * keys * rows]
    left, right, scores = torch.split(room[: sum(sizes)], sizes)
    # The query heads of a group are laid end to end, so that keys are never repeated.
    left = left.view(query.shape).copy_(query).view(units, rows, dim)
    right = right.view(key.shape).copy_(key).view(units, keys, dim)
    scores.view(units, keys, rows).baddbmm_(right, left.transpose(1, 2), beta=0, alpha=scale)
    return scores.view(batch, kv_heads, keys, heads // kv_heads, queries)


def _highest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest score over the keys of [batch, kv heads, keys, group, queries], and the lowest index that has it."""
    if scores.device.type != "cpu":
        return scores.max(2)
    # max() compares one number at a time there; pooling takes the queries for channels, many at once.
    batch, kv_heads, keys, group, queries = scores.shape
    image = scores.view(batch * kv_heads, keys, 1, group * queries).permute(0, 3, 1, 2)
    highest, where = functional.max_pool2d(image, (keys, 1), return_indices=True)
    return highest.view(batch, kv_heads, group, queries), where.view(batch, kv_heads, group, queries)


def _weigh(
    scores: torch.Tensor, highest: torch.Tensor, sink: torch.Tensor | None, first_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of [batch, kv heads, keys, group, queries] over the keys, at each sequence's first one; and its divisor.

    The scores become what is to be divided. exp2, as MKL's exp is many times slower wherever a result is too small for
    a number.
    """
    shift = (highest if sink is None else torch.maximum(highest, sink)) * -LOG2_E
    shift = shift.where(shift.isfinite(), 0)  # of queries that see nothing
    torch.add(shift[:, :, None], scores, alpha=LOG2_E, out=scores).exp2_()
    whole = scores.sum(2)
    if sink is not None:
        whole += (sink * LOG2_E + shift).exp2_()
    index, keys = first_key.view(-1, 1, 1, 1, 1), scores.shape[2]
    column = scores.gather(2, index.clamp(max=keys - 1).expand(-1, scores.shape[1], 1, *scores.shape[3:]))
    mass = column.where(index < keys, 0).squeeze(2) / whole  # a key that no query here may see has no mass
    return mass, whole


def _weighed(weights: torch.Tensor, whole: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Means of values [batch, kv heads, keys, dim] by weights [batch, kv heads, keys, group, queries] over `whole`.

    Gives [batch, queries, heads, dim].
    """
    batch, kv_heads, keys, group, queries = weights.shape
    units, dim = batch * kv_heads, value.shape[3]
    means = weights.view(units, keys, group * queries).transpose(1, 2) @ value.reshape(units, keys, dim).to(weights)
    means /= whole.clamp(min=torch.finfo(whole.dtype).tiny).view(units, group * queries, 1)
    return means.view(batch, kv_heads * group, queries, dim).transpose(1, 2)

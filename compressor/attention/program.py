"""The program that `compressor.attention.kernel` runs on the device, in Triton's language."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl


@cache
def compiled() -> Any:
    """Make the kernel `attend`, to be launched as `compiled()[grid](…)`; Triton is imported here and nowhere else."""
    global tl  # where the program looks for its language
    import triton
    import triton.language as tl

    return triton.jit(attend)


def attend(  # type: ignore[no-untyped-def]
    query,
    key,
    mask,
    sinks,
    first_key,
    best_out,
    first_out,
    scale,
    softcap,
    heads,
    group,
    queries,
    keys,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,
    key_d,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    dim: tl.constexpr,
    causal: tl.constexpr,
    additive: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """One program: a block of queries of one head. Triton's language, compiled or interpreted, never called as it is.

    Pointers are followed by their strides in elements, named after the axes (`_t` tokens, `_d` dimension).
    """
    blocks = tl.cdiv(queries, block_q)
    block = tl.program_id(0) % blocks
    flat = (tl.program_id(0) // blocks).to(tl.int64)  # offsets may exceed 32 bits, into masks above all
    batch = flat // heads
    head = flat % heads
    rows = block * block_q + tl.arange(0, block_q)
    lanes = tl.arange(0, block_k)
    axis = tl.arange(0, block_d)
    inside = rows < queries

    query += batch * query_b + head * query_h
    left = tl.load(
        query + rows[:, None].to(tl.int64) * query_t + axis[None, :] * query_d,
        mask=inside[:, None] & (axis[None, :] < dim),
        other=0.0,
    )
    key += batch * key_b + (head // group) * key_h
    column = 0
    if first_key is not None:
        column = tl.load(first_key + batch).to(tl.int32)

    best = tl.zeros([block_q], tl.int32)
    peak = tl.full([block_q], float("-inf"), tl.float32)  # highest score so far
    total = tl.zeros([block_q], tl.float32)  # sum of exp(score − peak) so far
    mine = tl.full([block_q], float("-inf"), tl.float32)  # score of the first real key
    stop = keys
    if causal:
        stop = tl.minimum(keys, (block + 1) * block_q)
    for start in range(0, stop, block_k):
        places = start + lanes
        real = places < keys
        right = tl.load(
            key + places[None, :].to(tl.int64) * key_t + axis[:, None] * key_d,
            mask=real[None, :] & (axis[:, None] < dim),
            other=0.0,
        )
        scores = tl.dot(left, right, input_precision="ieee") * scale
        if softcap is not None:
            # No tanh in the language itself: (1 − e⁻²ˣ) / (1 + e⁻²ˣ), and near 0, where that cancels, Taylor's series.
            bent = scores / softcap
            square = bent * bent
            small = bent * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
            decay = tl.exp(-2 * tl.abs(bent))
            large = (1 - decay) / (1 + decay)
            scores = softcap * tl.where(square < 0.0625, small, tl.where(bent < 0, -large, large))
        seen = real[None, :]
        if mask is not None:
            cells = mask + batch * mask_b + head * mask_h
            cells += rows[:, None].to(tl.int64) * mask_q + places[None, :].to(tl.int64) * mask_k
            given = inside[:, None] & real[None, :]
            if additive:
                scores += tl.load(cells, mask=given, other=0.0).to(tl.float32)
            else:
                seen = seen & (tl.load(cells, mask=given, other=1) != 0)
        if causal:
            seen = seen & (places[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))

        top = tl.max(scores, 1)
        lowest = tl.min(tl.where(scores == top[:, None], places[None, :], keys), 1)
        best = tl.where(top > peak, lowest, best)  # an equal score further on changes nothing
        higher = tl.maximum(peak, top)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: −∞ − −∞ would be NaN
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        peak = higher
        if (column >= start) & (column < start + block_k):
            mine = tl.max(tl.where(places[None, :] == column, scores, float("-inf")), 1)

    whole = peak
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        whole = tl.maximum(peak, sink)
    base = tl.where(whole == float("-inf"), 0.0, whole)
    total = total * tl.exp(peak - base)
    if sinks is not None:
        total += tl.exp(sink - base)
    out = flat * queries + rows
    tl.store(best_out + out, best.to(tl.int64), mask=inside)
    tl.store(first_out + out, tl.exp(mine - base) / total, mask=inside)

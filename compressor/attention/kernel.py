"""What each query attends to most, in one pass over the keys: a Triton kernel that holds no row of scores.

It answers as `compressor.attention.argmax.attended_keys` does, which stays the reference and does what is not supported
here. The keys are streamed with a running maximum and a running sum, as in FlashAttention (arXiv 2205.14135,
algorithm 1), so that a query costs the memory of one block of keys. `compressor.attention.program` is what runs on the
device; Triton is imported on first use, because the package works without it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from compressor.attention.program import compiled
from compressor.console import log

OLDEST = (8, 0)  # compute capability, Ampere: what Triton compiles well for
WIDEST = 256  # head dimension whose tiles fit into the 99 KiB of shared memory that the smallest of these GPUs has
_HALVES = {torch.float16, torch.bfloat16}
_FLOATS = _HALVES | {torch.float32}


def usable(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether the kernel can run here and knows what it is given; if not, the caller uses the reference."""
    return available(query.device) and supports(query, key, mask, bias, sinks) and _runs(query.device)


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether the kernel knows these arguments of `attended_keys`, wherever it runs.

    It does not know position biases, sinks that differ between queries, double precision (of which the reference makes
    double-precision scores), head dimensions above `WIDEST`, and calls without queries or keys.
    """
    batch, heads, _, dim = query.shape
    return (
        bias is None
        and query.dtype in _FLOATS
        and key.dtype == query.dtype
        and 0 not in (query.numel(), key.numel())
        and (key.shape[0], key.shape[3]) == (batch, dim)
        and heads % key.shape[1] == 0
        and dim <= WIDEST
        and (mask is None or mask.dtype in _FLOATS | {torch.bool})
        and (sinks is None or (sinks.ndim == 1 and sinks.dtype in _FLOATS))
        and all(other is None or other.device == query.device for other in (key, mask, sinks))
    )


def available(device: torch.device) -> bool:
    """Whether Triton is installed and has a backend for the device: NVIDIA's since Ampere, or its interpreter for any.

    The interpreter works if `TRITON_INTERPRET=1` was set before anything imported Triton, and transformers does.
    """
    return _installed() and (_interpreted() or (device.type == "cuda" and _known(device)))


def tile(dtype: torch.dtype, dim: int) -> tuple[int, int, int]:
    """Queries and keys that a program holds at one time, and its warps, so that registers and shared memory suffice.

    Float32 is multiplied without tensor cores, which takes more registers.
    """
    if dtype not in _HALVES:
        return 32, 32, 4 if dim <= 128 else 8
    if dim <= 64:
        return 64, 64, 4
    return 64, 32, 4 if dim <= 128 else 8


@torch.no_grad()
def attended_keys_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
    block: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the key of each query's highest score, and the attention mass on its sequence's first real key.

    Scores are summed in float32 whatever the dtype. The host waits for nothing. A query that may see no key at all,
    which is padding and never read, gets key 0 and mass NaN (0 with sinks) as in the reference; 1/keys where an
    additive mask hides them by a finite number. Scores that are NaN give a mass of NaN and some valid key.

    Args:
        query: [batch, heads, queries, dim] of any strides, float32, float16 or bfloat16.
        key: [batch, kv heads, keys, dim] of the same dtype; consecutive query heads share a head of keys equally.
        mask: broadcastable to [batch, heads, queries, keys]: boolean (True may be seen) or additive; None sees all.
        scaling: factor on the scores; 1/√dim by default.
        causal: without a mask, query t sees keys 0 … t.
        softcap: scores are bent to softcap · tanh(score / softcap).
        sinks: [heads] scores that take their share of the attention without being keys.
        first_key: [batch] index of the first real key of each sequence; 0 by default.
        block: queries, and keys, of a tile instead of those of `tile`; a power of two from 16 on.

    Returns:
        Index of the key, ties to the lowest, [batch, heads, queries] int64; mass, the same shape, float32.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    best = torch.empty(batch, heads, queries, dtype=torch.int64, device=query.device)
    first = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if _interpreted() and query.dtype == torch.bfloat16:  # of which the interpreter multiplies the bits
        query, key = query.float(), key.float()
    additive = mask is not None and mask.dtype != torch.bool
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)  # strides of 0, no copy
        mask = mask if additive else mask.view(torch.uint8)
    block_q, block_k, warps = tile(query.dtype, dim) if block is None else (block, block, 4)
    block_q = min(block_q, _power(queries))
    # One axis: the others of a CUDA grid end at 65,535, which batch · heads may exceed.
    grid = (-(-queries // block_q) * batch * heads,)
    with torch.cuda.device(query.get_device()):  # where Triton launches; −1, of no effect, for the interpreter
        compiled()[grid](
            query,
            key,
            mask,
            None if sinks is None else sinks.contiguous().view(heads),
            None if first_key is None else first_key.contiguous().view(batch),
            best,
            first,
            dim**-0.5 if scaling is None else float(scaling),
            None if softcap is None else float(softcap),
            heads,
            heads // kv_heads,
            queries,
            keys,
            *query.stride(),
            *key.stride(),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            dim=dim,
            causal=causal and mask is None,
            additive=additive,
            block_q=block_q,
            block_k=block_k,
            block_d=_power(dim),
            num_warps=warps,
            num_stages=2,
        )
    return best, first


def _power(number: int) -> int:
    """The power of two that holds a number, and at least the 16 that a matrix product on the device takes."""
    return max(16, 1 << (number - 1).bit_length())


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _known(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


@cache
def _runs(device: torch.device) -> bool:
    """Try the kernel once, on two keys of which each query sees the other's best.

    What it may lack is a C compiler, with which Triton makes its launcher; and a wrong answer must not go unnoticed.
    """
    query = torch.eye(2, 16, device=device).view(1, 1, 2, 16)
    expected = torch.tensor([0.0, 1.0], device=device).softmax(0)
    try:
        best, first = attended_keys_fused(query, query.flip(2), None, scaling=1.0)
        if best.flatten().tolist() != [1, 0] or not torch.allclose(first.flatten(), expected, atol=1e-5):
            raise ValueError(f"it attends to {best.flatten().tolist()} by {first.flatten().tolist()}")
    except Exception as error:  # of many kinds, and none stands in the way of the reference
        reason = " ".join(str(error).split())
        log.warning(f"attention on {device} is watched without its fused kernel, which is slower: {reason}")
        return False
    return True

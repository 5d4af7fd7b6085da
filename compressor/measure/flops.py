"""Multiply-adds of one forward pass, told apart by where they are spent."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import ModelError, RecipeError
from compressor.measure._forward import evaluating, require_length

# The names under which fvcore books operators that contract a dimension.
_CONTRACTIONS = "_grouped_mm addmm baddbmm bmm conv einsum linear matmul mm scaled_dot_product_attention"
_MATMUL_LIKE = set(_CONTRACTIONS.split())
# Operators that PyTorch does not tag as pointwise and that still contract nothing.
_LOOKUPS_COPIES_AND_REDUCTIONS = """
    all amax any argmax cumsum diff embedding empty_like histc index_add_ index_select log_softmax masked_fill_ mean
    movedim new_ones one_hot ones_like pad repeat repeat_interleave rms_norm scatter_ softmax sort sum swapaxes topk
    tril triu unflatten
"""
_FREE = {f"aten::{name}" for name in _LOOKUPS_COPIES_AND_REDUCTIONS.split()}
_FREE.add("prim::PythonOp.GeLUFunction")  # Bloom's


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds (MACs) of one forward pass; one multiply-add counts as one, as in fvcore.

    Attributes:
        total: the sum of the four parts.
        attention: everything inside the named attention modules, projections and both T x T products.
        mlp: every other matrix product, convolution or einsum of the base model.
        lm_head: everything outside the base model.
        other: the rest fvcore counts, layer norms for the most part. Elementwise work and RMS norms count nothing.
    """

    total: int
    attention: int
    mlp: int
    lm_head: int
    other: int


class _FirstOutput(nn.Module):
    """The tracer wants tensors in and a tensor out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True)[0]
        return output


def _shape(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """[B, H, Tq, D], [B, Hkv, Tk, D], [B, Hkv, Tk, Dv] -> B·H·Tq·Tk·(D + Dv), causal or not, grouped or not."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _matmul_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Output size x contracted dimension: right for vectors and for either side broadcast, as fvcore's is not."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _stacked_matmul_macs(left: list[int], right: list[int]) -> int:
    """[B, M, K] and [B, K, N], or rows [S, K] dealt out over experts [E, K, N]."""
    return math.prod(left) * right[-1]


def _costs_nothing(operator: str) -> bool:
    """Whether an operator fvcore did not count can be left out: known free, or pointwise by PyTorch's own tags."""
    namespace, _, name = operator.partition("::")
    if operator in _FREE or namespace != "aten":
        return operator in _FREE
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _outermost(names: Iterable[str]) -> list[str]:
    """Drop names that repeat or lie inside another, so that no operator is counted twice."""
    chosen = set(names)
    return sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen))


def _split(counts: Counter[str]) -> tuple[int, int]:
    """Matmul-like and other MACs of one module's per-operator counts."""
    matmul = sum(int(count) for name, count in counts.items() if name in _MATMUL_LIKE)
    return matmul, int(sum(counts.values())) - matmul


def count_flops(
    model: PreTrainedModel, attention_modules: Sequence[str], batch_size: int = 1, length: int = 256
) -> FlopCount:
    """Count the multiply-adds of one forward pass over [batch_size, length] token ids, without a cache.

    Built on fvcore's `FlopCountAnalysis`, which leaves `scaled_dot_product_attention` out in silence. Here it counts
    as two full T x T products whatever its mask, so that fused and explicit attention give the same number: for GPT-2
    (124M) at 1 x 256 that is 32.86 GMACs, where fvcore alone says 31.65.

    Args:
        model: any causal or masked language model; its training flags are left as they were.
        attention_modules: qualified names of the modules whose whole subtree is attention, for GPT-2
            `transformer.h.0.attn` and its siblings, for BERT both `….attention.self` and `….attention.output.dense`.
        batch_size: sequences.
        length: tokens in each.

    Raises:
        ModelError: a name in `attention_modules` is no module of the model.
        RecipeError: a size below one, or a length the model has no positions for.

    Warns:
        UserWarning: the model uses operators that nobody counted and that are neither elementwise nor known to be free.
    """
    if batch_size < 1:
        raise RecipeError(f"Got a batch of {batch_size} sequences; counting needs at least one.")
    require_length(model, length)
    modules = dict(model.named_modules())
    for name in attention_modules:
        if name not in modules:
            raise ModelError(
                f"{type(model).__name__} has no module '{name}'; give qualified names from named_modules()."
            )

    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore scripts and traces, both deprecated in PyTorch
        from fvcore.nn import FlopCountAnalysis

        input_ids = torch.zeros(batch_size, length, dtype=torch.long, device=model.device)
        analysis = FlopCountAnalysis(_FirstOutput(model), (input_ids,))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle(
            **{
                "aten::scaled_dot_product_attention": _attention_macs,
                "aten::matmul": _matmul_macs,
                "aten::baddbmm": lambda inputs, _: _stacked_matmul_macs(*map(_shape, inputs[1:3])),
                "aten::_grouped_mm": lambda inputs, _: _stacked_matmul_macs(*map(_shape, inputs[:2])),
            }
        )
        everything = _split(analysis.by_operator())

    uncounted = {name: times for name, times in analysis.unsupported_ops().items() if not _costs_nothing(name)}
    if uncounted:
        seen = ", ".join(f"{name} ({times}x)" for name, times in sorted(uncounted.items()))
        warnings.warn(f"The FLOPs of {type(model).__name__} leave out operators without a count: {seen}.", stacklevel=2)

    base = next(name for name, module in modules.items() if module is model.base_model)
    in_base = _split(analysis.by_operator(f"model.{base}" if base else "model"))
    in_attention = [_split(analysis.by_operator(f"model.{name}")) for name in _outermost(attention_modules)]
    attention = sum(map(sum, in_attention))
    mlp = in_base[0] - sum(matmul for matmul, _ in in_attention)
    other = in_base[1] - sum(rest for _, rest in in_attention)
    return FlopCount(sum(everything), attention, mlp, sum(everything) - sum(in_base), other)

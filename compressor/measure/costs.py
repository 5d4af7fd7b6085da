"""What a model costs without being timed: parameters, multiply-adds by share, key/value cache and peak memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from compressor.attention import attention_layers
from compressor.measure.flops import count_flops
from compressor.measure.memory import kv_cache_bytes_per_token, parameter_bytes, parameter_count, peak_memory


def measure_costs(model: PreTrainedModel, length: int, *, causal: bool) -> dict[str, Any]:
    """Costs of one sequence of `length` tokens.

    Returns:
        `heads` and `key_value_heads` per layer; `parameters` (tied ones once) and `parameter_bytes`; `macs`, the
        multiply-adds of one forward pass as `total`, `attention`, `mlp`, `lm_head` and `other`; `peak_memory_bytes` of
        that pass; `kv_cache_bytes_per_token`, None for masked models, which keep none.
    """
    layers = attention_layers(model)
    modules = [name for layer in layers for name in layer.modules]
    cache = kv_cache_bytes_per_token([layer.cached for layer in layers], model.dtype)
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    return {
        "length": length,
        "heads": [layer.num_heads for layer in layers],
        "key_value_heads": [layer.num_key_value_heads for layer in layers],
        "parameters": parameter_count(model),
        "parameter_bytes": parameter_bytes(model),
        "macs": asdict(count_flops(model, modules, batch_size=1, length=length)),
        "kv_cache_bytes_per_token": cache if causal else None,
        "peak_memory_bytes": peak_memory(model, tokens),
    }

"""Make a transformer smaller by removing attention heads and MLP channels, and learn honestly what it cost.

The public names, stable from now on:

- `attention_layers(model)`: where a model's heads sit.
- `prune_heads(model, {layer: [head, …]})`: remove heads from the weights, in place.
- `mlp_layers(model)`: where the channels of a model's MLPs sit.
- `prune_channels(model, {layer: [channel, …]})`: remove channels from the weights, in place.
- `score(...)`, `prune(...)`, `recover(...)`, `bench(...)`, `run(...)`, `paper(...)`: the verbs of the command line.
- `load(path)`: a model, dense or pruned.
- `compressor.game`: entropies, dividends and φ on bare arrays.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.attention import AttentionLayer, attention_layers, prune_heads
    from compressor.errors import CompressorError
    from compressor.loading import load
    from compressor.mlp import MLPLayer, mlp_layers, prune_channels
    from compressor.pipeline import bench, paper, prune, recover, run, score

__all__ = [
    "AttentionLayer",
    "CompressorError",
    "MLPLayer",
    "attention_layers",
    "bench",
    "load",
    "mlp_layers",
    "paper",
    "prune",
    "prune_channels",
    "prune_heads",
    "recover",
    "run",
    "score",
]

# Imported on first use: `compress --help` must not wait for torch.
_HOMES = {
    "AttentionLayer": "compressor.attention",
    "attention_layers": "compressor.attention",
    "prune_heads": "compressor.attention",
    "CompressorError": "compressor.errors",
    "load": "compressor.loading",
    "MLPLayer": "compressor.mlp",
    "mlp_layers": "compressor.mlp",
    "prune_channels": "compressor.mlp",
    "bench": "compressor.pipeline",
    "paper": "compressor.pipeline",
    "prune": "compressor.pipeline",
    "recover": "compressor.pipeline",
    "run": "compressor.pipeline",
    "score": "compressor.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

"""What Torch-Pruning (arXiv 2301.12900) makes of the same model: its importance chooses heads, its pruner cuts them.

Its pruner works on GPT-2's shape once a copy has Linear maps, with queries, keys and values apart: on a fused c_attn
its index mapping does not see the split, and asks the output projection for channels that it does not have (version
1.6.1: "IndexError: index 256 is out of bounds for dimension 0 with size 256", at width 256). `pruning_ratio` has to be
positive for heads to leave at all, so everything else is named among the ignored layers. There are no rows without the
package (`pip install 'lightning-compressor[bench]'`), nor for other architectures: with grouped queries its global
ranking numbers heads by the number of groups instead of their size, which names heads that are not there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.console import log
from compressor.loading import LoadedModel
from compressor.module import Batch, LanguageModel
from compressor.types import PruningPlan

IMPORTANCES = {
    "torch-pruning magnitude": ("GroupMagnitudeImportance", "nothing"),
    "torch-pruning taylor": ("GroupTaylorImportance", "a forward and a backward pass"),
}
HOW = (
    "heads by Torch-Pruning's importance and pruner on a copy with separate Linear maps for queries, keys and values; "
    "own_perplexity is of the model it cut, perplexity of the same heads removed here"
)


@dataclass(frozen=True)
class Cut:
    """What Torch-Pruning made: its own pruned model, and the heads that left it as a plan of ours."""

    model: PreTrainedModel
    plan: PruningPlan


class _Parts:
    """Queries, keys and values where GPT-2 expects one tensor that it splits into them."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self.parts = parts

    def split(self, size: int, dim: int) -> tuple[torch.Tensor, ...]:
        """What `Tensor.split` would give; the sizes are the parts' own."""
        return self.parts


class Separate(nn.Module):
    """GPT-2's fused map to queries, keys and values as three Linear maps."""

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        weights, biases = fused.weight.chunk(3, dim=1), fused.bias.chunk(3)
        self.maps = nn.ModuleList(_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def forward(self, hidden: torch.Tensor) -> _Parts:
        """Queries, keys and values, [batch, tokens, width] each."""
        return _Parts(*(each(hidden) for each in self.maps))


def cuts(dense: LoadedModel, calibration: Sequence[Batch], ratio: float, scope: str) -> dict[str, Cut]:
    """Torch-Pruning's models by name; none, with a line in the log, where it cannot be asked."""
    try:
        import torch_pruning
    except ImportError:
        log.info("torch-pruning is not installed: no rows for it")
        return {}
    if not isinstance(dense.model, GPT2LMHeadModel):
        log.info(
            f"no rows for torch-pruning: its pruner is asked on GPT-2's shape, not on {type(dense.model).__name__}"
        )
        return {}
    return {
        name: _cut(name, getattr(torch_pruning.importance, kind)(), dense, calibration, ratio, scope)
        for name, (kind, _) in IMPORTANCES.items()
    }


def _cut(name: str, importance: Any, dense: LoadedModel, calibration: Sequence[Batch], ratio: float, scope: str) -> Cut:
    import torch_pruning

    model = separated(dense.model)
    blocks = [block.attn for block in model.transformer.h]
    sizes = [attention.num_heads for attention in blocks]
    for batch in calibration if "taylor" in name else ():
        batch = {key: value.to(model.device) for key, value in batch.items()}
        losses, _ = LanguageModel(model, dense.task).losses(batch)
        losses.sum().backward()
    heads = {part: attention.num_heads for attention in blocks for part in attention.c_attn.maps}
    told = {*heads, *(attention.c_proj for attention in blocks)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": calibration[0]["input_ids"][:1, :16].to(model.device), "use_cache": False},
        importance,
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=[part for part in model.modules() if not any(part.children()) and part not in told],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda output: output.logits,
    )
    removed: dict[int, tuple[int, ...]] = {}
    places = {attention.c_attn.maps[0]: (layer, attention.head_dim) for layer, attention in enumerate(blocks)}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            if dependency.target.module in places:
                layer, size = places[dependency.target.module]
                removed[layer] = tuple(sorted({channel // size for channel in channels}))
        group.prune()
    model.zero_grad()
    emptied = any(len(gone) == sizes[layer] for layer, gone in removed.items())
    plan = PruningPlan(removed, name, ratio, scope, tuple(sizes), allow_empty=emptied)
    return Cut(model, plan)


def separated(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A copy that says the same, with Linear maps for Conv1D, and queries, keys and values apart."""
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.attn.c_attn = Separate(block.attn.c_attn)
        for owner, name in ((block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            conv = getattr(owner, name)
            setattr(owner, name, _linear(conv.weight, conv.bias))
    return model


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype)
    made.weight = nn.Parameter(weight.detach().T.contiguous())
    made.bias = nn.Parameter(bias.detach().clone())
    return made

"""What a model can take: which tokens, and how many of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def max_positions(model: PreTrainedModel) -> int | None:
    """Number of positions, in tokens, or None where the config names no limit.

    RoBERTa and its kin start counting after the padding index, so they have `padding_idx + 1` fewer positions than
    `config.max_position_embeddings` says.
    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    positions = int(positions)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return positions - int(padding) - 1
    return positions


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids that the model has an embedding for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.shape[0]
    return int(model.config.get_text_config().vocab_size)

"""What a pruned model is trained towards: the predictions of the dense model, and its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from compressor.errors import ModelError
from compressor.measure.perplexity import IGNORED


def divergence(logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(wanted ‖ model) in nats, the mean over the positions that predict something (Hinton et al. 2015, at T = 1).

    Args:
        logits: [batch, tokens, vocabulary] of the model that learns.
        wanted: [batch, tokens, vocabulary] of the model it learns from.
        labels: [batch, tokens], aligned with the logits; −100 where nothing is predicted.

    Returns:
        A scalar, in float32 at least; 0 where no position predicts anything.
    """
    real = labels != IGNORED
    learnt, target = (_wide(values[real]).log_softmax(-1) for values in (logits, wanted))
    total = functional.kl_div(learnt, target, reduction="sum", log_target=True)
    return total / real.sum().clamp(min=1)


def hidden_distance(
    states: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], attention_mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared difference of hidden states over real tokens, channels and layers.

    Args:
        states: [batch, tokens, width] by layer, of the model that learns.
        wanted: the same of the model it learns from; layers of another width are left out.
        attention_mask: [batch, tokens], 0 at padding.

    Raises:
        ModelError: the two have no hidden states of equal width.
    """
    real = attention_mask != 0
    pairs = [
        (own, other)
        for own, other in zip(states, wanted, strict=False)
        if own.shape == other.shape and own.shape[:-1] == real.shape
    ]
    if not pairs:
        raise ModelError("the pruned and the dense model have no hidden states of equal width; set hidden_weight to 0")
    return torch.stack([functional.mse_loss(_wide(own[real]), _wide(other[real])) for own, other in pairs]).mean()


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

"""Perplexity over tokens, accumulated batch by batch and process by process."""

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import DataError
from compressor.measure.sums import WideSums

IGNORED = -100
_ROWS = 512  # logits turned to float32 at a time: [512, V], not [B·T, V]


class TokenPerplexity(WideSums):
    """exp of the mean negative log-likelihood per token, in nats, over all tokens whose label is not -100.

    Every token weighs the same, however the data were split into batches or processes. Log-likelihoods are taken in
    float32 and summed in float64 (float32 where the device has no float64), whatever precision the model runs in.
    """

    is_differentiable = False
    higher_is_better = False

    nll_sum: Tensor
    token_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch; nothing waits for the device.

        Args:
            logits: [B, T, V], in any float dtype.
            labels: [B, T] token ids already aligned with the logits (the caller shifts); -100 is not counted.

        Raises:
            ValueError: the shapes do not belong together.
        """
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"Got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; want [B, T, V], [B, T]."
            )
        for sequence, targets in zip(logits, labels, strict=True):
            for rows, wanted in zip(sequence.split(_ROWS), targets.split(_ROWS), strict=True):
                losses = functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none")
                self.nll_sum += losses.sum(dtype=self.nll_sum.dtype)
        self.token_count += (labels != IGNORED).sum()

    def compute(self) -> Tensor:
        """Perplexity, a scalar; infinite where the mean negative log-likelihood exceeds what exp can hold.

        Raises:
            DataError: no token was counted.
        """
        return self.nll.exp()

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood in nats per token, of this process until `compute` or `sync` has gathered all.

        Raises:
            DataError: no token was counted.
        """
        if self.tokens == 0:
            raise DataError("Got no token to take a perplexity of; give sequences with at least one labelled token.")
        return self.nll_sum / self.token_count

    @property
    def tokens(self) -> int:
        """Tokens counted so far; reading it waits for the device."""
        return int(self.token_count)

"""Perplexity over tokens, accumulated batch by batch and process by process, and what each document adds to it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.utilities import dim_zero_cat

from compressor.errors import DataError
from compressor.measure.sums import WideSums

IGNORED = -100
_ROWS = 512  # logits turned to float32 at a time: [512, V], not [B·T, V]


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """What each document adds to a perplexity, in the order of the documents' numbers.

    `nll` is the negative log-likelihood of its predicted tokens in nats, summed: float64 [documents]; `tokens` is how
    many they are: int64 [documents]. Both are on the CPU.
    """

    nll: Tensor
    tokens: Tensor

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood per token; infinite where that exceeds what exp can hold."""
        return float((self.nll.sum() / self.tokens.sum()).exp())


class TokenPerplexity(WideSums):
    """exp of the mean negative log-likelihood per token, in nats, over all tokens whose label is not -100.

    Every token weighs the same, however the data were split into batches or processes. Log-likelihoods are taken in
    float32 and summed in float64 (float32 where the device has no float64), whatever precision the model runs in.
    Where updates say which document each sequence is of, `by_document` tells them apart.
    """

    is_differentiable = False
    higher_is_better = False

    nll_sum: Tensor
    token_count: Tensor
    sequence_nll: list[Tensor]
    sequence_tokens: list[Tensor]
    sequence_documents: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("sequence_nll", "sequence_tokens", "sequence_documents"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, documents: Tensor | None = None) -> None:
        """Add one batch; nothing waits for the device.

        Args:
            logits: [B, T, V], in any float dtype.
            labels: [B, T] token ids already aligned with the logits (the caller shifts); -100 is not counted.
            documents: [B] number of the document that each sequence is of, which may have several; in all updates or
                in none.

        Raises:
            ValueError: the shapes do not belong together.
        """
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"Got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; want [B, T, V], [B, T]."
            )
        if documents is not None and documents.shape != labels.shape[:1]:
            raise ValueError(f"Got documents {tuple(documents.shape)} for labels {tuple(labels.shape)}; want [B].")
        sums = self.nll_sum.new_zeros(len(labels))
        for row, (sequence, targets) in enumerate(zip(logits, labels, strict=True)):
            for rows, wanted in zip(sequence.split(_ROWS), targets.split(_ROWS), strict=True):
                losses = functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none")
                sums[row] += losses.sum(dtype=sums.dtype)
        counts = (labels != IGNORED).sum(1)
        self.nll_sum += sums.sum()
        self.token_count += counts.sum()
        if documents is not None:
            self.sequence_nll.append(sums)
            self.sequence_tokens.append(counts)
            self.sequence_documents.append(documents)

    def compute(self) -> Tensor:
        """Perplexity, a scalar; infinite where the mean negative log-likelihood exceeds what exp can hold.

        Raises:
            DataError: no token was counted.
        """
        return self.nll.exp()

    def by_document(self) -> DocumentLosses:
        """What each document adds, all its sequences together: of this process until `sync` has gathered all.

        Raises:
            DataError: no token was counted, or nobody said which document it is of.
        """
        if len(self.sequence_documents) == 0 or self.tokens == 0:
            raise DataError("Got no token of a known document; give labelled tokens and say of which documents.")
        documents, places = torch.unique(dim_zero_cat(self.sequence_documents).cpu(), return_inverse=True)
        nll = torch.zeros(len(documents), dtype=torch.float64)
        nll.index_add_(0, places, dim_zero_cat(self.sequence_nll).cpu().double())
        tokens = torch.zeros(len(documents), dtype=torch.int64)
        tokens.index_add_(0, places, dim_zero_cat(self.sequence_tokens).cpu())
        return DocumentLosses(nll, tokens)

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

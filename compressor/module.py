"""A LightningModule around any Hugging Face causal or masked language model."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from compressor.measure import TokenPerplexity
from compressor.types import Task

Batch = dict[str, torch.Tensor]


class LanguageModel(L.LightningModule):
    """Training, perplexity and scoring steps for a causal or masked language model.

    Batches are dicts of `input_ids`, `attention_mask` and, but for prediction, `labels`, all [batch, tokens] int64;
    labels are aligned with the inputs, and −100 where nothing is predicted.

    - `predict_step` runs the backbone without the language-model head: callbacks look at its attention.
    - `test_step` feeds `perplexity` (masked models: pseudo-perplexity over the masked tokens), document by document
      where the batch has `places`.
    - `training_step` is the mean cross-entropy per predicted token, in nats.
    """

    def __init__(self, model: PreTrainedModel, task: Task, learning_rate: float = 5e-5) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.learning_rate = learning_rate
        self.perplexity = TokenPerplexity()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary]."""
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **self._no_cache)
        logits: torch.Tensor = output.logits
        return logits

    def aligned(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and the labels they predict; a causal model's are one token apart."""
        logits, labels = self(batch), batch["labels"]
        return (logits[:, :-1], labels[:, 1:]) if self.task == "causal" else (logits, labels)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each sequence, summed over its predicted tokens, in nats; and their number: [batch] each."""
        logits, labels = self.aligned(batch)
        wide = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
        return losses.sum(1), (labels != -100).sum(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the backbone and throw its output away."""
        backbone = self.model.base_model
        backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **self._no_cache)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch into `perplexity`."""
        documents = batch["places"][:, 0] if "places" in batch else None
        self.perplexity.update(*self.aligned(batch), documents)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy of the predicted tokens, in nats."""
        losses, predicted = self.losses(batch)
        return losses.sum() / predicted.sum().clamp(min=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that require gradients."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate)

    @property
    def _no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if self.task == "causal" else {}

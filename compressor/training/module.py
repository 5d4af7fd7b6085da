"""The LightningModule that trains a pruned model towards the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.measure import TokenPerplexity
from compressor.module import Batch, LanguageModel
from compressor.training.objective import divergence, hidden_distance
from compressor.types import Task


class Recovery(LanguageModel):
    """Distillation of a pruned model from the dense one; without one, plain cross-entropy.

    The loss is KL(dense ‖ pruned) over the positions that predict something, plus `hidden_weight` times the mean
    squared difference of the hidden states. Dropout stays off in both: what is wanted is the dense model's function.

    Args:
        model: the pruned model; those of its parameters that require gradients are trained.
        task: "causal" or "masked".
        dense: the model to learn from, or None.
        learning_rate: of AdamW, at its highest.
        hidden_weight: of the hidden states' difference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        dense: PreTrainedModel | None,
        learning_rate: float,
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__(model, task, learning_rate)
        self.dense = dense
        self.hidden_weight = hidden_weight
        self.eval()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The loss of a batch, in nats."""
        if self.dense is None:
            return super().training_step(batch, batch_idx)
        with torch.no_grad():
            wanted = self._output(self.dense, batch)
        output = self._output(self.model, batch)
        labels = batch["labels"]
        # A causal model's logits predict the token one further on.
        pair = (output.logits, wanted.logits)
        if self.task == "causal":
            pair, labels = (pair[0][:, :-1], pair[1][:, :-1]), labels[:, 1:]
        loss = divergence(*pair, labels)
        if self.hidden_weight:
            distance = hidden_distance(output.hidden_states, wanted.hidden_states, batch["attention_mask"])
            loss = loss + self.hidden_weight * distance
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay: what the weights are to stay close to is not zero."""
        return torch.optim.AdamW(self.trained.values(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _output(self, model: PreTrainedModel, batch: Batch) -> Any:
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=bool(self.hidden_weight),
            **self._no_cache,
        )


@torch.no_grad()
def held_out_perplexity(module: LanguageModel, batches: Iterable[Batch]) -> float:
    """Perplexity of a model over batches, token-weighted; infinite where it is not a finite number."""
    device = module.model.device
    perplexity = TokenPerplexity().to(device)
    for batch in batches:
        perplexity.update(*module.aligned({name: values.to(device) for name, values in batch.items()}))
    value = float(perplexity.compute())
    return value if math.isfinite(value) else math.inf

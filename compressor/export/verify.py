"""The check before the word "done": a checkpoint is loaded again and has to say what the model in memory says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.errors import ArtefactError
from compressor.loading import load
from compressor.types import Task

TEXT = "Question: A box holds 12 eggs. How many eggs do 3 boxes hold?\nAnswer: 3 * 12 = 36 eggs."


@torch.inference_mode()
def largest_deviation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, task: Task) -> float:
    """Largest absolute difference between the logits of a model and of its checkpoint on a line of text.

    Raises:
        ArtefactError: the logits are not equal; the same weights in the same shapes leave no room for a difference.
    """
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :64].to(model.device)
    again = load(directory, task=task, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
    expected, found = (candidate(input_ids=tokens).logits for candidate in (model, again))
    if not torch.equal(expected, found):
        deviation = (expected - found).abs().max().item()
        raise ArtefactError(f"the checkpoint, loaded again, gives other logits (by {deviation:.3g}); it was not kept")
    return 0.0

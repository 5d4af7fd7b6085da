"""The check before the word "done": a checkpoint is loaded again and has to say what the model in memory says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compressor.context import max_positions, vocabulary_size
from compressor.errors import ArtefactError
from compressor.loading import load
from compressor.types import Task

TOKENS = 64


@torch.inference_mode()
def largest_deviation(model: PreTrainedModel, directory: Path, task: Task) -> float:
    """Largest absolute difference between the logits of a model and of its checkpoint, on random tokens.

    Raises:
        ArtefactError: a weight or a logit is not equal; the same numbers in the same shapes leave no room for less.
    """
    again = load(directory, task=task, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
    expected, found = model.state_dict(), again.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found or not torch.equal(expected[name], found[name]):
            raise ArtefactError(f"the checkpoint, loaded again, has another {name}; it was not kept")
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, max_positions(model) or TOKENS)
    tokens = torch.randint(vocabulary_size(model), (1, length), generator=generator).to(model.device)
    logits = [
        candidate(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits for candidate in (model, again)
    ]
    deviation = float((logits[0] - logits[1]).abs().max())
    if deviation != 0:
        raise ArtefactError(f"the checkpoint, loaded again, gives other logits (by {deviation:.3g}); it was not kept")
    return deviation

"""What every measurement shares: a model in eval mode, and a length it has positions for."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from compressor.context import max_positions
from compressor.errors import RecipeError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in eval mode, then give every module back the training flag it came with."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def require_length(model: PreTrainedModel, length: int) -> None:
    """Refuse a length, in tokens, for which `model` has no positions.

    Raises:
        RecipeError: `length` is below one, or above what the model can take.
    """
    if length < 1:
        raise RecipeError(f"Got a length of {length} tokens; a measurement needs at least one.")
    positions = max_positions(model)
    if positions is not None and length > positions:
        raise RecipeError(f"Got {length} tokens, but {type(model).__name__} has {positions} positions; ask for fewer.")

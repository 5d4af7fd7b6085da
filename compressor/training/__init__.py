"""Training a pruned model back: what it learns, how fast, with which adapters, and how an interruption is survived."""

from compressor.training.lora import AdaptedModel, adapt, check_peft
from compressor.training.module import Recovery, held_out_perplexity
from compressor.training.objective import divergence, hidden_distance
from compressor.training.schedule import Budget, learning_rate_factor
from compressor.training.state import Standing, StateFiles, read_state

__all__ = [
    "AdaptedModel",
    "Budget",
    "Recovery",
    "Standing",
    "StateFiles",
    "adapt",
    "check_peft",
    "divergence",
    "held_out_perplexity",
    "hidden_distance",
    "learning_rate_factor",
    "read_state",
]

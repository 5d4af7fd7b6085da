"""What stands where an attention layer lost its last head."""

from __future__ import annotations

import torch
from torch import nn

from compressor.attention.linear import features


class EmptyAttention(nn.Module):
    """What is left of an attention layer that lost its last head: the bias of its output projection.

    It still puts one zero per token into the key/value cache, because a cache tells the sequence length by any layer.
    """

    def __init__(self, head_dim: int, layer_idx: int | None, output_name: str, output: nn.Module | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.output_name = output_name  # within the module it replaces; beside that, if it starts with ".."
        if output is not None:
            self.add_module(output_name, output)

    @classmethod
    def of(cls, module: nn.Module, head_dim: int, output_name: str) -> EmptyAttention:
        """What is left of a module."""
        output = None if output_name.startswith("..") else module.get_submodule(output_name)
        return cls(head_dim, getattr(module, "layer_idx", None), output_name, output).train(module.training)

    def forward(
        self, hidden_states: torch.Tensor, *args: object, past_key_values: object = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Return (the output of zero heads, None) for hidden states [batch, tokens, width]."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            placeholder = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(placeholder, placeholder, self.layer_idx)  # type: ignore[attr-defined]
        output = self._modules.get(self.output_name)
        if output is None:  # the projection follows elsewhere and adds its own bias
            return hidden_states[..., :0], None
        result = hidden_states.new_zeros(*hidden_states.shape[:-1], features(output)[1])
        bias = output.bias
        return (result + bias if isinstance(bias, torch.Tensor) else result), None

"""Linear maps, in all the forms in which transformers keeps them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map whose weight can be cut; quantised ones are not."""
    if isinstance(module, Conv1D):
        return True
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Conv1d):
        return module.kernel_size == (1,) and module.groups == 1 and module.stride == (1,)
    if not isinstance(module, nn.Linear) or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    return weight.shape == (module.out_features, module.in_features)


def side(module: nn.Module, which: Literal["inputs", "outputs"]) -> int:
    """Dimension of the weight that inputs or outputs lie along: `Conv1D` keeps [inputs, outputs], others transpose."""
    return int((which == "inputs") != isinstance(module, Conv1D))


def channel_axis(module: nn.Module) -> int:
    """Dimension of what goes in and out along which the channels lie: 1 in [batch, channels, tokens] of `nn.Conv1d`."""
    return 1 if isinstance(module, nn.Conv1d) else -1


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    weight = module.get_parameter("weight")
    return weight.shape[side(module, "inputs")], weight.shape[side(module, "outputs")]

"""The base of metrics that add up floats over an epoch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

_WITHOUT_FLOAT64 = frozenset({"mps"})


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is kept for tensors of a device: there, or on the CPU where the device has none."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


class WideSums(Metric):
    """A metric whose float states stay float64 (float32 where the device has none), whatever the model becomes."""

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow the model to another device, never to another precision: `model.to(bfloat16)` would round the sums."""
        device = fn(torch.zeros((), device=self.device)).device
        wide = torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64
        return super()._apply(
            lambda state: state.to(device, wide if state.is_floating_point() else None), exclude_state
        )

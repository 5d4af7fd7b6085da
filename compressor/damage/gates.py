"""Gates on what heads or channels hand on: 1 leaves them as they are, 0 removes them; in between, the loss slopes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attention.linear import channel_axis, is_linear
from compressor.attention.nouns import Layer
from compressor.errors import ModelError


@dataclass(frozen=True)
class Site:
    """A linear map and the unit, a head or a channel, that each of its inputs comes from; −1 where it is none's.

    `uses` counts the times the map is applied in one forward pass.
    """

    module: str
    units: int
    owners: tuple[int, ...]
    uses: int = 1

    @property
    def entries(self) -> list[list[int]]:
        """The inputs of each unit."""
        found: list[list[int]] = [[] for _ in range(self.units)]
        for place, unit in enumerate(self.owners):
            if unit >= 0:
                found[unit].append(place)
        return found


def site_of(layer: Layer, units: int) -> Site:
    """The site at which a layer's `units` heads or channels hand on what they found."""
    projection = layer.slices[0]
    owners = [-1] * len(projection)
    for unit in range(units):
        for place in layer.entries([unit]):
            owners[place] = unit
    return Site(projection.module, units, tuple(owners), layer.uses)


@contextmanager
def gated(model: nn.Module, sites: Sequence[Site], gates: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Within the context, multiply the inputs of each site by its gates, [sequences, units]; None leaves a site alone.

    Raises:
        ModelError: a site is no linear map that takes its inputs as an argument.
    """
    with ExitStack() as stack:
        for site, gate in zip(sites, gates, strict=True):
            if gate is not None:
                module = linear_at(model, site)
                stack.callback(module.register_forward_pre_hook(_Scale(site, gate)).remove)
        yield


def linear_at(model: nn.Module, site: Site) -> nn.Module:
    """The linear map of a site."""
    module = model.get_submodule(site.module)
    if not is_linear(module):
        raise ModelError(
            f"{site.module} ({type(module).__name__}) is no linear map of its own, so what reaches it cannot be gated; "
            "use a criterion that does not look at the loss, such as magnitude, and --no-repair"
        )
    return module


def real_rows(inputs: torch.Tensor, axis: int, real: torch.Tensor, tokens: int) -> torch.Tensor:
    """The rows of what goes into a linear map that belong to real tokens, [tokens, channels].

    Args:
        inputs: [sequences, tokens, channels], [sequences, channels, tokens], or [sequences · tokens, channels].
        axis: where the channels lie.
        real: [real tokens] where the real ones are, in the flattened batch.
        tokens: in the batch, padding included.

    Raises:
        ModelError: the rows are not the tokens.
    """
    rows = inputs.movedim(axis, -1).flatten(0, -2)
    if len(rows) != tokens:
        raise ModelError(
            f"a layer works on {len(rows)} rows where the text has {tokens} tokens: what belongs to which token cannot "
            "be told; use a criterion that does not look at them, such as magnitude, and --no-repair"
        )
    return rows[real]


class _Scale:
    """A forward pre-hook that multiplies the channels of the first argument by their unit's gate."""

    def __init__(self, site: Site, gate: torch.Tensor) -> None:
        owners = torch.tensor(site.owners, device=gate.device)
        open_gate = gate.new_ones(len(gate), 1)  # the last column, where −1 points, is for inputs that are no unit's
        self.factors = torch.cat([gate, open_gate], dim=1)[:, owners]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, axis = args[0], channel_axis(module)
        factors = self.factors.to(inputs.dtype)
        if len(inputs) % len(factors) or (len(inputs) != len(factors) and inputs.ndim != 2):
            raise ModelError(
                f"a layer works on {list(inputs.shape)} where there are {len(factors)} sequences: they cannot be gated "
                "apart; use a criterion that does not look at the loss, such as magnitude"
            )
        if len(inputs) != len(factors):  # [sequences · tokens, channels], as OPT used to have it
            factors = factors.repeat_interleave(len(inputs) // len(factors), 0)
        shape = [len(inputs)] + [1] * (inputs.ndim - 1)
        shape[axis] = inputs.shape[axis]
        return (inputs * factors.view(shape), *args[1:])

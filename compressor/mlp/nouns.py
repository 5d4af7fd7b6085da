"""How what is known about the channels of MLPs is put down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressor.attention.nouns import Slice


@dataclass(frozen=True)
class MLPLayer:
    """One MLP of a model.

    `name` is the qualified name of the innermost module that holds it, and may hold more, `down_projection` that of the
    linear map that takes its hidden channels, `up_projections` those of the maps that make them: one, or gate and up.
    A channel is an input of the down projection. `uses` counts the times the MLP is applied in one forward pass.
    """

    index: int
    name: str
    down_projection: str
    up_projections: tuple[str, ...]
    num_channels: int
    slices: tuple[Slice, ...]  # that of the down projection first
    uses: int = 1

    def entries(self, channels: Iterable[int]) -> list[int]:
        """Inputs of the down projection that belong to some channels."""
        return sorted(channels)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose subtrees make up the MLP, in the order in which they are applied."""
        return (*self.up_projections, self.down_projection)

"""How what is known about attention heads is put down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Run = tuple[tuple[int, ...], int]  # (the heads that need them, how many entries in a row); no heads: never to be cut


@dataclass(frozen=True)
class Slice:
    """One dimension of something whose entries belong to heads.

    `kind` "tensor" is the parameter or buffer `name` of `module`; "output" what `module` returns, where it has to be
    computed in full, as by a norm over all heads; "argument" the argument `name` that `module` is called with.
    `runs` follow the entries in order. With `periodic` they repeat over the dimension, as in [batch · heads, …].
    """

    kind: Literal["tensor", "output", "argument"]
    module: str
    name: str
    dim: int
    runs: tuple[Run, ...]
    periodic: bool = False

    def __len__(self) -> int:
        """Number of entries, of one period."""
        return sum(length for _, length in self.runs)

    def kept(self, removed: Iterable[int]) -> list[int]:
        """Entries that stay when heads leave: those that no head or a surviving head needs."""
        gone, start = set(removed), 0
        kept: list[int] = []
        for heads, length in self.runs:
            if not heads or not gone.issuperset(heads):
                kept += range(start, start + length)
            start += length
        return kept


class Layer(Protocol):
    """What heads and channels have in common: a linear map that takes what they give."""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """What belongs to them, the inputs of that linear map first."""

    @property
    def uses(self) -> int:
        """How often the map is applied in one forward pass."""

    def entries(self, numbers: Iterable[int], /) -> list[int]:
        """Inputs of that linear map that belong to some heads or channels alone."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    `name` is the qualified name of the module that attends, `output_projection` that of the linear map that mixes the
    heads' outputs, `block` that of the module that holds both. `key_value_index[h]` is the key/value head that query
    head `h` reads, `group_index[h]` the group of heads it belongs to: of those that share a key/value head, unless the
    code of the layer keeps heads together in another way. `head_dim` is the width of a key, `value_dim` that of a
    head's slice of the output projection, `cached` how many numbers the layer keeps in the cache for every token.
    `maps[h]` are the attention maps that head `h` is made of: one, or two in differential attention. `uses` counts the
    times the layer is applied in one forward pass. `interface` tells whether it looks its attention function up,
    `spreadable` whether query heads may come to share key/value heads unevenly, `keys_shared` whether another layer
    reads the same keys, so that they stay.
    """

    index: int
    name: str
    block: str
    output_projection: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    cached: int
    key_value_index: tuple[int, ...]
    group_index: tuple[int, ...]
    slices: tuple[Slice, ...]  # that of the output projection first
    maps: tuple[tuple[int, ...], ...]
    uses: int = 1
    interface: bool = True
    spreadable: bool = True
    keys_shared: bool = False

    def entries(self, heads: Iterable[int]) -> list[int]:
        """Inputs of the output projection that belong to some heads alone."""
        projection = self.slices[0]
        return sorted(set(projection.kept(())) - set(projection.kept(heads)))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The heads of each group."""
        return tuple(
            tuple(head for head in range(self.num_heads) if self.group_index[head] == group)
            for group in sorted(set(self.group_index))
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose subtrees make up the layer, without repetition."""
        inside = self.output_projection == self.name or self.output_projection.startswith(f"{self.name}.")
        return (self.name,) if inside else (self.name, self.output_projection)

"""Experiments on a copy of a block: which entries of which weights belong to which hidden channel of its MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from compressor.attention.linear import channel_axis
from compressor.attention.specimen import SEED, Specimen
from compressor.mlp.trace import rows, varies

NONE, SEVERAL = -1, -2  # instead of the number of the one channel that an entry belongs to


@dataclass(frozen=True)
class Needs:
    """What the hidden channels of an MLP depend on; owners are channel numbers, NONE or SEVERAL.

    `outputs` has the owners of what the up projections return, by name, `tensors` those of other parameters and
    buffers, by name and dimension. `arguments` are those of the block's arguments that single channels depend on, and
    `bends` tells whether channels are more than multiples of what the up projections return.
    """

    channels: int
    outputs: dict[str, list[int]]
    tensors: dict[tuple[str, int], list[int]]
    arguments: list[str]
    bends: bool


def needs_of_channels(specimen: Specimen, down: str, ups: Sequence[str]) -> Needs:
    """Find the owners of all entries by group testing: two passes of gradients for every bit of a channel's number.

    An entry that channels with the bit need, or those without it, but never both, belongs to a single channel. The up
    projections' results are noise, cut off from whatever came before.
    """
    block, generator = specimen.block, torch.Generator().manual_seed(SEED)
    leaves: dict[str, list[torch.Tensor]] = {name: [] for name in ups}
    hidden: list[torch.Tensor] = []

    def cut(name: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            noise.movedim(channel_axis(module), -1)[0].abs_()  # one sequence that no rectifier puts out
            leaves[name].append(noise.requires_grad_())
            return noise.clone()

        return hook

    for buffer in block.buffers():
        if buffer.is_floating_point():
            buffer.requires_grad_()
    with torch.enable_grad(), ExitStack() as stack:
        for name in ups:
            stack.callback(block.get_submodule(name).register_forward_hook(cut(name)).remove)
        take = block.get_submodule(down).register_forward_pre_hook(
            lambda module, args: hidden.append(rows(args[0], module))
        )
        stack.callback(take.remove)
        specimen.run()
        channels = hidden[0].shape[1]
        known = {f"{inside}.{name}" for inside in ups for name, _ in block.get_submodule(inside).named_parameters()}
        named = (*block.named_parameters(), *block.named_buffers())
        others = {name: tensor for name, tensor in named if tensor.requires_grad and name not in known}
        arguments = {
            name: value
            for name, value in specimen.arguments.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        targets = [leaf for found in leaves.values() for leaf in found]
        targets += [*others.values(), *arguments.values()]
        sums = [_sum(hidden, generator, on, channels) for on in _groups(channels)]
        tests = [torch.autograd.grad(total, targets, retain_graph=True, allow_unused=True) for total in sums]
        total = torch.stack([states.sum() for states in hidden]).sum()
        slopes = torch.autograd.grad(total, targets, allow_unused=True)

    places = iter(range(len(targets)))
    outputs, bends = {}, channels == 0
    for name, found in leaves.items():
        own = [next(places) for _ in found]
        module = block.get_submodule(name)
        reached = [
            torch.stack([rows(test[place], module).ne(0).any(0) for place in own if test[place] is not None]).any(0)
            for test in tests
        ]
        outputs[name] = _owners(torch.stack(reached), channels)
        bends |= any(varies(rows(slopes[place], module)) for place in own)
    tensors: dict[tuple[str, int], list[int]] = {}
    for name in others:
        tensors |= {(name, dim): owners for dim, owners in _by_dimension(tests, next(places), channels).items()}
    asked = [name for name in arguments if _by_dimension(tests, next(places), channels)]
    return Needs(channels, outputs, tensors, asked, bends)


def _groups(channels: int) -> list[torch.Tensor]:
    """For every bit of a channel's number, the channels that have it and those that do not."""
    numbers = torch.arange(channels)
    bits = max(1, (channels - 1).bit_length())
    return [(numbers >> bit) & 1 == value for bit in range(bits) for value in (1, 0)]


def _sum(hidden: Sequence[torch.Tensor], generator: torch.Generator, on: torch.Tensor, channels: int) -> torch.Tensor:
    """The sum of some channels, each with weights of its own."""
    noise = [torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states) for states in hidden]
    return torch.stack([(states * weights)[:, on].sum() for states, weights in zip(hidden, noise, strict=True)]).sum()


def _owners(reached: torch.Tensor, channels: int) -> list[int]:
    """From [2 · bits, entries] booleans to the owner of every entry."""
    having, lacking = reached[::2], reached[1::2]
    numbers = (having.long() * (2 ** torch.arange(len(having)))[:, None]).sum(0)
    single = (having ^ lacking).all(0) & (numbers < channels)
    owners = torch.where(single, numbers, torch.where(reached.any(0), SEVERAL, NONE))
    return [int(owner) for owner in owners.tolist()]


def _by_dimension(tests: Sequence[Sequence[torch.Tensor | None]], place: int, channels: int) -> Mapping[int, list[int]]:
    """The owners along those dimensions of a tensor that tell channels apart."""
    shape = next((test[place].shape for test in tests if test[place] is not None), torch.Size())  # type: ignore[union-attr]
    found = {}
    for dim in range(len(shape)):
        reached = torch.stack([_along(test[place], dim, shape) for test in tests])
        owners = _owners(reached, channels)
        if any(owner >= 0 for owner in owners):
            found[dim] = owners
    return found


def _along(gradient: torch.Tensor | None, dim: int, shape: torch.Size) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(shape[dim], dtype=torch.bool)
    return gradient.ne(0).movedim(dim, 0).reshape(shape[dim], -1).any(1)

"""Passes over calibration text that ask the loss: its slope along every gate, and what it becomes without a unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compressor.console import track
from compressor.damage.channels import ChannelSlopes, ChannelSums
from compressor.damage.gates import Site, gated
from compressor.measure._forward import evaluating
from compressor.module import Batch, LanguageModel


@dataclass(frozen=True)
class Slopes:
    """How the loss of each calibration window changes as units leave; float64 on the CPU.

    `slope` [windows, units] is the derivative of a window's loss, in nats summed over its predicted tokens, along the
    removal of each unit, at the point `removed` [windows, units]: 0 where a unit is whole, 1 where it is gone. Units
    follow one another layer by layer. `tokens` [windows] is the number of predicted tokens, `documents` [windows] the
    document that a window is of. `channels` has the sums of the same pass over channels of MLPs, site by site.
    """

    slope: torch.Tensor
    removed: torch.Tensor
    tokens: torch.Tensor
    documents: torch.Tensor
    channels: tuple[ChannelSums, ...] = ()


def slopes(
    module: LanguageModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    share: float = 0.0,
    seed: int = 0,
    channels: Sequence[Site] = (),
) -> Slopes:
    """One forward and one backward pass over every batch.

    Args:
        module: the model and its task.
        batches: with labels and places, as data modules give them.
        sites: where the units are.
        share: of the units, drawn anew for every window, that are partly removed, by a uniform amount.
        seed: of the draws.
        channels: where MLPs take in their hidden channels, which are watched in passing and never gated.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [site.units for site in sites]
    found: list[tuple[torch.Tensor, ...]] = []
    device = module.model.device
    watch = ChannelSlopes(module.model, channels)
    with evaluating(module), _frozen(module), track("slopes of the loss", len(batches)) as done:
        for batch in batches:
            shape = (len(batch["input_ids"]), sum(widths))
            drawn = torch.rand(shape, generator=generator) < share
            removed = torch.rand(shape, generator=generator) * drawn
            gates = [(1 - part).to(device).requires_grad_() for part in torch.split(removed, widths, dim=1)]
            with gated(module.model, sites, gates), watch.watching(batch) as leaves:
                losses, predicted = module.losses(moved(batch, device))
                # What no loss depends on has slope zero.
                gradients = torch.autograd.grad(losses.sum(), [*gates, *leaves], materialize_grads=True)
            slope = -torch.cat(gradients[: len(gates)], dim=1).cpu().double()
            found.append((slope, removed.double(), predicted.cpu().double(), batch["places"][:, 0].cpu()))
            done()
    slope, away, tokens, documents = (torch.cat(parts) for parts in zip(*found, strict=True))
    told = tokens > 0  # a window of one token predicts nothing
    return Slopes(slope[told], away[told], tokens[told], documents[told], watch.sums())


def ablations(module: LanguageModel, batches: Sequence[Batch], sites: Sequence[Site]) -> torch.Tensor:
    """By how much the mean loss per predicted token rises without each unit alone, in nats, float64 [units].

    As many forward passes as there are units, and one.
    """
    units = [(place, unit) for place, site in enumerate(sites) for unit in range(site.units)]
    with track("loss without each unit", len(units) + 1) as done, evaluating(module), torch.no_grad():
        whole = _mean_loss(module, batches, sites, None)
        done()
        rises = []
        for gone in units:
            rises.append(_mean_loss(module, batches, sites, gone) - whole)
            done()
    return torch.tensor(rises, dtype=torch.float64)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Ask for no gradients of the weights, for which every linear map would keep its inputs."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _mean_loss(
    module: LanguageModel, batches: Iterable[Batch], sites: Sequence[Site], gone: tuple[int, int] | None
) -> float:
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        gates: list[torch.Tensor | None] = [None] * len(sites)
        if gone is not None:
            place, unit = gone
            gate = torch.ones(len(batch["input_ids"]), sites[place].units, device=module.model.device)
            gate[:, unit] = 0
            gates[place] = gate
        with gated(module.model, sites, gates):
            total += torch.stack(
                [part.sum().cpu().double() for part in module.losses(moved(batch, module.model.device))]
            )
    return float(total[0] / total[1])


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}

"""Moments of what reaches linear maps, over real tokens: streamed, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from compressor.attention.linear import channel_axis, side
from compressor.console import track
from compressor.damage.gates import Site, linear_at, real_rows
from compressor.damage.slopes import moved
from compressor.measure._forward import evaluating
from compressor.measure.sums import float64_device
from compressor.module import Batch, LanguageModel


def unit_moments(
    module: LanguageModel, batches: Sequence[Batch], sites: Sequence[Site]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """How strongly each unit acts through its map, from one forward pass: (activation, fluctuation) [units] per site.

    Activation is the root mean square of what a unit adds to the map's output; fluctuation the sum over a unit's inputs
    of their variance times the squared norm of their weights (FLAP, arXiv 2312.11983, eq. 5).
    """
    maps = [linear_at(module.model, site) for site in sites]
    device = module.model.device
    home = float64_device(device)
    norms = [_weights(part).to(home).double().square().sum(1) for part in maps]
    sums = [torch.zeros(2, len(site.owners), dtype=torch.float64, device=home) for site in sites]
    acts = [torch.zeros(site.units, dtype=torch.float64, device=home) for site in sites]
    real = torch.zeros(0)
    counts = [0] * len(sites)
    tokens = 0

    def watch(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        weights, entries = _weights(maps[place]), sites[place].entries
        alone = all(len(own) == 1 for own in entries)  # of a channel, the weights' norm says it all

        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            rows = real_rows(args[0], channel_axis(part), real, tokens)
            counts[place] += len(rows)  # again for every use
            wide = rows.to(home).double()
            sums[place] += torch.stack([wide.sum(0), wide.square().sum(0)])
            if alone:
                return
            for unit, own in enumerate(entries):
                acts[place][unit] += (rows[:, own] @ weights[own]).to(home).double().square().sum()

        return hook

    with ExitStack() as stack, track("strength of what is handed on", len(batches)) as done:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        for place, part in enumerate(maps):
            stack.callback(part.register_forward_pre_hook(watch(place)).remove)
        for batch in batches:
            real, tokens = batch["real"].to(device), batch["input_ids"].numel()
            module.predict_step(moved(batch, device), 0)
            done()
    return [
        (_activation(site, total, act, norm, rows), _fluctuation(site, total, norm, rows))
        for site, total, act, norm, rows in zip(sites, sums, acts, norms, counts, strict=True)
    ]


def _weights(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as [inputs, outputs]."""
    weight = module.get_parameter("weight").detach()
    return weight.movedim(side(module, "inputs"), 0).flatten(1)


def _activation(site: Site, sums: torch.Tensor, acts: torch.Tensor, norms: torch.Tensor, tokens: int) -> torch.Tensor:
    alone = [own[0] for own in site.entries if len(own) == 1]
    squares = (sums[1] * norms)[alone] if len(alone) == site.units else acts
    return (squares / tokens).sqrt().cpu()


def _fluctuation(site: Site, sums: torch.Tensor, norms: torch.Tensor, tokens: int) -> torch.Tensor:
    mean, square = sums / tokens
    spread = (square - mean.square()).clamp(min=0) * norms
    return torch.stack([spread[own].sum() for own in site.entries]).cpu()

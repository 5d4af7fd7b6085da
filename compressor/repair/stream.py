"""Where what a map gives is seen summed up: the residual stream behind it, found by experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attention.linear import channel_axis
from compressor.damage.gates import Site, linear_at
from compressor.damage.slopes import moved
from compressor.measure._forward import evaluating
from compressor.measure.sums import float64_device
from compressor.module import Batch, LanguageModel
from compressor.repair.passes import Point

STEP = 64.0  # times the outputs' root mean square they are moved by: far above the rounding of a large stream
NEAR = 0.05  # of a step: how far what moves by it may be off, and how large the rounding where that can be told

Seen = tuple[str, int | str, torch.Tensor]  # module, argument, and what it was


@dataclass(frozen=True)
class Stream:
    """The first place behind a map where its outputs, times `scale`, are part of a sum."""

    point: Point
    scale: float


def streams(module: LanguageModel, sample: Batch, sites: Sequence[Site]) -> list[Stream | None]:
    """The stream behind each site; None where the model does not add what the map gives to anything that is seen.

    Every site's outputs are moved by a random step, once; what moves by as many times that step, everywhere, and is
    not those outputs alone, is the sum. Norms before the sum, as Gemma 2 has them, and maps that are applied several
    times leave nothing to find.
    """
    with torch.no_grad(), evaluating(module):
        before = _inputs(module, sample, None)[0]
        return [_stream(module, sample, site, before) if site.uses == 1 else None for site in sites]


def _stream(module: LanguageModel, sample: Batch, site: Site, before: list[Seen]) -> Stream | None:
    part = linear_at(module.model, site)
    if channel_axis(part) != -1:
        return None
    after, outputs, step = _inputs(module, sample, part)
    if [entry[:2] for entry in before] != [entry[:2] for entry in after]:
        return None
    calls = [entry[:2] for entry in before]
    size, rounding = float(step.square().mean().sqrt()), torch.finfo(part.get_parameter("weight").dtype).eps
    for (name, argument, old), (_, _, new) in zip(before, after, strict=True):
        if old.shape != outputs.shape or calls.count((name, argument)) > 1:
            continue
        told = old.abs().maximum(new.abs()) * rounding < NEAR * size
        if told.sum() < told.numel() / 2:
            continue
        here, by = (new - old)[told], step[told]
        scale = float((here @ by) / (by @ by))
        alone = (old - scale * outputs)[told].norm() <= NEAR * old[told].norm()
        if scale and (here - scale * by).norm() <= NEAR * abs(scale) * by.norm() and not alone:
            return Stream(Point(name, argument), scale)
    return None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, where the device has it."""
    return tensor.detach().to(float64_device(tensor.device), copy=True).double()


def _inputs(
    module: LanguageModel, sample: Batch, shaken: nn.Module | None
) -> tuple[list[Seen], torch.Tensor, torch.Tensor]:
    """What modules are given, in the order in which they are run; with the outputs of one moved by a random step."""
    seen: list[Seen] = []
    kept: list[torch.Tensor] = [torch.zeros(0), torch.zeros(0)]

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            for argument, value in named:
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    seen.append((name, argument, _wide(value)))

        return given

    def shake(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = float(_wide(output).square().mean().sqrt()) or 1.0
        step = STEP * size * torch.randn(output.shape, generator=generator).to(output)
        kept[:] = [_wide(output), _wide(output + step) - _wide(output)]
        return output + step

    with ExitStack() as stack:
        for name, part in module.model.named_modules():
            stack.callback(part.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        if shaken is not None:
            stack.callback(shaken.register_forward_hook(shake).remove)
        module.predict_step(moved(sample, module.model.device), 0)
    return seen, kept[0], kept[1]

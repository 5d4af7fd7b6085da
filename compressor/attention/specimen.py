"""A copy of an attention block to experiment on: random weights, on the CPU, away from its model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from compressor.attention.interface import observing
from compressor.attention.trace import Frame, Site, WatchAttention, attending, map_leaves, named_heads, running

SEED = 0
Result = TypeVar("Result")


class Specimen:
    """The block at `depth` frames outside the attention module of a site, ready to be called as it was in its model.

    `inside` is the name of the attention module within the block, None if the block does not hold it.
    """

    def __init__(self, site: Site, depth: int = 0, dtype: torch.dtype = torch.float64) -> None:
        frame = site.stack[depth]
        self.site = site
        self.name = frame.name
        attends = site.stack[0].module
        self.inside = next((name for name, module in frame.module.named_modules() if module is attends), None)
        self.key: torch.Tensor | None = None
        self.block: nn.Module = copy.deepcopy(frame.module).to("cpu", dtype).eval()
        generator = torch.Generator().manual_seed(SEED)
        randomise(self.block, generator)
        named = dict(zip(inspect.signature(frame.module.forward).parameters, frame.args, strict=False)) | frame.kwargs
        self.arguments = map_leaves(lambda value: _argument(value, dtype, generator), named)

    def twin(self) -> Specimen:
        """The same block once more, to be changed on its own."""
        twin = copy.copy(self)
        twin.block = copy.deepcopy(self.block)
        return twin

    def submodule(self, name: str) -> nn.Module:
        """A module of the block, by its name within the block."""
        return self.block.get_submodule(name)

    def find(self, name: str) -> nn.Module:
        """A module of the block, by its name in the model."""
        return self.submodule(self._inside(name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of one of the block's, named as in the model."""
        if self._inside(name):
            self.block.set_submodule(self._inside(name), module)
        else:
            self.block = module

    def _inside(self, name: str) -> str:
        return name.removeprefix(self.name).removeprefix(".")

    def run(self, event: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None) -> torch.Tensor:
        """Call the block, and return the first tensor it gives.

        `event` gets what attention gave and the axis of its heads; what it returns takes that place.
        """
        assert self.inside is not None
        attends = self.submodule(self.inside)

        def asked(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, output: Any, **_: Any) -> Any:
            self.key = key
            return event(output, 2) if event is not None else None

        def alone(module: nn.Module, result: torch.Tensor, axis: int) -> torch.Tensor | None:
            return event(result, axis) if event is not None and module is attends else None

        frames: list[Frame] = []
        with ExitStack() as stack:
            if self.site.keys is not None:
                stack.enter_context(observing([attends], asked))
            else:
                stack.enter_context(running(self.block.named_modules(), frames))
                stack.enter_context(WatchAttention(lambda: attending(frames), named_heads, alone))
            output = self.block(**map_leaves(lambda value: value, self.arguments))
        return output if isinstance(output, torch.Tensor) else _first(output)


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Give parameters random values of ordinary size, so that nothing is hidden by a weight that happens to be zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)  # faster than in float64
            width = max(parameter.shape[1:].numel(), 1)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim < 2 else noise * width**-0.5)


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return tensor


def signature(site: Site, depth: int) -> tuple[object, ...]:
    """Everything that a specimen depends on: what two blocks of the same build, and called alike, have in common."""
    block = site.stack[depth]
    inside = [name for name, module in block.module.named_modules() if module is site.stack[0].module]
    modules = tuple((name, type(module), _settings(module)) for name, module in block.module.named_modules())
    tensors = (*block.module.named_parameters(), *block.module.named_buffers())
    arguments = map_leaves(_outline, (block.args, block.kwargs))
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors)
    return (tuple(inside), modules, shapes, repr(arguments), site.heads, site.keys, site.shares_keys)


def _settings(module: nn.Module) -> str:
    """A module's plain attributes, but for its number in the model."""
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    return repr(
        sorted(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, plain) and not name.startswith("_") and "layer_i" not in name
        )
    )


def _outline(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return value if isinstance(value, (bool, int, str, type(None))) else type(value)


def in_some_precision(experiment: Callable[[torch.dtype], Result]) -> Result:
    """The result in float64, or in float32 for modules that insist on it."""
    try:
        return experiment(torch.float64)
    except (RuntimeError, AssertionError, ValueError):
        return experiment(torch.float32)


def _to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if value.is_complex():
        return value.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return value.to(dtype) if value.is_floating_point() else value


def _argument(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = _to(value.cpu(), dtype)
    if not value.is_floating_point():
        return value
    value = value.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)  # a mask may hold the least of another dtype
    noise = torch.randn(value.shape, generator=generator, dtype=dtype)
    return torch.where(value.isnan(), noise, value).requires_grad_()

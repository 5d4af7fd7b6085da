"""One small forward pass that shows which linear maps of a model feed which, and so where its MLPs are.

What every linear map and embedding returns is cut off from what came before it, so that the graph of gradients behind
the input of a linear map ends at those that feed it. A down projection is fed by linear maps that feed nothing else,
each token by itself; it leads back to the width that these have taken in, and what it returns is added to something.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.interface import readable_masks
from compressor.attention.linear import channel_axis, features, is_linear
from compressor.attention.trace import Frame, evaluating, running, snapshot, trial_inputs
from compressor.errors import ModelError


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a linear map or an embedding; `stack` runs from its module outwards."""

    stack: tuple[Frame, ...]
    given: torch.Tensor
    returned: torch.Tensor  # a leaf

    @property
    def module(self) -> nn.Module:
        """The map itself."""
        return self.stack[0].module


@dataclass(frozen=True)
class Place:
    """Where an MLP is: its down projection's first use, and the maps that feed it."""

    down: Call
    ups: tuple[Call, ...]
    uses: int

    @property
    def depth(self) -> int:
        """How many frames outside the down projection the innermost module runs that holds all of the maps."""
        wanted = {up.module for up in self.ups}
        return next(depth for depth, frame in enumerate(self.down.stack) if wanted <= set(frame.module.modules()))

    @property
    def chosen(self) -> bool:
        """Whether it works on a list of chosen tokens, as experts do."""
        given = self.down.given
        return given.ndim == 2 and len(given) != self._tokens

    @property
    def _tokens(self) -> int:
        return int(self.down.stack[-1].kwargs["input_ids"].numel())


@contextmanager
def tracing(model: PreTrainedModel) -> Iterator[list[Place]]:
    """The places where MLPs seem to be, in the order of their first use.

    Within the context, copies of the model's modules can be run as they were.

    Raises:
        ModelError: the model cannot be run on a few token ids alone.
    """
    with torch.inference_mode(False), readable_masks(model):
        yield Wiring(_calls(model)).places()


def _calls(model: PreTrainedModel) -> list[Call]:
    calls: list[Call] = []
    stack: list[Frame] = []

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> object:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if not isinstance(output, torch.Tensor) or given is None:
            return None
        returned = output.detach().requires_grad_()
        calls.append(Call(tuple(reversed(stack)), given, returned))
        return returned.clone()  # which may be changed in place, as a leaf may not

    wanted = [part for part in model.modules() if is_linear(part) or isinstance(part, nn.Embedding)]
    handles = [part.register_forward_hook(cut, with_kwargs=True) for part in wanted]
    try:
        with evaluating(model), torch.enable_grad(), running(model.named_modules(), stack):
            output = model(**trial_inputs(model))[0]
    except Exception as error:  # whatever a model may trip over
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{type(model).__name__} cannot be run on token ids alone, so its MLPs cannot be found: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            _let_go(module)
    return [*calls, Call((Frame("", model, (), {}),), output, output)]  # what the model returns comes last


def _let_go(module: nn.Module) -> None:
    """Cut what a module has kept of a run, such as its state, off from the graph of that run."""
    for kept in (vars(module), module._buffers):
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                kept[name] = value.detach()


class Wiring:
    """Which calls feed which: those from whose results the input of another was computed, with no other in between."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.sources = {id(call.returned): call for call in calls}
        self.feeding = {call: self.behind(call.given.grad_fn) for call in calls}
        self.readers: dict[Call, list[Call]] = defaultdict(list)
        for call, ups in self.feeding.items():
            for up in ups:
                self.readers[up].append(call)

    def behind(self, node: Any) -> list[Call]:
        """The calls from whose results a node of a graph was computed."""
        leaves = {id(getattr(found, "variable", None)) for found in _graph(node)}
        return [call for key, call in self.sources.items() if key in leaves]

    def places(self) -> list[Place]:
        """The MLPs, in the order of their first use."""
        uses: dict[nn.Module, list[Call]] = defaultdict(list)
        for call in self.feeding:
            if self._is_down(call):
                uses[call.module].append(call)
        return [Place(_kept(first), tuple(self.feeding[first]), 1 + len(more)) for first, *more in uses.values()]

    def _is_down(self, call: Call) -> bool:
        """Whether a call is that of a down projection."""
        ups = self.feeding[call]
        if not ups or not all(is_linear(each.module) for each in (call, *ups)):
            return False
        if any(reader.module is not call.module for up in ups for reader in self.readers[up]):
            return False
        if features(call.module)[1] not in {features(up.module)[0] for up in ups}:
            return False
        return not _mixes_tokens(call, ups) and self._is_added(call)

    def _is_added(self, call: Call) -> bool:
        """Whether what a map returns meets others on its way, at once or after one more map, and not as a gate."""
        for reader in self.readers[call]:
            if len(self.feeding[reader]) > 1:
                return not self._gates(call, reader)
            slope = torch.autograd.grad(reader.given.sum(), call.returned, retain_graph=True)[0]
            if self.readers[reader] and not varies(rows(slope, call.module)):
                return self._is_added(reader)
        return False

    def _gates(self, call: Call, reader: Call) -> bool:
        """Whether what a map returns is multiplied with the stream, as a gate, on its way to the next map."""
        graph = _graph(reader.given.grad_fn)
        waiting = [node for node in graph if getattr(node, "variable", None) is call.returned]
        seen = set()
        while waiting:
            node = waiting.pop()
            for after in graph[node]:
                others = [other for other, _ in after.next_functions if other is not None and other is not node]
                met = {source for other in others for source in self.behind(other)} - {call}
                product = after.name().startswith("Mul")
                stream = len(met) > 1 or any(not is_linear(source.module) for source in met)
                if product and stream and after._saved_self.shape == after._saved_other.shape:
                    return True
                if (product or not met) and after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return False


def _kept(call: Call) -> Call:
    """A call with its arguments as they are now, without their graphs."""
    frames = (Frame(f.name, f.module, snapshot(f.args), snapshot(f.kwargs)) for f in call.stack)
    return replace(call, stack=tuple(frames))


def _graph(start: Any) -> dict[Any, list[Any]]:
    """The nodes behind a node, itself included, and those that were computed from each of them."""
    found: dict[Any, list[Any]] = {} if start is None else {start: []}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions:
            if before is not None and before not in found:
                found[before] = []
                waiting.append(before)
            if before is not None:
                found[before].append(node)
    return found


def _mixes_tokens(call: Call, ups: Sequence[Call]) -> bool:
    """Whether a map's input at a token depends on what the maps before it gave at others, as attention's does."""
    given = rows(call.given, call.module)
    last = given[-1:].sum()  # of no token at all, where an expert got none
    gradients = torch.autograd.grad(last, [up.returned for up in ups], retain_graph=True, allow_unused=True)
    for up, gradient in zip(ups, gradients, strict=True):
        moved = rows(torch.zeros_like(up.returned) if gradient is None else gradient, up.module).ne(0).any(1)
        if len(moved) != len(given) or bool(moved[:-1].any()):
            return True
    return False


def rows(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """What goes into or comes out of a map, as [tokens of all sequences, channels]."""
    return tensor.movedim(channel_axis(module), -1).flatten(0, -2)


def varies(slopes: torch.Tensor) -> bool:
    """Whether gradients [tokens, channels] differ between tokens, as they do where something bends."""
    return not torch.allclose(slopes, slopes[:1].expand_as(slopes), rtol=1e-6, atol=1e-9)

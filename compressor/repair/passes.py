"""Forward passes over calibration text that look at a few places, and go on from where a block ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attention.trace import map_leaves
from compressor.damage.slopes import moved
from compressor.measure._forward import evaluating
from compressor.module import Batch, LanguageModel


@dataclass(frozen=True)
class Point:
    """Something to look at: what `module` is given as `argument` (a place, or a name), or what it gives back (None).

    It comes by `times` in one forward pass.
    """

    module: str
    argument: int | str | None = 0
    times: int = 1


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass once everything was seen."""


class Passes:
    """Forward passes of a model over the same batches.

    `advance` keeps what a block gives, in the host's memory; passes then begin behind it. So a walk through the model,
    block by block, costs as much as a few whole passes, however deep it is.

    Args:
        module: the model.
        batches: the text.
        blocks: names of the model's blocks, in order; `blocks_of` finds those that can be left out.
    """

    def __init__(self, module: LanguageModel, batches: Sequence[Batch], blocks: Sequence[str]) -> None:
        self.module = module
        self.batches = batches
        self.blocks = blocks
        self.done = 0
        self.given: list[Any] = [None] * len(batches)  # by the last block that is done

    def look(self, points: Sequence[Point]) -> Iterator[tuple[Batch, list[list[Any]]]]:
        """Every batch, with what was seen at each point, in the order in which it came by.

        A pass ends as soon as everything was seen.
        """
        for batch, given in zip(self.batches, self.given, strict=True):
            output = map_leaves(self._back, given)
            with torch.no_grad(), evaluating(self.module), without(self.module.model, self.blocks[: self.done], output):
                found = see(self.module, batch, points)
            yield batch, found

    def advance(self, block: int, points: Sequence[Point] = ()) -> Iterator[tuple[Batch, list[list[Any]]]]:
        """As `look`, while running up to the end of a block; later passes begin there."""
        given = []
        for batch, found in self.look([Point(self.blocks[block], None), *points]):
            given.append(map_leaves(_kept, found[0][0]))
            yield batch, found[1:]
        self.given, self.done = given, block + 1

    def follow(self, other: Passes) -> None:
        """Begin where other passes begin, which has to be of the same model."""
        self.given, self.done = other.given, other.done

    def _back(self, leaf: Any) -> Any:
        return leaf.to(self.module.model.device) if isinstance(leaf, torch.Tensor) else leaf


def _kept(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf


def _as_now(leaf: Any) -> Any:
    """Some blocks go on to add to what they were given, in place."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def see(module: LanguageModel, batch: Batch, points: Sequence[Point]) -> list[list[Any]]:
    """Run a batch, with gradients as the caller has them, until every point was seen."""
    found: list[list[Any]] = [[] for _ in points]
    missing = sum(point.times for point in points)

    def keep(place: int, value: Any) -> None:
        nonlocal missing
        found[place].append(map_leaves(_as_now, value))
        missing -= 1
        if not missing:
            raise _Seen

    def watch(place: int, point: Point) -> Callable[[], None]:
        part, argument = module.model.get_submodule(point.module), point.argument
        if argument is None:
            return part.register_forward_hook(lambda _, __, output: keep(place, output)).remove

        def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(place, args[argument] if isinstance(argument, int) else kwargs[argument])

        return part.register_forward_pre_hook(given, with_kwargs=True).remove

    with ExitStack() as stack:
        for place, point in enumerate(points):
            stack.callback(watch(place, point))
        with suppress(_Seen):
            module.predict_step(moved(batch, module.model.device), 0)
    return found


@contextmanager
def without(model: nn.Module, blocks: Sequence[str], output: Any) -> Iterator[None]:
    """Within the context, blocks are not run: each gives OUTPUT, that of the last of them, which alone is looked at."""
    with ExitStack() as stack:
        for name in blocks:
            part = model.get_submodule(name)
            own = vars(part).get("forward")
            part.forward = lambda *_, **__: output
            if own is None:
                stack.callback(delattr, part, "forward")
            else:  # somebody else has wrapped it
                stack.callback(setattr, part, "forward", own)
        yield


def blocks_of(module: LanguageModel, sample: Batch, points: Sequence[Point]) -> list[str]:
    """The blocks of a model in the order in which they are run, if what comes after one depends on its output alone.

    That is tried out on a sample: whatever is seen at the points in later blocks has to be the same, bit for bit, when
    the blocks before are left out. Empty where it is not, or where the points are in no one list of blocks.
    """
    model = module.model
    lists = (name for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    home = next((name for name in lists if all(point.module.startswith(f"{name}.") for point in points)), "")
    if not home:
        return []
    names = [f"{home}.{number}" for number, _ in model.get_submodule(home).named_children()]
    order: list[str] = []
    with ExitStack() as stack, torch.no_grad(), evaluating(module):
        for name in names:
            part = model.get_submodule(name)
            stack.callback(part.register_forward_pre_hook(lambda _, __, name=name: order.append(name)).remove)
        module.predict_step(moved(sample, model.device), 0)
    if sorted(order) != sorted(names):
        return []
    with torch.no_grad(), evaluating(module):
        other = {**sample, "input_ids": sample["input_ids"].flip(1)}
        outputs = [found[0] for found in see(module, sample, [Point(name, None) for name in order])]
        whole = dict(zip(points, see(module, sample, points), strict=True))
        for place, output in enumerate(outputs[:-1]):
            later = [point for point in points if order.index(_block(point, home)) > place]
            see(module, other, points)  # whatever the blocks keep for each other is now of another text
            try:
                with without(model, order[: place + 1], output):
                    again = see(module, sample, later)
            except Exception:  # whatever a block misses that another one would have left it, such as its keys
                return []
            for point, found in zip(later, again, strict=True):
                if not all(map(torch.equal, found, whole[point])):
                    return []
    return order


def _block(point: Point, home: str) -> str:
    return f"{home}.{point.module.removeprefix(f'{home}.').partition('.')[0]}"

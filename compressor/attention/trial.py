"""A pruning plan before it is carried out: checked as a whole, and tried on copies of the blocks it is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral

import torch

from compressor.attention.nouns import Layer
from compressor.attention.silence import silence
from compressor.attention.slim import Editor, Habits
from compressor.attention.specimen import Specimen
from compressor.attention.trace import Site
from compressor.errors import PlanError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative; many modules round to float32 on their way


def check_plan(
    counts: Sequence[int], plan: Mapping[int, Iterable[int]], allow_empty: bool, noun: str = "head"
) -> dict[int, tuple[int, ...]]:
    """The plan as sorted tuples, without layers that lose nothing.

    Args:
        counts: how many heads or channels every layer has.
        plan: those to remove, by layer.
        allow_empty: let a layer lose all of them.
        noun: "head" or "channel".

    Raises:
        PlanError: the plan does not fit the layers.
    """
    checked: dict[int, tuple[int, ...]] = {}
    for index, requested in plan.items():
        removed = tuple(requested)
        if not _is_number(index) or not 0 <= index < len(counts):
            raise PlanError(f"the plan names layer {index!r}; the model has layers 0 to {len(counts) - 1}")
        count = counts[index]
        for number in removed:
            if not _is_number(number) or not 0 <= number < count:
                span = f"{noun}s 0 to {count - 1}" if count else f"no {noun}s left"
                raise PlanError(f"the plan names {noun} {number!r} of layer {index}, which has {span}")
        if len(set(removed)) < len(removed):
            raise PlanError(f"the plan names a {noun} of layer {index} twice: {listed(sorted(removed))}")
        if removed and len(removed) == count and not allow_empty:
            raise PlanError(f"the plan removes all {count} {noun}s of layer {index}; leave one, or allow empty layers")
        if removed:
            checked[int(index)] = tuple(sorted(int(number) for number in removed))
    return checked


def listed(numbers: Sequence[int], most: int = 16) -> str:
    """Numbers for a message, the first of them where there are many."""
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def _is_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def deviation(
    site: Site,
    block: str,
    projection: str,
    layer: Layer,
    removed: Sequence[int],
    remove: Callable[[Editor], None],
    habits: Habits,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Largest relative difference between a block without heads or channels and one in which they are silenced.

    Args:
        site: where the block is.
        block: its name.
        projection: name of the linear map that takes what the heads or channels give.
        layer: what is known of them.
        removed: those that leave.
        remove: takes them out of a copy of the block.
        habits: the reading of the block's code to try.
        dtype: the precision to compute in.

    Returns:
        The difference, and how large it may be.
    """
    depth = next(place for place, frame in enumerate(site.stack) if frame.name == block)
    silenced = Specimen(site, depth, dtype)
    slim = silenced.twin()
    silence(silenced.find(projection), layer, removed)
    remove(Editor(slim.find, slim.replace, habits))
    with torch.no_grad():
        expected, found = silenced.run(), slim.run()
    if expected.shape != found.shape:
        return math.inf, 0.0
    size = expected.abs().max().clamp(min=torch.finfo(dtype).tiny)  # without a bias, an emptied layer gives zeros
    return float((expected - found).abs().max() / size), TOLERANCE[dtype]


def first_that_works(
    candidates: Iterable[Habits], attempt: Callable[[Habits], tuple[float, float]], what: str, advice: str = ""
) -> Habits:
    """The first reading of a block's code under which heads or channels can leave.

    Raises:
        PlanError: there is none; the message starts with WHAT and ends with ADVICE.
    """
    failures: list[str] = []
    for habits in candidates:
        try:
            found, tolerance = attempt(habits)
        except (RuntimeError, AssertionError, ValueError) as error:
            failures.append(f"whose code cannot run without them ({' '.join(str(error).split())})")
            continue
        if found <= tolerance:
            return habits
        failures.append(f"which does not work as before without them (it deviates by {found:.1e})")
    raise PlanError(f"{what}, {failures[0]}{advice}")

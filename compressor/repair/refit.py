"""Closed-form repair: before units leave, the rest of what feeds the same map is refitted to stand in for them.

Map after map, in the order in which the model applies them: what the surviving inputs of a map should add is a
least-squares problem in the second moments of its inputs, which are taken from the model as repaired so far. Where the
model sums up what a map gives in a residual stream, the target is the stream of the dense model; so a map also makes up
for what is left of the errors before it, and maps behind a cut that lose nothing are refitted too. Elsewhere it is what
the map gave with all of its inputs. A ridge, chosen on calibration text that did not take part in the fit, draws the
change towards nothing. A bias, where there is one, takes over the mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attention.linear import side
from compressor.console import log, track
from compressor.damage.gates import Site, linear_at
from compressor.errors import ModelError
from compressor.measure.sums import float64_device
from compressor.module import Batch, LanguageModel
from compressor.repair.passes import Passes, Point, blocks_of, see
from compressor.repair.solve import HELD, Task, held_out, least_squares, moments_of_inputs, moments_of_streams, rows_of
from compressor.repair.stream import streams

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of an input's mean square
SAMPLE = 32  # tokens by which the model is tried out


@dataclass(frozen=True)
class Repair:
    """What came of one map, with errors on held-out calibration text as shares of the mean square of its outputs.

    `target` is "stream" or "output": what the map was fitted to. `before` is the error when units just leave, `after`
    the one after the refit. `ridge` was chosen, None where no refit helped; `condition` is the condition number of the
    system that was solved for it.
    """

    site: str
    target: str
    before: float
    after: float
    ridge: float | None
    condition: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


def repair(
    module: LanguageModel,
    batches: Sequence[Batch],
    plan: Sequence[tuple[Site, Sequence[int]]],
    others: Sequence[Site] = (),
) -> list[Repair]:
    """Refit the maps that lose units, and those behind them; the inputs of what is to leave get zero weights.

    Args:
        module: the model before anything was removed from it; changed in place, and ready to be cut.
        batches: calibration text, with places.
        plan: the units that leave each site.
        others: sites that lose nothing. Those behind the first that does are refitted, where there is a stream.

    Raises:
        ModelError: activations are not finite, or a site of the plan is no linear map. Maps that were refitted before
            that was found stay as they then are.
    """
    losing = [(site, sorted(gone)) for site, gone in plan if gone]
    if not losing:
        return []
    kinds = {bool(kind) for batch in batches for kind in held_out(batch)}
    sample = _sample(batches[0])
    tasks = _tasks(module, sample, losing, others)
    found: list[Repair] = []
    with track("repairing", len(tasks)) as done:
        for entry in _walk(module, batches, sample, tasks):
            found.append(entry)
            done()
    lost = {site.module for site, _ in losing}
    worse = sum(entry.ridge is None for entry in found if entry.site in lost)
    if len(kinds) < 2:
        log.warning(f"nothing is repaired: of fewer than {HELD} documents none can be held out; give more --samples")
    elif worse:
        log.warning(
            f"repair helps {len(losing) - worse} of {len(losing)} maps; the others just lose what leaves, for no refit "
            "helped on the documents held out; more --samples may"
        )
    return found


def _sample(batch: Batch) -> Batch:
    """The beginning of a batch's first document."""
    return {name: batch[name][:1, :SAMPLE] for name in ("input_ids", "attention_mask")}


def _tasks(
    module: LanguageModel, sample: Batch, losing: Sequence[tuple[Site, Sequence[int]]], others: Sequence[Site]
) -> list[Task]:
    """What is to be refitted, in the order in which the model first applies it."""
    lost = {site.module: gone for site, gone in losing}
    sites = [*(site for site, _ in losing), *(site for site in others if site.module not in lost)]
    names = {linear_at(module.model, site): site for site in sites}
    order: list[Site] = []
    handles = [part.register_forward_pre_hook(lambda part, _: order.append(names[part])) for part in names]
    try:
        see(module, sample, [Point(site.module, times=site.uses) for site in sites])
    finally:
        for handle in handles:
            handle.remove()
    ranked = list({site.module: site for site in order}.values())
    first = next(place for place, site in enumerate(ranked) if site.module in lost)
    behind = ranked[first:]
    found = zip(behind, streams(module, sample, behind), strict=True)
    tasks = []
    for site, stream in found:
        shared = is_shared(module.model, site)
        tasks.append(Task(site, lost.get(site.module, ()), None if shared else stream, shared))
    return [task for task in tasks if task.gone or task.stream is not None]


def is_shared(model: nn.Module, site: Site) -> bool:
    """Whether another module holds the weight of a site's map too, and may keep what leaves there."""
    own = linear_at(model, site).get_parameter("weight").data_ptr()
    return sum(weight.data_ptr() == own for part in model.modules() for weight in part.parameters(recurse=False)) > 1


def _exhaust(passes: Iterator[Any]) -> None:
    deque(passes, maxlen=0)


def _walk(module: LanguageModel, batches: Sequence[Batch], sample: Batch, tasks: Sequence[Task]) -> Iterator[Repair]:
    """Refit map after map. Of every block, the dense model's streams are noted before anything in it is changed."""
    names = [task.site.module for task in tasks]
    blocks = blocks_of(module, sample, [Point(task.site.module, times=task.site.uses) for task in tasks])
    if not blocks and len(tasks) > 2:
        log.info("blocks depend on more than the one before: the repair of every map takes a pass through all of them")
    dense, slim = Passes(module, batches, blocks), Passes(module, batches, blocks)
    homes = [next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), 0) for name in names]
    if blocks and homes[0]:
        _exhaust(dense.advance(homes[0] - 1))
        slim.follow(dense)
    for home in sorted(set(homes)):
        group = [task for task, own in zip(tasks, homes, strict=True) if own == home]
        more = home < homes[-1]
        targets = _targets(dense, group, home if more else None)
        for task in group:
            yield _refit(slim, task, *targets[task.site.module])
        if more:
            _exhaust(slim.advance(home))


def _targets(dense: Passes, tasks: Sequence[Task], block: int | None) -> dict[str, tuple[list[torch.Tensor], float]]:
    """What the dense model's streams behind some maps are, and how large their outputs; with a block, up to its end.

    By map: [real tokens, outputs] for every batch, in the host's memory, and a mean square on documents held out.
    """
    followed = [task for task in tasks if task.stream is not None]
    targets: dict[str, tuple[list[torch.Tensor], float]] = {task.site.module: ([], 0.0) for task in tasks}
    squares = {name: [0.0, 0.0] for name in targets}
    counts = [0, 0]
    points = [Point(task.site.module, None) for task in followed]
    points += [task.stream.point for task in followed if task.stream is not None]
    if not points:
        if block is not None:
            _exhaust(dense.advance(block))
        return targets
    for batch, found in dense.look(points) if block is None else dense.advance(block, points):
        held = held_out(batch)
        for kind in range(2):
            counts[kind] += int((held == bool(kind)).sum())
        for task, (outputs,), (seen,) in zip(followed, found[: len(followed)], found[len(followed) :], strict=True):
            name = task.site.module
            targets[name][0].append(rows_of(seen, -1, batch).cpu())
            own = rows_of(outputs, -1, batch)
            own = own.to(float64_device(own.device)).double().square().sum(1)
            for kind in range(2):
                squares[name][kind] += float(own[held.to(own.device) == bool(kind)].sum())
    told = slice(1, 2) if all(counts) else slice(0, 2)  # of all documents, where none is held out
    return {name: (rows, sum(squares[name][told]) / sum(counts[told])) for name, (rows, _) in targets.items()}


def _refit(slim: Passes, task: Task, streams: Sequence[torch.Tensor], square: float) -> Repair:
    """Refit one map of the model as repaired so far."""
    site = task.site
    part = linear_at(slim.module.model, site)
    axis = side(part, "inputs")
    weight, bias = part.get_parameter("weight").detach(), getattr(part, "bias", None)
    home = float64_device(weight.device)
    rows = weight.movedim(axis, 0).flatten(1).to(home, copy=True).double()  # [inputs, outputs]
    entries = site.entries
    leaving = torch.tensor([place for unit in task.gone for place in entries[unit]], dtype=torch.long, device=home)

    def silence() -> None:
        if not task.shared:
            weight.index_fill_(axis, leaving.to(weight.device), 0)

    if task.stream is None:
        moments = moments_of_inputs(slim, task, rows, leaving)
        silence()
        constant = torch.zeros_like(rows[:1]) if bias is None else bias.detach().to(home).double()[None]
        whole = torch.cat([rows, constant])
        square = float((whole * (moments.inputs[1] @ whole)).sum())
    else:  # which lacks what leaves, once that is silent
        silence()
        moments = moments_of_streams(slim, task, streams, rows.shape[1])
    if not bool(torch.isfinite(moments.inputs).all() and torch.isfinite(moments.lacking).all()):
        raise ModelError(f"what reaches {site.module} is not finite; the model or its text is broken")
    staying = torch.ones(len(rows) + 1, dtype=torch.bool, device=home)
    staying[leaving] = False
    staying[-1] = bias is not None
    fit = least_squares(moments, staying.nonzero().squeeze(1), () if task.shared else RIDGES)
    if fit.ridge is not None:
        rows[leaving] = 0
        weight.copy_((rows + fit.change[:-1]).to(weight).view(weight.movedim(axis, 0).shape).movedim(0, axis))
        if bias is not None:
            bias.detach().add_(fit.change[-1].to(weight))
    before, after = (error / square if square else 0.0 for error in (fit.before, fit.after))
    kind = "output" if task.stream is None else "stream"
    return Repair(site.module, kind, before, after, fit.ridge, fit.condition)

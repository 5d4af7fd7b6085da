"""Closed-form repair: before units leave, the rest of what feeds the same map is refitted to stand in for them.

Site after site, in the order in which the model applies them: what the surviving inputs of a map have to add, so that
the map gives what it gives with all of them, is a least-squares problem in the second moments of its inputs, which are
taken from the model as repaired so far. A ridge, chosen on calibration text that did not take part in the fit, draws
the change towards nothing. A bias, where there is one, takes over the mean of what leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attention.linear import channel_axis, side
from compressor.console import log, track
from compressor.damage.gates import Site, linear_at
from compressor.damage.moments import real_rows
from compressor.damage.slopes import moved
from compressor.errors import ModelError
from compressor.measure._forward import evaluating
from compressor.measure.sums import float64_device
from compressor.module import Batch, LanguageModel

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of an input's mean square
HELD = 5  # every so many documents are held out of the fit


@dataclass(frozen=True)
class Repair:
    """What came of one site, with errors on held-out calibration text as shares of the mean square of its outputs.

    `before` is the error when units just leave, `after` the one after the refit. `ridge` was chosen, None where no
    refit helped; `condition` is the condition number of the system that was solved for it.
    """

    site: str
    before: float
    after: float
    ridge: float | None
    condition: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass once a site's inputs are known."""


def repair(module: LanguageModel, batches: Sequence[Batch], plan: Sequence[tuple[Site, Sequence[int]]]) -> list[Repair]:
    """Refit the maps that lose units, in place; the inputs of what is to leave get zero weights, and can be cut.

    Args:
        module: the model before anything was removed from it.
        batches: calibration text, with places.
        plan: the units that leave each site.

    Raises:
        ModelError: activations are not finite, or a site is no linear map.
    """
    losing = [(site, sorted(gone)) for site, gone in plan if gone]
    if not losing:
        return []
    ranked = _in_order(module, batches[0], losing)
    found = []
    with track("repairing", len(ranked)) as done:
        for site, gone in ranked:
            found.append(_refit(module, batches, site, gone))
            done()
    worse = sum(entry.ridge is None for entry in found)
    if worse:
        log.warning(
            f"repair helps {len(found) - worse} of {len(found)} maps; the others just lose what leaves, for no refit "
            "helped on the documents held out; more --samples may"
        )
    return found


def _refit(module: LanguageModel, batches: Sequence[Batch], site: Site, gone: Sequence[int]) -> Repair:
    part = linear_at(module.model, site)
    fit, held, enough = _moments(module, batches, site)
    if not bool(torch.isfinite(fit).all() and torch.isfinite(held).all()):
        raise ModelError(f"what reaches {site.module} is not finite; the model or its text is broken")
    leaving = torch.tensor([place for unit in gone for place in site.entries[unit]], device=fit.device)
    constant = len(fit) - 1
    staying = torch.ones(constant + 1, dtype=torch.bool, device=fit.device)
    staying[leaving] = False
    staying[constant] = getattr(part, "bias", None) is not None
    staying = staying.nonzero().squeeze(1)
    axis = side(part, "inputs")
    weight = part.get_parameter("weight").detach()
    rows = weight.movedim(axis, 0).flatten(1).to(fit.device).double()  # [inputs, outputs]
    lost = rows[leaving]
    square = float((rows * (held[:-1, :-1] @ rows)).sum())

    def error(change: torch.Tensor) -> float:
        difference = torch.cat([lost, -change])
        places = torch.cat([leaving, staying])
        lacking = float((difference * (held[places][:, places] @ difference)).sum())
        return lacking / square if square else 0.0

    before = error(torch.zeros(len(staying), lost.shape[1], dtype=lost.dtype, device=lost.device))
    best: tuple[float, float | None, torch.Tensor | None] = (before, None, None)
    system, target = fit[staying][:, staying], fit[staying][:, leaving] @ lost
    inputs = staying < constant
    scale = system.diagonal()[inputs].sum() / max(1, int(inputs.sum()))
    shared = sum(other.data_ptr() == weight.data_ptr() for other in _all_weights(module.model)) > 1
    usable = enough and not shared and bool(len(staying)) and (bool(scale > 0) or not bool(inputs.any()))
    for ridge in RIDGES if usable else ():
        change = torch.linalg.solve(system + torch.diag(ridge * scale * inputs), target)
        if (after := error(change)) < best[0]:
            best = (after, ridge, change)
    after, ridge_chosen, chosen = best
    condition = None
    if ridge_chosen is not None:
        values = torch.linalg.eigvalsh(system + torch.diag(ridge_chosen * scale * inputs))
        condition = float(values[-1] / values[0])
    if shared:  # with a layer that may keep what leaves here
        return Repair(site.module, before, after, None, None)
    refitted = torch.cat([rows, torch.zeros_like(rows[:1])])
    if chosen is not None:
        refitted[staying] += chosen
    refitted[leaving] = 0
    with torch.no_grad():
        weight.copy_(refitted[:-1].to(weight).view(weight.movedim(axis, 0).shape).movedim(0, axis))
        if chosen is not None and getattr(part, "bias", None) is not None:
            part.get_parameter("bias").add_(refitted[-1].to(weight))
    return Repair(site.module, before, after, ridge_chosen, condition)


def _all_weights(model: nn.Module) -> list[torch.Tensor]:
    """Every parameter as often as modules hold it."""
    return [weight for part in model.modules() for weight in part.parameters(recurse=False)]


def _moments(module: LanguageModel, batches: Sequence[Batch], site: Site) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Mean second moments of a site's inputs with a one behind them, of documents to fit and of those held out.

    [inputs + 1, inputs + 1] each; and whether there are both: if not, both moments are those of all documents.
    """
    part = linear_at(module.model, site)
    size = len(site.owners) + 1
    device = module.model.device
    home = float64_device(device)
    sums = torch.zeros(2, size, size, dtype=torch.float64, device=home)
    counts = [0, 0]
    seen = 0

    def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal seen
        rows = real_rows(args[0], channel_axis(part), real, mask.numel()).to(home).double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        for kind, own in enumerate((rows[~held_out], rows[held_out])):
            sums[kind].addmm_(own.T, own)
            counts[kind] += len(own)
        seen += 1
        if seen == site.uses:
            raise _Seen

    handle = part.register_forward_pre_hook(hook)
    try:
        with evaluating(module), torch.no_grad():
            for batch in batches:
                seen, mask = 0, batch["attention_mask"]
                held_out = (batch["places"][:, 0] % HELD == HELD - 1)[batch["real"] // mask.shape[1]].to(home)
                real = batch["real"].to(device)
                with suppress(_Seen):
                    module.predict_step(moved(batch, device), 0)
    finally:
        handle.remove()
    if not all(counts):
        total = sums.sum(0) / sum(counts)
        return total, total, False
    return sums[0] / counts[0], sums[1] / counts[1], True


def _in_order(
    module: LanguageModel, batch: Batch, plan: Sequence[tuple[Site, Sequence[int]]]
) -> list[tuple[Site, Sequence[int]]]:
    """Sites in the order in which the model first applies them."""
    names = {linear_at(module.model, site): site.module for site, _ in plan}
    order: list[str] = []

    def note(part: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(names[part])

    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        for part in names:
            stack.callback(part.register_forward_pre_hook(note).remove)
        module.predict_step(moved(batch, module.model.device), 0)
    return sorted(plan, key=lambda entry: order.index(entry[0].module))

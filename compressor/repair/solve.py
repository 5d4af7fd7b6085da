"""What a map lacks, in second moments of calibration text, and the ridge regression that makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from compressor.attention.linear import channel_axis
from compressor.damage.gates import Site, linear_at, real_rows
from compressor.measure.sums import float64_device
from compressor.module import Batch
from compressor.repair.passes import Passes, Point
from compressor.repair.stream import Stream

HELD = 5  # every so many documents are held out of the fit


class Task(NamedTuple):
    """A map to refit: the units that leave it, and the stream behind it, where there is one.

    A weight that is `shared` with another module, which may keep what leaves here, is not to be touched.
    """

    site: Site
    gone: Sequence[int]
    stream: Stream | None
    shared: bool


class Moments(NamedTuple):
    """Second moments of x, a map's inputs with a one behind them, and of e, what its outputs lack; float64.

    x xᵀ [2, inputs + 1, inputs + 1], x eᵀ [2, inputs + 1, outputs] and e² [2], means over the documents to fit and over
    those held out. `enough` tells whether there are both kinds of documents: if not, both means are those of all.
    """

    inputs: torch.Tensor
    lacking: torch.Tensor
    square: torch.Tensor
    enough: bool


class Fit(NamedTuple):
    """The change of a map, [inputs + 1, outputs], and mean squares of what lacks on documents held out."""

    change: torch.Tensor
    before: float
    after: float
    ridge: float | None
    condition: float | None


def rows_of(seen: torch.Tensor, axis: int, batch: Batch) -> torch.Tensor:
    """What was seen of a batch's real tokens, [tokens, channels]."""
    return real_rows(seen, axis, batch["real"].to(seen.device), batch["attention_mask"].numel())


def held_out(batch: Batch) -> torch.Tensor:
    """Which of a batch's real tokens are of documents held out of the fit."""
    documents = batch["places"][:, 0] % HELD == HELD - 1
    return documents[batch["real"] // batch["attention_mask"].shape[1]]


def moments_of_streams(slim: Passes, task: Task, streams: Sequence[torch.Tensor], width: int) -> Moments:
    """Moments where e is what the stream lacks of the dense model's, in units of the map's outputs.

    Args:
        slim: passes of the model as it is.
        task: a map with a stream.
        streams: the dense model's, [real tokens, outputs] for every batch.
        width: of the outputs.
    """
    assert task.stream is not None
    point, scale = task.stream.point, task.stream.scale

    def lacking(place: int, batch: Batch, seen: torch.Tensor, home: torch.device) -> torch.Tensor:
        return (streams[place].to(home).double() - rows_of(seen, -1, batch).to(home).double()) / scale

    return _moments(slim, task.site, width, point, lacking)


def moments_of_inputs(slim: Passes, task: Task, rows: torch.Tensor, leaving: torch.Tensor) -> Moments:
    """Moments where e is what the leaving inputs give.

    Args:
        slim: passes of the model as it is.
        task: a map without a stream.
        rows: its weights, [inputs, outputs].
        leaving: numbers of its inputs.
    """
    found = _moments(slim, task.site, rows.shape[1], None, None)
    lost = rows[leaving]
    square = [(lost * (both[leaving][:, leaving] @ lost)).sum() for both in found.inputs]
    return found._replace(lacking=found.inputs[:, :, leaving] @ lost, square=torch.stack(square))


def _moments(
    slim: Passes,
    site: Site,
    width: int,
    stream: Point | None,
    lacking: Callable[[int, Batch, torch.Tensor, torch.device], torch.Tensor] | None,
) -> Moments:
    axis = channel_axis(linear_at(slim.module.model, site))
    home = float64_device(slim.module.model.device)
    size = len(site.owners) + 1
    inputs, products, square = (
        torch.zeros(shape, dtype=torch.float64, device=home) for shape in ((2, size, size), (2, size, width), (2,))
    )
    counts = [0, 0]
    points = [Point(site.module, times=site.uses), *([] if stream is None else [stream])]
    for place, (batch, (given, *seen)) in enumerate(slim.look(points)):
        held = held_out(batch).to(home)
        e = None if lacking is None else lacking(place, batch, seen[0][0], home)
        for one in given:  # use by use
            x = rows_of(one, axis, batch).to(home).double()
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            for kind, chosen in enumerate((~held, held)):
                own = x[chosen]
                inputs[kind].addmm_(own.T, own)
                counts[kind] += len(own)
                if e is not None:
                    products[kind].addmm_(own.T, e[chosen])
                    square[kind] += e[chosen].square().sum()
    enough = all(counts)
    if not enough:
        inputs, products, square = (torch.stack([both.sum(0)] * 2) for both in (inputs, products, square))
        counts = [sum(counts)] * 2
    for both in (inputs, products, square):
        for kind, count in enumerate(counts):
            both[kind] /= count
    return Moments(inputs, products, square, enough)


def least_squares(moments: Moments, staying: torch.Tensor, ridges: Sequence[float]) -> Fit:
    """The change of a map's weights that lowers what lacks most on the documents held out, by the best of some ridges.

    Args:
        moments: of the map.
        staying: numbers of the inputs that may change, the constant's among them where there is a bias.
        ridges: shares of an input's mean square; the constant has none.
    """
    fit, held = (found[staying][:, staying] for found in moments.inputs)
    target, held_target = (found[staying] for found in moments.lacking)

    def error(change: torch.Tensor) -> float:
        return max(0.0, float(moments.square[1] - (change * (2 * held_target - held @ change)).sum()))

    inputs = staying < moments.inputs.shape[1] - 1
    scale = fit.diagonal()[inputs].sum() / max(1, int(inputs.sum()))
    usable = moments.enough and bool(len(staying)) and (bool(scale > 0) or not bool(inputs.any()))
    change, before = torch.zeros_like(target), error(torch.zeros_like(target))
    after, chosen = before, None
    for ridge in ridges if usable else ():
        tried = torch.linalg.solve(fit + torch.diag(ridge * scale * inputs), target)
        if (left := error(tried)) < after:
            change, after, chosen = tried, left, ridge
    condition = None
    if chosen is not None:
        values = torch.linalg.eigvalsh(fit + torch.diag(chosen * scale * inputs))
        condition = float(values[-1] / values[0])
    whole = torch.zeros_like(moments.lacking[0])
    whole[staying] = change
    return Fit(whole, before, after, chosen, condition)

"""Slopes of the loss → what units are worth to it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from compressor.damage.slopes import Slopes
from compressor.game.resampling import draw_examples

SURE = 1e-3  # least share of a residual that a fit leaves, where a window all but decides it


class Worth(NamedTuple):
    """By how much the loss rises without a unit, in nats per predicted token, and its standard error: [units] each."""

    rise: torch.Tensor
    error: torch.Tensor


def first_order(found: Slopes) -> torch.Tensor:
    """Mean slope of the loss per predicted token along the removal of each unit, [units]."""
    return found.slope.sum(0) / found.tokens.sum()


def second_moment(found: Slopes) -> torch.Tensor:
    """Mean square of the windows' slopes per predicted token, [units]; half of it is the rise that Fisher promises."""
    return found.slope.square().sum(0) / found.tokens.sum()


def channel_first_order(found: Slopes) -> list[torch.Tensor]:
    """What `first_order` is for heads, by site of channels: mean slope of the loss per predicted token, [channels]."""
    return [-sums.total / found.tokens.sum() for sums in found.channels]


def channel_second_moment(found: Slopes) -> list[torch.Tensor]:
    """What `second_moment` is for heads, by site of channels, [channels]."""
    return [sums.windows / found.tokens.sum() for sums in found.channels]


def channel_curvature(found: Slopes) -> list[torch.Tensor]:
    """The rise of the loss that its curvature promises when a channel leaves, in nats per predicted token, [channels].

    Half the mean square of slopes along the channel's gate: the Fisher information of that gate, with tokens taken one
    by one. At a minimum of the loss it is the second derivative, and the slope itself adds nothing.
    """
    return [sums.tokens / 2 / found.tokens.sum() for sums in found.channels]


def loss_game(found: Slopes) -> Worth:
    """What each unit adds in the game whose value is −loss, averaged over the coalitions that were drawn.

    The slope along the removal r of a unit is taken to be b + q · r, with b and q fitted by least squares to slopes at
    random r amid other units that are partly gone. Its integral from 0 to 1, b + q / 2, is the rise of the loss: a
    Shapley value by Owen's multilinear extension, but for coalitions of about the size that pruning leaves instead of
    all sizes. Windows are weighed by their tokens; errors follow from the scatter of the residuals, each as if
    its window had not been fitted (HC3).
    """
    slope = found.slope / found.tokens[:, None]
    share = (found.tokens / found.tokens.sum())[:, None]
    centre, level = (share * found.removed).sum(0), (share * slope).sum(0)
    away = found.removed - centre
    variance = (share * away.square()).sum(0)
    varied = variance > 0  # of a unit that every window had whole, there is a slope only
    # In few windows a unit may hardly have varied: then it counts as if it had, half as much as the others.
    variance = variance.clamp(min=float(variance.mean()) / 2).where(varied, 1)
    curvature = torch.where(varied, (share * away * slope).sum(0) / variance, 0)
    # The rise is a weighted sum of the slopes; these are its weights.
    weights = share * (1 + torch.where(varied, (0.5 - centre) / variance, 0) * away)
    leverage = share * (1 + torch.where(varied, away.square() / variance, 0))
    residual = (slope - level - curvature * away) / (1 - leverage).clamp(min=SURE)
    return Worth(level + curvature * (0.5 - centre), (weights * residual).square().sum(0).sqrt())


def resampled_loss_game(found: Slopes, resamples: int, seed: int) -> torch.Tensor:
    """What `loss_game` gives when documents are drawn anew, with replacement: [resamples, units]."""
    _, documents = torch.unique(found.documents, return_inverse=True)
    draws = torch.from_numpy(draw_examples(int(documents.max()) + 1, resamples, seed))
    windows = [torch.arange(len(documents)).repeat_interleave(draw[documents]) for draw in draws]
    return torch.stack([loss_game(_windows(found, rows)).rise for rows in windows])


def _windows(found: Slopes, rows: torch.Tensor) -> Slopes:
    return Slopes(found.slope[rows], found.removed[rows], found.tokens[rows], found.documents[rows])

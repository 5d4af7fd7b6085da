"""The values that a scoring run takes from the model's loss, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from compressor.damage.gates import Site
from compressor.damage.moments import unit_moments
from compressor.damage.slopes import ablations, slopes
from compressor.damage.surrogate import (
    channel_curvature,
    channel_first_order,
    channel_second_moment,
    first_order,
    loss_game,
    resampled_loss_game,
    second_moment,
)
from compressor.module import Batch, LanguageModel

SHARE = 0.2  # of the heads, partly removed in every window when the loss game is sampled
DAMAGES = ("loss-game", "taylor", "fisher", "loo", "activation", "fluctuation")
OF_CHANNELS = tuple(name for name in DAMAGES if name != "loo")  # which takes a forward pass for each


class Damages(NamedTuple):
    """Values by name and site, float64 [units] on the CPU, and those of resampled documents, [resamples, units].

    `channels` has the values of hidden channels of MLPs, by name and site, [channels].
    """

    values: dict[str, list[torch.Tensor]]
    resampled: dict[str, list[torch.Tensor]]
    channels: dict[str, list[torch.Tensor]]


def damages(
    module: LanguageModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    names: Sequence[str],
    *,
    channels: Sequence[Site] = (),
    resamples: int = 0,
    seed: int = 0,
) -> Damages:
    """The named values of every site's units; those that one pass can give are taken from one pass.

    Channels of MLPs are looked at in the passes that the heads of `sites` take, and change nothing there. Their
    "loss-game" is no game: it is the rise that the curvature of the loss promises, amid heads that are partly gone.
    """
    widths = [site.units for site in sites]
    found: dict[str, list[torch.Tensor]] = {}
    again: dict[str, list[torch.Tensor]] = {}
    beside: dict[str, list[torch.Tensor]] = {}

    def keep(
        name: str, values: Callable[[], torch.Tensor], others: Callable[[], list[torch.Tensor]] | None = None
    ) -> None:
        if name in names:
            found[name] = list(torch.split(values(), widths))
            if channels and others is not None:
                beside[name] = others()

    if {"taylor", "fisher"} & set(names):
        whole = slopes(module, batches, sites, channels=channels)
        absolute = (lambda: first_order(whole).abs(), lambda: [slope.abs() for slope in channel_first_order(whole)])
        keep("taylor", *absolute)
        keep("fisher", lambda: second_moment(whole), lambda: channel_second_moment(whole))
    if "loss-game" in names:
        partly = slopes(module, batches, sites, SHARE, seed, channels)
        worth = loss_game(partly)
        keep("loss-game", lambda: worth.rise, lambda: channel_curvature(partly))
        found["loss-game-error"] = list(torch.split(worth.error, widths))
        if resamples:
            again["loss-game"] = list(torch.split(resampled_loss_game(partly, resamples, seed), widths, dim=1))
    keep("loo", lambda: ablations(module, batches, sites))
    if {"activation", "fluctuation"} & set(names):
        moments = unit_moments(module, batches, [*sites, *channels])
        own, other = moments[: len(sites)], moments[len(sites) :]
        for place, name in enumerate(("activation", "fluctuation")):
            keep(
                name,
                lambda place=place: torch.cat([moment[place] for moment in own]),  # type: ignore[misc]
                lambda place=place: [moment[place] for moment in other],  # type: ignore[misc]
            )
    return Damages(found, again, beside)

"""The values that a scoring run takes from the model's loss, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from compressor.damage.gates import Site
from compressor.damage.moments import unit_moments
from compressor.damage.slopes import ablations, slopes
from compressor.damage.surrogate import first_order, loss_game, resampled_loss_game, second_moment
from compressor.module import Batch, LanguageModel

SHARE = 0.2  # of the heads, partly removed in every window when the loss game is sampled
DAMAGES = ("loss-game", "taylor", "fisher", "loo", "activation", "fluctuation")


class Damages(NamedTuple):
    """Values by name and site, float64 [units] on the CPU, and those of resampled documents, [resamples, units]."""

    values: dict[str, list[torch.Tensor]]
    resampled: dict[str, list[torch.Tensor]]


def damages(
    module: LanguageModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    names: Sequence[str],
    *,
    resamples: int = 0,
    seed: int = 0,
) -> Damages:
    """The named values of every site's units; those that one pass can give are taken from one pass."""
    widths = [site.units for site in sites]
    found: dict[str, list[torch.Tensor]] = {}
    again: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, values: Callable[[], torch.Tensor]) -> None:
        if name in names:
            found[name] = list(torch.split(values(), widths))

    if {"taylor", "fisher"} & set(names):
        whole = slopes(module, batches, sites)
        keep("taylor", lambda: first_order(whole).abs())
        keep("fisher", lambda: second_moment(whole))
    if "loss-game" in names:
        partly = slopes(module, batches, sites, SHARE, seed)
        worth = loss_game(partly)
        keep("loss-game", lambda: worth.rise)
        found["loss-game-error"] = list(torch.split(worth.error, widths))
        if resamples:
            again["loss-game"] = list(torch.split(resampled_loss_game(partly, resamples, seed), widths, dim=1))
    keep("loo", lambda: ablations(module, batches, sites))
    if {"activation", "fluctuation"} & set(names):
        moments = unit_moments(module, batches, sites)
        keep("activation", lambda: torch.cat([activation for activation, _ in moments]))
        keep("fluctuation", lambda: torch.cat([fluctuation for _, fluctuation in moments]))
    return Damages(found, again)

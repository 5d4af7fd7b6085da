"""Rounds of pruning: a part of what is to leave goes, the rest is repaired, and the loss is asked again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from compressor.attention import attention_layers
from compressor.console import log
from compressor.damage import DAMAGES, damages, site_of
from compressor.errors import RecipeError
from compressor.loading import LoadedModel
from compressor.mlp import mlp_layers
from compressor.module import Batch, LanguageModel
from compressor.removal import silence
from compressor.types import PruningPlan, UnitScores

Choose = Callable[[UnitScores, UnitScores | None, float], PruningPlan]


def check_rounds(criterion: str, rounds: int) -> None:
    """Refuse rounds by a criterion that cannot be asked again.

    Raises:
        RecipeError: it cannot.
    """
    if rounds > 1 and criterion not in DAMAGES:
        raise RecipeError(
            f"rounds is {rounds}, but {criterion} is not asked again as heads leave; use one of {', '.join(DAMAGES)}, "
            "or one round"
        )


def rounds_worth_making(choose: Choose, heads: UnitScores, channels: UnitScores | None, rounds: int) -> int:
    """The most rounds up to so many of which, by the scores at hand, each removes more than the one before.

    Args:
        choose: as for `in_rounds`.
        heads, channels: the scores before the first round.
        rounds: how many were asked for.

    Raises:
        PlanError: what all rounds together are to remove is out of reach.
    """
    whole = choose(heads, channels, 1.0)  # what is out of reach is told by what was asked for, not by a part of it
    found = min(rounds, whole.removed + whole.removed_channels)
    while found > 1:
        plans = [choose(heads, channels, (part + 1) / found) for part in range(found)]
        if len({(plan.removed, plan.removed_channels) for plan in plans}) == found:
            break
        found -= 1
    if found < rounds:
        log.info(f"rounds is {rounds}, but so little leaves that {found} will do: of more, some would remove nothing")
    return found


def in_rounds(
    loaded: LoadedModel,
    first: PruningPlan,
    choose: Choose,
    text: Sequence[Batch],
    rounds: int,
    *,
    repaired: bool,
    seed: int,
) -> PruningPlan:
    """Go on from the plan of a first round: what it removes stays removed, and what follows is chosen without it.

    Args:
        loaded: the dense model, which stays as it is.
        first: what leaves in the first round.
        choose: (scores of heads, scores of channels or None, part of the whole way) → plan.
        text: to ask the loss on, and to repair on.
        rounds: how many, the first included.
        repaired: whether what stays is repaired between rounds.
        seed: of the draws of the first round; later ones draw anew.

    Returns:
        The plan of the last round, for the dense model.
    """
    plan = first
    for number in range(1, rounds):
        log.info(f"round {number + 1} of {rounds}: {plan.removed} heads and {plan.removed_channels} channels are gone")
        model = copy.deepcopy(loaded.model)
        silence(model, loaded.task, plan, text if repaired else None)
        layers = [layer for layer in attention_layers(model) if layer.num_heads]
        mlps = mlp_layers(model) if first.channels_per_layer else ()
        found = damages(
            LanguageModel(model, loaded.task),
            text,
            [site_of(layer, layer.num_heads) for layer in layers],
            [first.criterion],
            channels=[site_of(mlp, mlp.num_channels) for mlp in mlps],
            seed=seed + number,
        )
        told = [torch.zeros(0)] * len(first.heads_per_layer)
        for layer, values in zip(layers, found.values[first.criterion], strict=True):
            told[layer.index] = values
        heads = gone_first(first.criterion, told, plan.heads)
        channels = gone_first(first.criterion, found.channels[first.criterion], plan.channels) if mlps else None
        plan = choose(heads, channels, (number + 1) / rounds)
    return replace(plan, rounds=rounds)


def gone_first(criterion: str, values: Sequence[torch.Tensor], gone: Mapping[int, Sequence[int]]) -> UnitScores:
    """Scores in which what is gone already is below everything else, so that it goes first again."""
    every = torch.cat(list(values)) if values else torch.zeros(0)
    below = float(every.min()) - float(every.abs().max()) - 1 if len(every) else 0.0
    told = []
    for index, layer in enumerate(values):
        own = layer.clone()
        own[list(gone.get(index, ()))] = below
        told.append(tuple(own.tolist()))
    return UnitScores(criterion, tuple(told))

"""The nouns that cross station boundaries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Task = Literal["causal", "masked"]


@dataclass(frozen=True)
class LayerScores:
    """What a scoring epoch found out about one layer of H heads. Entropies and dividends are in nats, float64.

    What was not asked for is not in the mappings. Coalitions of one size are in lexicographic order.
    """

    phi: torch.Tensor  # [H]
    entropy: torch.Tensor  # [H]
    pair_dividends: torch.Tensor  # [H, H], zero diagonal
    coverage: (
        torch.Tensor
    )  # [H, H] share of the distribution of a pair's symbols that was seen; a head's, on the diagonal
    first_key_mass: torch.Tensor  # [H] mean attention mass on the first key
    output_norm: torch.Tensor  # [H] L2 norm of the head's slice of the output projection
    observations: int
    dividends: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by order from "3" on: [C(H, order)]
    triples: Mapping[str, torch.Tensor] = field(default_factory=dict)  # "entropy", "coverage", … of triples: [C(H, 3)]
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of heads, beyond φ, and standard errors: [H]
    resampled: Mapping[str, torch.Tensor] = field(default_factory=dict)  # "phi", "entropy", "loss-game": [R, H]


@dataclass(frozen=True)
class MLPScores:
    """What a scoring run found out about one MLP of F hidden channels; float64."""

    output_norm: torch.Tensor  # [F] L2 norm of the channel's slice of the down projection
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of channels, by name: [F]


@dataclass(frozen=True)
class Scores:
    """The outcome of a scoring run: one `LayerScores` per attention layer, and the facts that identify the run.

    `mlps` has one `MLPScores` per MLP, where the run looked at them; if an MLP has a value, all have it.
    """

    layers: tuple[LayerScores, ...]
    facts: Mapping[str, Any]
    mlps: tuple[MLPScores, ...] = ()


@dataclass(frozen=True)
class UnitScores:
    """One number per head or channel, `[layers][units]`; those with the lowest go first."""

    criterion: str
    values: tuple[tuple[float, ...], ...]

    @property
    def units_per_layer(self) -> tuple[int, ...]:
        """Number of heads or channels in each layer."""
        return tuple(len(layer) for layer in self.values)


@dataclass(frozen=True)
class PruningPlan:
    """Which query heads and MLP channels leave which layer, in the numbering of the model that was scored, and why.

    Either a `ratio` or a `target` says how much: (kind, share of the dense model's that is left), of "flops", "params"
    or "latency". `predicted` is the share that the plan was found to leave, before anything was removed.
    """

    heads: Mapping[int, tuple[int, ...]]
    criterion: str
    ratio: float | None
    scope: str  # "layer" or "global"
    heads_per_layer: tuple[int, ...]  # before pruning
    allow_empty: bool = False
    seed: int | None = None  # of the draw, where the criterion is random
    unit: str = "head"  # "head", "query" or "group": what leaves at one time
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by MLP
    channels_per_layer: tuple[int, ...] = ()  # before pruning, of every MLP; empty where the plan is about heads alone
    target: tuple[str, float] | None = None
    structures: tuple[str, ...] = ("heads",)  # what may leave: "heads", "channels"
    align: int = 8  # what stays of an MLP is a multiple of it wide
    predicted: float | None = None
    rounds: int = 1  # between which the rest was repaired, and the criterion asked again
    edited: bool = False  # whether it is by hand, and no longer what the criterion says

    @property
    def removed(self) -> int:
        """Number of heads removed in all."""
        return sum(len(heads) for heads in self.heads.values())

    @property
    def total(self) -> int:
        """Number of heads before pruning."""
        return sum(self.heads_per_layer)

    @property
    def removed_channels(self) -> int:
        """Number of channels removed in all."""
        return sum(len(channels) for channels in self.channels.values())

    @property
    def total_channels(self) -> int:
        """Number of channels before pruning."""
        return sum(self.channels_per_layer)

    @property
    def fingerprint(self) -> str:
        """Of what leaves, and of the rule that says how much: another one tells that a plan was edited."""
        leaving = [[[index, sorted(gone)] for index, gone in sorted(of.items())] for of in (self.heads, self.channels)]
        rule = [self.ratio, self.target, self.scope, self.unit, self.structures, self.align, self.allow_empty]
        return hashlib.sha256(json.dumps([leaving, rule, self.rounds]).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "criterion": self.criterion,
            "ratio": self.ratio,
            "target": None if self.target is None else dict([self.target]),
            "predicted": self.predicted,
            "scope": self.scope,
            "unit": self.unit,
            "structures": list(self.structures),
            "align": self.align,
            "allow_empty": self.allow_empty,
            "seed": self.seed,
            "rounds": self.rounds,
            "edited": self.edited,
            "heads_per_layer": list(self.heads_per_layer),
            "removed_heads": self.removed,
            "total_heads": self.total,
            "heads": {str(layer): list(heads) for layer, heads in sorted(self.heads.items())},
            "channels_per_layer": list(self.channels_per_layer),
            "removed_channels": self.removed_channels,
            "total_channels": self.total_channels,
            "channels": {str(layer): list(channels) for layer, channels in sorted(self.channels.items())},
            "fingerprint": self.fingerprint,
        }

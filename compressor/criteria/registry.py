"""The one place where pruning criteria are known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compressor.errors import RecipeError
from compressor.files import did_you_mean
from compressor.types import Scores, UnitScores

Values = list[list[float]]
NOTHING, FORWARD, BACKWARD = "nothing", "a forward pass", "a forward and a backward pass"


@dataclass(frozen=True)
class Criterion:
    """A named rule that turns a scoring run into one number per head; the lowest are removed first.

    `cost` says what it takes for each calibration example. `counted` says that it is made from the counts of symbols,
    so that it is worth what these are worth; `needs` names one of the values that a scoring run computes only when
    asked. `channels` scores the hidden channels of MLPs, `[mlps][channels]`, where the criterion can. `in_loss` says
    that values are rises of the loss in nats per token, which add up and compare across layers, heads and channels.
    """

    name: str
    summary: str
    values: Callable[[Scores, int], Values]
    cost: str
    counted: bool = False
    needs: str | None = None
    channels: Callable[[Scores, int], Values] | None = None
    in_loss: bool = False

    def __call__(self, scores: Scores, seed: int = 0) -> UnitScores:
        """Score every head; `seed` matters to criteria that draw.

        Raises:
            RecipeError: the scoring run was not asked for what the criterion needs.
        """
        if not self.answered_by(scores):
            raise RecipeError(f"the scores hold no {self.needs} values; score again with --values {self.needs}")
        return UnitScores(self.name, tuple(tuple(layer) for layer in self.values(scores, seed)))

    def answered_by(self, scores: Scores) -> bool:
        """Whether a scoring run holds what the criterion needs."""
        return self.needs is None or all(self.needs in layer.values for layer in scores.layers if len(layer.phi))

    def channel_scores(self, scores: Scores, seed: int = 0) -> UnitScores:
        """Score every hidden channel of every MLP; `seed` matters to criteria that draw.

        Raises:
            RecipeError: the criterion says nothing of channels, or the scoring run did not look at them.
        """
        self.check_channels()
        assert self.channels is not None
        if not self.answers_channels(scores):
            what = f"{self.needs} values of channels" if self.needs else "channels of MLPs"
            again = f"--values {self.needs}" if self.needs else f"--criterion {self.name}"
            reason = scores.facts.get("no_channels")
            then = f"score again with {again}" if reason is None else f"{reason}; give --structures heads"
            raise RecipeError(f"the scores hold no {what}; {then}")
        return UnitScores(self.name, tuple(tuple(mlp) for mlp in self.channels(scores, seed)))

    def check_channels(self) -> None:
        """Refuse to score channels by a criterion that says nothing of them.

        Raises:
            RecipeError: it does not.
        """
        if self.channels is None:
            able = ", ".join(entry.name for entry in criteria() if entry.channels is not None)
            raise RecipeError(
                f"{self.name} says nothing of channels of MLPs; give --structures heads, or one of {able}"
            )

    def answers_channels(self, scores: Scores) -> bool:
        """Whether the criterion scores channels, and a scoring run holds what it needs for every MLP."""
        if self.channels is None or not scores.mlps:
            return False
        return self.needs is None or all(self.needs in mlp.values for mlp in scores.mlps if len(mlp.output_norm))


_REGISTRY: dict[str, Criterion] = {}


def register(
    name: str,
    summary: str,
    *,
    cost: str,
    counted: bool = False,
    needs: str | None = None,
    channels: Callable[[Scores, int], Values] | None = None,
    in_loss: bool = False,
) -> Callable[[Callable[[Scores, int], Values]], Callable[[Scores, int], Values]]:
    """Enter a function `(scores, seed) -> [layers][heads]` under a name nobody has yet; see `Criterion`."""

    def enter(values: Callable[[Scores, int], Values]) -> Callable[[Scores, int], Values]:
        if name in _REGISTRY:
            raise ValueError(f"there is already a criterion named {name!r}")
        _REGISTRY[name] = Criterion(name, summary, values, cost, counted, needs, channels, in_loss)
        return values

    return enter


def register_value(
    name: str, summary: str, *, cost: str, counted: bool = False, channels: bool = False, in_loss: bool = False
) -> None:
    """Enter a criterion that is one of the values which a scoring run computes when asked, of channels too or not."""

    def given(scores: Scores, seed: int) -> Values:
        return [layer.values[name].tolist() if len(layer.phi) else [] for layer in scores.layers]

    def of_channels(scores: Scores, seed: int) -> Values:
        return [mlp.values[name].tolist() if len(mlp.output_norm) else [] for mlp in scores.mlps]

    also = of_channels if channels else None
    register(name, summary, cost=cost, counted=counted, needs=name, channels=also, in_loss=in_loss)(given)


def criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
        RecipeError: nobody has that name.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"unknown criterion {name!r}{did_you_mean(name, _REGISTRY)}; known: {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


def criteria() -> tuple[Criterion, ...]:
    """All criteria, in the order in which they were registered."""
    return tuple(_REGISTRY.values())

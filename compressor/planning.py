"""A rule and scores → a plan, with prices of the model at hand where the rule is a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from compressor.attention import attention_layers
from compressor.budget import Costs, Rule, choose
from compressor.config import Recipe
from compressor.console import log, track
from compressor.criteria import Criterion
from compressor.errors import RecipeError
from compressor.loading import LoadedModel
from compressor.measure.latency import SHARES, LatencyTable, latency_prices, latency_table
from compressor.measure.prices import Layer, Prices, flop_prices, parameter_prices
from compressor.measure.throughput import throughput_steps
from compressor.mlp import mlp_layers
from compressor.types import PruningPlan, Scores, UnitScores

COUNTED = 256  # tokens of the sequence whose FLOPs are told, where the model takes as many


@dataclass(frozen=True)
class Pricing:
    """What leaves with units of a model, as a budget asks for it, and what there is in all."""

    costs: Costs
    total: float


def counted_length(loaded: LoadedModel) -> int:
    """Tokens of the sequence whose FLOPs are told."""
    return min(COUNTED, loaded.context)


def prefill_length(loaded: LoadedModel, recipe: Recipe) -> int:
    """Tokens of the prompts that latency is timed on."""
    return min(recipe.prompt_length, loaded.context)


def structures_of(recipe: Recipe, rule: Criterion, evidence: Scores) -> tuple[str, ...]:
    """What may leave: as the recipe says; else heads for a ratio, and for a target all that the criterion knows."""
    if recipe.structures is not None:
        return tuple(name for name in ("heads", "channels") if name in recipe.structures)
    if recipe.target is None:
        return ("heads",)
    if rule.answers_channels(evidence):
        log.info(f"target_{recipe.target[0]}: heads and channels of MLPs may leave; --structures names one alone")
        return "heads", "channels"
    log.info(f"target_{recipe.target[0]}: only heads may leave, for {rule.name} has no scores of channels here")
    return ("heads",)


def rule_of_recipe(recipe: Recipe, structures: tuple[str, ...]) -> Rule:
    """The rule that a recipe asks for."""
    return Rule(
        ratio=recipe.ratio,
        target=recipe.target,
        scope=recipe.scope_in_force,
        unit=recipe.unit_in_force,
        structures=structures,
        align=recipe.align,
        allow_empty=recipe.allow_empty,
    )


def channel_scores(rule: Criterion, evidence: Scores, structures: Sequence[str], seed: int) -> UnitScores | None:
    """The scores of channels by a criterion, where channels may leave.

    Raises:
        RecipeError: the criterion has none, or not for every MLP that was scored.
    """
    if "channels" not in structures:
        return None
    found = rule.channel_scores(evidence, seed)
    counts = tuple(mlp["channels"] for mlp in evidence.facts["mlps"])
    if found.units_per_layer != counts:
        raise RecipeError(
            f"{rule.name} has no scores for some channels of MLPs; score again, or give --structures heads"
        )
    return found


def pricing_of(rule: Rule, dense: LoadedModel, table: LatencyTable | None) -> Pricing | None:
    """Prices of a model for a rule's target; None for rules that need none."""
    if rule.target is None:
        return None
    kind = rule.target[0]
    if kind == "params":
        prices = parameter_prices(dense.model)
    else:
        prices = flop_prices(dense.model, counted_length(dense))
        if kind == "latency":
            assert table is not None
            prices = latency_prices(dense.model, table, prices.saved_along)
    return Pricing(_costs(dense, prices, rule.structures), prices.total)


def time_structures(dense: LoadedModel, structures: Sequence[str], recipe: Recipe) -> LatencyTable:
    """Measure the latency table of a model on this machine."""
    models = 1 + len(SHARES) * len(structures)
    with track("timing copies", throughput_steps(models, recipe.repeats, causal=False)) as step:
        table = latency_table(
            dense.model,
            structures,
            batch_size=recipe.batch_size,
            prompt_length=prefill_length(dense, recipe),
            repeats=recipe.repeats,
            seed=recipe.seed,
            on_step=step,
        )
    for structure in table.smoothed:
        log.warning(
            f"fewer {structure} were not always faster: this machine's noise is as large as what there is to save; the "
            "times were made monotone, and more --repeats would help"
        )
    return table


def chooser(
    rule: Rule,
    groups: Sequence[Sequence[int]],
    pricing: Pricing | None,
    *,
    in_loss: bool,
    seed: int | None = None,
) -> Callable[[UnitScores, UnitScores | None], PruningPlan]:
    """Everything of `choose` but the scores."""
    costs, total = (None, 0.0) if pricing is None else (pricing.costs, pricing.total)

    def chosen(heads: UnitScores, channels: UnitScores | None) -> PruningPlan:
        return choose(rule, heads, channels, groups=groups, costs=costs, total=total, in_loss=in_loss, seed=seed)

    return chosen


def _costs(dense: LoadedModel, prices: Prices, structures: Sequence[str]) -> Costs:
    layers: dict[str, Sequence[Layer]] = {"heads": attention_layers(dense.model)}
    if "channels" in structures:
        layers["channels"] = mlp_layers(dense.model)

    @lru_cache(maxsize=1024)  # draws and resamples ask for the same layers again
    def costs(structure: str, index: int, portions: tuple[tuple[int, ...], ...]) -> list[float]:
        return prices.saved_along(layers[structure][index], portions)

    return costs

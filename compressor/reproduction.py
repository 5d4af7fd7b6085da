"""The protocol of arXiv 2605.09515 on a model at hand, its published figures, and which of them hold.

500 documents, one symbol per document and head (the tuple of all its argmax keys), φ, 5 %, 10 % and 20 % of the heads.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from compressor.attention import attention_layers, prune_heads
from compressor.budget import allocate
from compressor.comparison import measure_quality, measure_speed, prompt_length_of, summarise
from compressor.confidence import is_saturated
from compressor.config import Recipe
from compressor.criteria import criterion, random_scores
from compressor.errors import RecipeError
from compressor.files import did_you_mean
from compressor.loading import LoadedModel
from compressor.preparation import data_for
from compressor.types import LayerScores, PruningPlan, Scores

RATIOS = (0.05, 0.1, 0.2)
AGREEMENT = 0.01  # relative; two figures as close as this are the same figure
PUBLISHED: dict[str, dict[str, float]] = {  # as printed in the paper
    "gpt2": {
        "mean triple dividend": -5.403,
        "perplexity, dense": 28.4,
        "perplexity at 5%": 30.1,
        "perplexity at 10%": 31.6,
        "perplexity at 20%": 33.4,
        "perplexity at 20%, random": 38.0,
        "FLOPs saved at 20%": 0.18,
        "throughput gained at 20%": 0.22,
    },
    "bert": {"mean pair dividend": 6.215},
    "tinyllama": {},
}


MODELS = {
    "gpt2": ("gpt2", "openai-community/gpt2"),
    "bert": ("bert-base-uncased", "google-bert/bert-base-uncased"),
    "tinyllama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0",),
}


@dataclass(frozen=True)
class Claim:
    """A figure of the paper's beside ours.

    `verdict` is "reproduced", "not reproduced", "artefact" (what the protocol gives whatever the model does), "not
    comparable" for perplexities where another model stands in, or "" where the paper has no such figure.
    """

    name: str
    published: float | None
    measured: float | None
    verdict: str
    reason: str


def reproduce(name: str, scores: Scores, dense: LoadedModel, recipe: Recipe) -> dict[str, Any]:
    """Prune by the paper's ratios, measure, and set what was found beside what was published: JSON-ready."""
    data = data_for(dense, recipe)
    groups = [layer.group_index for layer in attention_layers(dense.model)]
    choose = partial(
        allocate, scope=recipe.scope_in_force, unit=recipe.unit_in_force, groups=groups, allow_empty=recipe.allow_empty
    )
    ours = criterion(recipe.criterion)(scores, recipe.seed)
    plans = {f"{recipe.criterion} {ratio:.0%}": choose(ours, ratio) for ratio in RATIOS}
    draws = range(recipe.seed, recipe.seed + recipe.random_seeds)
    heads = ours.units_per_layer
    drawn = {f"random (seed {seed})": choose(random_scores(heads, seed), RATIOS[-1], seed=seed) for seed in draws}
    rows, losses = measure_quality(dense, {**plans, **drawn}, data, seed=recipe.seed)
    speed = _speed(dense, plans[f"{recipe.criterion} {RATIOS[-1]:.0%}"], recipe)
    reference = f"{recipe.criterion} {RATIOS[-1]:.0%}"
    summary = summarise(rows, losses, reference, recipe.seed)
    document = {"paper": name, "model": dense.name, "rows": rows, **summary, "speed": speed}
    return document | {"claims": [asdict(claim) for claim in claims(name, scores, document, recipe)]}


def claims(name: str, scores: Scores, document: dict[str, Any], recipe: Recipe) -> list[Claim]:
    """The paper's figures and ours, each with a verdict.

    Raises:
        RecipeError: the paper has no such model.
    """
    published = published_figures(name)
    rows = {row["name"]: row for row in document["rows"]}
    last = rows[f"{recipe.criterion} {RATIOS[-1]:.0%}"]
    dense = rows["dense"]
    measured: dict[str, float | None] = {
        **_dividends(scores.layers[_judged_layer(recipe)]),
        "perplexity, dense": dense["perplexity"],
        **{f"perplexity at {ratio:.0%}": rows[f"{recipe.criterion} {ratio:.0%}"]["perplexity"] for ratio in RATIOS},
        "perplexity at 20%, random": document["random"]["mean"] if document["random"] else None,
        "FLOPs saved at 20%": 1 - last["costs"]["macs"]["total"] / dense["costs"]["macs"]["total"],
        "attention FLOPs saved at 20%": 1 - last["costs"]["macs"]["attention"] / dense["costs"]["macs"]["attention"],
        "throughput gained at 20%": document["speed"]["prefill"]["speedup"]["median"] - 1,
    }
    own = document["model"] in MODELS[name]
    layer = scores.layers[_judged_layer(recipe)]
    return [_judged(kind, published.get(kind), value, layer, own) for kind, value in measured.items()]


def published_figures(name: str) -> dict[str, float]:
    """What the paper prints about a model.

    Raises:
        RecipeError: nothing.
    """
    if name not in PUBLISHED:
        raise RecipeError(
            f"unknown model of the paper {name!r}{did_you_mean(name, PUBLISHED)}; known: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def _judged_layer(recipe: Recipe) -> int:
    """The layer whose dividends are compared; the paper's tables are of the first."""
    return recipe.triple_layers[0] if recipe.triple_layers else 0


def _dividends(layer: LayerScores) -> dict[str, float | None]:
    heads = len(layer.phi)
    pair = float(layer.pair_dividends.sum()) / (heads * (heads - 1)) if heads > 1 else None
    triples = layer.dividends.get("3")
    return {
        "mean pair dividend": pair,
        "mean triple dividend": float(triples.mean()) if triples is not None and len(triples) else None,
    }


def _judged(name: str, published: float | None, measured: float | None, layer: LayerScores, own: bool) -> Claim:
    if published is None or measured is None:
        return Claim(name, published, measured, "", "")
    close = math.isclose(measured, published, rel_tol=AGREEMENT)
    verdict, reason = "reproduced" if close else "not reproduced", ""
    if "dividend" in name and is_saturated(layer):
        verdict = "artefact"
        reason = (
            f"nearly all tuples of {layer.observations} documents differ, so every entropy is about "
            f"ln {layer.observations} = {math.log(layer.observations):.4f} whatever the heads do"
        )
    elif "perplexity" in name and not own:
        verdict, reason = "not comparable", "another model than the paper's"
    elif name == "FLOPs saved at 20%" and not close:
        reason = "the paper's figure can only be that of attention alone"
    elif name == "throughput gained at 20%" and not close:
        reason = "the paper's figure is 1 / (1 − 0.18) − 1, what its FLOPs would promise; ours is timed"
    elif not close:
        reason = f"{measured / published - 1:+.1%} off"
    return Claim(name, published, measured, verdict, reason)


def _speed(dense: LoadedModel, plan: PruningPlan, recipe: Recipe) -> dict[str, Any]:
    pruned = prune_heads(copy.deepcopy(dense.model), plan.heads, allow_empty=plan.allow_empty)
    timed = measure_speed(
        {"dense": dense.model, "pruned": pruned},
        causal=dense.task == "causal",
        batch_size=recipe.batch_size,
        prompt_length=prompt_length_of(dense, recipe),
        new_tokens=recipe.new_tokens,
        repeats=recipe.repeats,
        seed=recipe.seed,
    )
    return timed["pruned"]

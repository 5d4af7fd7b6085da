"""Rounds of pruning, against what the physically pruned and repaired model says of the heads that are left."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import compressor
from compressor import pipeline, pruning
from compressor.attention import attention_layers
from compressor.budget import Rule, choose
from compressor.config import Recipe
from compressor.damage import damages, site_of
from compressor.errors import PlanError, RecipeError
from compressor.module import LanguageModel
from compressor.preparation import calibration_of, load_for
from compressor.removal import remove, silence
from compressor.rounds import gone_first, in_rounds
from compressor.scoring import score_model
from compressor.types import PruningPlan, UnitScores


@pytest.fixture
def run(models, texts):
    """A tiny model with its text, scored by the loss without each head."""

    def prepare(kind: str = "gpt2", criterion: str = "loo"):
        recipe = Recipe(model=models[kind], data=texts, values=[criterion], bootstrap=0, dtype="float64")
        loaded = load_for(recipe)
        scores = score_model(loaded, recipe)
        return loaded, scores, calibration_of(loaded, recipe, scores.facts)

    return prepare


def by_rule(rule: Rule, heads: UnitScores, channels: UnitScores | None, part: float) -> PruningPlan:
    return choose(rule.part(part), heads, channels)


@pytest.mark.parametrize("repaired", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_later_rounds_ask_the_model_that_is_left(run, kind, repaired):
    loaded, scores, text = run(kind)
    heads = UnitScores("loo", tuple(tuple(layer.values["loo"].tolist()) for layer in scores.layers))
    rule = Rule(ratio=0.5, scope="global")
    first = choose(rule.part(0.5), heads)
    before = copy.deepcopy(loaded.model.state_dict())
    plan = in_rounds(loaded, first, partial(by_rule, rule), text, 2, repaired=repaired, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    count = len(scores.layers[0].phi)
    assert (plan.removed, plan.rounds, plan.ratio) == (count, 2, 0.5)  # half of two layers
    # The same once more, by surgery: the heads that are left in the slim model, by the loss without each of them.
    slim = copy.deepcopy(loaded.model)
    remove(slim, loaded.task, first, text if repaired else None)
    sites = [site_of(layer, layer.num_heads) for layer in attention_layers(slim)]
    rises = damages(LanguageModel(slim, loaded.task), text, sites, ["loo"]).values["loo"]
    left = [[head for head in range(count) if head not in first.heads.get(layer, ())] for layer in range(2)]
    ranked = sorted(
        (float(rise), layer, head)
        for layer, values in enumerate(rises)
        for rise, head in zip(values, left[layer], strict=True)
    )
    expected = {(layer, head) for layer, gone in first.heads.items() for head in gone}
    for _, layer, head in ranked:
        if len(expected) < count and sum(one == layer for one, _ in expected) < count - 1:
            expected.add((layer, head))
    assert {(layer, head) for layer, gone in plan.heads.items() for head in gone} == expected


def test_what_is_silent_is_as_if_it_were_gone(run, make_batch):
    loaded, _, text = run()
    plan = PruningPlan({0: (1,), 1: (0, 2)}, "loo", 0.5, "global", (4, 4), channels={0: tuple(range(8))})
    for calibration in (text, None):
        slim, silent = copy.deepcopy(loaded.model), copy.deepcopy(loaded.model)
        remove(slim, loaded.task, plan, calibration)
        silence(silent, loaded.task, plan, calibration)
        batch = {name: text[0][name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            assert torch.allclose(slim(**batch).logits, silent(**batch).logits, atol=1e-9)


def test_what_is_gone_goes_first_again():
    values = [torch.tensor([0.5, -2.0, 3.0]), torch.tensor([-7.0, 1.0])]
    found = gone_first("loo", values, {0: (2,), 1: (1,)})
    flat = sorted((value, layer, unit) for layer, own in enumerate(found.values) for unit, value in enumerate(own))
    assert [(layer, unit) for _, layer, unit in flat[:2]] == [(0, 2), (1, 1)]
    assert found.values[0][:2] == (0.5, -2.0)
    assert found.values[1][0] == -7.0


def test_rounds_over_heads_and_channels_meet_a_target(models, texts, here: Path):
    compressor.score(model=models["gpt2"], data=texts, output_dir="s")
    pruned = compressor.prune(scores="s", target_flops=0.8, rounds=3, align=2, export=True, output_dir="p")
    plan = json.loads((here / "p" / "plan.json").read_text(encoding="utf-8"))
    assert plan["plan"]["rounds"] == 3
    assert plan["target"]["found"] <= 0.8
    assert plan["removed_in_resamples"] is None
    assert pruned.plan.channels


def test_rounds_that_would_remove_nothing_are_not_made(models, texts, here: Path, monkeypatch):
    compressor.score(model=models["gpt2"], data=texts, output_dir="s")
    with monkeypatch.context() as patched:
        patched.setattr(pruning, "in_rounds", None)
        once = compressor.prune(scores="s", ratio=0.2, rounds=2, output_dir="p")  # ⌈0.1 · 4⌉ = ⌈0.2 · 4⌉
    assert once.plan == compressor.prune(scores="s", ratio=0.2, dry_run=True).plan
    assert (once.plan.rounds, once.document["plan"]["rounds"]) == (1, 1)
    assert once.document["removed_in_resamples"] is not None
    assert compressor.prune(scores="s", ratio=0.75, rounds=9, dry_run=True).plan.rounds == 3  # three heads of four


def test_a_target_out_of_reach_is_told_before_any_round(models, texts, here: Path, monkeypatch):
    compressor.score(model=models["gpt2"], data=texts, output_dir="s")
    monkeypatch.setattr(pruning, "calibration_of", None)
    with pytest.raises(PlanError, match=r"target_flops is 0\.1; "):
        compressor.prune(scores="s", target_flops=0.1, rounds=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"criterion": "gt-fep", "rounds": 2}, "is not asked again"),
        ({"criterion": "entropy", "structures": ["channels"]}, "says nothing of channels"),
    ],
)
def test_what_no_scores_can_answer_costs_no_scoring(models, texts, here: Path, monkeypatch, settings, says):
    monkeypatch.setattr(pipeline, "score_model", None)
    for verb in (compressor.run, compressor.prune):
        with pytest.raises(RecipeError, match=says):
            verb(model=models["gpt2"], data=texts, **settings)


def test_rounds_are_told(compress, models, texts, here: Path):
    compressor.score(model=models["gpt2"], data=texts, output_dir="s")
    shown = compress("prune", "--scores", "s", "--ratio", "0.5", "--rounds", "2", "--no-repair").out
    assert "4 of 8 heads (50.0%) go; in 2 rounds; the rule" in " ".join(shown.split())
    assert "rounds" not in compress("prune", "--scores", "s", "--ratio", "0.5", "--no-repair").out


def test_a_criterion_that_is_not_asked_again_knows_no_rounds(models, texts, here: Path):
    compressor.score(model=models["gpt2"], data=texts, criterion="gt-fep", output_dir="s")
    with pytest.raises(RecipeError, match="rounds is 2, but gt-fep is not asked again as heads leave; use one"):
        compressor.prune(scores="s", criterion="gt-fep", rounds=2)
    with pytest.raises(RecipeError, match="rounds is 0; expected 1 or more"):
        compressor.prune(scores="s", rounds=0)

"""Scoring runs that look at the hidden channels of MLPs, from `compressor.score` to what is on disk and printed."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import MethodType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor
from compressor import scoring
from compressor.artefact import load_scores
from compressor.confidence import mlp_report
from compressor.config import Recipe
from compressor.criteria import criterion
from compressor.data.documents import load_documents
from compressor.errors import ModelError, RecipeError
from compressor.loading import load_model
from compressor.mlp import mlp_layers, silenced_channels
from compressor.types import MLPScores

VALUES = ["loss-game", "taylor", "fisher", "loo", "activation", "fluctuation"]
SAID = ("loss-game", "taylor", "fisher", "activation", "fluctuation", "magnitude", "random")


@pytest.fixture
def quick(models, texts):
    """Settings of a small and fast run on a tiny GPT-2."""
    return {"model": models["gpt2"], "data": texts, "samples": 8, "bootstrap": 0}


def test_every_mlp_has_values_of_every_channel(quick, here, tmp_path):
    run = compressor.score(**quick, values=VALUES, output_dir=tmp_path / "scores")
    model = load_model(quick["model"]).model
    found = mlp_layers(model)
    assert run.scores.facts["mlps"] == [
        {"name": mlp.name, "channels": mlp.num_channels, "projection": mlp.down_projection} for mlp in found
    ]
    assert "no_channels" not in run.scores.facts
    again = load_scores(tmp_path / "scores")
    for scores in (run.scores, again):
        assert len(scores.mlps) == len(found) == 2
        for mlp, layer in zip(scores.mlps, found, strict=True):
            assert set(mlp.values) == {*VALUES} - {"loo"}
            weight = model.get_submodule(layer.down_projection).weight.detach().double()  # [channels, width]
            assert torch.allclose(mlp.output_norm, weight.norm(dim=1))
            assert all(len(value) == layer.num_channels for value in (mlp.output_norm, *mlp.values.values()))
            assert mlp.values["loss-game"].dtype == torch.float64
        for name in SAID:
            entry = criterion(name)
            assert entry.answers_channels(scores)
            assert entry.channel_scores(scores).units_per_layer == tuple(layer.num_channels for layer in found)
    other = compressor.score(**quick, values=VALUES, output_dir=tmp_path / "other")
    assert other.scores.facts == run.scores.facts
    first, second = ((tmp_path / name / "scores.safetensors").read_bytes() for name in ("scores", "other"))
    assert first == second


def test_the_lowest_channels_of_a_trained_model_are_missed_least(here, tmp_path):
    """On the embedded model: half of all channels, those of least loss-game, of most, and by chance."""
    run = compressor.score(samples=12, bootstrap=0, output_dir=tmp_path / "scores")
    loaded = load_model("embedded")
    ids = [
        loaded.tokenizer(text, return_tensors="pt").input_ids
        for text in load_documents("embedded", "both").evaluation[:8]
    ]
    rises = {}
    for name, sign in (("loss-game", 1), ("loss-game", -1), ("random", 1)):
        scores = criterion(name).channel_scores(run.scores)
        ranked = sorted(
            (sign * value, layer, channel)
            for layer, row in enumerate(scores.values)
            for channel, value in enumerate(row)
        )
        gone = {layer: [] for layer in range(len(scores.values))}
        for _, layer, channel in ranked[: len(ranked) // 2]:
            gone[layer].append(channel)
        with silenced_channels(loaded.model, gone), torch.no_grad():
            rises[name, sign] = sum(float(loaded.model(row, labels=row).loss) for row in ids)
    low, high, chance = rises["loss-game", 1], rises["loss-game", -1], rises["random", 1]
    assert low < chance < high


@pytest.mark.parametrize(
    ("criterion_", "values", "norms"),
    [("gt-fep", None, False), ("entropy", ["loo"], False), ("magnitude", None, True), ("random", None, True)],
)
def test_mlps_are_looked_at_where_something_asks_for_them(quick, here, tmp_path, criterion_, values, norms):
    run = compressor.score(**quick, criterion=criterion_, values=values, output_dir=tmp_path / "scores")
    assert [len(mlp.output_norm) for mlp in run.scores.mlps] == ([128, 128] if norms else [])
    assert all(not mlp.values for mlp in run.scores.mlps)
    assert len(run.scores.facts["mlps"]) == len(run.scores.mlps)
    assert criterion("magnitude").answers_channels(run.scores) == norms
    with pytest.raises(RecipeError, match="the scores hold no fisher values of channels; score again with --values"):
        criterion("fisher").channel_scores(load_scores(tmp_path / "scores"))


def test_heads_have_the_same_scores_to_the_last_bit(quick, here, tmp_path, monkeypatch):
    run = compressor.score(**quick, values=VALUES, output_dir=tmp_path / "with")
    monkeypatch.setattr(scoring, "_mlps_of", lambda *_: ((), None))
    compressor.score(**quick, values=VALUES, output_dir=tmp_path / "without")
    beside, alone = (load_file(tmp_path / name / "scores.safetensors") for name in ("with", "without"))
    assert {name for name in beside if not name.startswith("mlps.")} == set(alone)
    assert all(torch.equal(beside[name], alone[name]) for name in alone)
    assert run.scores.mlps


def test_a_model_of_experts_has_its_heads_scored(models, texts, build, here, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    build("gpt_oss", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="compressor"):
        run = compressor.score(
            model=str(tmp_path / "model"), data=texts, samples=6, bootstrap=0, output_dir=tmp_path / "scores"
        )
    assert all("loss-game" in layer.values for layer in run.scores.layers)
    assert run.scores.mlps == ()
    assert "experts" in run.scores.facts["no_channels"]
    with pytest.raises(RecipeError, match=r"experts.*; give --structures heads$") as caught:
        criterion("loss-game").channel_scores(load_scores(tmp_path / "scores"))
    assert "\n" not in str(caught.value)


def test_an_mlp_that_is_not_given_tokens_leaves_all_without_values(quick, here, tmp_path, monkeypatch):
    """With values of some MLPs and not of others nothing could be planned."""

    def transposed(self, hidden):
        return self.c_proj(self.act(self.c_fc(hidden.transpose(0, 1).contiguous()))).transpose(0, 1)

    loaded = load_model(quick["model"])
    mlp = loaded.model.transformer.h[1].mlp
    mlp.forward = MethodType(transposed, mlp)
    scores = scoring.score_model(loaded, Recipe(**quick, values=VALUES))
    assert all("taylor" in layer.values for layer in scores.layers)
    assert len(scores.mlps) == 2
    assert all(not mlp.values for mlp in scores.mlps)
    assert "transformer.h.1.mlp.c_proj" in scores.facts["no_channels"]
    assert not criterion("loss-game").answers_channels(scores)
    assert criterion("magnitude").answers_channels(scores)
    with pytest.raises(RecipeError, match=r"is not given one row for each token.*; give --structures heads$"):
        criterion("taylor").channel_scores(scores)


def test_broken_mlps_are_a_users_mistake(quick, models, here, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 0] = math.inf
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(tmp_path / "model")
    quick["model"] = str(tmp_path / "model")
    with pytest.raises(ModelError, match=r"an MLP of .* is not finite; its weights are broken") as caught:
        compressor.score(**quick, criterion="magnitude", output_dir=tmp_path / "scores")
    assert "\n" not in str(caught.value)


def test_the_spread_of_values_is_told():
    norms = torch.tensor([4.0, 1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    report = mlp_report(MLPScores(norms, {"loss-game": norms * 3e-6, "activation": norms}))
    assert report["channels"] == 5
    assert report["output_norm"] == report["values"]["activation"] == {"least": 1.0, "median": 3.0, "most": 9.0}
    assert report["values"]["loss-game"]["negligible"] == {"below": 1e-5, "share": 0.6}
    none = torch.zeros(0, dtype=torch.float64)
    assert mlp_report(MLPScores(none, {"taylor": none})) == {"channels": 0, "values": {}, "output_norm": None}


def test_the_terminal_and_json_say_the_same(compress, quick):
    words = ("--model", quick["model"], "--data", quick["data"], "--samples", 8, "--bootstrap", 0)
    told = compress("score", *words, "--json").json["mlps"]
    scores = load_scores(Path("runs/gpt2/score"))
    assert [entry["mlp"] for entry in told] == [0, 1]
    printed = compress("score", *words).out
    assert "loss-game of the hidden channels of MLPs, in nats per token" in printed
    for entry, mlp in zip(told, scores.mlps, strict=True):
        values = mlp.values["loss-game"]
        spread = entry["values"]["loss-game"]
        assert spread["most"] == float(values.max())
        assert spread["negligible"]["share"] == sum(value < 1e-5 for value in values.tolist()) / len(values)
        line = [f"{spread[name]:.1e}" for name in ("least", "median", "most")]
        assert [*line, f"{spread['negligible']['share']:.0%}"] in [row.split()[2:] for row in printed.splitlines()]


def test_strengths_alone_are_printed_without_a_unit(compress, quick):
    words = ("--model", quick["model"], "--data", quick["data"], "--samples", 8, "--bootstrap", 0)
    printed = compress("score", *words, "--criterion", "activation").out
    assert "activation of the hidden channels of MLPs\n" in printed
    assert "below" not in printed
    assert "hidden channels" not in compress("score", *words, "--criterion", "gt-fep").out

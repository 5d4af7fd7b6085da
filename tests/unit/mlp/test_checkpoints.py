"""What the config says of MLPs; what is saved and loaded again is the same model, here and in stock classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import compressor
from compressor import mlp_layers, prune_channels, prune_heads
from compressor.attention import removed_heads
from compressor.errors import ModelError
from compressor.export import write_checkpoint
from compressor.loading import load_model
from compressor.mlp import removed_channels

Plan = Mapping[int, Sequence[int]]
UNEVEN: Plan = {0: [0, 5, 31], 1: [2, *range(8, 20)]}
EVEN: Plan = {0: [0, 1, 30], 1: [7, 8, 31]}
MASKED = ("albert", "bert", "deberta-v2", "distilbert", "modernbert", "mpnet", "roberta")
CAUSAL = ("codegen", "cohere", "falcon", "gemma3", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "olmo2")
CAUSAL += ("opt", "phi3", "qwen3", "starcoder2")


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def plan_for(kind: str, plan: Plan) -> Plan:
    return {0: plan[0]} if kind == "albert" else plan


def saved(model, kind: str, folder: Path) -> str:
    """Save a model in a precision in which its class comes back as it was, and name that."""
    if kind == "gemma3":
        model.float()  # the scale of its embeddings is computed in the precision it is loaded in
    model.save_pretrained(folder)
    return str(model.dtype).removeprefix("torch.")


def stored(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("plan", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_what_is_saved_and_loaded_is_the_same_model(tiny, make_batch, tmp_path, kind, plan):
    model = prune_channels(tiny(kind), plan_for(kind, plan))
    dtype = saved(model, kind, tmp_path)
    again = compressor.load(tmp_path, device="cpu", dtype=dtype, task="masked" if kind in MASKED else "causal")
    assert type(again) is type(model)
    assert removed_channels(again) == removed_channels(model)
    assert [layer.num_channels for layer in mlp_layers(again)] == [layer.num_channels for layer in mlp_layers(model)]
    for padding in ("none", "right"):
        assert torch.equal(logits(again, make_batch(padding)), logits(model, make_batch(padding)))
    again.save_pretrained(tmp_path / "again")
    configs = [stored(folder) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0] == configs[1]


# By kind, the field that holds the width of all layers.
FIELDS = {
    "albert": "intermediate_size",
    "bert": "intermediate_size",
    "codegen": "n_inner",
    "cohere": "intermediate_size",
    "deberta-v2": "intermediate_size",
    "distilbert": "hidden_dim",
    "falcon": "ffn_hidden_size",
    "gemma3": "intermediate_size",
    "gpt2": "n_inner",
    "gpt_bigcode": "n_inner",
    "gpt_neox": "intermediate_size",
    "llama": "intermediate_size",
    "mistral": "intermediate_size",
    "modernbert": "intermediate_size",
    "olmo2": "intermediate_size",
    "opt": "ffn_dim",
    "phi3": "intermediate_size",
    "qwen3": "intermediate_size",
    "starcoder2": "intermediate_size",
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_width_of_all_layers_stands_in_the_config_and_stock_classes_load_it(tiny, make_batch, tmp_path, kind):
    model = prune_channels(tiny(kind), plan_for(kind, EVEN))
    width = mlp_layers(model)[0].num_channels
    dtype = saved(model, kind, tmp_path)
    config = stored(tmp_path)
    assert config[FIELDS[kind]] == width
    assert "per_layer_config" not in config
    assert config["pruned_channels"] == {str(index): list(gone) for index, gone in plan_for(kind, EVEN).items()}
    assert config["dense_config"] == {"": {FIELDS[kind]: width + 3}}
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(again.eval(), make_batch("right")), logits(model, make_batch("right")))


def test_widths_of_single_layers_stand_in_the_config_one_by_one(tiny):
    model = prune_channels(tiny("llama"), UNEVEN)
    assert [model.config.per_layer_config[index].intermediate_size for index in (0, 1)] == [29, 19]
    written = json.loads(model.config.to_json_string())
    assert written["intermediate_size"] == 32
    assert written["per_layer_config"] == {"0": {"intermediate_size": 29}, "1": {"intermediate_size": 19}}
    assert written["pruned_channels"] == {str(index): list(gone) for index, gone in UNEVEN.items()}
    prune_channels(model, {0: range(10)})
    written = json.loads(model.config.to_json_string())
    assert (written["intermediate_size"], "per_layer_config" in written) == (19, False)


def test_no_number_of_gpt2_means_four_times_its_width(tiny, make_batch, tmp_path):
    model = prune_channels(tiny("gpt2", n_inner=None), EVEN)
    assert (model.config.n_inner, model.config.dense_config) == (93, {"": {"n_inner": None}})
    model.save_pretrained(tmp_path)
    for again in (
        compressor.load(tmp_path, device="cpu", dtype="float64"),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval(),
    ):
        assert torch.equal(logits(again, make_batch()), logits(model, make_batch()))


def test_a_width_that_experts_have_too_is_told_layer_by_layer(tiny, masked, make_batch, tmp_path):
    """One number for all would have the stock class build other experts; these keep their width."""
    dense = tiny("hunyuan_v1_moe")
    model = prune_channels(copy.deepcopy(dense), EVEN)
    written = json.loads(model.config.to_json_string())
    assert written["intermediate_size"] == 32
    assert written["per_layer_config"] == {"0": {"intermediate_size": 29}, "1": {"intermediate_size": 29}}
    twin = masked(dense, EVEN)
    assert torch.allclose(logits(model, make_batch()), logits(twin, make_batch()), rtol=1e-9, atol=1e-9)
    model.save_pretrained(tmp_path)
    again = compressor.load(tmp_path, device="cpu", dtype="float64")
    again.set_experts_implementation("eager")
    assert torch.equal(logits(again, make_batch()), logits(model, make_batch()))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "opt", "bloom"])
@pytest.mark.parametrize("plan", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_heads_channels_and_heads_again(tiny, make_batch, tmp_path, kind, plan):
    model = prune_heads(tiny(kind), {0: [1]})
    prune_channels(model, plan)
    prune_heads(model, {0: [1], 1: [0, 2]})
    prune_channels(model, {1: [0]})
    model.save_pretrained(tmp_path)
    task = "masked" if kind == "bert" else "causal"
    again = compressor.load(tmp_path, device="cpu", dtype=str(model.dtype).removeprefix("torch."), task=task)
    assert torch.equal(logits(again, make_batch("right")), logits(model, make_batch("right")))
    assert removed_heads(again) == {0: (1, 2), 1: (0, 2)}
    assert removed_channels(again) == removed_channels(model)
    again.save_pretrained(tmp_path / "again")
    assert stored(tmp_path) == stored(tmp_path / "again")


def test_a_layer_without_heads_and_a_layer_without_channels(tiny, make_batch, tmp_path):
    model = prune_heads(tiny("llama"), {0: range(6)}, allow_empty=True)
    prune_channels(model, {0: [3], 1: range(32)}, allow_empty=True)
    model.save_pretrained(tmp_path)
    again = compressor.load(tmp_path, device="cpu", dtype="float64")
    assert torch.equal(logits(again, make_batch("right")), logits(model, make_batch("right")))
    assert again.config.per_layer_config[1].intermediate_size == 0


def test_checkpoints_are_checked_as_those_without_heads_are(models, tmp_path):
    loaded = load_model(models["gpt2"])
    count = mlp_layers(loaded.model)[0].num_channels
    prune_channels(loaded.model, {0: range(0, count, 2)})
    record = write_checkpoint(loaded, {"plan": "p"}, tmp_path / "checkpoint")
    assert record["verified"]["largest_logit_deviation"] == 0
    assert removed_channels(compressor.load(tmp_path / "checkpoint")) == {0: tuple(range(0, count, 2))}


def test_a_record_that_is_incomplete_is_refused(tiny, tmp_path):
    prune_channels(tiny("llama"), EVEN).save_pretrained(tmp_path)
    config = stored(tmp_path)
    del config["pruned_modules"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="has channels removed but no pruned_modules"):
        compressor.load(tmp_path)

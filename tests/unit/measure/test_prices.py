"""What is predicted to leave against what the counters say of models from which it left."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compressor.attention import attention_layers, prune_heads
from compressor.errors import ModelError
from compressor.measure.costs import measure_costs
from compressor.measure.prices import flop_prices, parameter_prices
from compressor.mlp import mlp_layers, prune_channels

LENGTH = 24
KINDS = ("gpt2", "llama", "bert", "phi3", "qwen3", "albert", "diffllama", "deepseek_v3", "mistral", "gpt_oss")


def mlps_of(model: PreTrainedModel) -> Sequence[Any]:
    try:
        return mlp_layers(model)
    except ModelError:  # experts
        return ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_prices_are_what_the_counters_say(build: Callable[..., Any], kind: str, seed: int) -> None:
    model = build(kind)
    draw = random.Random(seed)
    layers, mlps = attention_layers(model), mlps_of(model)
    heads = {}
    for layer in layers:
        share = len(layer.groups) < layer.num_heads and not layer.spreadable
        some = draw.sample(range(layer.num_heads), draw.randint(1, layer.num_heads - 1))
        heads[layer.index] = [group[0] for group in layer.groups] if share else sorted(some)
    channels = {mlp.index: draw.sample(range(mlp.num_channels), draw.randint(1, mlp.num_channels - 1)) for mlp in mlps}
    dense = measure_costs(model, LENGTH, causal=True)
    slim = prune_heads(copy.deepcopy(model), heads)
    if channels:
        prune_channels(slim, channels)
    pruned = measure_costs(slim, LENGTH, causal=True)
    for prices, before, after, close in (
        (parameter_prices(model), dense["parameters"], pruned["parameters"], 0.0),
        (flop_prices(model, LENGTH), dense["macs"]["total"], pruned["macs"]["total"], 1e-3),
    ):
        assert prices.total == before
        saved = sum(prices.saved(layers[index], removed) for index, removed in heads.items())
        saved += sum(prices.saved(mlps[index], removed) for index, removed in channels.items())
        assert saved == pytest.approx(before - after, rel=close, abs=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_layer_without_heads_leaves_a_bias(build: Callable[..., Any], kind: str) -> None:
    model = build(kind)
    layers = attention_layers(model)
    dense = measure_costs(model, LENGTH, causal=True)
    slim = prune_heads(copy.deepcopy(model), {1: range(layers[1].num_heads)}, allow_empty=True)
    pruned = measure_costs(slim, LENGTH, causal=True)
    everyone = range(layers[1].num_heads)
    assert parameter_prices(model).saved(layers[1], everyone) == dense["parameters"] - pruned["parameters"]
    assert flop_prices(model, LENGTH).saved(layers[1], everyone) == dense["macs"]["total"] - pruned["macs"]["total"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
def test_portions_one_after_another_save_what_they_save_together(build: Callable[..., Any], kind: str) -> None:
    model = build(kind)
    draw = random.Random(1)
    for prices in (parameter_prices(model), flop_prices(model, LENGTH)):
        for layer, units in [(layer, layer.num_heads) for layer in attention_layers(model)] + [
            (mlp, mlp.num_channels) for mlp in mlp_layers(model)
        ]:
            order = draw.sample(range(units), units - 1)
            portions = [order[:2], order[2:3], order[3:]]
            along = prices.saved_along(layer, portions)
            for step in range(3):
                together = [unit for portion in portions[: step + 1] for unit in portion]
                assert along[step] == pytest.approx(prices.saved(layer, together))
            assert along == sorted(along)


def test_a_model_that_was_pruned_before_has_prices_of_its_own(build: Callable[..., Any]) -> None:
    model = prune_heads(build("gpt2"), {0: [1]})
    prune_channels(model, {1: range(5)})
    dense = measure_costs(model, LENGTH, causal=True)
    layers, mlps = attention_layers(model), mlp_layers(model)
    slim = prune_channels(prune_heads(copy.deepcopy(model), {0: [0]}), {1: [2, 9]})
    pruned = measure_costs(slim, LENGTH, causal=True)
    for prices, name in ((parameter_prices(model), "parameters"), (flop_prices(model, LENGTH), "macs")):
        before, after = (of[name] if name == "parameters" else of[name]["total"] for of in (dense, pruned))
        assert prices.saved(layers[0], [0]) + prices.saved(mlps[1], [2, 9]) == before - after


def test_a_module_under_two_names_counts_once_and_a_tensor_of_two_modules_stays(build: Callable[..., Any]) -> None:
    model = build("gpt2")
    attention, mlp = attention_layers(model)[0], mlp_layers(model)[0]
    alone = parameter_prices(model)
    expected = alone.saved(attention, [0]), alone.saved(mlp, [0])
    model.other_name = model.transformer.h[0]
    named_twice = parameter_prices(model)
    assert named_twice.total == alone.total
    assert (named_twice.saved(attention, [0]), named_twice.saved(mlp, [0])) == expected
    model.keeper = torch.nn.Linear(1, 1, bias=False)
    model.keeper.weight = model.transformer.h[0].mlp.c_fc.weight
    assert parameter_prices(model).saved(mlp, [0]) == expected[1] - 24


def test_a_model_with_an_emptied_layer_has_prices(build: Callable[..., Any]) -> None:
    model = prune_heads(build("gpt2"), {0: range(4)}, allow_empty=True)
    dense = measure_costs(model, LENGTH, causal=True)
    layers = attention_layers(model)
    pruned = measure_costs(prune_heads(copy.deepcopy(model), {1: [2]}), LENGTH, causal=True)
    assert parameter_prices(model).saved(layers[1], [2]) == dense["parameters"] - pruned["parameters"]
    assert flop_prices(model, LENGTH).saved(layers[1], [2]) == dense["macs"]["total"] - pruned["macs"]["total"]

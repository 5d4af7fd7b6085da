"""The latency table: its arithmetic against numbers worked out by hand, and which models it is timed on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
from transformers import PreTrainedModel

from compressor.attention import attention_layers
from compressor.measure import Samples, Throughput, latency
from compressor.measure.latency import LatencyTable, latency_prices, latency_table, table_of
from compressor.measure.prices import flop_prices
from compressor.mlp import mlp_layers

SETTINGS = {"batch_size": 2, "prompt_length": 8, "repeats": 3}
LEFT = {"heads": (0.75, 0.5, 0.25)}


def test_times_that_fall_are_kept() -> None:
    table = table_of(LEFT, {"heads": (1.0, 0.9, 0.7, 0.6)}, **SETTINGS)
    assert table.points["heads"] == ((1.0, 1.0), (0.75, 0.9), (0.5, 0.7), (0.25, 0.6))
    assert (table.smoothed, table.dense) == ((), 1.0)


def test_times_out_of_order_are_pooled_and_it_is_said() -> None:
    table = table_of(LEFT, {"heads": (1.0, 0.8, 0.9, 0.5)}, **SETTINGS)
    assert [seconds for _, seconds in table.points["heads"]] == pytest.approx([1.0, 0.85, 0.85, 0.5])
    assert table.smoothed == ("heads",)
    assert table.timed["heads"] == (1.0, 0.8, 0.9, 0.5)
    worst = table_of(LEFT, {"heads": (1.0, 1.1, 1.2, 1.3)}, **SETTINGS)
    assert [seconds for _, seconds in worst.points["heads"]] == pytest.approx([1.0] * 4)  # nothing to save
    slower = table_of(LEFT, {"heads": (1.0, 1.2, 0.8, 0.6)}, **SETTINGS)  # than the dense one, and yet no more is saved
    assert [seconds for _, seconds in slower.points["heads"]] == pytest.approx([1.0, 1.0, 0.8, 0.6])


def test_copies_of_one_share_are_one_point() -> None:
    """A copy that lost nothing says nothing of the dense model's time; others of one share have their mean."""
    table = table_of({"heads": (1.0, 1.0, 0.5, 0.5)}, {"heads": (1.0, 0.7, 1.4, 0.6, 0.8)}, **SETTINGS)
    assert table.points["heads"] == ((1.0, 1.0), (0.5, pytest.approx(0.7)))
    assert (table.smoothed, table.timed["heads"]) == ((), (1.0, 0.7, 1.4, 0.6, 0.8))
    assert latency._interpolated(table.points["heads"], latency.np.array([1.0, 0.75])) == pytest.approx([1.0, 0.85])


def test_a_table_survives_being_written() -> None:
    table = table_of(LEFT, {"heads": (1.0, 0.8, 0.9, 0.5)}, **SETTINGS)
    assert LatencyTable.of(json.loads(json.dumps(table.to_dict()))) == table


def test_a_layer_saves_its_share_of_its_structure(build: Callable[..., Any]) -> None:
    model = build("gpt2")
    table = table_of(
        {"heads": (0.75, 0.5, 0.25), "channels": (0.75, 0.5, 0.25)},
        {"heads": (1.0, 0.9, 0.7, 0.6), "channels": (1.0, 0.8, 0.6, 0.4)},
        **SETTINGS,
    )
    prices = latency_prices(model, table, flop_prices(model, 16).saved_along)
    layers, mlps = attention_layers(model), mlp_layers(model)
    assert (prices.kind, prices.total) == ("latency", 1.0)
    # two equal layers of four heads; below a quarter as steep as above it: 0.6 − 0.1
    along = prices.saved_along(layers[0], [(2,), (0,), (1,), (3,)])
    assert along == pytest.approx([0.05, 0.15, 0.2, 0.25])
    assert prices.saved(mlps[1], range(4)) == pytest.approx(0.5 * 0.2 / 2)
    assert sum(prices.saved(mlp, range(24)) for mlp in mlps) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_the_copies_have_the_shares_they_are_said_to_have(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any], kind: str
) -> None:
    seen: dict[str, PreTrainedModel] = {}

    def timing(models: Mapping[str, PreTrainedModel], **settings: Any) -> dict[str, Throughput]:
        seen.update(models)
        rates = {name: 16.0 / (1 + place) for place, name in enumerate(models)}  # later ones are slower
        assert (settings["causal"], settings["batch_size"], settings["prompt_length"]) == (False, 2, 8)
        return {name: Throughput(Samples((rate,)), None) for name, rate in rates.items()}

    monkeypatch.setattr(latency, "measure_throughput", timing)
    model = build(kind)
    before = [layer.num_heads for layer in attention_layers(model)]
    table = latency_table(model, ("heads", "channels"), **SETTINGS)
    assert seen["dense"] is model
    assert len(seen) == 7
    for structure, points in table.points.items():
        assert points[0] == (1.0, 1.0)
        assert [share for share, _ in points] == sorted((share for share, _ in points), reverse=True)
        shares = [share for share, _ in points[1:]]
        if kind == "llama" and structure == "heads":  # two of three heads a group stay in two copies
            assert len(shares) == 2
            shares = [shares[0], *shares]
        for wanted, share in zip((0.75, 0.5, 0.25), shares, strict=True):
            copied = seen[f"{structure} {wanted}"]
            heads = [layer.num_heads for layer in attention_layers(copied)]
            widths = [mlp.num_channels for mlp in mlp_layers(copied)]
            if structure == "heads":
                assert share == pytest.approx(sum(heads) / sum(before))
                assert widths == [mlp.num_channels for mlp in mlp_layers(model)]
            else:
                assert heads == before
                assert share == pytest.approx(sum(widths) / sum(mlp.num_channels for mlp in mlp_layers(model)))
                assert share == wanted
    assert table.smoothed == ("heads", "channels")
    assert [layer.num_heads for layer in attention_layers(model)] == before


def test_it_runs_on_a_clock(build: Callable[..., Any]) -> None:
    table = latency_table(build("llama"), ("heads",), **SETTINGS)
    seconds = [second for _, second in table.points["heads"]]
    assert table.dense > 0
    assert all(first >= second for first, second in pairwise(seconds))


def test_a_structure_of_one_head_in_each_layer_saves_nothing() -> None:
    table = table_of({"heads": (1.0, 1.0, 1.0)}, {"heads": (1.0, 1.0, 1.0, 1.0)}, **SETTINGS)
    assert latency._interpolated(table.points["heads"], latency.np.array([0.5])) == 1.0

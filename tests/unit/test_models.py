"""The support matrix: its check on representatives, that the check bites, the committed JSON, and `compress models`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compressor import assets, support
from compressor.errors import ModelError
from tests.conftest import ROOT, Outcome

REPRESENTATIVES = {  # class: the units that have to be reached
    "GPT2LMHeadModel": ["head"],  # Conv1D, queries, keys and values fused
    "BertForMaskedLM": ["head"],  # an encoder, its output projection in another module
    "AlbertForMaskedLM": ["head"],  # one layer that is used twice
    "LlamaForCausalLM": ["head", "query", "group"],
    "Gemma2ForCausalLM": ["head", "query", "group"],  # soft caps, single precision
    "GptOssForCausalLM": ["head", "query", "group"],  # sinks, experts, sliding windows
    "DeepseekV3ForCausalLM": ["head"],  # latent attention
    "Qwen3NextForCausalLM": ["head", "query", "group"],  # gates, beside layers without softmax
    "MiMoV2FlashForCausalLM": ["head", "query", "group"],  # layers of different numbers of heads
    "GPTNeoXForCausalLM": ["head"],  # fused and interleaved by heads
    "BloomForCausalLM": ["head"],  # attention of its own, biased by distance
    "BartForConditionalGeneration": ["head"],  # encoder, decoder and attention between them
    "CodeGenForCausalLM": ["query"],  # heads kept together by the code
    "ZambaForCausalLM": ["head", "query", "group"],  # one block, placed among others without attention
    "MambaForCausalLM": [],
    "BitNetForCausalLM": [],  # a norm over all heads
}
UNPRUNED = ("GptOssForCausalLM", "MambaForCausalLM", "BitNetForCausalLM")  # experts, no MLPs, norms over channels


@pytest.fixture(scope="module")
def sweep() -> Iterator[ModuleType]:
    """The script, with the folder it stands in to import from, as when it is run."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("models")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(assets.MODELS.read_text(encoding="utf-8"))
    return found


def entry_of(sweep: ModuleType, name: str) -> Any:
    return next(entry for entry in sweep.entries() if entry.class_name == name)


# --- the check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_representatives_say_what_the_committed_matrix_says(
    sweep: ModuleType, document: dict[str, Any], name: str
) -> None:
    row = sweep.check(entry_of(sweep, name))
    assert row.get("units", []) == REPRESENTATIVES[name], row
    assert (row["channels"] == "pass") is (name not in UNPRUNED), row
    committed = next(row for row in document["rows"] if row["class"] == name and not row["variant"])
    inexact = ("parity", "effect", "channels_parity")  # last digits differ between processors
    assert {key: row[key] for key in row if key not in inexact} == {
        key: committed[key] for key in committed if key not in inexact
    }
    if REPRESENTATIVES[name]:
        assert row["parity"] <= document["settings"]["tolerance"]
        assert row["effect"] >= 100 * document["settings"]["tolerance"]


Fault = Callable[[Any, dict[int, list[int]], Callable[..., Any]], Any]


def other_heads(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    """Removes as many heads, but in the last layer others."""
    last = max(plan)
    wrong = [head for head in range(6) if head not in plan[last]][: len(plan[last])]
    return prune(model, plan | {last: wrong})


def changed_bias(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    with torch.no_grad():
        pruned.transformer.h[1].attn.c_proj.bias[0] += 1e-3  # all alike would be lost in the norm behind
    return pruned


def wrong_number(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    pruned.transformer.h[0].attn.num_heads += 1
    return pruned


def config_that_lies(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    pruned.config.pruned_heads = {"0": [0]}
    return pruned


def frozen(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    pruned.transformer.h[0].attn.c_proj.weight.requires_grad_(False)
    return pruned


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_heads, "logits differ"),
        (changed_bias, "logits differ"),
        (wrong_number, "fault: "),
        (config_that_lies, "config.pruned_heads"),
        (frozen, "no gradient"),
    ],
)
def test_the_check_notices_damage(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, damage: Fault, says: str) -> None:
    prune = sweep.prune_heads
    monkeypatch.setattr(sweep, "prune_heads", lambda model, plan: damage(model, plan, prune))
    row = sweep.check(entry_of(sweep, "GPT2LMHeadModel"))
    assert row["status"] == "fault"
    assert row["reason"].startswith("fault: ")
    assert says in row["reason"]


def other_channels(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    """Removes as many channels, but in the last layer others."""
    last = max(plan)
    wrong = [channel for channel in range(40) if channel not in plan[last]][: len(plan[last])]
    return prune(model, plan | {last: wrong})


def wrong_size(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    pruned.transformer.h[0].mlp.c_fc.nf += 1
    pruned.transformer.h[0].mlp.c_fc.forward = lambda states: states @ pruned.transformer.h[0].mlp.c_fc.weight
    return pruned


def width_that_lies(model: Any, plan: dict[int, list[int]], prune: Callable[..., Any]) -> Any:
    pruned = prune(model, plan)
    pruned.config.per_layer_config = None
    pruned.config.n_inner = 40
    return pruned


@pytest.mark.parametrize(
    ("damage", "says"),
    [(other_channels, "logits differ"), (wrong_size, "fault: "), (width_that_lies, "config.n_inner says")],
)
def test_the_check_notices_damage_to_mlps(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, damage: Fault, says: str
) -> None:
    channels = importlib.import_module("channels")
    prune = channels.prune_channels
    monkeypatch.setattr(channels, "prune_channels", lambda model, plan: damage(model, plan, prune))
    row = sweep.check(entry_of(sweep, "GPT2LMHeadModel"))
    assert row["status"] == "supported"
    assert row["channels"].startswith("fault: ")
    assert says in row["channels"]


def test_an_exception_becomes_a_row(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("once")

    monkeypatch.setattr(sweep, "attention_layers", broken)
    row = sweep.check(entry_of(sweep, "GPT2LMHeadModel"))
    assert (row["status"], row["reason"]) == ("fault", "fault: ZeroDivisionError: once")


def test_plans_are_random_seeded_and_of_their_unit(sweep: ModuleType) -> None:
    plans = importlib.import_module("plans")
    layers = sweep.attention_layers(sweep.build(entry_of(sweep, "LlamaForCausalLM")))
    drawn = {str(seed): plans.draw_plan(layers, "head", str(seed)) for seed in range(20)}
    assert len({str(plan) for plan in drawn.values()}) > 10
    assert drawn["3"] == plans.draw_plan(layers, "head", "3")
    for plan in drawn.values():
        assert set(plan) == {0, 1}
        assert all(1 <= len(heads) <= 3 for heads in plan.values())
        assert all(plans.uneven(layers[index].groups, heads) for index, heads in plan.items())
    for layer, heads in plans.draw_plan(layers, "query", "0").items():
        assert len({len(set(heads) & set(group)) for group in layers[layer].groups}) == 1
    for layer, heads in plans.draw_plan(layers, "group", "0").items():
        assert tuple(heads) in layers[layer].groups


# --- the committed JSON ---------------------------------------------------------------------------------------------


def test_the_matrix_covers_every_class(sweep: ModuleType, document: dict[str, Any]) -> None:
    rows = [(row["model_type"], row["class"], row["task"], row["variant"]) for row in document["rows"]]
    wanted = [*sweep.entries(), *sweep.variants()]
    assert rows == [(entry.model_type, entry.class_name, entry.task, entry.variant) for entry in wanted]


def test_the_matrix_is_well_formed_and_free_of_faults(document: dict[str, Any]) -> None:
    assert {"rows", "settings", "versions", "machine", "suite"} == document.keys()
    for row in document["rows"]:
        assert row["status"] in support.STATUSES
        assert "fault" not in json.dumps(row), row
        if row["status"] == "supported":
            assert row["units"]
            assert row["parity"] <= document["settings"]["tolerance"]
            assert row["training"] == "yes"
        else:
            assert row["reason"]
            assert "\n" not in row["reason"]
        if row["status"] != "not constructible":
            assert "\n" not in row["channels"]
            assert row.get("channels_parity", 0) <= document["settings"]["tolerance"]


def test_the_matrix_holds_no_path(document: dict[str, Any]) -> None:
    assert not [row["class"] for row in document["rows"] if "/tmp" in json.dumps(row)]


# --- reading it -----------------------------------------------------------------------------------------------------


def test_one_model_type_or_class() -> None:
    assert [row["class"] for row in support.support_matrix("bert")["rows"]] == ["BertForMaskedLM", "BertLMHeadModel"]
    assert [row["model_type"] for row in support.support_matrix("LlamaForCausalLM")["rows"]] == ["llama"]
    assert support.support_matrix("internlm3")["rows"] == support.support_matrix("llama")["rows"]
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        support.support_matrix("lama")


def test_equal_rows_are_merged() -> None:
    rows = support.support_matrix("bert")["rows"]
    assert [line["task"] for line in support.lines(rows)] == ["both"]
    rows[0] = rows[0] | {"units": []}
    assert sorted(line["task"] for line in support.lines(rows)) == ["causal", "masked"]


def test_the_command(compress: Callable[..., Outcome]) -> None:
    shown = compress("models")
    assert shown.code == 0
    for word in ("llama", "deepseek_v3", "has no attention heads", "units", "channels", "experts", "classes: "):
        assert word in shown.out
    one = compress("models", "mamba")
    assert "mamba" in one.out
    assert "llama" not in one.out
    assert "1 class: 1 without heads" in one.out
    assert compress("models", "llama", "--json").json == support.support_matrix("llama")
    wrong = compress("models", "gpt-2")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean 'gpt2'" in wrong.err


def test_the_command_waits_for_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom compressor.cli.app import app\n"
        "try:\n    app(['models', 'llama'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("[]\n")

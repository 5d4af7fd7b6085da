"""Names → models: the right class, task, dtype and device, the stock loaders' numbers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging

import compressor
from compressor import assets
from compressor.errors import CompressorError, ModelError, RecipeError
from compressor.loading import choose_device, choose_dtype, choose_task, load, load_model
from tests.conftest import CONTEXT, save_tiny, snapshot, tiny_model, tiny_tokenizer

STOCK = {"gpt2": GPT2LMHeadModel, "bert": BertForMaskedLM, "llama": LlamaForCausalLM}


def refused(name: object, **settings: Any) -> str:
    with pytest.raises(CompressorError) as caught:
        load_model(str(name), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_a_model_is_what_the_stock_loader_makes_of_it(models: dict[str, str], kind: str) -> None:
    model = compressor.load(models[kind])
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    stock = auto.from_pretrained(models[kind]).eval()
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert type(model) is STOCK[kind]
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_embedded_model(models: dict[str, str]) -> None:
    loaded = load_model("embedded")
    assert (loaded.name, loaded.task) == ("embedded", "causal")
    assert loaded.model.config.n_layer * loaded.model.config.n_head > 0
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size
    assert loaded.identity == load_model(str(assets.MODEL)).identity


def test_the_run_directory_stands_for_the_checkpoint_in_it(models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["gpt2"], tmp_path / "run" / "checkpoint")
    assert type(load(tmp_path / "run")) is GPT2LMHeadModel
    assert load_model(str(tmp_path / "run")).identity == load_model(models["gpt2"]).identity


def test_a_path_under_the_home_directory(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models["gpt2"], tmp_path / "mine")
    assert load_model("~/mine").identity == load_model(models["gpt2"]).identity


# --- identity -------------------------------------------------------------------------------------------------------


def test_equal_models_have_equal_identities_wherever_they_lie(models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["gpt2"], tmp_path / "copy")
    assert load_model(str(tmp_path / "copy")).identity == load_model(models["gpt2"]).identity
    assert load_model(models["other"]).identity != load_model(models["gpt2"]).identity


@pytest.mark.parametrize("what", ["weight", "config"])
def test_a_changed_model_has_another_identity(models: dict[str, str], tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "copy"))
    if what == "weight":
        weights = load_file(folder / "model.safetensors")
        weights["transformer.h.1.mlp.c_fc.bias"][3] += 1e-6
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    assert load_model(str(folder)).identity != load_model(models["gpt2"]).identity


def test_loading_changes_nothing_on_disk_or_in_the_loggers(models: dict[str, str]) -> None:
    before = snapshot(Path(models["gpt2"]))
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(models["gpt2"])
    refused("nobody/nothing")
    assert snapshot(Path(models["gpt2"])) == before
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled() == bars


# --- task -----------------------------------------------------------------------------------------------------------


def test_tasks_come_from_the_config() -> None:
    assert choose_task(GPT2Config(), None, "m") == "causal"
    assert choose_task(BertConfig(), None, "m") == "masked"
    assert choose_task(GPT2Config(), "causal", "m") == "causal"
    assert choose_task(BertConfig(), "masked", "m") == "masked"


def test_an_encoder_never_passes_for_a_causal_model() -> None:
    """It would see the tokens that it is to predict."""
    for architectures in (None, [], ["BertModel"], ["BertForMaskedLM"], ["BertForPreTraining"]):
        with pytest.raises(ModelError, match="--task masked"):
            choose_task(BertConfig(architectures=architectures), "causal", "m")
        assert choose_task(BertConfig(architectures=architectures), None, "m") == "masked"


def test_a_bert_that_decodes_is_causal(tmp_path: Path) -> None:
    config = BertConfig(
        **{**tiny_model("bert").config.to_dict(), "is_decoder": True, "architectures": ["BertLMHeadModel"]}
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), task="causal").task == "causal"


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()])
def test_other_models_are_refused(config: Any) -> None:
    for task in (None, "causal", "masked"):
        with pytest.raises(ModelError):
            choose_task(config, task, "m")


def test_tasks_nobody_knows() -> None:
    with pytest.raises(RecipeError, match="casual"):
        choose_task(GPT2Config(), "casual", "m")


# --- device and dtype -----------------------------------------------------------------------------------------------


def test_the_device_and_its_reason() -> None:
    assert choose_device("cpu")[0] == torch.device("cpu")
    device, why = choose_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else device.type)
    assert why
    for wrong in ("cuda:99", "meta:x", "abacus", ""):
        with pytest.raises(RecipeError, match="expected auto"):
            choose_device(wrong)


def test_the_meta_device_holds_no_numbers() -> None:
    with pytest.raises(RecipeError):
        choose_device("meta")


@pytest.mark.parametrize(
    ("stored", "asked", "device", "expected"),
    [
        (torch.float32, "auto", "cpu", torch.float32),
        (torch.bfloat16, "auto", "cpu", torch.float32),
        (torch.float16, "auto", "cpu", torch.float32),
        (torch.bfloat16, "auto", "cuda", torch.bfloat16),
        (torch.float16, "auto", "cuda", torch.float16),
        (torch.float64, "auto", "cpu", torch.float64),
        (torch.bfloat16, "stored", "cpu", torch.bfloat16),
        (torch.float32, "stored", "cuda", torch.float32),
        (torch.float32, "float64", "cpu", torch.float64),
        (torch.bfloat16, "float16", "cpu", torch.float16),
        (None, "auto", "cpu", torch.float32),
        (None, "stored", "cpu", torch.float32),
    ],
)
def test_the_dtype(stored: torch.dtype | None, asked: str, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(asked, GPT2Config(dtype=stored), torch.device(device))[0] == expected


@pytest.mark.parametrize("asked", ["auto", "stored", "float64", "bfloat16"])
def test_the_dtype_reaches_every_weight(tmp_path: Path, asked: str) -> None:
    folder = save_tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    expected = {"auto": torch.float32, "stored": torch.bfloat16}.get(asked) or getattr(torch, asked)
    model = load(folder, dtype=asked, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.dtype == expected


def test_dtypes_nobody_knows(models: dict[str, str]) -> None:
    assert "float23" in refused(models["gpt2"], dtype="float23")


# --- the context ----------------------------------------------------------------------------------------------------


def test_the_context_is_the_shortest_limit(models: dict[str, str], tmp_path: Path) -> None:
    assert load_model(models["gpt2"]).context == CONTEXT
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "m"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for limit, expected in ((20, 20), (10**30, CONTEXT), (CONTEXT + 9, CONTEXT)):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": limit}))
        assert load_model(str(folder)).context == expected


def test_robertas_positions_start_behind_the_padding_index(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=30, pad_token_id=1,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    with torch.no_grad():  # the longest sequence that the embeddings themselves take
        loaded.model(input_ids=torch.full((1, loaded.context), 5))
        with pytest.raises((IndexError, RuntimeError)):
            loaded.model(input_ids=torch.full((1, loaded.context + 1), 5))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_code_of_the_models_own_runs_only_when_asked_for(models: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    assert "--trust-remote-code" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_never_opened(models: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "m"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert load(folder)  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder)


def test_weights_that_are_missing_or_of_another_shape(models: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.1.attn.c_proj.weight"
    lacking = {key: value for key, value in weights.items() if key != name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(folder)
    save_file({**weights, name: weights[name][:8]}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder)


def test_offline_the_message_says_what_would_work() -> None:
    message = refused("nobody/nothing")
    assert "'nobody/nothing'" in message
    assert "--model embedded" in message
    assert "directory" in message

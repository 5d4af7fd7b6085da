"""Slimmer checkpoints: what `compressor.load` reopens is bit for bit what was pruned, or there is no checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

import compressor
from compressor import attention_layers, prune_heads
from compressor.errors import ArtefactError
from compressor.export import RECORD, write_checkpoint
from compressor.loading import LoadedModel, load_model
from tests.conftest import Outcome, save_tiny, snapshot

Compress = Callable[..., Outcome]
STOCK = {"gpt2": GPT2LMHeadModel, "bert": BertForMaskedLM, "llama": LlamaForCausalLM}
AUTO = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM}
PLANS: dict[str, tuple[str, dict[int, list[int]]]] = {
    "gpt2": ("gpt2", {0: [1], 1: [0, 3]}),
    "gpt2, one layer untouched": ("gpt2", {1: [2]}),
    "gpt2, an empty layer": ("gpt2", {0: [0, 1, 2, 3]}),
    "gpt2, all layers empty": ("gpt2", {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}),
    "bert": ("bert", {0: [3], 1: [0, 1]}),
    "bert, an empty layer": ("bert", {0: [2], 1: [0, 1, 2, 3]}),
    "llama, uneven groups": ("llama", {0: [1], 1: [0, 4, 5]}),
    "llama, a whole group": ("llama", {0: [0, 1, 2], 1: [0, 3]}),
    "llama, an empty layer": ("llama", {0: [0, 1, 2, 3, 4, 5], 1: [2]}),
    "llama, as many heads everywhere": ("llama", {0: [0, 3], 1: [2, 4]}),
    "llama, as many heads everywhere, uneven groups": ("llama", {0: [0, 1], 1: [1, 3]}),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of two padded sequences, so that masks play a part."""
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.fixture
def pruned(models: dict[str, str]) -> Callable[[str], LoadedModel]:
    def make(plan: str) -> LoadedModel:
        kind, heads = PLANS[plan]
        loaded = load_model(models[kind])
        before = logits(loaded.model)
        prune_heads(loaded.model, heads, allow_empty=True)
        assert not torch.equal(logits(loaded.model), before)
        return loaded

    return make


@pytest.mark.parametrize("plan", list(PLANS))
def test_what_is_reopened_is_the_same_model(pruned: Callable[[str], LoadedModel], tmp_path: Path, plan: str) -> None:
    kind, heads = PLANS[plan]
    loaded = pruned(plan)
    record = write_checkpoint(loaded, {"plan": "p"}, tmp_path / "checkpoint")
    again = compressor.load(tmp_path / "checkpoint")
    assert torch.equal(logits(again), logits(loaded.model))
    assert type(again) is STOCK[kind]
    assert type(again).__module__ == STOCK[kind].__module__
    assert not again.training
    state, expected = again.state_dict(), loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [layer.num_heads for layer in attention_layers(again)] == [
        layer.num_heads for layer in attention_layers(loaded.model)
    ]
    assert json.loads((tmp_path / "checkpoint" / RECORD).read_text()) == record
    assert record["plan"] == "p"
    assert record["verified"]["largest_logit_deviation"] == 0
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["pruned_heads"] == {str(layer): removed for layer, removed in heads.items()}
    assert load_model(str(tmp_path / "checkpoint")).tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


@pytest.mark.parametrize("plan", [plan for plan in PLANS if not plan.startswith("bert")])
def test_what_is_reopened_generates_the_same(pruned: Callable[[str], LoadedModel], tmp_path: Path, plan: str) -> None:
    loaded = pruned(plan)
    write_checkpoint(loaded, {}, tmp_path / "checkpoint")
    again = compressor.load(tmp_path / "checkpoint")
    prompt = torch.tensor([[1, 7, 9, 30]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    written = [model.generate(prompt, attention_mask=mask, **settings) for model in (loaded.model, again)]
    assert torch.equal(*written)
    with torch.no_grad():  # greedy decoding without a cache, step by step
        sequence = prompt
        for _ in range(8):
            token = again(input_ids=sequence, use_cache=False).logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, token], dim=1)
    assert torch.equal(written[1], sequence)


@pytest.mark.parametrize("plan", list(PLANS))
def test_weights_are_safetensors_of_the_slim_shapes(
    pruned: Callable[[str], LoadedModel], tmp_path: Path, plan: str
) -> None:
    loaded = pruned(plan)
    write_checkpoint(loaded, {}, tmp_path / "checkpoint")
    names = {file.name for file in (tmp_path / "checkpoint").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if STOCK[PLANS[plan][0]] is not BertForMaskedLM:
        assert "generation_config.json" in names
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    parameters = dict(loaded.model.named_parameters())
    assert shapes.items() <= {name: tuple(value.shape) for name, value in parameters.items()}.items()


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "llama, as many heads everywhere"])
def test_stock_loaders_fail_loudly(pruned: Callable[[str], LoadedModel], tmp_path: Path, plan: str) -> None:
    """Rather than handing out a model with fresh random weights, or with heads that read others' keys."""
    write_checkpoint(pruned(plan), {}, tmp_path / "checkpoint")
    with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
        AUTO[PLANS[plan][0]].from_pretrained(tmp_path / "checkpoint")


def test_stock_loaders_open_what_their_class_can_express(pruned: Callable[[str], LoadedModel], tmp_path: Path) -> None:
    """Llama counts heads apart from the hidden size, so that its config alone makes the slim shapes."""
    loaded = pruned("llama, as many heads everywhere")
    write_checkpoint(loaded, {}, tmp_path / "checkpoint")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    assert torch.equal(logits(stock), logits(loaded.model))


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        *((kind, {0: [0, 1], 1: [2, 3]}) for kind in ("bert", "bloom", "deepseek_v3", "falcon", "gpt2", "gpt_bigcode")),
        *((kind, {0: [0], 1: [3]}) for kind in ("gpt2", "mistral", "mpnet", "qwen3", "gpt_oss")),
        # As many heads in both layers, but not as many in both groups of each, and then as many.
        *((kind, {0: [0, 1], 1: [4, 5]}) for kind in ("mistral", "cohere", "gpt_oss", "olmo2", "phi3", "qwen3_next")),
        *((kind, {0: [0, 3], 1: [2, 5]}) for kind in ("mistral", "cohere", "gpt_oss", "olmo2", "phi3", "qwen3_next")),
    ],
    ids=str,
)
def test_what_stock_code_makes_of_a_checkpoint_is_right_or_nothing(
    build: Callable[..., PreTrainedModel], tmp_path: Path, kind: str, plan: dict[int, list[int]]
) -> None:
    """Where all layers have as many heads, a config may look like that of a dense model. It must not mislead."""
    model = prune_heads(build(kind, dtype=torch.float32), plan)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(3))
    try:
        stock = type(model).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            found = stock(input_ids=ids).logits
    except (RuntimeError, ValueError):  # loud enough
        return
    with torch.no_grad():
        assert torch.allclose(found, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


LAYOUTS: dict[str, dict[int, list[int]]] = {
    "albert": {0: [1, 2]},
    "bloom": {0: [0], 1: [1, 2]},
    "codegen": {0: [0, 3, 4, 7]},
    "cohere": {0: [1, 4], 1: [3, 4, 5]},
    "deepseek_v3": {0: [1], 1: [0, 1, 3]},
    "falcon": {0: [0], 1: [1, 2]},
    "falcon-groups": {0: [0, 4], 1: [3, 4, 5]},
    "gpt_bigcode": {0: [0], 1: [1, 2]},
    "gpt_bigcode-heads": {0: [0], 1: [1, 2]},
    "gpt_neox": {0: [3], 1: [2]},
    "gpt_oss": {0: [1, 4], 1: [0, 1, 2]},
    "mpnet": {0: [0], 1: [0, 1, 2, 3]},
    "olmo2": {0: [0, 3], 1: [5]},
    "phi3": {0: [0, 1, 2], 1: [3, 4, 5]},
    "qwen3_next": {0: [0], 1: [0, 1, 2]},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_layouts_are_reopened_as_they_were(
    build: Callable[..., PreTrainedModel], tmp_path: Path, kind: str
) -> None:
    """What a model is called with, and what modules return, may be cut too; the config tells how to do so again."""
    model = prune_heads(build(kind, dtype=torch.float32), LAYOUTS[kind], allow_empty=True)
    model.save_pretrained(tmp_path)
    again = compressor.load(tmp_path)
    assert type(again) is type(model)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ids = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, wanted = again(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)  # experts may be multiplied in another order
    assert attention_layers(again) == attention_layers(model)
    said, told = again.config.to_dict(), model.config.to_dict()
    numbers = [name for name in told if "head" in name or name.startswith(("pruned", "dense", "per_layer"))]
    assert {name: said[name] for name in numbers} == {name: told[name] for name in numbers}


def test_a_reopened_model_can_be_pruned_and_saved_again(build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = build("gpt_oss", dtype=torch.float32)
    for step, plan in enumerate([{0: [1]}, {0: [3], 1: [0, 1, 2]}, {1: [2]}]):
        prune_heads(model, plan)
        model.save_pretrained(tmp_path / str(step))
        model = compressor.load(tmp_path / str(step))
    once = prune_heads(build("gpt_oss", dtype=torch.float32), {0: [1, 4], 1: [0, 1, 2, 5]})
    state, expected = model.state_dict(), once.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert attention_layers(model) == attention_layers(once)
    assert model.config.pruned_heads == once.config.pruned_heads == {"0": [1, 4], "1": [0, 1, 2, 5]}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_16_bit_checkpoint_stays_16_bit(compress: Compress, tmp_path: Path, texts: str, kind: str) -> None:
    folder = save_tiny(kind, tmp_path / "m", dtype=torch.bfloat16)
    assert compress("score", "--model", folder, "--data", texts, "-o", tmp_path / "s").code == 0
    outcome = compress("prune", "--scores", tmp_path / "s", "--no-repair", "--export", "-o", tmp_path / "p")
    assert outcome.code == 0, outcome.err
    checkpoint = tmp_path / "p" / "checkpoint"
    weights = load_file(checkpoint / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"
    original = load_file(folder / "model.safetensors")
    untouched = [name for name in weights if weights[name].shape == original[name].shape]
    assert len(untouched) > 5
    assert all(torch.equal(weights[name], original[name]) for name in untouched)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_pruning_a_checkpoint_again(
    compress: Compress, models: dict[str, str], texts: str, tmp_path: Path, kind: str
) -> None:
    """The record keeps the dense numbering, and the twice pruned model is the once pruned one with all those heads."""
    source = models[kind]
    flags = ("--data", texts, "--quiet")
    for step in ("first", "second"):
        scores, target = tmp_path / f"{step}-scores", tmp_path / step
        assert compress("score", "--model", source, "-o", scores, *flags).code == 0
        outcome = compress(
            "prune", "--scores", scores, "--no-repair", "--export", "--ratio", "0.3", "-o", target, "--json", *flags
        )
        assert outcome.code == 0, outcome.err
        assert all(len(heads) == 2 for heads in outcome.json["plan"]["heads"].values()) or step == "second"
        source = target / "checkpoint"
    plans = [json.loads((tmp_path / step / "plan.json").read_text())["plan"]["heads"] for step in ("first", "second")]
    heads = 6 if kind == "llama" else 4
    expected = {}
    for layer in ("0", "1"):
        left = [head for head in range(heads) if head not in plans[0][layer]]
        expected[layer] = sorted([*plans[0][layer], *(left[head] for head in plans[1][layer])])
    config = json.loads((source / "config.json").read_text())
    assert config["pruned_heads"] == expected
    at_once = prune_heads(compressor.load(models[kind]), {int(layer): gone for layer, gone in expected.items()})
    assert torch.equal(logits(compressor.load(source)), logits(at_once))
    assert not compress("bench", "--model", models[kind], "--against", source, *flags, "--repeats", 1,
                        "--prompt-length", 5, "--new-tokens", 2).code  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_an_untouched_model_can_be_written_too(models: dict[str, str], tmp_path: Path, kind: str) -> None:
    loaded = load_model(models[kind])
    write_checkpoint(loaded, {}, tmp_path / "checkpoint")
    stock = AUTO[kind].from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(compressor.load(tmp_path / "checkpoint")), logits(stock.eval()))


def test_a_context_shorter_than_the_verifying_line(compress: Compress, tmp_path: Path, texts: str) -> None:
    """A byte-sized vocabulary makes more tokens of the line than a small model has positions."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import GPT2Config, PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"[UNK]": 0, "<|end|>": 1, "w": 2, " ": 3, "1": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="<|end|>")
    tokenizer.save_pretrained(tmp_path / "m")
    config = GPT2Config(vocab_size=5, n_positions=24, n_embd=16, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    assert compress("score", "--model", tmp_path / "m", "--data", texts, "-o", tmp_path / "s").code == 0
    outcome = compress("prune", "--scores", tmp_path / "s", "--export", "-o", tmp_path / "p")
    assert outcome.code == 0, outcome.err


def test_a_tokenizer_that_makes_nothing_of_the_verifying_line(compress: Compress, tmp_path: Path, texts: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "m")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": r"w\d+"}, "behavior": "Removed", "invert": True
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_model(str(folder)).tokenizer
    assert len(tokenizer("w1 and w2")["input_ids"]) == 2
    assert len(tokenizer("A line of text.")["input_ids"]) == 0
    assert compress("score", "--model", folder, "--data", texts, "-o", tmp_path / "s").code == 0
    outcome = compress("prune", "--scores", tmp_path / "s", "--export", "-o", tmp_path / "p")
    assert outcome.code == 0, outcome.err


# --- tampering ------------------------------------------------------------------------------------------------------


def flip(file: Path, tensor: str, index: int) -> None:
    """Flip the sign bit of one float32 in a safetensors file."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[tensor]["data_offsets"][0] + 4 * index + 3] ^= 0x80
    file.write_bytes(content)


@pytest.mark.parametrize(
    "tensor", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "transformer.wpe.weight"]
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_noticed_and_nothing_is_left(
    compress: Compress,
    models: dict[str, str],
    texts: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor: str,
    where: str,
) -> None:
    assert compress("score", "--model", models["gpt2"], "--data", texts, "-o", "scores").code == 0
    before = snapshot(here)
    save = PreTrainedModel.save_pretrained

    def tampered(self: PreTrainedModel, directory: Path, *args: Any, **kwargs: Any) -> None:
        save(self, directory, *args, **kwargs)
        size = dict(self.named_parameters())[tensor].numel()
        flip(Path(directory) / "model.safetensors", tensor, 0 if where == "first" else size - 1)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", tampered)
    outcome = compress("prune", "--scores", "scores", "--export", "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith("error: the checkpoint")
    assert len(outcome.err.splitlines()) == 1
    assert snapshot(here) == before


def test_a_record_that_is_lost_is_noticed(
    pruned: Callable[[str], LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `pruned_heads` the reopened model has other shapes."""
    save = PreTrainedModel.save_pretrained

    def forgetful(self: PreTrainedModel, directory: Path, *args: Any, **kwargs: Any) -> None:
        save(self, directory, *args, **kwargs)
        config = json.loads((Path(directory) / "config.json").read_text())
        del config["pruned_heads"]
        (Path(directory) / "config.json").write_text(json.dumps(config))

    loaded = pruned("gpt2")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", forgetful)
    with pytest.raises(compressor.CompressorError):
        write_checkpoint(loaded, {}, tmp_path / "checkpoint")


def test_other_heads_than_recorded_are_noticed(
    pruned: Callable[[str], LoadedModel], models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right shapes with the wrong weights in them."""
    other = prune_heads(compressor.load(models["gpt2"]), {0: [2], 1: [0, 3]})
    loaded = pruned("gpt2")
    monkeypatch.setattr("compressor.export.verify.load", lambda *args, **kwargs: other)
    with pytest.raises(ArtefactError, match="not kept"):
        write_checkpoint(loaded, {}, tmp_path / "checkpoint")


def test_a_moved_checkpoint_still_opens(pruned: Callable[[str], LoadedModel], tmp_path: Path) -> None:
    loaded = pruned("llama, uneven groups")
    write_checkpoint(loaded, {}, tmp_path / "checkpoint")
    shutil.move(tmp_path / "checkpoint", tmp_path / "elsewhere")
    assert torch.equal(logits(compressor.load(tmp_path / "elsewhere")), logits(loaded.model))

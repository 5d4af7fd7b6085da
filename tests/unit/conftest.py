"""Tiny random models and their masked twins, as fixtures: in importlib mode tests cannot import helpers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

VOCABULARY = 37
PAD = 0
HEADS = {"gpt2": 4, "bert": 4, "roberta": 4, "llama": 6, "mistral": 6, "qwen3": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
ENCODER: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS["bert"],
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = ENCODER | {"num_attention_heads": HEADS["llama"], "num_key_value_heads": 2}
GPT2: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_inner": 32,
    "n_layer": 2,
    "n_head": HEADS["gpt2"],
    "n_positions": 64,
}
KINDS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "bert": (BertForMaskedLM, BertConfig, ENCODER),
    "roberta": (RobertaForMaskedLM, RobertaConfig, ENCODER),
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED | {"attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED | {"head_dim": 6, "sliding_window": None}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED | {"num_attention_heads": HEADS["qwen3"], "head_dim": 10}),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Move every parameter, biases too, away from its initial value, so that none can be lost without being missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


def _build(
    kind: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    model_class, config_class, settings = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config_class(**settings | overrides), attn_implementation=implementation)
    model.to(dtype)
    randomise(model, seed)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # every greedy generation runs its full length
    return model.eval()


def _batch(padding: str = "none", batch: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row in range(1, batch):
            absent = 2 * row
            mask[row, slice(-absent, None) if padding == "right" else slice(absent)] = 0
        ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def _output_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module whose input is the concatenation of the heads' outputs, spelt out per architecture."""
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.h[layer].attn.c_proj
    if kind in ("bert", "roberta"):
        return model.base_model.encoder.layer[layer].attention.output.dense
    return model.model.layers[layer].self_attn.o_proj


def _mute(model: PreTrainedModel, heads: Mapping[int, Sequence[int]], head_dim: int) -> PreTrainedModel:
    """Silence heads of a dense model by zeroing their slices of what enters the output projection."""
    for layer, removed in heads.items():
        columns = [head * head_dim + offset for head in removed for offset in range(head_dim)]

        def zero(module: nn.Module, args: tuple[torch.Tensor], columns: list[int] = columns) -> tuple[torch.Tensor]:
            muted = args[0].clone()
            muted[..., columns] = 0
            return (muted,)

        _output_projection(model, layer).register_forward_pre_hook(zero)
    return model


@contextmanager
def _eager_attentions(model: PreTrainedModel) -> Iterator[Callable[..., tuple[torch.Tensor, ...]]]:
    """The attention matrices that transformers itself hands out, [batch, heads, queries, keys] per layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield lambda **batch: model(**batch, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    return _build


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    return _batch


@pytest.fixture(scope="session")
def mute() -> Callable[..., PreTrainedModel]:
    return _mute


@pytest.fixture(scope="session")
def output_projection() -> Callable[..., nn.Module]:
    return _output_projection


@pytest.fixture(scope="session")
def eager_attentions() -> Callable[..., Any]:
    return _eager_attentions

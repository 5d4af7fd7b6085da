"""Counts against closed forms derived by hand from each config."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.pytorch_utils import Conv1D

from compressor.errors import ModelError, RecipeError
from compressor.measure import FlopCount, count_flops

LAYERS, HEADS, DIM, HIDDEN, INNER, VOCABULARY, POSITIONS = 2, 4, 6, 24, 40, 53, 32
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
SHAPES = pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 7)])


def gpt2(implementation: str = "sdpa") -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation)


def parts(attention: int, mlp: int, lm_head: int, other: int) -> FlopCount:
    return FlopCount(attention + mlp + lm_head + other, attention, mlp, lm_head, other)


def full_attention(tokens: int, length: int) -> int:
    """Four HIDDEN x HIDDEN projections per token, two T x T products over all heads."""
    return LAYERS * tokens * (4 * HIDDEN * HIDDEN + 2 * length * HIDDEN)


GPT2_ATTENTION = [f"transformer.h.{layer}.attn" for layer in range(LAYERS)]


@IMPLEMENTATIONS
@SHAPES
def test_gpt2(implementation: str, batch: int, length: int) -> None:
    tokens = batch * length
    assert count_flops(gpt2(implementation), GPT2_ATTENTION, batch, length) == parts(
        attention=full_attention(tokens, length),
        mlp=LAYERS * tokens * 2 * HIDDEN * INNER,
        lm_head=tokens * HIDDEN * VOCABULARY,
        other=(2 * LAYERS + 1) * tokens * 5 * HIDDEN,
    )


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize(
    ("config", "model_class", "base"),
    [(BertConfig, BertForMaskedLM, "bert"), (RobertaConfig, RobertaForMaskedLM, "roberta")],
)
def test_masked_models(
    config: type, model_class: type[PreTrainedModel], base: str, implementation: str, batch: int, length: int
) -> None:
    model = model_class._from_config(config(**ENCODER), attn_implementation=implementation)
    names = [
        f"{base}.encoder.layer.{layer}.attention.{part}" for layer in range(LAYERS) for part in ("self", "output.dense")
    ]
    tokens = batch * length
    assert count_flops(model, names, batch, length) == parts(
        attention=full_attention(tokens, length),
        mlp=LAYERS * tokens * 2 * HIDDEN * INNER,
        lm_head=tokens * (HIDDEN * HIDDEN + 5 * HIDDEN + HIDDEN * VOCABULARY),  # dense, norm, decoder
        other=(2 * LAYERS + 1) * tokens * 5 * HIDDEN,
    )


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_with_grouped_queries(implementation: str, batch: int, length: int, kv_heads: int) -> None:
    config = LlamaConfig(**ENCODER, num_key_value_heads=kv_heads)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    tokens = batch * length
    projections = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv_heads * DIM
    assert count_flops(model, [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)], batch, length) == parts(
        attention=LAYERS * tokens * (projections + 2 * length * HIDDEN),  # every query head attends, grouped or not
        mlp=LAYERS * tokens * 3 * HIDDEN * INNER,
        lm_head=tokens * HIDDEN * VOCABULARY,
        other=0,
    )


@IMPLEMENTATIONS
def test_heads_physically_removed_from_one_layer(implementation: str) -> None:
    model = gpt2(implementation)
    attention = model.transformer.h[0].attn
    width = 1 * DIM  # one head of four stays
    attention.c_attn, attention.c_proj = Conv1D(3 * width, HIDDEN), Conv1D(HIDDEN, width)
    attention.num_heads, attention.split_size = 1, width
    whole = count_flops(gpt2(implementation), GPT2_ATTENTION, 2, 9)
    pruned = count_flops(model, GPT2_ATTENTION, 2, 9)
    per_layer = 18 * (4 * HIDDEN * HIDDEN + 2 * 9 * HIDDEN)
    assert pruned.attention == per_layer + per_layer // 4
    assert (pruned.mlp, pruned.lm_head, pruned.other) == (whole.mlp, whole.lm_head, whole.other)


def test_operators_fvcore_does_not_know() -> None:
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, bos_token_id=0)
    )  # baddbmm
    counted = count_flops(bloom, [f"transformer.h.{layer}.self_attention" for layer in range(LAYERS)], 2, 8)
    assert counted.attention == full_attention(16, 8)
    mixtral = MixtralForCausalLM(
        MixtralConfig(**ENCODER, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )  # _grouped_mm
    counted = count_flops(mixtral, [], 2, 8)
    attention = LAYERS * 16 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 2 * DIM + 2 * 8 * HIDDEN)
    assert counted.mlp == attention + LAYERS * 16 * (HIDDEN * 4 + 2 * 3 * HIDDEN * INNER)
    assert counted.attention == 0


class LeftWeight(nn.Module):
    """[H, H] @ [B, H, T]: fvcore's own count misses the batch."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (torch.ones(HIDDEN, HIDDEN) @ states.transpose(1, 2)).transpose(1, 2)


def test_a_broadcast_left_operand() -> None:
    model = gpt2()
    for block in model.transformer.h:
        block.mlp = LeftWeight()
    assert count_flops(model, GPT2_ATTENTION, 3, 8).mlp == LAYERS * 24 * HIDDEN * HIDDEN


class GroupedCrossAttention(nn.Module):
    """Fused attention as no model here calls it: fewer keys than queries, fewer and wider value heads."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query = states.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        key, value = query[:, :2, :5], torch.cat([query, query], -1)[:, :2, :5]
        mixed = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return mixed[..., :DIM].transpose(1, 2).flatten(2)


def test_fused_attention_of_any_shape() -> None:
    model = gpt2()
    for block in model.transformer.h:
        block.mlp = GroupedCrossAttention()
    assert count_flops(model, GPT2_ATTENTION, 3, 8).mlp == LAYERS * 3 * HEADS * 8 * 5 * (DIM + 2 * DIM)


class Tensordot(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(states, torch.ones(HIDDEN, HIDDEN), 1).tanh()


def test_an_operator_nobody_counts_is_named() -> None:
    model = gpt2()
    model.transformer.h[1].mlp = Tensordot()
    with pytest.warns(UserWarning, match=r"GPT2LMHeadModel leave out .*: aten::tensordot \(1x\)\.$"):
        count_flops(model, GPT2_ATTENTION, 1, 8)


def test_the_published_gpt2() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    counted = count_flops(model, [f"transformer.h.{layer}.attn" for layer in range(12)])
    assert round(counted.total / 1e9, 2) == 32.86
    products = 12 * 2 * 256 * 256 * 768
    assert round((counted.total - products) / 1e9, 2) == 31.65
    assert counted.attention == 12 * 256 * 4 * 768 * 768 + products


def test_nested_and_repeated_names_count_once() -> None:
    model = gpt2()
    names = [*GPT2_ATTENTION, *GPT2_ATTENTION, "transformer.h.0.attn.c_attn"]
    assert count_flops(model, names, 1, 8) == count_flops(model, GPT2_ATTENTION, 1, 8)


def test_a_model_without_head_has_no_head_to_count() -> None:
    whole = gpt2()
    base = GPT2Model(whole.config)
    names = [name.removeprefix("transformer.") for name in GPT2_ATTENTION]
    counted, expected = count_flops(base, names, 1, 8), count_flops(whole, GPT2_ATTENTION, 1, 8)
    assert (counted.attention, counted.mlp, counted.other) == (expected.attention, expected.mlp, expected.other)
    assert counted.lm_head == 0


def test_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_flops(model, GPT2_ATTENTION, 1, 8)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "fvcore" not in caplog.text


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ModelError, match=r"no module 'h\.0\.attn'"):
        count_flops(gpt2(), ["h.0.attn"], 1, 8)
    with pytest.raises(RecipeError, match=r"33 tokens.*32 positions"):
        count_flops(gpt2(), GPT2_ATTENTION, 1, 33)
    with pytest.raises(RecipeError, match="0 sequences"):
        count_flops(gpt2(), GPT2_ATTENTION, 0, 8)

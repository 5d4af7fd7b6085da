"""Tiny random models and their masked twins, as fixtures: in importlib mode tests cannot import helpers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MPNetConfig,
    MPNetForMaskedLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
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
STACK: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2} | SPECIAL
KINDS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "bert": (BertForMaskedLM, BertConfig, ENCODER),
    "roberta": (RobertaForMaskedLM, RobertaConfig, ENCODER),
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED | {"attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED | {"head_dim": 6, "sliding_window": None}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED | {"num_attention_heads": HEADS["qwen3"], "head_dim": 10}),
    # Layouts of other kinds: fused, interleaved, latent, gated, with a parameter or a bias for each head …
    "albert": (AlbertForMaskedLM, AlbertConfig, ENCODER | {"embedding_size": 12}),
    "bloom": (BloomForCausalLM, BloomConfig, STACK | {"n_head": 4}),
    "codegen": (CodeGenForCausalLM, CodeGenConfig, GPT2 | {"n_head": 8, "n_embd": 32, "rotary_dim": 2}),
    "cohere": (CohereForCausalLM, CohereConfig, GROUPED | {"use_qk_norm": True}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        ENCODER
        | {"num_key_value_heads": 4, "q_lora_rank": 9, "kv_lora_rank": 7, "first_k_dense_replace": 2}
        | {"qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 6},
    ),
    "diffllama": (DiffLlamaForCausalLM, DiffLlamaConfig, ENCODER | {"num_key_value_heads": 2}),
    "falcon": (FalconForCausalLM, FalconConfig, STACK | {"num_attention_heads": 4, "multi_query": True}),
    "falcon-groups": (
        FalconForCausalLM,
        FalconConfig,
        STACK | {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
    ),
    "gemma3n": (  # its last two layers take keys and values from the first two
        Gemma3nForCausalLM,
        Gemma3nTextConfig,
        ENCODER
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "laurel_rank": 5}
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 6, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "gpt_bigcode": (GPTBigCodeForCausalLM, GPTBigCodeConfig, GPT2),
    "gpt_bigcode-heads": (GPTBigCodeForCausalLM, GPTBigCodeConfig, GPT2 | {"multi_query": False}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, ENCODER),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        GROUPED | {"head_dim": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "mpnet": (MPNetForMaskedLM, MPNetConfig, ENCODER),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, GROUPED),
    "phi3": (Phi3ForCausalLM, Phi3Config, GROUPED),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        GROUPED | {"head_dim": 8, "layer_types": ["full_attention"] * 2, "mlp_only_layers": [0, 1]},
    ),
}
# Where the heads' outputs meet, by model type; most are built like Llama.
OUTPUTS = {
    "albert": "albert.encoder.albert_layer_groups.{}.albert_layers.0.attention.dense",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "bloom": "transformer.h.{}.self_attention.dense",
    "codegen": "transformer.h.{}.attn.out_proj",
    "falcon": "transformer.h.{}.self_attention.dense",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_bigcode": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "mpnet": "mpnet.encoder.layer.{}.attention.attn.o",
    "roberta": "roberta.encoder.layer.{}.attention.output.dense",
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
    kind: str, implementation: str | None = None, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    model_class, config_class, settings = KINDS[kind]
    implementation = implementation or ("sdpa" if model_class._supports_sdpa else "eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_class(**settings | overrides)
        config._experts_implementation = "eager"  # grouped products know no double precision
        model = model_class._from_config(config, attn_implementation=implementation)
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
    name = OUTPUTS.get(model.config.model_type, "model.layers.{}.self_attn.o_proj")
    return model.get_submodule(name.format(layer))


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

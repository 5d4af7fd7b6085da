"""Tiny random models with MLPs of many builds, and their masked twins, as fixtures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SqueezeBertConfig,
    SqueezeBertForMaskedLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 37
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STACK: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = STACK | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts_per_tok": 1, "moe_intermediate_size": 20, "head_dim": 6}
KINDS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "bitnet": (BitNetForCausalLM, BitNetConfig, GROUPED),
    "deberta-v2": (
        DebertaV2ForMaskedLM,
        DebertaV2Config,
        STACK | {"relative_attention": True, "pos_att_type": ["c2p"]},
    ),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4} | SPECIAL,
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GROUPED | {"head_dim": 6, "sliding_window": 4}),
    "hunyuan_v1_moe": (HunYuanMoEV1ForCausalLM, HunYuanMoEV1Config, EXPERTS | {"num_experts": 3, "moe_topk": 1}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, EXPERTS | {"num_local_experts": 3}),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig,
        STACK | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        SPECIAL
        | {"vocab_size": VOCABULARY, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 32}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"num_experts": 3}),
    "squeezebert": (SqueezeBertForMaskedLM, SqueezeBertConfig, STACK | {"embedding_size": 24}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, GROUPED),
}
# Where the hidden channels of an MLP end, by model type, spelt out; most are built like Llama.
DOWN = {
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.{}.ffn_output",
    "bert": "bert.encoder.layer.{}.output.dense",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "codegen": "transformer.h.{}.mlp.fc_out",
    "deberta-v2": "deberta.encoder.layer.{}.output.dense",
    "distilbert": "distilbert.transformer.layer.{}.ffn.lin2",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_bigcode": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "modernbert": "model.layers.{}.mlp.Wo",
    "hunyuan_v1_moe": "model.layers.{}.mlp.shared_mlp.down_proj",
    "mpnet": "mpnet.encoder.layer.{}.output.dense",
    "opt": "model.decoder.layers.{}.fc2",
    "roberta": "roberta.encoder.layer.{}.output.dense",
    "starcoder2": "model.layers.{}.mlp.c_proj",
}


@pytest.fixture(scope="session")
def tiny(build: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """A model by kind, in double precision, every weight away from its initial value."""

    def make(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        if kind not in KINDS:
            return build(kind, **{"dtype": torch.float32} if kind == "bloom" else {}, seed=seed, **overrides)
        model_class, config_class, settings = KINDS[kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = config_class(**settings | overrides)
            config._experts_implementation = "eager"
            model = model_class._from_config(config).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_((0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def down() -> Callable[[PreTrainedModel, int], str]:
    """The name of a layer's down projection, spelt out by model type."""

    def name(model: PreTrainedModel, layer: int) -> str:
        return DOWN.get(model.config.model_type, "model.layers.{}.mlp.down_proj").format(layer)

    return name


@pytest.fixture(scope="session")
def masked(down: Callable[[PreTrainedModel, int], str]) -> Callable[..., PreTrainedModel]:
    """A dense copy in whose down projections the weights of some channels are zero."""

    def make(model: PreTrainedModel, channels: Mapping[int, Sequence[int]]) -> PreTrainedModel:
        twin = copy.deepcopy(model)
        for layer, gone in channels.items():
            projection = twin.get_submodule(down(twin, layer))
            with torch.no_grad():
                for channel in gone:
                    projection.weight.select(0 if isinstance(projection, Conv1D) else 1, channel).zero_()
        return twin

    return make

"""A tiny random instance of every language model class that transformers registers, from its configuration alone.

A general rule sets the sizes that a configuration has to small numbers; OVERRIDES holds what the rule gets wrong, and
what the published models switch on and the defaults leave off.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

HEADS, GROUPS, VOCABULARY, POSITIONS = 6, 2, 96, 64

# Values of the fields that a configuration has, by the fields' names. The numbers are kept apart where an architecture
# lets them, so that a mix-up shows as a wrong shape.
SIZES: dict[str, Any] = {
    name: value
    for names, value in (
        ("vocab_size decoder_vocab_size vocab_size_per_layer_input", VOCABULARY),
        ("hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim dim hidden_dim word_embed_proj_dim", 48),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", 2),
        ("num_encoder_layers num_decoder_layers", 2),
        ("num_attention_heads n_head n_heads num_heads attention_heads", HEADS),
        ("decoder_attention_heads encoder_attention_heads", HEADS),
        ("num_decoder_attention_heads num_encoder_attention_heads", HEADS),
        ("num_key_value_heads num_kv_heads kv_n_heads", GROUPS),
        ("head_dim d_head dim_head", 12),
        ("swa_num_attention_heads", 8),
        ("swa_num_key_value_heads", 4),
        ("swa_head_dim", 10),
        ("intermediate_size n_inner dff dim_ff ffn_hidden_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner", 40),
        ("shared_intermediate_size prediction_head_size mlp_dim", 40),
        ("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 28),
        ("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length", POSITIONS),
        ("max_target_positions max_source_positions max_2d_position_embeddings", POSITIONS),
        ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k", 2),
        ("first_k_dense_replace num_dense_layers n_group num_expert_group topk_group pretraining_tp", 1),
        ("n_shared_experts num_shared_experts moe_num_shared_experts", 1),
        # Multi-head latent attention, and the indexer of its sparse kind.
        ("q_lora_rank embedding_size input_embedding_size", 20),
        ("kv_lora_rank embedding_rank output_channels rel_extent", 16),
        ("qk_nope_head_dim position_bias_num_buckets", 8),
        ("qk_rope_head_dim d_rel index_topk", 4),
        ("v_head_dim router_hidden_size", 10),
        ("index_head_dim", 14),
        ("index_n_heads mamba_dt_rank conv_kernel_size", 3),
        # State spaces and linear attention.
        ("mamba_d_state state_size ssm_state_size laurel_rank", 5),
        ("mamba_expand expand linear_num_key_heads", 2),
        ("mamba_chunk_size chunk_size linear_num_value_heads linear_num_heads", 4),
        ("linear_key_head_dim linear_head_dim pronunciation_embed_dim", 7),
        ("linear_value_head_dim shape_embed_dim", 9),
        # Other inputs and towers.
        ("hidden_size_per_layer_input", 6),
        ("output_embedding_size", 24),
        ("pronunciation_vocab_size", VOCABULARY + 1),
        ("shape_vocab_size", VOCABULARY + 2),
        ("image_size", 16),
        ("patch_size num_mel_bins", 8),
    )
    for name in names.split()
}
# Set only where the default is a number: None turns the feature off, and stays.
LIMITS = {"sliding_window", "sliding_window_size", "window_size", "attention_window_size"}
LIMITS |= {"attention_window", "attention_chunk_size", "local_attention"}
STATES = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
KEPT = ("A_log",)  # logarithms of decay rates, which noise would blow up
FULL_THEN_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
SHARED_KEYS = {"layer_types": SLIDING_THEN_FULL["layer_types"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
SHORT_CONVOLUTION = {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DISENTANGLED_2 = {**DISENTANGLED, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 12}
# Fields of particular model types; a dictionary goes to the sub-configuration of that name.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 7},  # of its linear attention
    "bamba": {**MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1, 2]},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 30,
        "patching_threshold": 3.75,  # about the median, so that patches are of different lengths
    },
    "codegen": {"n_head": 8, "rotary_dim": 4},  # its projection is laid out for four cores: heads come in fours
    "cohere": {"use_qk_norm": True},
    "cohere_compass_text": {
        **SLIDING_THEN_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},  # the class reads a rope_theta the default lacks
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED_2,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 9,
        "hc_mult": 3,
        "partial_rotary_factor": 0.34,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note": {
        "head_dim": 12,
        "shared_experts_intermediate_size": 30,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 18,
        "swa_kv_lora_rank": 14,
        "swa_head_dim": 11,
        "swa_qk_nope_head_dim": 5,
        "swa_v_head_dim": 9,
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 5, "position_embedding_type": "rotary", "token_dropout": True},
    "esmc": {"num_key_value_heads": HEADS, "head_dim": 8},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 96},
    "funnel": {"block_sizes": [1, 2], "num_decoder_layers": 1},
    "gemma3n_text": {
        **SHARED_KEYS,
        "intermediate_size": 40,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": {"global_head_dim": 20}},
    "gemma4_text": {"global_head_dim": 20},
    "gemma4_unified_text": {"global_head_dim": 20},
    "gemma4_unified": {"text_config": {"global_head_dim": 20}},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **MAMBA2,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
    },
    "helium": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3},
    "jetmoe": {"num_key_value_heads": 3, "kv_channels": 12},
    "laguna": {"num_attention_heads_per_layer": [6, 8], **FULL_THEN_SLIDING},
    "lfm2": {**SHORT_CONVOLUTION, "block_multiple_of": 4},
    "lfm2_moe": SHORT_CONVOLUTION,
    "llama4": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 44},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 14},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": FULL_THEN_SLIDING,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "rotary_dim": 6,
        "dense_intermediate_size": 44,
        "index_n_heads": 2,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": FULL_THEN_SLIDING,
    "mimo_v2_flash": {"num_attention_heads": 8},  # sliding layers have twice the key heads
    "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mobilebert": {"intra_bottleneck_size": 24},
    "modernbert": {"local_attention": 4},
    "musicgen": {"num_codebooks": 2},
    "musicgen_melody": {"num_codebooks": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 28,
    },
    "neomme": {"default_long_sliding_window": 6, "sliding_window": 4, "head_dim": 16},
    "perceiver": {"num_latents": 10, "d_latents": 48, "num_self_attends_per_block": 2},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 48,
            "depthwise_separable_out_channel": 48,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "nemo_final_size": 2,
            "bias_max_distance": 10,
        }
    },
    "qwen4_exp": {
        "indexer_n_heads": 3,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 14,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 10,
        "ple_layer_ids": [1],
        "ple_embed_dim": 48,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "eos_token_id": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 4, "lru_width": 48},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32],
        "attention_head_size": 12,
        "feed_forward_size": 40,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "squeezebert": {
        "embedding_size": 48,
        **dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2),
    },
    "stablelm": {"qk_layernorm": True},
    "xlnet": {"d_head": 8},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},  # its states come in blocks of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "zamba2": {"adapter_rank": 7},
    # Half of the value heads come from each of two projections, and only whole groups can leave.
    "zaya": {
        "num_experts_per_tok": 1,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 4,
    },
}
# Further attention layouts, by model type and name.
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("falcon", "groups"): {"new_decoder_architecture": True},
    ("falcon", "heads"): {"multi_query": False, "num_kv_heads": HEADS},
    ("falcon", "alibi"): {"multi_query": False, "num_kv_heads": HEADS, "alibi": True},
    ("gpt_bigcode", "heads"): {"multi_query": False},
    ("gemma4_text", "keys-are-values"): {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
    ("gemma4_text", "shared-keys"): SHARED_KEYS,
    ("gemma4_text", "experts"): {"enable_moe_block": True, "top_k_experts": 2},
    ("qwen2", "sliding"): {
        "use_sliding_window": True,
        "sliding_window": 4,
        **FULL_THEN_SLIDING,
    },
    ("deepseek_v3", "plain-queries"): {"q_lora_rank": None},
    ("zamba2", "two-blocks"): {
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "num_key_value_heads": HEADS,
        "adapter_rank": 7,
    },
}
# Classes whose own casts to single precision do not survive double: the mask, its lowest number, becomes -inf, a row
# that is masked throughout (padding on the left) NaN; XGLM and Inkling 2 fail outright.
DTYPE: dict[str, torch.dtype] = dict.fromkeys(
    (
        "BloomForCausalLM",
        "Gemma2ForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteSWAForCausalLM",
        "Inkling2ForCausalLM",
        "MptForCausalLM",
        "ProphetNetForCausalLM",
        "VaultGemmaForCausalLM",
        "XGLMForCausalLM",
    ),
    torch.float32,
)
BORROWED = "it takes every key and value from another model, which transformers refuses as having no layer to make them"
UNBUILDABLE = {
    "Gemma4AssistantForCausalLM": BORROWED,
    "Gemma4UnifiedAssistantForCausalLM": BORROWED,
    "MraForMaskedLM": "its attention is a CUDA kernel, without which every head gives zeros",
}


class Unbuildable(Exception):  # noqa: N818 - a finding, not a fault
    """The class has no consistent tiny instance here; the message says why."""


@dataclass(frozen=True, order=True)
class Entry:
    """One language model class, and the model type it is built from."""

    model_type: str
    class_name: str
    task: str
    variant: str = ""


@cache
def entries() -> tuple[Entry, ...]:
    """Every distinct class of the causal and the masked mapping."""
    found: dict[str, Entry] = {}
    mappings = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    for task, names in mappings.items():
        for model_type, name in names.items():
            known = found.setdefault(name, Entry(model_type, name, task))
            if plain(name).startswith(plain(model_type)) and not plain(name).startswith(plain(known.model_type)):
                found[name] = dataclasses.replace(known, model_type=model_type)  # llama, not one of its borrowers
    return tuple(sorted(found.values()))


def plain(name: str) -> str:
    """NAME in small letters and digits only."""
    return name.lower().replace("-", "").replace("_", "")


def variants() -> tuple[Entry, ...]:
    """Further attention layouts of classes that have several."""
    by_type = {entry.model_type: entry for entry in entries() if entry.task == "causal"}
    return tuple(dataclasses.replace(by_type[name], variant=variant) for name, variant in VARIANTS)


def build(entry: Entry, seed: int = 0, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A tiny instance of ENTRY in eval mode, every weight drawn from SEED."""
    if entry.class_name in UNBUILDABLE:
        raise Unbuildable(UNBUILDABLE[entry.class_name])
    try:
        cls = getattr(transformers, entry.class_name)
        config = configuration(entry)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = cls(config)
    except ImportError as error:
        raise Unbuildable(str(error).strip().split(" but ")[0]) from error
    model = model.train(False).to(dtype or DTYPE.get(entry.class_name, torch.float64))
    randomise(model, seed)
    return model


def configuration(entry: Entry) -> PretrainedConfig:
    """The small configuration of ENTRY."""
    cls = getattr(transformers, entry.class_name).config_class
    chosen = {**OVERRIDES.get(entry.model_type, {}), **VARIANTS.get((entry.model_type, entry.variant), {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: PretrainedConfig = cls(**small(cls, chosen, entry.task == "causal"))
    config._experts_implementation = "eager"  # the grouped products know no double precision
    return config


def small(cls: type[PretrainedConfig], chosen: dict[str, Any], causal: bool, tower: bool = False) -> dict[str, Any]:
    """Keyword arguments that make a configuration of CLS small, those CHOSEN by hand first."""
    default = cls()
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    whole = sorted(name for name in names if isinstance(value_of(default, name), int))
    values: dict[str, Any] = {name: SIZES[name] for name in names & SIZES.keys()}
    values |= dict.fromkeys(LIMITS.intersection(whole), 4)
    values |= {n: 0.0 for n in names if re.search("dropout|pdrop", n) and isinstance(value_of(default, n), float)}
    values |= {name: i for i, name in enumerate(n for n in whole if n.endswith(("_token_id", "_token_index")))}
    if "qk_rope_head_dim" in names:  # latent attention: every head has its own keys, and head_dim follows
        values.pop("head_dim", None)
        values["num_key_value_heads"] = HEADS
    values |= dict.fromkeys(names & {"is_decoder", "causal"}, causal)
    values |= layers(default, names)
    if tower:
        values |= dict.fromkeys(names & {"num_hidden_layers", "encoder_layers", "decoder_layers"}, 1)
    for name in cls.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            is_text = "text" in name
            values[name] = small(type(part), chosen.get(name, {}), causal and is_text, tower=not is_text)
            values[name]["model_type"] = part.model_type
    return values | {name: value for name, value in chosen.items() if name not in cls.sub_configs}


def value_of(config: Any, name: str) -> Any:
    """What CONFIG has under NAME; None where it has nothing, or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def layers(default: Any, names: set[str]) -> dict[str, Any]:
    """The fewest of the default's layers that show every kind of layer, at least two of them attention."""
    count: int = getattr(default, "num_hidden_layers", 0)
    lists = {name: v for name in names if isinstance(v := value_of(default, name), list) and len(v) == count}
    lists = {name: column for name, column in lists.items() if column != [*range(count)]}  # indices of layers
    if not lists:
        return {}
    kept: set[int] = set()
    for column in lists.values():
        for value in dict.fromkeys(map(str, column)):
            if value not in {str(column[i]) for i in kept}:
                kept.add(next(i for i, v in enumerate(column) if str(v) == value))
    types = next((lists[n] for n in ("layer_types", "layers_block_type") if n in lists), ["attention"] * count)
    attention = [i for i, kind in enumerate(types) if kind.startswith("hybrid") or "linear" not in kind]
    for i in reversed(attention):
        if len(kept.intersection(attention)) < 2:
            kept.add(i)
    order = sorted(kept)
    return {"num_hidden_layers": len(order)} | {n: [v[i] for i in order] for n, v in lists.items()}


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Noise in every parameter: a head that did nothing would hide a wrong cut."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        with torch.no_grad():
            if parameter.dim() < 2 or name.endswith(KEPT):  # norms, biases, sinks, decays: about their own start
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)


def inputs(
    model: PreTrainedModel,
    batch: int = 2,
    tokens: int = 9,
    padding: str | None = "right",
    seed: int = 0,
    *,
    second: bool = False,
) -> dict[str, torch.Tensor]:
    """Random tokens, no special ones among them; all rows but the first padded on one side.

    With SECOND also the other input of classes that can take one (an encoder's states, entities, which
    tokens are global), without which part of their attention stays idle.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config(decoder=True)
    streams = config.num_codebooks if model.config.model_type.startswith("musicgen") else 1
    ids = torch.randint(32, 90, (batch, streams, tokens), generator=generator)
    mask = torch.ones((batch, tokens), dtype=torch.long)
    if padding:
        mask[1:, : tokens // 3] = 0
        mask = mask if padding == "left" else mask.flip(1)
        ids = torch.where(mask[:, None].bool(), ids, getattr(config, "pad_token_id", None) or 0)
    given = {"input_ids": ids.flatten(0, 1), "attention_mask": mask}
    return given | (second_input(model, batch, tokens, generator) if second else {})


def second_input(
    model: PreTrainedModel, batch: int, tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What MODEL may be given beside its tokens; nothing for most."""
    if model.config.model_type == "luke":
        positions = torch.tensor([[0, 1, -1], [3, -1, -1]]).expand(batch, 2, 3)
        return {"entity_ids": torch.full((batch, 2), 6), "entity_position_ids": positions}
    accepted = inspect.signature(model.forward).parameters
    if "global_attention_mask" in accepted:
        return {"global_attention_mask": torch.eye(1, tokens, dtype=torch.long).expand(batch, tokens)}
    name = next((name for name in STATES if name in accepted), None)
    crosses = any(part.endswith(("encoder_attn", "cross_attn")) for part, _ in model.named_modules())
    if name is None or not crosses or model.config.is_encoder_decoder:
        return {}
    states = torch.randn((batch, 5, model.config.hidden_size), generator=generator, dtype=torch.float64)
    return {name: states.to(model.dtype)}

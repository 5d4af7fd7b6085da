"""The sizes of the tiny models, from which `tiny_models` builds them.

A general rule sets the sizes that a configuration has to small numbers; OVERRIDES holds what the rule gets wrong, and
what the published models switch on and the defaults leave off.
"""

from __future__ import annotations

from typing import Any

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
    ("big_bird", "full"): {"attention_type": "original_full"},
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

"""Layouts against what the configs say, and against the shapes of the weights, dense and pruned."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from compressor.attention import attention_layers, prune_heads
from compressor.attention.layout import features, head_output_norms, is_linear
from compressor.errors import ModelError

SMALL = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("kind", "heads", "key_value_heads", "head_dim", "name", "output", "projections"),
    [
        ("gpt2", 4, 4, 6, "transformer.h.{}.attn", "transformer.h.{}.attn.c_proj", ["c_attn"]),
        (
            "bert",
            4,
            4,
            6,
            "bert.encoder.layer.{}.attention.self",
            "bert.encoder.layer.{}.attention.output.dense",
            ["query", "key", "value"],
        ),
        (
            "roberta",
            4,
            4,
            6,
            "roberta.encoder.layer.{}.attention.self",
            "roberta.encoder.layer.{}.attention.output.dense",
            ["query", "key", "value"],
        ),
        *(
            (
                kind,
                heads,
                2,
                dim,
                "model.layers.{}.self_attn",
                "model.layers.{}.self_attn.o_proj",
                ["q_proj", "k_proj", "v_proj"],
            )
            for kind, heads, dim in [("llama", 6, 4), ("mistral", 6, 6), ("qwen3", 4, 10)]
        ),
    ],
)
def test_every_number_and_name(build, kind, heads, key_value_heads, head_dim, name, output, projections):
    model = build(kind)
    layers = attention_layers(model)
    assert [layer.index for layer in layers] == [0, 1]
    for index, layer in enumerate(layers):
        assert layer.name == name.format(index)
        assert layer.output_projection == output.format(index)
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (heads, key_value_heads, head_dim)
        assert layer.key_value_index == tuple(head // (heads // key_value_heads) for head in range(heads))
        assert [projection.name for projection in layer.projections] == [f"{layer.name}.{part}" for part in projections]
        expected = [("query", "key", "value")] if kind == "gpt2" else [("query",), ("key",), ("value",)]
        assert [projection.parts for projection in layer.projections] == expected
        for module in (*layer.modules, layer.output_projection):
            model.get_submodule(module)
        assert len(layer.modules) == (2 if kind in ("bert", "roberta") else 1)


@pytest.mark.parametrize(
    ("kind", "removed", "heads", "mapping"),
    [
        ("gpt2", [0, 2], 2, (0, 1)),
        ("bert", [1], 3, (0, 1, 2)),
        ("roberta", [0, 1, 3], 1, (0,)),
        ("llama", [0, 1, 2], 3, (0, 0, 0)),  # a whole group: one key/value head is left
        ("llama", [0, 3], 4, (0, 0, 1, 1)),  # even
        ("llama", [4], 5, (0, 0, 0, 1, 1)),  # uneven
        ("mistral", [1, 2, 4, 5], 2, (0, 1)),
        ("qwen3", [0, 1, 2], 1, (0,)),
    ],
)
def test_pruned_models_are_described_as_they_are_now(build, kind, removed, heads, mapping):
    model = build(kind)
    dense = attention_layers(model)
    prune_heads(model, {1: removed})
    untouched, layer = attention_layers(model)
    assert untouched == dense[0]
    assert (layer.name, layer.output_projection, layer.head_dim) == (
        dense[1].name,
        dense[1].output_projection,
        dense[1].head_dim,
    )
    assert (layer.num_heads, layer.num_key_value_heads) == (heads, len(set(mapping)))
    assert layer.key_value_index == mapping
    assert features(model.get_submodule(layer.output_projection))[0] == heads * layer.head_dim


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_an_emptied_layer_keeps_its_place(build, kind):
    model = build(kind)
    dense = attention_layers(model)
    prune_heads(model, {0: range(dense[0].num_heads)}, allow_empty=True)
    empty, rest = attention_layers(model)
    assert rest == dense[1]
    assert (empty.index, empty.name, empty.output_projection) == (0, dense[0].name, dense[0].output_projection)
    assert (empty.num_heads, empty.num_key_value_heads, empty.key_value_index) == (0, 0, ())
    assert features(model.get_submodule(empty.output_projection))[0] == 0


def test_only_plain_linear_maps_are_linear():
    class Wrapped(nn.Linear):
        """What quantisation and adapters do: a subclass that computes something else."""

    assert is_linear(nn.Linear(2, 3))
    assert not is_linear(Wrapped(2, 3))
    assert features(nn.Linear(2, 3)) == (2, 3)


def refused(model) -> str:
    with pytest.raises(ModelError) as caught:
        attention_layers(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_model_without_attention_is_refused():
    config = MambaConfig(vocab_size=37, hidden_size=16, state_size=4, num_hidden_layers=1)
    assert "no attention heads" in refused(MambaForCausalLM(config))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cross_attention_is_refused(build, kind):
    assert "cross-attention" in refused(build(kind, add_cross_attention=True, is_decoder=True))


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_projection_that_is_not_a_plain_linear_map_is_refused(build, name):
    class Quantised(nn.Linear):
        pass

    model = build("llama")
    attention = model.model.layers[1].self_attn
    old = getattr(attention, name)
    setattr(attention, name, Quantised(old.in_features, old.out_features))
    message = refused(model)
    assert f"model.layers.1.self_attn.{name} is Quantised" in message


def test_a_head_dim_that_does_not_divide_is_refused(build):
    model = build("llama")
    model.model.layers[0].self_attn.head_dim = 5
    assert "do not divide" in refused(model)


def test_a_norm_over_the_whole_width_is_refused():
    """OLMo2 normalises all heads of a projection at once, so cutting one head changes all others."""
    message = refused(Olmo2ForCausalLM(Olmo2Config(**SMALL)))
    assert "q_norm" in message


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [(4, 8), pytest.param(8, 8, id="as many heads as dimensions")],
)
def test_attention_sinks_are_refused(heads, head_dim):
    """GPT-OSS has one sink per head; the released models have 64 heads of 64 dimensions."""
    config = SMALL | {
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    message = refused(GptOssForCausalLM(GptOssConfig(**config)))
    assert "sinks" in message


def test_fused_projections_that_interleave_heads_are_refused():
    """GPT-BigCode without multi-query keeps q, k, v of one head together: [heads, 3, dim], not [3, heads, dim]."""
    config = GPTBigCodeConfig(
        vocab_size=37, n_embd=32, n_layer=1, n_head=4, n_positions=32, multi_query=False, bos_token_id=1, eos_token_id=2
    )
    refused(GPTBigCodeForCausalLM(config))


def test_multi_query_fused_projections_are_refused():
    config = GPTBigCodeConfig(
        vocab_size=37, n_embd=32, n_layer=1, n_head=4, n_positions=32, multi_query=True, bos_token_id=1, eos_token_id=2
    )
    refused(GPTBigCodeForCausalLM(config))


def test_heads_that_come_in_couples_are_refused():
    """DiffLlama subtracts head h + H/2 from head h: no single head can be taken out."""
    refused(DiffLlamaForCausalLM(DiffLlamaConfig(**SMALL)))


def test_block_sparse_attention_is_refused():
    """BigBird's block-sparse layer reshapes to the hidden size of its config, and is swapped for another when inputs
    are short: once pruned it cannot run."""
    config = BigBirdConfig(vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
    refused(BigBirdForMaskedLM(config))


def test_a_per_head_norm_is_refused(build):
    model = build("qwen3")
    model.model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.ones(4, 10))
    assert "q_norm.weight [4, 10]" in refused(model)


def test_parallel_blocks_are_found():
    layers = attention_layers(Cohere2ForCausalLM(Cohere2Config(**SMALL)))
    assert [(layer.num_heads, layer.num_key_value_heads, layer.head_dim) for layer in layers] == [(4, 2, 8)]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3"])
def test_output_norms_are_those_of_the_slices(build, output_projection, kind):
    model = build(kind)
    for layer in attention_layers(model):
        module = output_projection(model, layer.index)
        weight = module.weight.detach().numpy()
        by_input = weight if kind == "gpt2" else weight.T
        for head, norm in enumerate(head_output_norms(model, layer)):
            rows = by_input[head * layer.head_dim : (head + 1) * layer.head_dim]
            assert float(norm) == pytest.approx((rows**2).sum() ** 0.5, rel=1e-12)


def test_layouts_do_not_depend_on_the_dtype_or_the_implementation(build):
    expected = attention_layers(build("llama"))
    assert attention_layers(build("llama", implementation="eager", dtype=torch.bfloat16)) == expected


def test_backbones_without_a_language_model_head_are_found_too():
    special = {"bos_token_id": 1, "eos_token_id": 2}
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=24, n_layer=1, n_head=4, n_positions=16, **special))
    encoder = BertForMaskedLM(BertConfig(vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=4))
    assert attention_layers(decoder.transformer)[0].name == "h.0.attn"
    assert attention_layers(encoder.bert)[0].name == "encoder.layer.0.attention.self"

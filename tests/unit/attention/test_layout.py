"""Layouts against what the configs say, against layouts written down by hand, and the shapes of the weights."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BitNetConfig,
    BitNetForCausalLM,
    FNetConfig,
    FNetForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from compressor.attention import AttentionProbe, attention_layers, prune_heads
from compressor.attention.layout import Slice, output_norms
from compressor.attention.linear import features, is_linear, side
from compressor.attention.trace import WatchAttention
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
Owners = list[tuple[int, ...]]


@pytest.mark.parametrize(
    ("kind", "heads", "key_value_heads", "head_dim", "name", "output"),
    [
        ("gpt2", 4, 4, 6, "transformer.h.{}.attn", "transformer.h.{}.attn.c_proj"),
        *(
            (
                kind,
                4,
                4,
                6,
                f"{kind}.encoder.layer.{{}}.attention.self",
                f"{kind}.encoder.layer.{{}}.attention.output.dense",
            )
            for kind in ("bert", "roberta")
        ),
        *(
            (kind, heads, 2, dim, "model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj")
            for kind, heads, dim in [("llama", 6, 4), ("mistral", 6, 6), ("qwen3", 4, 10)]
        ),
    ],
)
def test_every_number_and_name(build, kind, heads, key_value_heads, head_dim, name, output):
    model = build(kind)
    layers = attention_layers(model)
    assert [layer.index for layer in layers] == [0, 1]
    for index, layer in enumerate(layers):
        assert layer.name == name.format(index)
        assert layer.output_projection == output.format(index)
        assert layer.name.startswith(layer.block)
        assert layer.output_projection.startswith(f"{layer.block}.")
        assert (layer.num_heads, layer.num_key_value_heads) == (heads, key_value_heads)
        assert layer.head_dim == layer.value_dim == head_dim
        size = heads // key_value_heads
        assert layer.key_value_index == layer.group_index == tuple(head // size for head in range(heads))
        assert layer.groups == tuple(tuple(range(start, start + size)) for start in range(0, heads, size))
        assert layer.maps == tuple((head,) for head in range(heads))
        assert (layer.uses, layer.interface, layer.spreadable, layer.keys_shared) == (1, True, True, False)
        for head in range(heads):
            assert layer.entries([head]) == list(range(head * head_dim, (head + 1) * head_dim))
        assert len(layer.modules) == (2 if kind in ("bert", "roberta") else 1)


# --- layouts, stated by hand as the code that reads them does


def own(heads: int, width: int) -> Owners:
    """Head by head, WIDTH entries each."""
    return [(head,) for head in range(heads) for _ in range(width)]


def shared(heads: int, keys: int, width: int) -> Owners:
    """Key/value head by key/value head, each read by as many consecutive heads."""
    groups = torch.arange(heads).reshape(keys, -1).tolist()
    return [tuple(group) for group in groups for _ in range(width)]


def apart(maps: dict[str, Owners], *, bias: bool = True) -> dict[tuple[str, str, str, int], Owners]:
    """Weights of linear maps, and their biases."""
    parts = [("weight", 0), ("bias", 0)] if bias else [("weight", 0)]
    return {("tensor", module, name, dim): owners for module, owners in maps.items() for name, dim in parts}


def joint(heads: Sequence[int], width: int) -> Owners:
    """WIDTH entries for some heads together."""
    return [tuple(heads)] * width


QKV = "self_attention.query_key_value"
BERT = {f"self.{name}": own(4, 6) for name in ("query", "key", "value")}
# Per kind: entries along the dimensions that belong to heads; names follow those of the block. Of the output
# projection, always by its inputs, only the width of a head is said.
LAYOUTS: dict[str, tuple[int, dict[tuple[str, str, str, int], Owners]]] = {
    # c_attn is three blocks, each split into heads; its weight is [inputs, outputs].
    "gpt2": (6, {("tensor", "c_attn", "weight", 1): own(4, 6) * 3, ("tensor", "c_attn", "bias", 0): own(4, 6) * 3}),
    "bert": (6, apart(BERT)),
    "llama": (4, apart({"q_proj": own(6, 4), "k_proj": shared(6, 2, 4), "v_proj": shared(6, 2, 4)})),
    # Its norms have one weight for all heads.
    "qwen3": (10, apart({"q_proj": own(4, 10), "k_proj": shared(4, 2, 10), "v_proj": shared(4, 2, 10)}, bias=False)),
    # query_key_value is [heads, 3, dim].
    "gpt_neox": (6, apart({"query_key_value": own(4, 18)})),
    "gpt_bigcode-heads": (6, apart({"c_attn": own(4, 18)})),
    # One key and one value for all queries.
    "gpt_bigcode": (6, apart({"c_attn": own(4, 6) + joint(range(4), 12)})),
    "falcon": (6, apart({"query_key_value": own(4, 6) + joint(range(4), 12)}, bias=False)),
    # [groups, queries of a group + key + value, dim].
    "falcon-groups": (
        4,
        apart({"query_key_value": [*own(3, 4), *joint([0, 1, 2], 8), *own(6, 4)[12:], *joint([3, 4, 5], 8)]}),
    ),
    # Four blocks of two heads, each with queries, values and keys.
    "codegen": (
        4,
        apart({"qkv_proj": [head for at in range(0, 32, 8) for head in own(8, 4)[at : at + 8] * 3]}, bias=False),
    ),
    # Alibi comes in as [batch · heads, 1, keys].
    "bloom": (6, apart({"query_key_value": own(4, 18)}) | {("argument", "", "alibi", 0): own(4, 1)}),
    # The bias of relative positions, [1, heads, queries, keys].
    "mpnet": (6, apart({name: own(4, 6) for name in "qkv"}) | {("argument", "", "position_bias", 1): own(4, 1)}),
    "phi3": (4, apart({"qkv_proj": own(6, 4) + shared(6, 2, 4) * 2}, bias=False)),
    # Latents are everybody's; a head has 5 + 4 entries of the query, 5 of the key and 6 of the value.
    "deepseek_v3": (6, apart({"q_b_proj": own(4, 9), "kv_b_proj": own(4, 11)}, bias=False)),
    # Each head's query is followed by its gate.
    "qwen3_next": (8, apart({"q_proj": own(6, 16), "k_proj": shared(6, 2, 8), "v_proj": shared(6, 2, 8)}, bias=False)),
    "gpt_oss": (
        6,
        apart({"q_proj": own(6, 6), "k_proj": shared(6, 2, 6), "v_proj": shared(6, 2, 6)})
        | {("tensor", "", "sinks", 0): own(6, 1)},
    ),
    # Norms with a weight for each head, [heads, dim].
    "cohere": (
        4,
        apart({"q_proj": own(6, 4), "k_proj": shared(6, 2, 4), "v_proj": shared(6, 2, 4)}, bias=False)
        | {("tensor", "q_norm", "weight", 0): own(6, 1), ("tensor", "k_norm", "weight", 0): shared(6, 2, 1)},
    ),
    # Norms over all heads at once: they and the maps before them stay whole.
    "olmo2": (
        4,
        apart({"v_proj": shared(6, 2, 4)}, bias=False)
        | {("output", "q_norm", "", -1): own(6, 4), ("output", "k_norm", "", -1): shared(6, 2, 4)},
    ),
    "albert": (6, apart({name: own(4, 6) for name in ("query", "key", "value")})),
    # Two maps, h and h + 2, make one head; all of them read every key, and each value goes to both.
    "diffllama": (12, apart({"q_proj": own(2, 6) * 2}, bias=False)),
}


def entries(part: Slice) -> Owners:
    return [heads for heads, length in part.runs for _ in range(length)]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_slices_are_those_of_the_architecture(build, output_projection, kind):
    width, expected = LAYOUTS[kind]
    model = build(kind)
    for layer in attention_layers(model):
        projection, *rest = layer.slices
        assert model.get_submodule(projection.module) is output_projection(model, layer.index)
        assert (projection.kind, projection.module, projection.name) == ("tensor", layer.output_projection, "weight")
        assert projection.dim == (0 if isinstance(output_projection(model, 0), Conv1D) else 1)
        assert entries(projection) == own(layer.num_heads, width)
        assert layer.value_dim == width
        block = f"{layer.block}."
        found = {
            (part.kind, f"{part.module}.".removeprefix(block).strip("."), part.name, part.dim): part for part in rest
        }
        assert {name: entries(part) for name, part in found.items()} == expected
        assert len(found) == len(rest)
        for part in rest:
            assert part.periodic is (part.name == "alibi")
            if part.kind == "tensor":
                tensor = getattr(model.get_submodule(part.module), part.name)
                assert len(part) == tensor.shape[part.dim]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_stays_is_what_a_surviving_head_needs(build, kind):
    layer = attention_layers(build(kind))[0]
    for removed in ([0], [1], list(range(layer.num_heads))[:-1], list(range(layer.num_heads))):
        for part in layer.slices:
            needed = [place for place, heads in enumerate(entries(part)) if set(heads) - set(removed)]
            assert part.kept(removed) == needed
        gone = [place for head in removed for place in range(head * layer.value_dim, (head + 1) * layer.value_dim)]
        assert layer.entries(removed) == gone


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


def test_layers_of_the_same_shapes_may_share_keys_in_other_ways(build):
    model = prune_heads(build("llama"), {0: [0], 1: [5]})
    first, second = model.model.layers
    for name, parameter in first.named_parameters():
        assert parameter.shape == second.get_parameter(name).shape
    layers = attention_layers(model)
    assert [layer.key_value_index for layer in layers] == [(0, 0, 1, 1, 1), (0, 0, 0, 1, 1)]
    assert [layer.groups for layer in layers] == [((0, 1), (2, 3, 4)), ((0, 1, 2), (3, 4))]


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


# --- sharing


def test_grouped_layouts_say_who_reads_which_key(build):
    expected = {"llama": (0, 0, 0, 1, 1, 1), "falcon-groups": (0, 0, 0, 1, 1, 1), "deepseek_v3": (0, 1, 2, 3)}
    expected |= {"gpt_bigcode": (0, 0, 0, 0), "gpt_bigcode-heads": (0, 1, 2, 3), "qwen3_next": (0, 0, 0, 1, 1, 1)}
    for kind, mapping in expected.items():
        for layer in attention_layers(build(kind)):
            assert layer.key_value_index == mapping
            assert layer.num_key_value_heads == len(set(mapping))
            assert layer.spreadable is (kind != "falcon-groups")  # it repeats keys by itself


@pytest.mark.parametrize(
    ("kind", "interface"), [("bloom", False), ("falcon", False), ("mpnet", False), ("llama", True)]
)
def test_whether_a_layer_looks_its_attention_function_up(build, kind, interface):
    assert {layer.interface for layer in attention_layers(build(kind))} == {interface}


def test_keys_are_as_wide_as_the_code_makes_them(build):
    """DeepSeek's keys are 5 + 4 wide, its values 6."""
    assert {(layer.head_dim, layer.value_dim) for layer in attention_layers(build("deepseek_v3"))} == {(9, 6)}


@pytest.mark.parametrize("applied", [1, 2, 5])
def test_a_layer_that_is_applied_several_times_is_one_layer(build, applied):
    (layer,) = attention_layers(build("albert", num_hidden_layers=applied))
    assert layer.uses == applied


def test_two_maps_make_one_head_of_differential_attention(build):
    for layer in attention_layers(build("diffllama")):
        assert layer.num_heads == 2
        assert layer.maps == ((0, 2), (1, 3))


def test_keys_that_another_layer_reads_stay(build):
    """Gemma 3n's last layers take their keys and values from earlier ones."""
    layers = attention_layers(build("gemma3n"))
    assert [layer.name for layer in layers] == [f"model.layers.{index}.self_attn" for index in range(4)]
    for layer in layers:
        assert layer.keys_shared
        assert layer.key_value_index == (0, 0, 1, 1)
        projections = {part.module.removeprefix(f"{layer.name}."): entries(part) for part in layer.slices}
        assert projections == {"q_proj": own(4, 8), "o_proj": own(4, 8)}
        assert {part.kind for part in layer.slices} == {"tensor"}


def test_layers_are_in_the_order_of_first_use(build):
    model = build("gpt2", n_layer=3)
    blocks = model.transformer.h
    blocks.append(blocks.pop(0))  # built as 0, 1, 2; run as 1, 2, 0
    assert [model.get_submodule(layer.name).layer_idx for layer in attention_layers(model)] == [1, 2, 0]


# --- linear maps


def test_a_softmax_over_anything_but_keys_is_not_attention():
    """A router's runs over experts, Mesa's over heads; neither shows a head."""
    module, shown = nn.Module(), []
    scores = torch.randn(2, 4, 11, 11)
    with WatchAttention(lambda: module, lambda _: 4, lambda *event: shown.append(event)):
        nn.functional.softmax(scores, dim=1)
        nn.functional.softmax(scores[0, 0], dim=-1)
        nn.functional.softmax(scores, 2)
        nn.functional.softmax(torch.randn(2, 5, 7, 11), dim=-1)
        assert not shown
        found = nn.functional.softmax(scores, dim=-1)
    assert [(event[0] is module, event[1] is found, event[2]) for event in shown] == [(True, True, 1)]


def test_what_is_a_linear_map():
    class Packed(nn.Linear):
        """What quantisation does: other numbers, in another shape."""

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)

    assert is_linear(nn.Linear(2, 3))
    assert is_linear(Conv1D(3, 2))
    assert not is_linear(Packed())
    assert not is_linear(nn.LayerNorm(3))
    assert not is_linear(nn.Bilinear(2, 3, 4))
    assert features(nn.Linear(2, 3)) == features(Conv1D(3, 2)) == (2, 3)
    assert nn.Linear(2, 3).weight.shape[side(nn.Linear(2, 3), "inputs")] == 2
    assert Conv1D(3, 2).weight.shape[side(Conv1D(3, 2), "outputs")] == 3


class LowRank(nn.Module):
    """An adapter: what a linear map gives, and what a narrow detour adds to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, 3, bias=False, dtype=base.weight.dtype)
        self.wide = nn.Linear(3, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + self.wide(self.narrow(states))


def test_adapters_are_seen_through(build):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.v_proj = LowRank(attention.q_proj), LowRank(attention.v_proj)
    plain, layer = attention_layers(model)
    found = {(part.module.removeprefix(f"{layer.name}."), part.name): entries(part) for part in layer.slices}
    whole = {(part.module.removeprefix(f"{plain.name}."), part.name): entries(part) for part in plain.slices}
    for name in ("q_proj", "v_proj"):
        owners = whole.pop((name, "weight"))
        assert whole.pop((name, "bias")) == owners
        whole |= {(f"{name}.{part}", "weight"): owners for part in ("base", "wide")} | {
            (f"{name}.base", "bias"): owners
        }
    assert found == whole


# --- what is refused


def refused(model) -> str:
    with pytest.raises(ModelError) as caught:
        attention_layers(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_models_without_attention_are_refused():
    config = MambaConfig(vocab_size=37, hidden_size=16, state_size=4, num_hidden_layers=1)
    assert "no attention heads" in refused(MambaForCausalLM(config))
    config = FNetConfig(vocab_size=37, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    assert "no attention heads" in refused(FNetForMaskedLM(config))


def test_a_norm_over_all_heads_before_the_output_projection_is_refused():
    """BitNet normalises what all heads give, so that without one of them all others would change."""
    message = refused(BitNetForCausalLM(BitNetConfig(**SMALL)))
    assert "over all" in message
    assert "none can leave alone" in message


class Quantised(nn.Linear):
    """Weights of eight bits and their scale."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = float(base.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.weight.to(states.dtype) * self.scale).T


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_quantised_maps_are_refused(build, name):
    model = build("mistral")
    attention = model.model.layers[1].self_attn
    setattr(attention, name, Quantised(getattr(attention, name)))
    model(torch.ones(1, 3, dtype=torch.long))
    assert "model.layers.1.self_attn" in refused(model)


def test_a_model_that_cannot_be_run_is_refused_with_the_reason(build, monkeypatch):
    model = build("llama")

    def stumble(*_args, **_kwargs):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", stumble)
    assert "out of" in refused(model)


def test_a_model_under_a_probe_is_refused_and_goes_on_being_watched(build, make_batch):
    model = build("llama")
    with AttentionProbe(model, attention_layers(model)) as probe, torch.no_grad():
        assert "watched already" in refused(model)
        model(**make_batch())
        assert sorted(probe.take()) == [0, 1]


# --- discovery leaves no trace


def state(model) -> tuple:
    modules = [
        (
            name,
            module.training,
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.config.to_dict() if hasattr(module, "config") else None,
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    facts = [(name, id(tensor), tensor._version, tensor.requires_grad, tensor.grad) for name, tensor in tensors]
    return modules, facts, torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "albert", "bloom", "falcon-groups", "gpt_oss", "mpnet"])
def test_discovery_leaves_the_model_as_it_was(build, kind):
    """With some modules in training mode, and one weight frozen."""
    model = build(kind, dtype=torch.float32)
    next(iter(model.base_model.children())).train()
    next(model.parameters()).requires_grad_(False)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    attention_layers(model)
    assert state(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_refusal_leaves_the_model_as_it_was(build, monkeypatch):
    model = build("llama").train()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda *_: 1 / 0)
    before = state(model)
    refused(model)
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_discovery_does_not_move_a_bit_of_the_output(build, make_batch, kind, dtype):
    model, batch = build(kind, dtype=dtype), make_batch("right")
    with torch.no_grad():
        before = model(**batch).logits
        attention_layers(model)
        assert torch.equal(model(**batch).logits.nan_to_num(), before.nan_to_num())


def test_discovery_works_wherever_it_is_called(build):
    expected = attention_layers(build("gpt_oss"))
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            model = build("gpt_oss").train()
            assert attention_layers(model) == expected
    model(torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()


def test_layouts_do_not_depend_on_weights_or_seeds(build):
    """Weights that happen to be zero hide nothing."""
    model = build("llama")
    expected = attention_layers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(7)
    assert attention_layers(model) == expected


# --- numbers


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3", "deepseek_v3"])
def test_output_norms_are_those_of_the_slices(build, output_projection, kind):
    model = build(kind)
    for layer in attention_layers(model):
        module = output_projection(model, layer.index)
        weight = module.weight.detach().numpy()
        by_input = weight if kind == "gpt2" else weight.T
        for head, norm in enumerate(output_norms(model, layer)):
            rows = by_input[head * layer.value_dim : (head + 1) * layer.value_dim]
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

"""Pruned models against their masked twins: dense models whose muted heads add nothing to the output projection."""

import copy
import json
import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from compressor.attention import attention_layers, prune_heads, removed_heads
from compressor.attention.slim import Editor
from compressor.errors import PlanError

HEADS = {"gpt2": 4, "bert": 4, "roberta": 4, "llama": 6, "mistral": 6, "qwen3": 4}
HEADS |= dict.fromkeys(["albert", "bloom", "deepseek_v3", "falcon", "gpt_bigcode", "gpt_bigcode-heads", "gpt_neox"], 4)
HEADS |= dict.fromkeys(["cohere", "falcon-groups", "gpt_oss", "olmo2", "phi3", "qwen3_next"], 6)
HEADS |= {"codegen": 8, "gemma3n": 4, "mpnet": 4}
# The width of a head's slice of the output projection's input.
DIM = dict.fromkeys(HEADS, 6) | dict.fromkeys(["llama", "cohere", "codegen", "falcon-groups", "olmo2", "phi3"], 4)
DIM |= {"gemma3n": 8, "qwen3": 10, "qwen3_next": 8}
GROUPED = ("llama", "mistral", "qwen3", "cohere", "gpt_oss", "olmo2", "phi3", "qwen3_next")  # on two keys
SINGLE = ("bloom",)  # its own mask is -inf in double precision, which no padded row survives
Plan = Mapping[int, Sequence[int]]

# Llama and Mistral: heads 0-2 read key/value head 0, heads 3-5 read key/value head 1.
PLANS = {
    "gpt2": [{0: [1]}, {0: [0, 3], 1: [0, 1, 2]}],
    "bert": [{1: [2]}, {0: [0, 3], 1: [1, 2, 3]}],
    "roberta": [{0: [0, 1, 2], 1: [3]}],
    "llama": [
        {0: [0, 4], 1: [2, 3]},  # even: the stock code path
        {0: [0, 1, 2]},  # a whole group
        {0: [1, 3, 4, 5], 1: [3, 4, 5]},  # a whole group and more
        {0: [0], 1: [3, 4]},  # uneven, three and two, three and one
    ],
    "mistral": [{0: [0, 5]}, {0: [1, 2], 1: [5]}],
    "qwen3": [{0: [0, 2]}, {1: [3]}, {0: [2, 3], 1: [0]}],
    "albert": [{0: [1, 2]}],
    "bloom": [{0: [0], 1: [1, 2]}],
    "codegen": [{1: [0, 3, 4, 7]}],  # one of every block
    "cohere": [{0: [1, 4], 1: [3, 4, 5]}, {0: [2]}],
    "deepseek_v3": [{0: [1], 1: [0, 1, 3]}],
    "falcon": [{0: [0], 1: [1, 2]}],
    "falcon-groups": [{0: [0, 4], 1: [2, 3]}, {1: [0, 1, 2]}],
    "gemma3n": [{0: [1, 3], 2: [0, 2]}, {0: [0], 1: [2, 3], 2: [0, 1], 3: [0, 1, 2]}],
    "gpt_bigcode": [{0: [0], 1: [1, 2]}],
    "gpt_bigcode-heads": [{0: [0], 1: [1, 2]}],
    "gpt_neox": [{0: [3], 1: [0, 2]}],
    "gpt_oss": [{0: [1, 4], 1: [0, 1, 2]}, {1: [5]}],
    "mpnet": [{0: [0], 1: [1, 3]}],
    "olmo2": [{0: [0, 3], 1: [0, 1, 2]}, {0: [5]}],
    "phi3": [{0: [0, 3], 1: [0, 1, 2]}, {0: [5]}],
    "qwen3_next": [{0: [0, 3], 1: [0, 1, 2]}, {0: [5]}],
}
CASES = [(kind, plan) for kind, plans in PLANS.items() for plan in plans]


def cases(chosen: Sequence[tuple[str, Plan]]) -> pytest.MarkDecorator:
    names = [f"{kind}-{plan}".replace(" ", "") for kind, plan in chosen]
    return pytest.mark.parametrize(("kind", "plan"), chosen, ids=names)


KIND_AND_PLAN = cases(CASES)


@pytest.fixture
def pair(build, mute):
    """A pruned model and its masked twin, made from the same weights."""

    def make(kind: str, plan: Plan, *, allow_empty: bool = False, **settings):
        dense = build(kind, **({"dtype": torch.float32} if kind in SINGLE else {}) | settings)
        pruned = prune_heads(copy.deepcopy(dense), plan, allow_empty=allow_empty)
        return pruned, mute(dense, plan, DIM[kind])

    return make


def logits(model, batch) -> torch.Tensor:
    """Logits of the real tokens, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
    assert torch.isfinite(expected).all()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@KIND_AND_PLAN
def test_pruned_equals_masked_twin(pair, make_batch, kind, plan):
    pruned, twin = pair(kind, plan)
    for padding in ("none", "right", "left"):
        batch = make_batch(padding)
        assert_close(logits(pruned, batch), logits(twin, batch))
    stock = "sdpa" if type(pruned)._supports_sdpa else "eager"
    assert pruned.config._attn_implementation == stock  # also where groups became uneven


@KIND_AND_PLAN
def test_pruned_equals_masked_twin_under_eager_attention(pair, make_batch, kind, plan):
    """In float32: transformers' eager Llama casts the softmax to it, and gives NaN for padded float64 rows."""
    pruned, twin = pair(kind, plan, implementation="eager", dtype=torch.float32)
    for padding in ("none", "right", "left"):
        batch = make_batch(padding)
        assert_close(logits(pruned, batch), logits(twin, batch))
    assert pruned.config._attn_implementation == "eager"


@KIND_AND_PLAN
def test_every_removal_matters(build, make_batch, kind, plan):
    """Otherwise all of these comparisons would be empty: the muted heads do something in the dense model."""
    dense, batch = build(kind, dtype=torch.float32), make_batch()
    pruned = prune_heads(copy.deepcopy(dense), plan)
    assert float((logits(dense, batch) - logits(pruned, batch)).abs().max()) > 1e-2
    assert pruned.num_parameters() < dense.num_parameters()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    data=st.data(),
    kind=st.sampled_from(["gpt2", "bert", "llama", "qwen3", "cohere", "deepseek_v3", "gpt_bigcode", "gpt_oss"]),
)
def test_any_plan_equals_its_masked_twin(build, mute, make_batch, data, kind):
    heads = range(HEADS[kind])
    subset = st.lists(st.sampled_from(heads), unique=True, max_size=len(heads))
    plan = data.draw(st.dictionaries(st.sampled_from([0, 1]), subset))
    dense = build(kind, seed=data.draw(st.integers(0, 3)))
    pruned = prune_heads(copy.deepcopy(dense), plan, allow_empty=True)
    batch = make_batch(data.draw(st.sampled_from(["none", "right"])))
    assert_close(logits(pruned, batch), logits(mute(dense, plan, DIM[kind]), batch))
    for layer in attention_layers(pruned):
        assert layer.num_heads == len(heads) - len(plan.get(layer.index, ()))


def generate(model, batch, **kwargs):
    output = model.generate(
        **batch,
        max_new_tokens=7,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences, torch.stack(output.logits), output.past_key_values


GENERATING = cases([case for case in CASES if case[0] not in ("albert", "bert", "mpnet", "roberta")])


def cached(kind: str, survivors: Sequence[int]) -> tuple[int, int, int]:
    """Key/value heads that the cache holds for some heads, and the widths of a key and a value."""
    if kind == "deepseek_v3":
        return 1, 7, 4  # the latent that all heads share, and the part of the key that knows positions
    if kind == "gemma3n":
        return 2, 8, 8  # other layers read these keys
    if kind in ("falcon", "gpt_bigcode"):
        keys = 1
    else:  # Falcon repeats the keys of a group before it caches them
        keys = len({head // (HEADS[kind] // 2) for head in survivors}) if kind in GROUPED else len(survivors)
    return keys, DIM[kind], DIM[kind]


@GENERATING
def test_generation_with_a_cache_equals_the_twin_and_the_cache_is_slim(pair, make_batch, kind, plan):
    pruned, twin = pair(kind, plan)
    batch = make_batch("left")
    tokens, steps, cache = generate(pruned, batch)
    expected_tokens, expected_steps, _ = generate(twin, batch)
    assert tokens.tolist() == expected_tokens.tolist()
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 7
    assert_close(steps, expected_steps)
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(filled) == 2
    for index, layer in enumerate(filled):
        slim, *widths = cached(kind, [head for head in range(HEADS[kind]) if head not in plan.get(index, ())])
        for states, width in zip((layer.keys, layer.values), widths, strict=True):
            assert states.shape == (3, slim, tokens.shape[1] - 1, width)


@GENERATING
def test_generation_with_a_static_cache_equals_the_twin(pair, make_batch, kind, plan):
    """Room for all tokens is made in advance, by the config's numbers or those of the first keys."""
    pruned, twin = pair(kind, plan)
    batch = make_batch("left")
    tokens, steps, _ = generate(pruned, batch, cache_implementation="static")
    expected_tokens, expected_steps, _ = generate(twin, batch)
    assert tokens.tolist() == expected_tokens.tolist()
    assert_close(steps, expected_steps)


def test_stepwise_logits_equal_those_of_one_pass(pair, make_batch):
    pruned, _ = pair("llama", {0: [0], 1: [3, 4]})
    ids = make_batch()["input_ids"]
    cache, steps = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = pruned(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        assert_close(torch.cat(steps, 1), pruned(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("empty", [0, 1])
def test_generation_with_an_emptied_layer(pair, make_batch, kind, empty):
    plan = {empty: range(HEADS[kind]), 1 - empty: [1]}
    pruned, twin = pair(kind, plan, allow_empty=True)
    batch = make_batch("left")
    tokens, steps, _ = generate(pruned, batch)
    expected_tokens, expected_steps, _ = generate(twin, batch)
    assert tokens.tolist() == expected_tokens.tolist()
    assert_close(steps, expected_steps)


def test_beam_search_with_an_emptied_layer(pair, make_batch):
    """Beams reorder the whole cache, the placeholder of the empty layer too."""
    pruned, twin = pair("gpt2", {0: range(4)}, allow_empty=True)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    batch = make_batch()
    assert pruned.generate(**batch, **options).tolist() == twin.generate(**batch, **options).tolist()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "llama", "mistral", "gpt_oss", "mpnet"])
@pytest.mark.parametrize("plan", [[0], [1], [0, 1]])
def test_emptied_layers_equal_the_twin(pair, make_batch, kind, plan):
    """With and without a bias at the output projection, which is all that remains."""
    emptied = {layer: list(range(HEADS[kind])) for layer in plan}
    pruned, twin = pair(kind, emptied, allow_empty=True)
    for padding in ("none", "right", "left"):
        batch = make_batch(padding)
        assert_close(logits(pruned, batch), logits(twin, batch))
    with pytest.raises(PlanError, match="no heads left"):
        prune_heads(pruned, {plan[0]: [0]}, allow_empty=True)


def named(model, kind: str, layer: int) -> dict[str, nn.Module]:
    """Query, key, value (or all three fused) and output, spelt out per architecture."""
    if kind == "gpt2":
        attention = model.transformer.h[layer].attn
        return {"fused": attention.c_attn, "output": attention.c_proj}
    if kind in ("bert", "roberta"):
        attention = model.base_model.encoder.layer[layer].attention
        inner = attention.self
        return {"query": inner.query, "key": inner.key, "value": inner.value, "output": attention.output.dense}
    attention = model.model.layers[layer].self_attn
    return {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
    }


def expected_slices(name: str, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, kept: list[int]):
    """The surviving parts of a dense weight and bias, by reshaping them head by head."""
    dim = DIM[kind]
    if name == "fused":
        inputs = weight.shape[0]
        by_head = weight.reshape(inputs, 3, -1, dim)[:, :, kept].reshape(inputs, -1)
        return by_head, bias.reshape(3, -1, dim)[:, kept].reshape(-1)
    if name == "output":
        if kind == "gpt2":
            return weight.reshape(-1, dim, weight.shape[1])[kept].reshape(-1, weight.shape[1]), bias
        return weight.reshape(weight.shape[0], -1, dim)[:, kept].reshape(weight.shape[0], -1), bias
    if name in ("key", "value") and kind == "llama":
        kept = sorted({head // 3 for head in kept})
    cut = weight.reshape(-1, dim, weight.shape[1])[kept].reshape(-1, weight.shape[1])
    return cut, None if bias is None else bias.reshape(-1, dim)[kept].reshape(-1)


SLICED = [("gpt2", [0, 2]), ("bert", [1]), ("roberta", [0, 1, 3]), ("llama", [0, 1, 2]), ("llama", [1, 3, 4])]


@pytest.mark.parametrize(("kind", "removed"), SLICED)
def test_weights_and_biases_are_the_surviving_slices_and_nothing_else_changes(build, kind, removed):
    dense = build(kind)
    pruned = prune_heads(copy.deepcopy(dense), {1: removed})
    kept = [head for head in range(HEADS[kind]) if head not in removed]
    cut = {id(module) for module in named(pruned, kind, 1).values()}
    for name, before in named(dense, kind, 1).items():
        after = named(pruned, kind, 1)[name]
        weight, bias = expected_slices(name, before.weight, before.bias, kind, kept)
        assert torch.equal(after.weight, weight)
        assert (after.bias is None) == (bias is None)
        assert bias is None or torch.equal(after.bias, bias)
        rows, columns = after.weight.shape
        if isinstance(after, Conv1D):
            assert (after.nx, after.nf) == (rows, columns)
        else:
            assert (after.out_features, after.in_features) == (rows, columns)
    for (name, before), after in zip(dense.named_modules(), pruned.modules(), strict=True):
        if id(after) not in cut:
            for parameter, old in before.named_parameters(recurse=False):
                assert torch.equal(getattr(after, parameter), old), name


@pytest.mark.parametrize(("kind", "removed"), SLICED)
def test_gradients_equal_those_of_the_twin_on_surviving_weights(pair, make_batch, kind, removed):
    pruned, twin = pair(kind, {1: removed})
    batch = make_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = [model(**batch, labels=labels).loss for model in (pruned, twin)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for loss in losses:
        loss.backward()
    kept = [head for head in range(HEADS[kind]) if head not in removed]
    for name, dense in named(twin, kind, 1).items():
        slim = named(pruned, kind, 1)[name]
        bias = None if dense.bias is None else dense.bias.grad
        weight, bias = expected_slices(name, dense.weight.grad, bias, kind, kept)
        assert_close(slim.weight.grad, weight)
        if bias is not None:
            # A key's bias moves all scores of a query alike: its gradient is zero, but for dust.
            assert torch.allclose(slim.bias.grad, bias, rtol=1e-9, atol=1e-12)
    for name, parameter in pruned.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    rest = dict(twin.named_parameters())
    embedding = next(
        name for name in rest if name.endswith(("wte.weight", "word_embeddings.weight", "embed_tokens.weight"))
    )
    assert_close(dict(pruned.named_parameters())[embedding].grad, rest[embedding].grad)


@pytest.mark.parametrize(("kind", "removed"), [("gpt2", [0]), ("llama", [1, 3, 4])])
def test_one_optimiser_step_lowers_the_loss(build, make_batch, kind, removed):
    model = prune_heads(build(kind), {0: removed}).train()
    ids = make_batch()["input_ids"]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(ids, labels=ids).loss
    before.backward()
    optimiser.step()
    assert model(ids, labels=ids).loss.item() < before.item()


@pytest.mark.parametrize("removed", [[0], [0, 3]], ids=["uneven", "even"])
def test_a_pruned_model_can_be_trained_after_inference_mode(build, make_batch, removed):
    """As in `compress`: Lightning measures perplexity in inference mode, and fine-tuning follows."""
    model = prune_heads(build("llama"), {0: removed})
    ids = make_batch()["input_ids"]
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert torch.isfinite(model.model.layers[0].self_attn.k_proj.weight.grad).all()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "bloom", "mpnet", "olmo2"])
def test_pruning_twice_is_pruning_once_with_the_union(build, make_batch, kind):
    twice = prune_heads(build(kind), {0: [1], 1: [0, 2]})
    prune_heads(twice, {0: [1], 1: [1]})  # originally heads 2 of layer 0, 3 of layer 1
    once = prune_heads(build(kind), {0: [1, 2], 1: [0, 2, 3]})
    assert removed_heads(twice) == removed_heads(once) == {0: (1, 2), 1: (0, 2, 3)}
    assert twice.config.pruned_heads == {"0": [1, 2], "1": [0, 2, 3]}
    assert attention_layers(twice) == attention_layers(once)
    for (name, left), right in zip(twice.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert torch.equal(logits(twice, make_batch()), logits(once, make_batch()))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5), max_size=3))
def test_any_sequence_of_prunings_is_recorded_in_the_original_numbering(build, order, cuts):
    model = build("llama")
    alive = list(range(6))
    doomed = order[:5]
    bounds = [0, *sorted(cut for cut in cuts if cut < 5), 5]
    for start, stop in pairwise(bounds):
        originals = doomed[start:stop]
        prune_heads(model, {0: [alive.index(head) for head in originals]})
        alive = [head for head in alive if head not in originals]
    assert removed_heads(model) == {0: tuple(sorted(doomed))}
    query = build("llama").model.layers[0].self_attn.q_proj.weight.reshape(6, 4, -1)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, query[alive].reshape(4, -1))


def test_pruning_again_can_make_uneven_groups_even(pair, make_batch):
    plan = {0: [0, 3]}
    pruned, twin = pair("llama", {0: [0]})
    prune_heads(pruned, {0: [2]})  # originally head 3
    twin = pair("llama", plan)[1]
    assert removed_heads(pruned) == {0: (0, 3)}
    assert_close(logits(pruned, make_batch("right")), logits(twin, make_batch("right")))


def test_an_uneven_layer_can_be_pruned_further(pair, make_batch):
    pruned, _ = pair("llama", {0: [0], 1: [3, 4]})
    prune_heads(pruned, {0: [0], 1: [3]})  # originally head 1 of layer 0, head 5 of layer 1: its group goes
    twin = pair("llama", {0: [0, 1], 1: [3, 4, 5]})[1]
    assert attention_layers(pruned)[1].num_key_value_heads == 1
    assert_close(logits(pruned, make_batch("left")), logits(twin, make_batch("left")))


BAD = [
    {2: [0]},
    {-1: [0]},
    {"0": [0]},
    {0.0: [0]},
    {0: [9]},
    {0: [-1]},
    {0: ["1"]},
    {0: "12"},
    {0: [1.0]},
    {0: [1, 1]},
    {0: range(6)},
    {0: [True]},
    {True: [0]},
    {0: [None]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_bad_plan_leaves_the_model_bit_identical(build, kind, bad):
    """A good part of the plan comes first, so that checking while cutting would show."""
    if kind == "gpt2" and isinstance(bad.get(0), range):
        bad = {0: range(4)}
    plan = ({1: [0]} if True not in bad else {0: [1]}) | bad
    assert_refused(prune_heads(build(kind), {1: [2]}), plan)


def assert_refused(model, plan: Plan) -> str:
    """Refuse a plan in one line, and leave the model as it is."""
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    attributes = [(name, set(vars(module)) - {"_indices"}) for name, module in model.named_modules()]
    layers = attention_layers(model)
    with pytest.raises(PlanError) as caught:
        prune_heads(model, plan)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_dict() == config
    assert [(name, set(vars(module)) - {"_indices"}) for name, module in model.named_modules()] == attributes
    assert attention_layers(model) == layers
    return str(caught.value)


@pytest.mark.parametrize("removed", [[0], [0, 1, 3], [0, 3, 4]])
def test_uneven_groups_are_refused_where_the_code_repeats_keys_by_itself(build, removed):
    """Falcon lays each group's queries, key and value side by side, as many in each."""
    message = assert_refused(build("falcon-groups"), {0: [2, 5], 1: removed})
    assert "layer 1 (transformer.h.1.self_attention)" in message
    assert "--unit query" in message


@pytest.mark.parametrize("removed", [[0], [0, 1], [0, 2, 4], [0, 1, 2, 3]])
def test_heads_that_the_code_keeps_in_fours_leave_in_fours(build, removed):
    """CodeGen's projection is laid out in four blocks; without two of them it runs, and takes keys for queries."""
    assert "layer 0" in assert_refused(build("codegen"), {1: [1, 2, 5, 6], 0: removed})


class LowRank(nn.Module):
    """An adapter: what a linear map gives, and what a narrow detour adds to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, 3, bias=False, dtype=base.weight.dtype)
        self.wide = nn.Linear(3, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + self.wide(self.narrow(states))


def test_adapters_are_cut_with_what_they_adapt(build, mute, make_batch):
    dense = build("llama")
    attention = dense.model.layers[1].self_attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention.q_proj, attention.v_proj = LowRank(attention.q_proj), LowRank(attention.v_proj)
    plan = {0: [1], 1: [0, 1, 2, 4]}
    pruned = prune_heads(copy.deepcopy(dense), plan)
    assert pruned.model.layers[1].self_attn.v_proj.wide.weight.shape == (4, 3)
    assert_close(logits(pruned, make_batch("right")), logits(mute(dense, plan, 4), make_batch("right")))


def test_an_adapter_of_the_output_projection_is_refused(build):
    """The heads reach two maps at once; only one of them would be cut."""
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = LowRank(attention.o_proj)
    assert "layer 1 (model.layers.1.self_attn)" in assert_refused(model, {0: [1], 1: [0, 3]})


class Biased(nn.Module):
    def forward(self, scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return scores + bias


@pytest.mark.parametrize("by_name", [True, False])
def test_of_a_bias_for_each_head_what_stays_is_used_and_one_for_all_is_left_whole(by_name):
    """Entries [batch · 4 heads, …] that repeat, and a bias that is broadcast."""
    model = nn.ModuleDict({"attention": Biased()})
    Editor(model.get_submodule, model.set_submodule).keep_argument("attention", "bias", 0, [1, 3], 4)
    bias, scores = torch.randn(8, 5), torch.randn(4, 5)

    def biased(bias: torch.Tensor) -> torch.Tensor:
        return model["attention"](scores, bias=bias) if by_name else model["attention"](scores, bias)

    assert torch.equal(biased(bias), scores + bias[[1, 3, 5, 7]])
    assert torch.equal(biased(bias[:1]), scores + bias[0])


def test_an_iterator_of_heads_is_read_once(build):
    model = prune_heads(build("gpt2"), {0: iter([2, 0])})
    assert removed_heads(model) == {0: (0, 2)}


@pytest.mark.parametrize("plan", [{}, {0: []}])
def test_an_empty_plan_changes_nothing(build, plan):
    model, dense = prune_heads(build("gpt2"), plan), build("gpt2")
    assert removed_heads(model) == {}
    assert not getattr(model.config, "pruned_heads", None)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_frozen_weights_stay_frozen_and_trainable_ones_trainable(build, kind):
    model = build(kind)
    projection = named(model, kind, 0)["output"]
    projection.weight.requires_grad_(False)
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune_heads(model, {0: [0], 1: [1]})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == expected
    assert not all(expected.values())
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta"])
def test_tied_weights_stay_tied(build, kind):
    model = prune_heads(build(kind), {0: [0], 1: [1, 2]})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "plan"), [("gpt2", {0: [0, 3]}), ("llama", {0: [0], 1: [3, 4]}), ("bert", {0: range(4)})]
)
def test_deep_copies_are_whole_and_independent(build, make_batch, kind, plan):
    model = prune_heads(build(kind), plan, allow_empty=True)
    batch = make_batch("right")
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    prune_heads(twin, {1: [0]})
    assert torch.equal(logits(model, batch), expected)
    assert removed_heads(model) != removed_heads(twin)


@pytest.mark.parametrize("training", [True, False])
def test_an_emptied_layer_keeps_its_mode(build, training):
    model = build("gpt2").train(training)
    prune_heads(model, {0: range(4)}, allow_empty=True)
    assert model.transformer.h[0].attn.training is training


def test_parameters_fall_by_exactly_the_slices_of_the_heads(build):
    """GPT-2: a head has 3 · (width + 1) · dim in c_attn and dim · width in c_proj."""
    dense = build("gpt2")
    pruned = prune_heads(build("gpt2"), {0: [0, 1], 1: [3]})
    assert dense.num_parameters() - pruned.num_parameters() == 3 * (3 * (24 + 1) * 6 + 6 * 24)


def test_dropout_and_dtype_survive(build):
    model = prune_heads(build("llama", dtype=torch.bfloat16), {0: [0]})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- what the config says


NUMBERS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")


def told(model, *names: str) -> list[int]:
    """What the config says of all layers at once."""
    assert "per_layer_config" not in model.config.to_dict()
    return [getattr(model.config, name) for name in names]


def told_by_layer(model) -> list[tuple[int, int]]:
    """Heads and key/value heads of every layer."""
    layers = model.config.per_layer_config
    return [(layers[index].num_attention_heads, layers[index].num_key_value_heads) for index in (0, 1)]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({0: [0, 3], 1: [1, 4]}, [4, 2, 4, 24]),
        ({0: [0, 1, 2], 1: [3, 4, 5]}, [3, 1, 4, 24]),
        ({0: [0, 1, 3, 4], 1: [1, 2, 3, 5]}, [2, 2, 4, 24]),
    ],
    ids=str,
)
def test_the_config_tells_what_all_layers_have(build, plan, expected):
    model = prune_heads(build("llama"), plan)
    assert told(model, *NUMBERS) == expected
    assert isinstance(model.config, LlamaConfig)
    assert type(model.config).__name__ == "LlamaConfig"
    stored = json.loads(model.config.to_json_string())
    assert stored["num_attention_heads"] == expected[0]
    assert stored["pruned_heads"] == {str(layer): removed for layer, removed in plan.items()}
    assert stored["dense_config"][""]["num_attention_heads"] == 6


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"n_head": 2, "num_attention_heads": 2, "head_dim": 6, "n_embd": 24}),
        ("bert", {"num_attention_heads": 2, "head_dim": 6, "hidden_size": 24}),
        ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}),
        ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10}),
        ("deepseek_v3", {"num_attention_heads": 2, "num_key_value_heads": 2, "v_head_dim": 6}),
        ("gpt_bigcode", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("gpt_bigcode-heads", {"num_attention_heads": 2, "num_key_value_heads": 2}),
        ("gpt_oss", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}),
        ("gpt_neox", {"num_attention_heads": 2, "head_dim": 6}),
        ("falcon-groups", {"num_attention_heads": 4, "num_kv_heads": 2, "head_dim": 4}),
    ],
)
def test_the_config_tells_it_in_the_words_of_its_class(build, kind, fields):
    model = prune_heads(build(kind), {0: [0, 3], 1: [0, 3]})
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert "per_layer_config" not in model.config.to_dict()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model.config)))
    assert {name: getattr(again, name) for name in fields} == fields


@pytest.mark.parametrize(("kind", "name"), [("llama", "num_key_value_heads"), ("falcon-groups", "num_kv_heads")])
def test_the_config_tells_of_groups_that_left(build, kind, name):
    assert getattr(prune_heads(build(kind), {0: [0, 1, 2], 1: [3, 4, 5]}).config, name) == 1


def test_the_config_tells_what_each_layer_has(build):
    model = prune_heads(build("llama"), {0: [0, 1, 2, 3]})
    assert told_by_layer(model) == [(2, 1), (6, 2)]
    assert (model.config.hidden_size, model.config.head_dim) == (24, 4)
    stored = json.loads(model.config.to_json_string())
    assert stored["num_attention_heads"] == 6
    assert stored["per_layer_config"]["0"] == {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("kind", "plan", "heads"),
    [
        ("llama", {0: [0, 1], 1: [4, 5]}, 4),  # uneven groups
        ("llama", {0: [5], 1: [0]}, 5),  # which is no number for Llama's own config: 5 does not divide 24
        ("olmo2", {0: [0, 3], 1: [1, 4]}, 4),  # norms that compute more than they return
        ("bloom", {0: [0], 1: [1]}, 3),  # a bias for heads that are gone
    ],
)
def test_layers_that_no_stock_class_would_build_are_told_one_by_one(build, kind, plan, heads):
    """One number for all would have stock code build another model, in which heads read others' keys."""
    model = prune_heads(build(kind), plan)
    stored = json.loads(model.config.to_json_string())
    name = model.config.attribute_map.get("num_attention_heads", "num_attention_heads")
    assert [layer[name] for _, layer in sorted(stored["per_layer_config"].items())] == [heads, heads]
    assert stored[name] == HEADS[kind]


def test_an_emptied_layer_has_no_heads_in_the_config(build):
    model = prune_heads(build("gpt2"), {1: range(4)}, allow_empty=True)
    assert [model.config.per_layer_config[index].n_head for index in (0, 1)] == [4, 0]


def test_the_config_stays_true_when_more_is_removed(build):
    """Equal, then unequal, then equal again; what the dense model had is kept throughout."""
    model = prune_heads(build("llama"), {0: [0, 3], 1: [1, 5]})
    dense = dict(model.config.dense_config[""])
    assert dense.items() >= {"num_attention_heads": 6, "num_key_value_heads": 2}.items()
    prune_heads(model, {1: [0, 1]})  # originally 0 and 2: the first group is gone
    assert told_by_layer(model) == [(4, 2), (2, 1)]
    prune_heads(model, {0: [2, 3]})
    assert told(model, *NUMBERS) == [2, 1, 4, 24]
    assert removed_heads(model) == {0: (0, 3, 4, 5), 1: (0, 1, 2, 5)}
    assert model.config.dense_config[""].items() >= dense.items()


@pytest.mark.parametrize("plan", [{0: [0, 3], 1: [1, 5]}, {0: [0]}, {0: [5], 1: [0]}], ids=str)
def test_a_pruned_config_can_be_copied_pickled_and_saved(build, tmp_path, plan):
    model = prune_heads(build("llama"), plan)
    expected = model.config.to_dict()
    assert isinstance(model.config, LlamaConfig)
    for twin in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert isinstance(twin, LlamaConfig)
        assert twin.to_dict() == expected
    model.config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["pruned_heads"] == expected["pruned_heads"]
    assert stored["model_type"] == "llama"


def test_pruning_one_model_leaves_the_config_of_another_alone(build):
    """Relaxing the checks of a config class would otherwise be seen by all of its instances."""
    prune_heads(build("llama"), {0: [5], 1: [0]})
    assert type(build("llama").config) is LlamaConfig
    with pytest.raises(Exception, match="multiple of the number of attention heads"):
        LlamaConfig(hidden_size=24, num_attention_heads=5)

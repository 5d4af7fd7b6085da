"""Models without some channels against masked twins: dense models whose down projections take nothing from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import attention_layers, mlp_layers, prune_channels, prune_heads
from compressor.attention import removed_heads
from compressor.errors import PlanError
from compressor.mlp import removed_channels, silenced_channels

Plan = Mapping[int, Sequence[int]]
KINDS = ("bert", "bloom", "codegen", "cohere", "deberta-v2", "deepseek_v3", "distilbert", "falcon", "gemma3", "gpt2")
KINDS += ("gpt_bigcode", "gpt_neox", "llama", "mistral", "modernbert", "mpnet", "olmo2", "opt", "phi3", "qwen3")
KINDS += ("qwen3_next", "roberta", "starcoder2")
UNEVEN: Plan = {0: [0, 5, 31], 1: [2, *range(8, 20)]}
EVEN: Plan = {0: [0, 1, 30], 1: [7, 8, 31]}
PADDINGS = ("none", "right", "left")


def logits(model, batch) -> torch.Tensor:
    """Logits of the real tokens, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
    assert torch.isfinite(expected).all()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("plan", [UNEVEN, EVEN, {1: [3]}], ids=["uneven", "even", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_equals_masked_twin(tiny, masked, make_batch, kind, plan):
    dense = tiny(kind)
    pruned, twin = prune_channels(copy.deepcopy(dense), plan), masked(dense, plan)
    for padding in PADDINGS:
        if kind == "bloom" and padding == "left":
            continue  # its own mask is -inf, which no row survives that is masked throughout
        assert_close(logits(pruned, make_batch(padding)), logits(twin, make_batch(padding)))
    assert float((logits(dense, make_batch()) - logits(pruned, make_batch())).abs().max()) > 1e-3
    assert [layer.num_channels for layer in mlp_layers(pruned)] == [
        layer.num_channels - len(plan.get(layer.index, ())) for layer in mlp_layers(dense)
    ]
    assert pruned.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("plan", [{0: [0, 5, 31]}, {0: range(1, 32)}])
def test_an_mlp_that_is_used_twice_loses_channels_for_both(tiny, masked, make_batch, plan):
    dense = tiny("albert")
    pruned = prune_channels(copy.deepcopy(dense), plan)
    assert_close(logits(pruned, make_batch("right")), logits(masked(dense, plan), make_batch("right")))
    assert pruned.config.intermediate_size == 32 - len(plan[0])


def test_the_layers_of_gemma_3n_that_can_be_pruned(tiny, masked, make_batch):
    """Its first MLP cannot; the others are counted from 0, and stand in the config's list where they are."""
    dense = tiny("gemma3n")
    pruned = prune_channels(copy.deepcopy(dense), {0: [3, 4], 2: [0]})
    assert_close(logits(pruned, make_batch()), logits(masked(dense, {1: [3, 4], 3: [0]}), make_batch()))
    assert pruned.config.intermediate_size == [32, 30, 32, 31]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(["gpt2", "llama", "bert", "phi3", "opt"]))
def test_any_plan_equals_its_masked_twin(tiny, masked, make_batch, data, kind):
    subset = st.lists(st.integers(0, 31), unique=True, max_size=31)
    plan = data.draw(st.dictionaries(st.sampled_from([0, 1]), subset))
    dense = tiny(kind, seed=data.draw(st.integers(0, 2)))
    pruned = prune_channels(copy.deepcopy(dense), plan)
    batch = make_batch(data.draw(st.sampled_from(PADDINGS)))
    assert_close(logits(pruned, batch), logits(masked(dense, plan), batch))
    assert [layer.num_channels for layer in mlp_layers(pruned)] == [32 - len(plan.get(index, ())) for index in (0, 1)]


@pytest.mark.parametrize("kind", ["llama", "bert", "opt", "phi3", "modernbert"])
def test_an_emptied_mlp_adds_its_bias_and_nothing_else(tiny, masked, make_batch, kind):
    dense = tiny(kind)
    with pytest.raises(PlanError, match="all 32 channels of layer 0; leave one, or allow empty layers"):
        prune_channels(dense, {0: range(32)})
    emptied = {0: range(32), 1: [4]}
    pruned = prune_channels(copy.deepcopy(dense), emptied, allow_empty=True)
    assert_close(logits(pruned, make_batch("right")), logits(masked(dense, emptied), make_batch("right")))
    with pytest.raises(PlanError, match="no channels left"):
        prune_channels(pruned, {0: [0]}, allow_empty=True)
    prune_channels(pruned, {1: [0]})
    assert [layer.num_channels for layer in mlp_layers(pruned)] == [0, 30]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "phi3"])
def test_silencing_is_masking_and_ends_with_its_context(tiny, masked, make_batch, kind):
    dense, batch = tiny(kind), make_batch("right")
    before = logits(dense, batch)
    with silenced_channels(dense, UNEVEN) as model:
        assert model is dense
        assert_close(logits(dense, batch), logits(masked(dense, UNEVEN), batch))
    assert torch.equal(logits(dense, batch), before)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "opt"])
def test_generation_equals_that_of_the_twin(tiny, masked, make_batch, kind):
    dense = tiny(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    pruned = prune_channels(copy.deepcopy(dense), UNEVEN)
    batch = make_batch("left")
    assert pruned.generate(**batch, **options).tolist() == masked(dense, UNEVEN).generate(**batch, **options).tolist()


def kept_slices(kind: str, model) -> dict[str, torch.Tensor]:
    """What should be left of layer 1 without the channels of UNEVEN, by slicing the dense weights."""
    stay = [channel for channel in range(32) if channel not in UNEVEN[1]]
    state = model.state_dict()
    if kind == "gpt2":
        name = "transformer.h.1.mlp."
        up = {f"{name}c_fc.weight": state[f"{name}c_fc.weight"][:, stay], f"{name}c_fc.bias": None}
        up[f"{name}c_fc.bias"] = state[f"{name}c_fc.bias"][stay]
        return up | {f"{name}c_proj.weight": state[f"{name}c_proj.weight"][stay]}
    if kind == "bert":
        name = "bert.encoder.layer.1."
        up = {f"{name}intermediate.dense.{part}": state[f"{name}intermediate.dense.{part}"][stay] for part in PARTS}
        return up | {f"{name}output.dense.weight": state[f"{name}output.dense.weight"][:, stay]}
    name = "model.layers.1.mlp."
    down = {f"{name}down_proj.weight": state[f"{name}down_proj.weight"][:, stay]}
    if kind == "phi3":
        gate, up = state[f"{name}gate_up_proj.weight"].chunk(2)
        return down | {f"{name}gate_up_proj.weight": torch.cat([gate[stay], up[stay]])}
    return down | {f"{name}{part}.weight": state[f"{name}{part}.weight"][stay] for part in ("gate_proj", "up_proj")}


PARTS = ("weight", "bias")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "phi3"])
def test_weights_are_the_surviving_slices_and_nothing_else_changes(tiny, kind):
    dense = tiny(kind)
    pruned = prune_channels(copy.deepcopy(dense), {1: UNEVEN[1]})
    expected = dense.state_dict() | kept_slices(kind, dense)
    found = pruned.state_dict()
    assert list(found) == list(dense.state_dict())
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for module in pruned.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif hasattr(module, "nx"):
            assert (module.nx, module.nf) == tuple(module.weight.shape)
    names = ("intermediate_size", "hidden_dim", "ffn_dim")
    numbers = [value for part in pruned.modules() for name, value in vars(part).items() if name in names]
    assert numbers == ([32, 19] if kind == "llama" else [])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "deberta-v2"])
def test_one_optimiser_step_lowers_the_loss(tiny, make_batch, kind):
    model = prune_channels(tiny(kind), UNEVEN)
    with torch.inference_mode():
        mlp_layers(model)
    ids = make_batch()["input_ids"]
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(ids, labels=ids).loss
    before.backward()
    for layer in mlp_layers(model):
        assert model.get_submodule(layer.down_projection).weight.grad.any()
    optimiser.step()
    assert model(ids, labels=ids).loss.item() < before.item()


def test_no_random_numbers_are_used_up_and_precision_is_kept(tiny):
    model = tiny("llama").bfloat16()
    before = torch.get_rng_state()
    prune_channels(model, EVEN)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_frozen_weights_stay_frozen(tiny):
    model = tiny("llama")
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune_channels(model, UNEVEN)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == expected


# --- plans ----------------------------------------------------------------------------------------------------------

BAD = [
    ({2: [0]}, "layer 2; the model has layers 0 to 1"),
    ({"0": [0]}, "layer '0'"),
    ({0: [32]}, "channel 32 of layer 0, which has channels 0 to 31"),
    ({0: [-1]}, "channel -1"),
    ({0: [1.0]}, "channel 1.0"),
    ({0: [True]}, "channel True"),
    ({0: [4, 1, 4]}, "a channel of layer 0 twice: 1, 4, 4"),
    ({0: range(32)}, "all 32 channels of layer 0"),
]


def assert_refused(model, plan: Plan, says: str, **options: bool) -> None:
    """Refuse a plan in one line, and leave the model as it is."""
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    attributes = [(name, set(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(PlanError) as caught:
        prune_channels(model, plan, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_dict() == config
    assert [(name, set(vars(module))) for name, module in model.named_modules()] == attributes


@pytest.mark.parametrize(("bad", "says"), BAD)
def test_a_bad_plan_leaves_the_model_bit_identical(tiny, bad, says):
    """A good part of the plan comes first, so that checking while cutting would show."""
    assert_refused(tiny("llama"), {1: [0]} | bad, says)


class Stubborn(nn.Module):
    """Insists on its number of channels, and on even ones in another way."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)
        self.strict = strict

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(states))
        if self.strict:
            return self.down(hidden.view(*states.shape[:2], 32))
        return self.down(hidden) * (2 if hidden.shape[-1] % 2 else 1)


@pytest.mark.parametrize(("strict", "says"), [(True, "cannot run without them"), (False, "does not work as before")])
def test_channels_that_the_code_needs_stay(tiny, strict, says):
    model = tiny("llama")
    model.model.layers[1].mlp = Stubborn(strict).double()
    assert_refused(model, {0: [1], 1: [*range(17)]}, "and 1 more of layer 1 (model.layers.1.mlp), wh")
    assert_refused(model, {0: [1], 1: [4]}, says)


class Sized(nn.Module):
    """Splits what comes from both projections by a number that it keeps; another number happens to be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(24, 64, bias=False), nn.Linear(32, 24)
        self.ffn_size, self.mlp_scale = 32, 32

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(states).split(self.ffn_size, -1)
        return self.down(gate.relu() * up)


class Scaled(Sized):
    """Computes with both numbers."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(states).chunk(2, -1)
        return self.down(gate.relu() * up) / self.mlp_scale


@pytest.mark.parametrize(("mlp", "numbers"), [(Sized, (29, 29)), (Scaled, (32, 32))])
def test_numbers_follow_where_they_mean_the_width(tiny, make_batch, mlp, numbers):
    model = tiny("llama")
    model.model.layers[1].mlp = mlp().double()
    dense = copy.deepcopy(model)
    prune_channels(model, {1: [0, 3, 4]})
    assert (model.model.layers[1].mlp.ffn_size, model.model.layers[1].mlp.mlp_scale) == numbers
    with silenced_channels(dense, {1: [0, 3, 4]}):
        assert_close(logits(model, make_batch()), logits(dense, make_batch()))


def test_code_that_cannot_run_without_channels_is_not_emptied(tiny):
    """GPT-2's linear maps reshape what they get, which must not be nothing."""
    with pytest.raises(PlanError, match=r"all 32 channels of layer 0"):
        prune_channels(tiny("gpt2"), {0: range(32)})
    assert_refused(tiny("gpt2"), {1: [0], 0: range(32)}, "cannot run without them", allow_empty=True)


@pytest.mark.parametrize("plan", [{}, {0: []}])
def test_an_empty_plan_changes_nothing(tiny, plan):
    model = prune_channels(tiny("gpt2"), plan)
    assert removed_channels(model) == {}
    assert not hasattr(model.config, "pruned_channels")


# --- what is remembered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "phi3"])
def test_pruning_twice_is_pruning_once_with_the_union(tiny, make_batch, kind):
    twice = prune_channels(tiny(kind), {0: [1, 30], 1: [0, 2]})
    prune_channels(twice, {0: [1], 1: [1]})  # originally 2 of layer 0, 3 of layer 1
    once = prune_channels(tiny(kind), {0: [1, 2, 30], 1: [0, 2, 3]})
    assert removed_channels(twice) == removed_channels(once) == {0: (1, 2, 30), 1: (0, 2, 3)}
    assert twice.config.to_dict() == once.config.to_dict()
    assert mlp_layers(twice) == mlp_layers(once)
    for (name, left), right in zip(twice.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_heads_and_channels_are_remembered_side_by_side(tiny):
    model = prune_heads(tiny("llama"), {0: [0, 3]})
    prune_channels(model, {1: [5]})
    prune_heads(model, {1: [1, 4]})
    assert removed_heads(model) == {0: (0, 3), 1: (1, 4)}
    assert removed_channels(model) == {1: (5,)}
    stored = json.loads(model.config.to_json_string())
    assert stored["num_attention_heads"] == 4
    assert stored["per_layer_config"] == {"1": {"intermediate_size": 31}}
    assert stored["dense_config"][""]["num_attention_heads"] == 6
    assert [layer.num_heads for layer in attention_layers(model)] == [4, 4]


def test_deep_copies_are_whole_and_independent(tiny, make_batch):
    model = prune_channels(tiny("llama"), UNEVEN)
    expected = logits(model, make_batch())
    twin = prune_channels(copy.deepcopy(model), {0: [0]})
    assert torch.equal(logits(model, make_batch()), expected)
    assert removed_channels(twin) != removed_channels(model)

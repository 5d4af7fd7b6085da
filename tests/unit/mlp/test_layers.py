"""MLPs are found where they are, whatever their build, and what is none of them is told apart or refused in a line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compressor import mlp_layers, prune_channels
from compressor.attention.specimen import Specimen
from compressor.attention.trace import Frame, Site
from compressor.errors import ModelError
from compressor.mlp import silenced_channels
from compressor.mlp.anatomy import needs_of_channels

# Channels of every MLP, and how many entries of the up projections' outputs each of them owns.
FOUND = {
    "albert": (32, 1),
    "bert": (32, 1),
    "bloom": (96, 1),
    "codegen": (32, 1),
    "cohere": (32, 2),
    "deberta-v2": (32, 1),
    "deepseek_v3": (32, 2),
    "distilbert": (32, 1),
    "falcon": (96, 1),
    "gemma3": (32, 2),
    "gpt2": (32, 1),
    "gpt_bigcode": (32, 1),
    "gpt_neox": (32, 1),
    "llama": (32, 2),
    "mistral": (32, 2),
    "modernbert": (32, 2),
    "mpnet": (32, 1),
    "olmo2": (32, 2),
    "opt": (32, 1),
    "phi3": (32, 2),
    "qwen3": (32, 2),
    "qwen3_next": (32, 2),
    "roberta": (32, 1),
    "starcoder2": (32, 1),
}


@pytest.mark.parametrize("kind", FOUND)
def test_every_mlp_is_found_and_nothing_else(tiny, down, kind):
    model = tiny(kind)
    channels, owned = FOUND[kind]
    layers = mlp_layers(model)
    shared = kind == "albert"  # one MLP, applied twice
    assert [layer.down_projection for layer in layers] == [down(model, index) for index in range(1 if shared else 2)]
    for index, layer in enumerate(layers):
        assert (layer.index, layer.num_channels, layer.uses) == (index, channels, 2 if shared else 1)
        assert model.get_submodule(layer.name)
        first, *others = layer.slices
        assert (first.module, first.name) == (layer.down_projection, "weight")
        weights = [part for part in others if part.name == "weight"]
        assert {part.module for part in weights} == set(layer.up_projections)
        assert sum(map(len, weights)) == owned * channels
        for part in layer.slices:
            assert model.get_submodule(part.module).get_parameter(part.name).shape[part.dim] == len(part)
            assert {own for own, _ in part.runs} == {(channel,) for channel in range(channels)}


def test_biases_go_with_the_outputs_they_are_added_to(tiny):
    for kind, biased in (("gpt2", True), ("llama", False)):
        layer = mlp_layers(tiny(kind))[0]
        assert any(part.name == "bias" for part in layer.slices) is biased
        assert not any((part.module, part.name) == (layer.down_projection, "bias") for part in layer.slices)


def test_blocks_of_one_build_are_examined_once(tiny, monkeypatch):
    from compressor.mlp import layout

    monkeypatch.setattr(layout, "_EXAMINED", {})
    mlp_layers(tiny("llama", num_hidden_layers=5))
    assert len(layout._EXAMINED) == 1


def test_looking_leaves_no_trace(tiny, make_batch):
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [(part.training, set(vars(part)), len(part._forward_hooks)) for part in model.modules()]
    with torch.inference_mode():
        mlp_layers(model)
    assert [(part.training, set(vars(part)), len(part._forward_hooks)) for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad


def test_what_a_module_keeps_of_the_run_does_not_hang_on_its_graph(with_mlp):
    model = with_mlp(Keeping)
    assert len(mlp_layers(model)) == 2
    assert not model.model.layers[1].mlp.state.requires_grad
    copy.deepcopy(model)


def test_rectifiers_hide_no_channel():
    """Of a single token half of the channels would be put out by chance."""
    module = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24))
    site = Site((Frame("", module, (torch.zeros(1, 1, 24),), {}),), heads=0)
    assert needs_of_channels(Specimen(site), "2", ["0"]).outputs == {"0": list(range(64))}


# --- other builds, put in the place of Llama's ----------------------------------------------------------------------


class Interleaved(nn.Module):
    """Gate and up in turns in one map, with biases, each channel scaled by a parameter of its own."""

    def __init__(self, hidden: int = 24, width: int = 19) -> None:
        super().__init__()
        self.both = nn.Linear(hidden, 2 * width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.shared = nn.Parameter(torch.rand(1))
        self.down = nn.Linear(width, hidden)
        self.width = width

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        both = self.both(states)
        return self.shared * self.scale * nn.functional.silu(both[..., ::2]) * both[..., 1::2]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down(self.hidden(states))


class Normed(Interleaved):
    """A norm over all channels."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(super().hidden(states), (self.width,))


class Convolved(Interleaved):
    """A convolution across channels."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        hidden = super().hidden(states)
        return hidden + 0.3 * hidden.roll(1, -1)


class Straight(Interleaved):
    """A narrow linear map, without anything that bends: an adapter, no MLP."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        return self.scale * self.both(states)[..., : self.width]


class Looking(Interleaved):
    """What is there at a token comes from all before it: attention of a kind, no MLP."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        return super().hidden(states).cumsum(1)


class Keeping(Interleaved):
    """Keeps what it computed, as recurrent layers keep their state."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        self.state = super().hidden(states)
        return self.state


class Hesitant(Interleaved):
    """Runs in its model, and not by itself."""

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        if states.grad_fn is None:
            raise LookupError("not\nhere")
        return super().hidden(states)


class Gate(Interleaved):
    """Scales the stream, and adds nothing to it."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * super().forward(states).sigmoid()


class LowRank(nn.Module):
    """An adapter: what a linear map gives, and what a narrow detour adds to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, 3, bias=False, dtype=base.weight.dtype)
        self.wide = nn.Linear(3, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + self.wide(self.narrow(states))


class Quantised(nn.Module):
    """A linear map whose weight is stored in whole numbers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", (10 * base.weight.detach()).round().to(torch.int8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.weight.to(states.dtype) / 10).T


class Experts(nn.Module):
    """Tokens are dealt out among plain MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 3)
        self.experts = nn.ModuleList([Interleaved() for _ in range(3)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            result = result.index_add(0, rows, expert(flat[rows]))
        return result.view_as(states)


@pytest.fixture
def with_mlp(tiny):
    """A Llama with another module in the place of its second MLP, or of both."""

    def make(mlp: type[nn.Module], both: bool = False):
        model = tiny("llama")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for layer in model.model.layers[0 if both else 1 :]:
                layer.mlp = mlp().double()
        return model.eval()

    return make


def test_interleaved_projections_and_scales_are_told_apart(with_mlp, make_batch):
    model = with_mlp(Interleaved)
    layer = mlp_layers(model)[1]
    assert (layer.name, layer.num_channels) == ("model.layers.1.mlp", 19)
    runs = {(part.module.rpartition(".")[2], part.name): part.runs for part in layer.slices}
    assert runs["both", "weight"] == runs["both", "bias"]
    assert [(own, length) for own, length in runs["both", "weight"]] == [((channel,), 2) for channel in range(19)]
    assert runs["mlp", "scale"] == tuple(((channel,), 1) for channel in range(19))
    assert ("mlp", "shared") not in runs
    pruned = prune_channels(copy.deepcopy(model), {1: [0, 7, 18]})
    mlp = pruned.model.layers[1].mlp
    assert (mlp.both.weight.shape, mlp.both.bias.shape, mlp.scale.shape) == ((32, 24), (32,), (16,))
    with torch.no_grad(), silenced_channels(model, {1: [0, 7, 18]}):
        assert torch.allclose(pruned(**make_batch()).logits, model(**make_batch()).logits, rtol=1e-12)


def test_adapters_are_cut_with_what_they_adapt(tiny, make_batch):
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = LowRank(mlp.gate_proj), LowRank(mlp.up_proj)
    plan = {0: [1], 1: [0, 5, 30]}
    pruned = prune_channels(copy.deepcopy(model), plan)
    assert pruned.model.layers[1].mlp.up_proj.wide.weight.shape == (29, 3)
    with torch.no_grad(), silenced_channels(model, plan):
        assert torch.allclose(pruned(**make_batch()).logits, model(**make_batch()).logits, rtol=1e-9, atol=1e-12)


def test_an_mlp_whose_channels_go_two_ways_is_left_out(tiny):
    """An adapter of the down projection takes them too, and only one of the maps would be cut."""
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj = LowRank(model.model.layers[1].mlp.down_proj)
    assert [layer.name for layer in mlp_layers(model)] == ["model.layers.0.mlp"]


def test_quantised_weights_are_refused(tiny):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj is Quantised and holds no plain weights; load the"):
        mlp_layers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_precision_of_a_model_changes_nothing(tiny, dtype):
    assert mlp_layers(tiny("llama").to(dtype)) == mlp_layers(tiny("llama"))


@pytest.mark.parametrize("mlp", [Straight, Looking, Gate])
def test_what_is_no_mlp_is_left_out(with_mlp, mlp):
    assert [layer.name for layer in mlp_layers(with_mlp(mlp))] == ["model.layers.0.mlp"]
    with pytest.raises(ModelError, match="LlamaForCausalLM has no MLP"):
        mlp_layers(with_mlp(mlp, both=True))


@pytest.mark.parametrize("mlp", [Normed, Convolved])
def test_mixed_channels_are_refused(with_mlp, mlp):
    assert [layer.name for layer in mlp_layers(with_mlp(mlp))] == ["model.layers.0.mlp"]
    with pytest.raises(ModelError, match=r"^model.layers.0.mlp \(\w+\) mixes its 19 hidden channels [^\n]*$"):
        mlp_layers(with_mlp(mlp, both=True))


def test_an_mlp_that_cannot_be_examined_is_left_out(with_mlp):
    assert [layer.name for layer in mlp_layers(with_mlp(Hesitant))] == ["model.layers.0.mlp"]
    with pytest.raises(ModelError, match=r"^model.layers.0.mlp \(Hesitant\) cannot be run by itself \(not here\)$"):
        mlp_layers(with_mlp(Hesitant, both=True))


def test_experts_in_lists_are_refused(with_mlp):
    assert [layer.name for layer in mlp_layers(with_mlp(Experts))] == ["model.layers.0.mlp"]
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM has its MLPs in experts \(Interleaved\)[^\n]*$"):
        mlp_layers(with_mlp(Experts, both=True))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mixtral", "MixtralForCausalLM has its MLPs in experts"),
        ("qwen3_moe", "Qwen3MoeForCausalLM has its MLPs in experts"),
        ("gpt_oss", "GptOssForCausalLM has its MLPs in experts"),
        ("bitnet", "mixes its 32 hidden channels before down_proj takes them"),
        ("squeezebert", "SqueezeBertForMaskedLM has no MLP"),  # grouped convolutions
    ],
)
def test_models_without_an_mlp_to_prune_are_refused_in_a_line(tiny, kind, says):
    model = tiny(kind)
    for attempt in (lambda: mlp_layers(model), lambda: prune_channels(model, {0: [1]})):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_of_experts_and_dense_layers_the_dense_ones_are_found(tiny):
    model = tiny("qwen3_moe", mlp_only_layers=[1])
    assert [layer.name for layer in mlp_layers(model)] == ["model.layers.1.mlp"]
    assert prune_channels(model, {0: [3]}).model.layers[1].mlp.down_proj.in_features == 31


def test_an_mlp_that_computes_on_statistics_of_its_channels_is_left_out(tiny):
    """Gemma 3n's first layers let through only what is far above the mean of all channels."""
    assert [layer.name for layer in mlp_layers(tiny("gemma3n"))] == [f"model.layers.{index}.mlp" for index in (1, 2, 3)]


def test_a_model_that_cannot_be_run_is_refused_in_a_line(tiny):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(3, 32).double()
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM cannot be run on token ids alone, [^\n]*$"):
        mlp_layers(model)
    assert not any(part._forward_hooks for part in model.modules())

"""What the loss says of channels, against gates on every token of every window, one window after the other."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compressor.attention import attention_layers
from compressor.damage import (
    channel_curvature,
    channel_first_order,
    channel_second_moment,
    damages,
    gated,
    not_by_token,
    site_of,
    slopes,
)
from compressor.errors import ModelError
from compressor.mlp import mlp_layers
from compressor.module import LanguageModel

MASKED = ("albert", "bert")
# Plain and gated, fused, shared by all layers, in parallel with attention.
KINDS = ("gpt2", "llama", "phi3", "bert", "albert", "codegen", "gpt_neox", "cohere", "falcon", "opt")
NAMES = ["loss-game", "taylor", "fisher", "loo", "activation", "fluctuation"]


def labelled(batch):
    mask = batch["attention_mask"]
    return {
        **batch,
        "labels": batch["input_ids"].masked_fill(mask == 0, -100),
        "real": mask.flatten().nonzero().squeeze(1),
        "places": torch.stack([torch.arange(len(mask)), torch.zeros(len(mask), dtype=torch.long)], dim=1),
    }


@pytest.fixture
def prepared(tiny, make_batch):
    """A tiny model, two labelled batches, one of them padded, and its sites: of heads and of channels."""

    def prepare(kind):
        model = tiny(kind)
        batches = [labelled(make_batch("none", 2, 6, seed=1)), labelled(make_batch("right", 3, 9, seed=2))]
        heads = [site_of(layer, layer.num_heads) for layer in attention_layers(model)]
        channels = [site_of(layer, layer.num_channels) for layer in mlp_layers(model)]
        return LanguageModel(model, "masked" if kind in MASKED else "causal"), batches, heads, channels

    return prepare


def windows_of(batches):
    """Each window alone, without padding."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()][None]


def token_slopes(module, ids, downs):
    """Slopes of the window's loss along a gate for every channel at every token: per map and use [tokens, channels]."""
    gates = {down: [] for down in downs}
    hooks = []
    for down in downs:
        part = module.model.get_submodule(down)

        def scale(part, args, own=gates[down]):
            own.append(torch.ones_like(args[0]).requires_grad_())
            return (args[0] * own[-1],)

        hooks.append(part.register_forward_pre_hook(scale))
    logits = module.model(ids, attention_mask=torch.ones_like(ids)).logits[0]
    for hook in hooks:
        hook.remove()
    predicted, labels = (logits[:-1], ids[0, 1:]) if module.task == "causal" else (logits, ids[0])
    loss = functional.cross_entropy(predicted, labels, reduction="sum")
    found = torch.autograd.grad(loss, [gate for own in gates.values() for gate in own])
    uses = len(found) // len(downs)
    flat = [slope.double().flatten(0, -2) for slope in found]
    return [flat[place * uses : (place + 1) * uses] for place in range(len(downs))], len(labels)


def by_hand(module, batches, channels, gates=None, heads=()):
    """(curvature, |slope|, window Fisher) of every map's channels, written out in loops."""
    downs = [site.module for site in channels]
    totals = [[torch.zeros(site.units, dtype=torch.float64) for _ in range(3)] for site in channels]
    tokens = 0
    for row, ids in enumerate(windows_of(batches)):
        widths = [site.units for site in heads]
        with gated(module.model, heads, torch.split(gates[row : row + 1], widths, dim=1) if heads else ()):
            found, predicted = token_slopes(module, ids, downs)
        tokens += predicted
        for (curvature, slope, fisher), uses in zip(totals, found, strict=True):
            window = torch.zeros_like(slope)
            for use in uses:
                for token in use:
                    curvature += token**2 / 2
                    slope += token
                    window += token
            fisher += window**2
    return [(curvature / tokens, slope.abs() / tokens, fisher / tokens) for curvature, slope, fisher in totals]


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_gates_on_every_token(prepared, kind):
    module, batches, heads, channels = prepared(kind)
    found = damages(module, batches, heads, ["taylor", "fisher"], channels=channels).channels
    assert set(found) == {"taylor", "fisher"}
    for place, (_, slope, fisher) in enumerate(by_hand(module, batches, channels)):
        assert slope.min() > 0
        assert torch.allclose(found["taylor"][place], slope, rtol=1e-3, atol=1e-6)  # norms compute in float32
        assert torch.allclose(found["fisher"][place], fisher, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_is_taken_where_heads_are_partly_gone(prepared, kind):
    module, batches, heads, channels = prepared(kind)
    partly = slopes(module, batches, heads, 0.5, 3, channels)
    assert (partly.removed > 0).any()
    whole = channel_curvature(slopes(module, batches, heads, channels=channels))
    written = by_hand(module, batches, channels, 1 - partly.removed, heads)
    for place, found in enumerate(channel_curvature(partly)):
        assert torch.allclose(found, written[place][0], rtol=1e-3, atol=1e-6)
        assert not torch.allclose(found, whole[place], rtol=1e-2)


def test_a_scoring_run_takes_the_curvature_from_the_pass_of_the_game(prepared):
    module, batches, heads, channels = prepared("gpt2")
    found = damages(module, batches, heads, ["loss-game"], channels=channels, seed=5).channels
    same = channel_curvature(slopes(module, batches, heads, 0.2, 5, channels))
    assert all(map(torch.equal, found["loss-game"], same))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "codegen"])
def test_neither_padding_nor_the_size_of_batches_matters(prepared, kind):
    module, batches, heads, channels = prepared(kind)
    alone = [labelled({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in windows_of(batches)]
    width = 14  # wider than any window
    together = torch.zeros(len(alone), width, dtype=torch.long)
    mask = torch.zeros_like(together)
    for row, one in enumerate(alone):
        ids = one["input_ids"][0]
        together[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    together[mask == 0] = torch.arange(3, 3 + int((mask == 0).sum())) % 30  # padding that would count for something
    everyone = [labelled({"input_ids": together, "attention_mask": mask})]
    runs = [slopes(module, given, heads, channels=channels) for given in (batches, alone, everyone)]
    for value in (channel_curvature, channel_first_order, channel_second_moment):
        first, *others = (torch.cat(value(run)) for run in runs)
        for other in others:
            assert torch.allclose(first, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "albert", "codegen", "cohere"])
def test_heads_are_worth_the_same_to_the_last_bit_whether_channels_are_looked_at_or_not(prepared, kind):
    module, batches, heads, channels = prepared(kind)
    alone = damages(module, batches, heads, NAMES, resamples=3, seed=1)
    beside = damages(module, batches, heads, NAMES, channels=channels, resamples=3, seed=1)
    assert not alone.channels
    assert set(beside.channels) == {*NAMES} - {"loo"}
    for left, right in ((alone.values, beside.values), (alone.resampled, beside.resampled)):
        assert left.keys() == right.keys()
        assert all(torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True))


def test_channels_cost_no_pass(prepared):
    module, batches, heads, channels = prepared("codegen")
    counts = []
    for given in ((), channels):
        passes = []
        hooks = [module.model.register_forward_hook(lambda *_, seen=passes: seen.append("forward"))]
        head = module.model.get_output_embeddings()
        hooks += [head.register_full_backward_hook(lambda *_, seen=passes: seen.append("backward"))]
        damages(module, batches, heads, [name for name in NAMES if name != "loo"], channels=given)
        counts.append((passes.count("forward"), passes.count("backward")))
        for hook in hooks:
            hook.remove()
    assert counts[0] == counts[1] == (4, 4)  # two batches, with whole heads and with partly gated ones


def test_a_model_is_left_as_it_was(prepared):
    module, batches, heads, channels = prepared("codegen")
    damages(module, batches, heads, NAMES, channels=channels)
    assert not any(part._forward_pre_hooks or part._backward_hooks for part in module.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "albert"])
def test_strength_is_that_of_what_channels_hand_on(prepared, kind):
    module, batches, heads, channels = prepared(kind)
    found = damages(module, batches, heads, ["activation", "fluctuation"], channels=channels).channels
    for place, site in enumerate(channels):
        part = module.model.get_submodule(site.module)
        weight = part.weight.detach().flatten(1)
        weight = weight if isinstance(part, Conv1D) else weight.T
        inputs = []
        hook = part.register_forward_pre_hook(lambda part, args, seen=inputs: seen.append(args[0].detach()))
        with torch.no_grad():
            for ids in windows_of(batches):
                module.model(ids, attention_mask=torch.ones_like(ids))
        hook.remove()
        rows = torch.cat([given[0] for given in inputs])
        for channel in range(site.units):
            handed = rows[:, [channel]] * weight[channel]
            strength = float(handed.square().sum(1).mean().sqrt())
            spread = float(rows[:, channel].var(correction=0) * weight[channel].square().sum())
            assert found["activation"][place][channel] == pytest.approx(strength, rel=1e-4)
            assert found["fluctuation"][place][channel] == pytest.approx(spread, rel=1e-4)


def flattened(self, hidden):
    """An MLP that takes all tokens as one list, as OPT's once did."""
    shape = hidden.shape
    return self.c_proj(self.act(self.c_fc(hidden.flatten(0, -2)))).view(shape)


def transposed(self, hidden):
    """An MLP that wants tokens before sequences."""
    return self.c_proj(self.act(self.c_fc(hidden.transpose(0, 1).contiguous()))).transpose(0, 1)


def merged(self, hidden):
    """An MLP that sees two tokens as one."""
    pairs = hidden.unflatten(1, (-1, 2)).mean(2) if hidden.shape[1] % 2 == 0 else hidden[:, ::2].contiguous()
    return self.c_proj(self.act(self.c_fc(pairs))).repeat_interleave(2, 1)[:, : hidden.shape[1]]


def convolved(self, hidden):
    """An MLP of convolutions, which have channels before tokens."""
    return self.c_proj(self.act(self.c_fc(hidden)).transpose(1, 2)).transpose(1, 2)


def as_convolution(part):
    inputs, outputs = part.weight.shape
    made = nn.Conv1d(inputs, outputs, 1, dtype=part.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(part.weight.T[..., None])
        made.bias.copy_(part.bias)
    return made


@pytest.mark.parametrize("layout", [flattened, convolved])
def test_tokens_are_told_apart_however_they_lie(prepared, layout):
    module, batches, heads, channels = prepared("gpt2")
    names = ["loss-game", "taylor", "fisher", "activation"]
    expected = damages(module, batches, heads, names, channels=channels).channels
    for layer in module.model.transformer.h:
        layer.mlp.forward = MethodType(layout, layer.mlp)
        if layout is convolved:
            layer.mlp.c_proj = as_convolution(layer.mlp.c_proj)
    assert not_by_token(module, batches[1], channels) is None
    found = damages(module, batches, heads, names, channels=channels).channels
    for name in names:
        assert all(map(torch.allclose, found[name], expected[name]))


@pytest.mark.parametrize("odd", [transposed, merged])
def test_rows_that_are_no_tokens_are_noticed(prepared, odd):
    module, batches, heads, channels = prepared("gpt2")
    assert not_by_token(module, batches[1], channels) is None
    mlp = module.model.transformer.h[1].mlp
    mlp.forward = MethodType(odd, mlp)
    assert not_by_token(module, batches[1], channels) == channels[1].module
    if odd is merged:
        with pytest.raises(ModelError, match="what belongs to which token cannot be told") as caught:
            slopes(module, batches, heads, channels=channels)
        assert "\n" not in str(caught.value)


def test_a_map_that_the_backbone_never_reaches_is_noticed(prepared):
    module, batches, _, channels = prepared("gpt2")
    mlp = module.model.transformer.h[0].mlp
    mlp.forward = MethodType(lambda self, hidden: torch.zeros_like(hidden), mlp)
    assert not_by_token(module, batches[1], channels) == channels[0].module


def test_what_the_loss_does_not_depend_on_has_slope_zero(prepared):
    """A model may cut its own gradients, as some that recur do."""
    module, batches, heads, channels = prepared("codegen")
    mlp = module.model.transformer.h[0].mlp
    mlp.forward = torch.no_grad()(mlp.forward)
    found = damages(module, batches, heads, ["loss-game", "fisher"], channels=channels).channels
    for first, second in found.values():
        assert not first.any()
        assert second.min() > 0

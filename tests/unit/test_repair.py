"""Repair against a least-squares solution by QR of the raw activations, and by what it is for: the loss."""

import copy

import pytest
import torch

from compressor.attention import attention_layers, prune_heads
from compressor.damage import site_of
from compressor.errors import ModelError
from compressor.mlp import mlp_layers
from compressor.module import LanguageModel
from compressor.removal import sites_of
from compressor.repair import HELD, RIDGES, refit, repair
from compressor.repair.passes import Point, blocks_of
from compressor.repair.stream import streams

KINDS = pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "albert"])


@pytest.fixture
def prepared(build):
    """A tiny model, calibration batches with padding, and its sites."""

    def prepare(kind, batches=10, rows=6, tokens=12):
        model = build(kind, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        text = []
        for index in range(batches):
            ids = torch.randint(3, 37, (rows, tokens), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, tokens - 3 :] = 0
            real = mask.flatten().nonzero().squeeze(1)
            places = torch.stack([torch.arange(rows) + index * rows, torch.zeros(rows, dtype=torch.long)], dim=1)
            text.append(
                {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "real": real, "places": places}
            )
        layers = attention_layers(model)
        sites = [site_of(layer, layer.num_heads) for layer in layers]
        return LanguageModel(model, "masked" if kind in ("bert", "albert") else "causal"), text, sites

    return prepare


def inputs_of(module: LanguageModel, site, batches, held: bool) -> torch.Tensor:
    """All real rows of documents that are held out, or are not, which reach a site: [tokens, inputs]."""
    seen: list[torch.Tensor] = []
    part = module.model.get_submodule(site.module)
    handle = part.register_forward_pre_hook(lambda part, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            module.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    uses = len(seen) // len(batches)
    masks = []
    for batch in batches:
        mine = [(document % HELD == HELD - 1) == held for document in batch["places"][:, 0].tolist()]
        masks += [batch["attention_mask"].bool() & torch.tensor(mine)[:, None]] * uses
    return torch.cat([rows[mask] for rows, mask in zip(seen, masks, strict=True)])


def weight_of(module: LanguageModel, site) -> torch.Tensor:
    part = module.model.get_submodule(site.module)
    return part.weight.detach() if type(part).__name__ == "Conv1D" else part.weight.detach().T


@KINDS
def test_the_refit_is_the_ridge_regression(prepared, kind):
    """Solved once more from the activations themselves, stacked with the ridge's own rows."""
    module, batches, sites = prepared(kind)
    site, gone = sites[0], [1, 2]
    before = copy.deepcopy(module)
    (found,) = repair(module, batches, [(site, gone)])
    assert found.site == site.module
    assert found.ridge in RIDGES
    assert 0 < found.after < found.before
    rows, old = inputs_of(before, site, batches, held=False), weight_of(before, site)
    leaving = [place for head in gone for place in site.entries[head]]
    staying = [place for place in range(len(site.owners)) if place not in leaving]
    bias = module.model.get_submodule(site.module).bias is not None
    design = torch.cat([rows[:, staying], torch.ones(len(rows), int(bias), dtype=rows.dtype)], dim=1)
    penalty = (found.ridge * len(rows) * rows[:, staying].square().mean()) ** 0.5
    extra = penalty * torch.eye(len(staying), design.shape[1], dtype=rows.dtype)
    target = torch.cat([rows[:, leaving] @ old[leaving], torch.zeros(len(staying), old.shape[1], dtype=rows.dtype)])
    change = torch.linalg.lstsq(torch.cat([design, extra]), target).solution
    new = weight_of(module, site)
    assert torch.allclose(new[staying], old[staying] + change[: len(staying)], atol=1e-9)
    assert not new[leaving].any()
    if bias:
        moved = module.model.get_submodule(site.module).bias - before.model.get_submodule(site.module).bias
        assert torch.allclose(moved, change[-1], atol=1e-9)
    rows = inputs_of(before, site, batches, held=True)
    shift_before = before.model.get_submodule(site.module).bias.detach() if bias else 0
    whole = rows @ old + shift_before
    for told, weights, shift in ((found.before, old, 0), (found.after, new, change[-1] if bias else 0)):
        error = rows[:, staying] @ weights[staying] + shift + shift_before - whole
        assert told == pytest.approx(float(error.square().sum() / whole.square().sum()), rel=1e-8)


@KINDS
def test_a_repaired_model_can_be_cut(prepared, kind):
    """Cutting what hands on nothing changes nothing."""
    module, batches, sites = prepared(kind)
    plan = {index: [0, 3] for index in range(len(sites))}
    found = repair(module, batches, [(sites[index], gone) for index, gone in plan.items()])
    assert [entry.site for entry in found] == [site.module for site in sites]
    arguments = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = module.model(**arguments).logits
        slim = prune_heads(module.model, plan)(**arguments).logits
    real = batches[0]["attention_mask"].bool()
    assert torch.allclose(slim[real], expected[real], rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


# What stands behind each map where its outputs have been summed up, spelt out per architecture.
STREAMS = {
    "gpt2": ["transformer.h.0.ln_2", "transformer.h.1", "transformer.h.1.ln_2", "transformer.ln_f"],
    "bert": [
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "bert.encoder.layer.1.output.LayerNorm",
    ],
    "llama": [
        "model.layers.0.post_attention_layernorm",
        "model.layers.1",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ],
}
ALL = pytest.mark.parametrize("kind", list(STREAMS))


def all_sites(module: LanguageModel) -> list:
    """Every output projection and down projection, block by block."""
    heads = [site_of(layer, layer.num_heads) for layer in attention_layers(module.model)]
    channels = [site_of(layer, layer.num_channels) for layer in mlp_layers(module.model)]
    return [site for both in zip(heads, channels, strict=True) for site in both]


@ALL
def test_streams_are_where_the_architecture_sums(prepared, kind):
    module, batches, _ = prepared(kind)
    found = streams(module, batches[0], all_sites(module))
    assert [stream.point.module for stream in found] == STREAMS[kind]
    assert [stream.scale for stream in found] == pytest.approx([1.0] * 4)


def test_a_scaled_stream_is_found_with_its_scale(prepared):
    module, batches, _ = prepared("gpt2")
    module.model.transformer.h[1].attn.resid_dropout.register_forward_hook(lambda part, args, output: output / 2)
    found = streams(module, batches[0], all_sites(module))
    assert [stream.scale for stream in found] == pytest.approx([1.0, 1.0, 0.5, 1.0])


def test_a_norm_before_the_sum_leaves_no_stream(prepared):
    """What a map of OLMo 2 gives is normed before it is added."""
    module, batches, sites = prepared("olmo2")
    assert streams(module, batches[0], all_sites(module)) == [None] * 4
    found = repair(module, batches, [(sites[0], [1])], all_sites(module))
    assert [(entry.site, entry.target) for entry in found] == [(sites[0].module, "output")]
    assert found[0].after < found[0].before


@ALL
def test_every_map_behind_a_cut_is_fitted_to_the_dense_stream(prepared, kind):
    """Followed map by map: raw activations of the model as repaired so far, and a solution by QR."""
    module, batches, sites = prepared(kind)
    dense, follower = copy.deepcopy(module), copy.deepcopy(module)
    plan = {sites[0].module: [1], sites[1].module: [0, 2]}
    everything = all_sites(module)
    found = repair(module, batches, [(site, plan[site.module]) for site in reversed(sites)], everything)
    assert [entry.site for entry in found] == [site.module for site in everything]
    assert {entry.target for entry in found} == {"stream"}
    for site, entry, place in zip(everything, found, STREAMS[kind], strict=True):
        part = follower.model.get_submodule(site.module)
        leaving = [entry for unit in plan.get(site.module, ()) for entry in site.entries[unit]]
        staying = [entry for entry in range(len(site.owners)) if entry not in leaving]
        old = weight_of(follower, site).clone()
        with torch.no_grad():
            (part.weight if type(part).__name__ == "Conv1D" else part.weight.T)[leaving] = 0
        rows = inputs_of(follower, site, batches, held=False)
        lacking = rows_given(dense, place, batches) - rows_given(follower, place, batches)
        bias = part.bias is not None
        design = torch.cat([rows[:, staying], torch.ones(len(rows), int(bias), dtype=rows.dtype)], dim=1)
        penalty = (entry.ridge * len(rows) * rows[:, staying].square().mean()) ** 0.5
        extra = penalty * torch.eye(len(staying), design.shape[1], dtype=rows.dtype)
        target = torch.cat([lacking, torch.zeros(len(staying), lacking.shape[1], dtype=rows.dtype)])
        change = torch.linalg.lstsq(torch.cat([design, extra]), target).solution
        new = weight_of(module, site)
        assert torch.allclose(new[staying], old[staying] + change[: len(staying)], atol=1e-7)
        assert not new[leaving].any()
        part.load_state_dict(module.model.get_submodule(site.module).state_dict())
    for name, tensor in follower.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def rows_given(module: LanguageModel, place: str, batches) -> torch.Tensor:
    """What a module is given of the documents to fit, [tokens, width]."""
    seen: list[torch.Tensor] = []
    part = module.model.get_submodule(place)
    handle = part.register_forward_pre_hook(lambda part, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            module.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    fit = [
        torch.tensor([document % HELD != HELD - 1 for document in batch["places"][:, 0].tolist()]) for batch in batches
    ]
    return torch.cat(
        [
            rows[batch["attention_mask"].bool() & chosen[:, None]]
            for rows, batch, chosen in zip(seen, batches, fit, strict=True)
        ]
    )


def test_maps_before_the_first_cut_stay_as_they_are(prepared):
    module, batches, sites = prepared("gpt2")
    before = copy.deepcopy(module.state_dict())
    found = repair(module, batches, [(sites[1], [1])], all_sites(module))
    assert [entry.site for entry in found] == [site.module for site in all_sites(module)[2:]]
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.{entry.site}.{kind}" for entry in found for kind in ("weight", "bias")}


@ALL
def test_blocks_that_are_done_are_left_out_and_nothing_changes(prepared, kind, monkeypatch):
    """With passes that go on behind the last block as with passes through the whole model, bit for bit."""
    module, batches, sites = prepared(kind)
    whole = copy.deepcopy(module)
    plan, everything = [(site, [1]) for site in sites], all_sites(module)
    runs = [0, 0]
    for number, one in enumerate((module, whole)):

        def count(part, args, output, number=number):
            runs[number] += len(output) > 1  # more than a sample

        one.model.get_submodule(sites[0].module).register_forward_hook(count)
    in_parts = repair(module, batches, plan, everything)
    monkeypatch.setattr(refit, "blocks_of", lambda *_: [])
    assert repair(whole, batches, plan, everything) == in_parts
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert runs == [40, 50]  # the dense model, two maps, going on; the dense model, four maps


def test_blocks_that_reach_past_each_other_are_never_left_out(prepared):
    """A block that looks at what another one was given, not only at what it gave."""
    module, batches, sites = prepared("gpt2")
    points = [Point(site.module) for site in sites]
    assert blocks_of(module, batches[0], points) == ["transformer.h.0", "transformer.h.1"]
    first, second = module.model.transformer.h
    notes: dict[str, torch.Tensor] = {}
    first.attn.register_forward_hook(lambda part, args, output: notes.update(last=output[0]))
    second.attn.c_proj.register_forward_pre_hook(lambda part, args: (args[0] + notes["last"],))
    assert blocks_of(module, batches[0], points) == []


def test_heads_that_say_the_same_are_replaced_exactly(prepared):
    """Where one head is a copy of another, the other takes over, and the loss stays."""
    module, batches, sites = prepared("gpt2")
    width = 6
    qkv = module.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for part in range(3):
            start = part * 4 * width
            qkv.weight[:, start : start + width] = qkv.weight[:, start + width : start + 2 * width]
            qkv.bias[start : start + width] = qkv.bias[start + width : start + 2 * width]
        before = module.losses(batches[0])[0]
        (found,) = repair(module, batches, [(sites[0], [0])])
        assert found.after < 1e-6 * found.before
        assert torch.allclose(module.losses(batches[0])[0], before, rtol=1e-3)


def test_where_nothing_helps_weights_stay(prepared, caplog, monkeypatch):
    """The heads leave all the same, and it is said that nothing makes up for them."""
    module, batches, sites = prepared("gpt2")
    before = weight_of(module, sites[0]).clone()
    monkeypatch.setattr(refit, "RIDGES", ())
    (found,) = repair(module, batches, [(sites[0], [1])])
    assert found.ridge is None
    assert found.after == found.before > 0
    gone = sites[0].entries[1]
    assert not weight_of(module, sites[0])[gone].any()
    before[gone] = 0
    assert torch.equal(weight_of(module, sites[0]), before)
    assert "repair helps 0 of 1 maps" in caplog.text


def test_without_documents_to_hold_out_nothing_is_fitted(prepared, caplog):
    """A fit to one document looks perfect to that document alone."""
    module, batches, sites = prepared("gpt2", batches=1, rows=1)
    before = weight_of(module, sites[0]).clone()
    whole = copy.deepcopy(module)
    (found,) = repair(module, batches, [(sites[0], [1])])
    assert (found.ridge, found.condition) == (None, None)
    assert "nothing is repaired: of fewer than 5 documents none can be held out" in caplog.text
    rows = inputs_of(whole, sites[0], batches, held=False)
    weight, bias = weight_of(whole, sites[0]), whole.model.get_submodule(sites[0].module).bias.detach()
    lost = rows[:, sites[0].entries[1]] @ weight[sites[0].entries[1]]
    assert found.before == found.after
    assert found.before == pytest.approx(float(lost.square().sum() / (rows @ weight + bias).square().sum()), rel=1e-8)
    before[sites[0].entries[1]] = 0
    assert torch.equal(weight_of(module, sites[0]), before)


def test_heads_that_are_replaced_by_silence_leave_a_bias(prepared):
    """Where what stays is always zero, there is nothing to fit but the mean."""
    module, batches, sites = prepared("gpt2")
    attention = module.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        attention.weight[:, 54:] = 0  # the values of heads 1 to 3
        attention.bias[54:] = 0
        attention.bias[48:54] = 1.0
    (found,) = repair(module, batches, [(sites[0], [0])])
    assert found.after <= found.before


def test_a_weight_that_another_layer_holds_too_is_left_alone(prepared):
    """What leaves one layer may stay in the other."""
    module, batches, sites = prepared("gpt2")
    blocks = module.model.transformer.h
    blocks[1].attn.c_proj.weight = blocks[0].attn.c_proj.weight
    before = weight_of(module, sites[0]).clone()
    found = repair(module, batches, [(sites[0], [0]), (sites[1], [1])])
    assert [entry.ridge for entry in found] == [None, None]
    assert torch.equal(weight_of(module, sites[0]), before)


def test_broken_activations_are_refused(prepared):
    module, batches, sites = prepared("gpt2")
    with torch.no_grad():
        module.model.transformer.h[0].attn.c_attn.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="is not finite; the model or its text is broken") as caught:
        repair(module, batches, [(sites[0], [1])])
    assert "\n" not in str(caught.value)


def test_nothing_to_remove_is_nothing_to_repair(prepared):
    module, batches, sites = prepared("gpt2")
    before = copy.deepcopy(module.state_dict())
    assert repair(module, batches, [(site, []) for site in sites]) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["gemma3n", "falcon", "gpt_oss", "phi3", "cohere"])
def test_blocks_of_other_builds_are_repaired_too(prepared, kind):
    """Blocks that share keys, that compute in parallel and add in place, whose MLPs are experts or fused."""
    module, batches, sites = prepared(kind)
    everything = [site for *_, site in sites_of(module.model)]
    before = module.losses(batches[0])[0].sum()
    found = repair(module, batches, [(sites[0], [1])], everything)
    assert found[0].site == sites[0].module
    assert 0 < found[0].after <= found[0].before
    assert all(entry.after <= entry.before for entry in found)
    assert torch.isfinite(module.losses(batches[0])[0]).all()
    assert module.losses(batches[0])[0].sum() != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_far_larger_than_what_a_map_adds_are_found(prepared, dtype):
    module, batches, _ = prepared("llama")
    with torch.no_grad():
        module.model.model.embed_tokens.weight.mul_(100)
    module.to(dtype)
    found = streams(module, batches[0], all_sites(module))
    assert [stream.point.module for stream in found if stream] == STREAMS["llama"]
    assert [stream.scale for stream in found if stream] == pytest.approx([1.0] * 4, rel=0.02)

"""Repair against a least-squares solution by QR of the raw activations, and by what it is for: the loss."""

import copy

import pytest
import torch

from compressor import repair as repairing
from compressor.attention import attention_layers, prune_heads
from compressor.damage import site_of
from compressor.errors import ModelError
from compressor.module import LanguageModel
from compressor.repair import HELD, RIDGES, repair

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
    whole = rows @ old
    for told, weights, shift in ((found.before, old, 0), (found.after, new, change[-1] if bias else 0)):
        error = rows[:, staying] @ weights[staying] + shift - whole
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


@KINDS
def test_later_sites_are_repaired_for_what_earlier_ones_now_give(prepared, kind):
    """The second site's fit is that of a model whose first site is repaired already."""
    module, batches, sites = prepared(kind)
    if len(sites) == 1:
        pytest.skip("one layer, applied twice")
    once = copy.deepcopy(module)
    both = repair(module, batches, [(sites[1], [0]), (sites[0], [1])])
    first = repair(once, batches, [(sites[0], [1])])
    second = repair(once, batches, [(sites[1], [0])])
    assert both == [*first, *second]
    assert torch.equal(weight_of(module, sites[1]), weight_of(once, sites[1]))


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
    monkeypatch.setattr(repairing, "RIDGES", ())
    (found,) = repair(module, batches, [(sites[0], [1])])
    assert found.ridge is None
    assert found.after == found.before > 0
    gone = sites[0].entries[1]
    assert not weight_of(module, sites[0])[gone].any()
    before[gone] = 0
    assert torch.equal(weight_of(module, sites[0]), before)
    assert "repair helps 0 of 1 maps" in caplog.text


def test_without_documents_to_hold_out_nothing_is_fitted(prepared):
    """A fit to one document looks perfect to that document alone."""
    module, batches, sites = prepared("gpt2", batches=1, rows=1)
    before = weight_of(module, sites[0]).clone()
    (found,) = repair(module, batches, [(sites[0], [1])])
    assert (found.ridge, found.condition) == (None, None)
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

"""What the loss says of heads, against finite differences, silenced heads, and quadratics that are known."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import compressor
from compressor.attention import attention_layers
from compressor.attention.silence import silenced_heads
from compressor.damage import (
    Slopes,
    ablations,
    damages,
    first_order,
    gated,
    loss_game,
    resampled_loss_game,
    second_moment,
    site_of,
    slopes,
)
from compressor.errors import ModelError, RecipeError
from compressor.game.resampling import draw_examples
from compressor.module import LanguageModel

KINDS = pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])


@pytest.fixture
def prepared(build, make_batch):
    """A tiny model, its sites, and two labelled batches with padding."""

    def prepare(kind):
        model = build(kind, dtype=torch.float64)
        batches = []
        for padding in ("none", "right"):
            batch = make_batch(padding)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            real = batch["attention_mask"].flatten().nonzero().squeeze(1)
            places = torch.stack([torch.arange(len(labels)), torch.zeros(len(labels), dtype=torch.long)], dim=1)
            batches.append({**batch, "labels": labels, "real": real, "places": places})
        layers = attention_layers(model)
        sites = [site_of(layer, layer.num_heads) for layer in layers]
        return LanguageModel(model, "masked" if kind in ("bert", "albert") else "causal"), batches, sites

    return prepare


def mean_loss(module: LanguageModel, batches) -> float:
    """Nats per predicted token, written down once more."""
    total, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            shifted = (row[:-1], labels[1:]) if module.task == "causal" else (row, labels)
            kept = shifted[1] != -100
            total += float(functional.cross_entropy(shifted[0][kept], shifted[1][kept], reduction="sum"))
            tokens += int(kept.sum())
    return total / tokens


@KINDS
def test_losing_heads_one_at_a_time_is_silencing_them(prepared, kind):
    module, batches, sites = prepared(kind)
    rises = ablations(module, batches, sites)
    whole = mean_loss(module, batches)
    expected = []
    for index, site in enumerate(sites):
        for head in range(site.units):
            with silenced_heads(module.model, {index: [head]}):
                expected.append(mean_loss(module, batches) - whole)
    assert torch.allclose(rises, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert rises.abs().max() > 1e-3


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_slopes_are_finite_differences(prepared, kind, share):
    """Along every head, at the very point that was drawn."""
    module, batches, sites = prepared(kind)
    found = slopes(module, batches, sites, share, seed=3)
    assert bool((found.removed == 0).all()) == (share == 0)
    step, start = 1e-3, 0
    widths = [site.units for site in sites]
    for batch in batches:
        rows = slice(start, start + len(batch["input_ids"]))
        start = rows.stop
        for unit in range(sum(widths)):
            ends = []
            for sign in (1, -1):
                moved = found.removed[rows].clone()
                moved[:, unit] += sign * step
                with gated(module.model, sites, torch.split(1 - moved, widths, dim=1)), torch.no_grad():
                    ends.append(module.losses(batch)[0])
            difference = (ends[0] - ends[1]).double() / (2 * step)
            assert torch.allclose(found.slope[rows, unit], difference, rtol=1e-2, atol=1e-2)  # norms compute in float32
    rows = torch.cat([batch["labels"][:, int(module.task == "causal") :] for batch in batches])
    assert found.tokens.tolist() == [sum(label != -100 for label in row) for row in rows.tolist()]


def test_moments_of_slopes():
    found = Slopes(
        torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.zeros(2, 2), torch.tensor([2.0, 8.0]), torch.arange(2)
    )
    assert first_order(found).tolist() == pytest.approx([0.4, 0.2])
    assert second_moment(found).tolist() == pytest.approx([1.0, 2.0])


def line(units: int, windows: int, share: float, seed: int) -> tuple[Slopes, torch.Tensor]:
    """Slopes that are lines along every unit, and the rises that they integrate to."""
    generator = torch.Generator().manual_seed(seed)
    start, curvature = torch.randn(2, units, generator=generator, dtype=torch.float64)
    removed = torch.rand(windows, units, generator=generator, dtype=torch.float64)
    removed *= torch.rand(windows, units, generator=generator, dtype=torch.float64) < share
    tokens = torch.randint(20, 60, (windows,), generator=generator).double()
    slope = (start + curvature * removed) * tokens[:, None]
    return Slopes(slope, removed, tokens, torch.arange(windows) // 2), start + curvature / 2


def noisy(found: Slopes, size: float, generator: torch.Generator) -> Slopes:
    noise = size * torch.randn(found.slope.shape, generator=generator, dtype=torch.float64)
    return replace(found, slope=found.slope + noise * found.tokens[:, None])


def test_a_line_is_integrated():
    found, rises = line(units=5, windows=30, share=0.4, seed=0)
    worth = loss_game(found)
    assert torch.allclose(worth.rise, rises)
    assert torch.allclose(worth.error, torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_standard_errors_are_those_of_repetition():
    found, rises = line(units=3, windows=200, share=0.4, seed=1)
    generator = torch.Generator().manual_seed(5)
    runs = [loss_game(noisy(found, 2.0, generator)) for _ in range(300)]
    rise, error = (torch.stack(parts) for parts in zip(*runs, strict=True))
    assert torch.allclose(error.mean(0), rise.std(0), rtol=0.15)
    assert ((rise.mean(0) - rises).abs() < 4 * rise.std(0) / 300**0.5).all()


def test_resamples_draw_whole_documents():
    """Written out: the windows of a document come together, as often as it is drawn."""
    found, _ = line(units=3, windows=12, share=0.5, seed=4)
    found = noisy(found, 1.0, torch.Generator().manual_seed(0))
    resamples = resampled_loss_game(found, 5, seed=2)
    for draw, rises in zip(draw_examples(6, 5, seed=2), resamples, strict=True):
        rows = [window for window in range(12) for _ in range(draw[window // 2])]
        written = Slopes(found.slope[rows], found.removed[rows], found.tokens[rows], found.documents[rows])
        assert torch.allclose(rises, loss_game(written).rise)
    assert resamples.std(0).min() > 0


def test_units_that_every_window_had_whole_have_slopes_only():
    found, _ = line(units=3, windows=20, share=0.0, seed=3)
    assert torch.allclose(loss_game(found).rise, first_order(found))


@KINDS
def test_the_loss_game_predicts_what_silencing_does(prepared, kind):
    """Within the noise it states, beside an allowance for what is no quadratic."""
    module, batches, sites = prepared(kind)
    found = damages(module, batches * 50, sites, ["loss-game", "loo"], seed=1).values
    game, error, loo = (torch.cat(found[name]) for name in ("loss-game", "loss-game-error", "loo"))
    assert ((game - loo).abs() <= 4 * error + 0.25 * loo.abs().max()).all()
    assert torch.corrcoef(torch.stack([game, loo]))[0, 1] > 0.9


def test_a_window_that_predicts_nothing_spoils_nothing(prepared):
    module, batches, sites = prepared("gpt2")
    lone = {name: tensor[:1, :1] for name, tensor in batches[0].items() if name in ("input_ids", "attention_mask")}
    lone |= {"labels": lone["input_ids"], "real": torch.tensor([0]), "places": torch.zeros(1, 2, dtype=torch.long)}
    alone = slopes(module, batches, sites)
    beside = slopes(module, [*batches, lone], sites)
    assert torch.equal(alone.slope, beside.slope)
    assert module.training_step(lone, 0) == 0
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_few_windows_give_no_wild_numbers():
    """A unit that hardly varied is told no slope to extrapolate; and the errors own up to the scatter."""
    worst = 0.0
    for seed in range(300):
        found, _ = line(units=8, windows=12, share=0.2, seed=seed)
        flat = replace(found, slope=torch.ones_like(found.slope) * found.tokens[:, None])
        worth = loss_game(noisy(flat, 1.0, torch.Generator().manual_seed(seed)))
        worst = max(worst, float((worth.rise - 1).abs().max()))
    assert worst < 10


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "albert"])
def test_strength_is_that_of_what_heads_hand_on(prepared, kind):
    """Against outputs of the projection, of which each is taken with all other heads silenced."""
    module, batches, sites = prepared(kind)
    found = damages(module, batches, sites, ["activation", "fluctuation"]).values
    for index, site in enumerate(sites):
        projection = module.model.get_submodule(site.module)
        weight = projection.weight.detach()
        weight = weight if type(projection).__name__ == "Conv1D" else weight.T
        inputs = []
        hook = projection.register_forward_pre_hook(lambda part, args, seen=inputs: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                module.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
        uses = len(inputs) // len(batches)
        masks = [batch["attention_mask"].bool() for batch in batches for _ in range(uses)]
        rows = torch.cat([seen[mask] for seen, mask in zip(inputs, masks, strict=True)])
        for head, own in enumerate(site.entries):
            handed = rows[:, own] @ weight[own]
            assert found["activation"][index][head] == pytest.approx(float(handed.square().sum(1).mean().sqrt()))
            fluctuation = sum(float(rows[:, c].var(correction=0) * weight[c].square().sum()) for c in own)
            assert found["fluctuation"][index][head] == pytest.approx(fluctuation)


def test_a_projection_that_is_no_linear_map_is_refused(prepared):
    module, batches, sites = prepared("gpt2")
    holder = [type(sites[0])(sites[0].module.rpartition(".")[0], sites[0].units, sites[0].owners)]
    with pytest.raises(ModelError, match="is no linear map of its own") as caught:
        slopes(module, batches, holder)
    assert "\n" not in str(caught.value)


def test_scores_hold_what_was_asked(tmp_path):
    names = ["loss-game", "taylor", "fisher", "loo", "activation", "fluctuation"]
    run = compressor.score(samples=6, values=names, output_dir=tmp_path / "scores", bootstrap=0)
    for layer in run.scores.layers:
        assert set(names) | {"loss-game-error"} == set(layer.values)
        assert all(torch.isfinite(values).all() for values in layer.values.values())
    again = compressor.score(samples=6, values=names, output_dir=tmp_path / "again", bootstrap=0)
    assert (tmp_path / "scores" / "scores.safetensors").read_bytes() == (
        tmp_path / "again" / "scores.safetensors"
    ).read_bytes()
    assert again.scores.facts == run.scores.facts


def test_how_often_heads_would_go_is_told(tmp_path):
    run = compressor.score(samples=12, output_dir=tmp_path / "scores", bootstrap=20)
    pruned = compressor.prune(scores=run.directory, dry_run=True)
    shares = pruned.document["removed_in_resamples"]
    assert [sum(layer) for layer in shares] == pytest.approx([2.0] * 4)  # two of eight go in every resample
    drawn = torch.stack([layer.resampled["loss-game"] for layer in run.scores.layers])
    lowest = drawn.argsort(dim=-1)[..., :2]
    for layer, share in enumerate(shares):
        counted = torch.bincount(lowest[layer].flatten(), minlength=8) / 20
        assert share == pytest.approx(counted.tolist())


def test_an_unknown_value_is_refused():
    with pytest.raises(RecipeError, match="unknown value 'taylr'; did you mean 'taylor'"):
        compressor.score(values=["taylr"])

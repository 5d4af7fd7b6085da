"""The scoring epoch through a real Trainer against numpy counts of transformers' own attention matrices."""

import math
from itertools import combinations
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AttentionInterface

from compressor.analysis import Analysis
from compressor.attention import AttentionProbe, attention_layers, prune_heads
from compressor.callbacks import HeadScoring, scoring
from compressor.callbacks.scoring import FirstKeyMass
from compressor.callbacks.tables import SymbolTable
from compressor.confidence import is_saturated
from compressor.criteria import criteria
from compressor.errors import CompressorError, DataError, RecipeError
from compressor.game.counts import PairHistogram
from compressor.module import LanguageModel
from compressor.trainer import run_scoring
from compressor.types import Scores

CPU = torch.device("cpu")
MASKED = ("albert", "bert", "mpnet", "roberta")


class Batches(L.LightningDataModule):
    """Ready-made batches."""

    def __init__(self, *batches: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.batches = list(batches)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)


@pytest.fixture
def score():
    """Score a model over batches: → one LayerScores per layer."""

    def run(
        model, batches, *, alphabet: int = 16, device: torch.device = CPU, layers=None, triple_layers=(0,), **settings
    ):
        settings.setdefault("analysis", Analysis(layers=tuple(triple_layers)))
        callback = HeadScoring(layers or attention_layers(model), alphabet, **settings)
        module = LanguageModel(model, "masked" if model.config.model_type in MASKED else "causal")
        run_scoring(module, Batches(*batches), callback, device)
        return callback.layers_scored

    return run


@pytest.fixture
def batches(make_batch):
    """Batches of different shapes, two of them padded on the right, as the data module pads; the last are short."""
    shapes = [("right", 4, 12), ("right", 3, 9), ("none", 2, 7), ("none", 9, 2), ("none", 9, 3)]
    return [make_batch(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def entropy(columns: np.ndarray) -> float:
    shares = np.unique(columns, axis=0, return_counts=True)[1] / len(columns)
    return float(-(shares * np.log(shares)).sum())


def observed(attentions, batches, symbol: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer: symbols [observations, heads, …] and mean masses on the first key, by loops over padded rows."""
    layers: list[tuple[list, list]] = []
    for batch in batches:
        for index, weights in enumerate(attentions(**batch)):
            if index == len(layers):
                layers.append(([], []))
            for row, mask in zip(weights.double().numpy(), batch["attention_mask"].numpy(), strict=True):
                real = np.flatnonzero(mask)
                part = row[:, real][:, :, real]  # [heads, queries, keys], without any padding
                keys = part.argmax(-1)
                if symbol == "sequence":
                    layers[index][0].append(np.pad(keys, ((0, 0), (0, 16 - len(real))), constant_values=-1)[None])
                else:
                    layers[index][0].append((keys if symbol == "key" else np.arange(len(real)) - keys).T)
                layers[index][1].append(part[:, :, 0].T)
    return [(np.concatenate(symbols), np.concatenate(masses).mean(0)) for symbols, masses in layers]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "llama"])
@pytest.mark.parametrize("symbol", ["key", "offset", "sequence"])
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_scores_are_those_of_counts_by_numpy(
    build, batches, score, eager_attentions, monkeypatch, kind, symbol, storage
):
    model = build(kind, dtype=torch.float32)
    with eager_attentions(model) as attentions, torch.no_grad():
        expected = observed(attentions, batches, symbol)
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**40 if storage == "dense" else 0)
    found = score(model, batches, symbol=symbol, triple_layers=[0, 1])
    assert len(found) == len(expected) == 2
    for layer, (symbols, mass) in zip(found, expected, strict=True):
        heads = symbols.shape[1]
        flat = symbols.reshape(len(symbols), heads, -1)
        singles = [entropy(flat[:, head]) for head in range(heads)]
        assert len(set(np.round(singles, 9))) > 1
        assert layer.observations == len(symbols)
        assert layer.entropy.tolist() == pytest.approx(singles, abs=1e-12)
        information = np.zeros((heads, heads))
        joint = {}
        for i, j in combinations(range(heads), 2):
            joint[i, j] = entropy(flat[:, [i, j]].reshape(len(flat), -1))
            information[i, j] = information[j, i] = singles[i] + singles[j] - joint[i, j]
        assert np.allclose(layer.pair_dividends.numpy(), information, rtol=0, atol=1e-11)
        assert layer.phi.tolist() == pytest.approx((np.array(singles) + information.sum(1) / 2).tolist(), abs=1e-10)
        triples = [
            -(singles[i] + singles[j] + singles[k] - joint[i, j] - joint[i, k] - joint[j, k])
            - entropy(flat[:, [i, j, k]].reshape(len(flat), -1))
            for i, j, k in combinations(range(heads), 3)
        ]
        assert layer.dividends["3"].tolist() == pytest.approx(triples, abs=1e-10)
        assert layer.first_key_mass.tolist() == pytest.approx(mass.tolist(), rel=1e-4, abs=1e-6)
        assert {tensor.dtype for tensor in (layer.phi, layer.entropy, layer.first_key_mass)} == {torch.float64}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("symbol", ["key", "sequence"])
def test_left_padded_batches_are_scored_too(build, make_batch, score, eager_attentions, kind, symbol):
    """Fully masked rows of padded queries, whose attention is not a number, count for nothing."""
    model, batch = build(kind, dtype=torch.float32), make_batch("left", 4, 12, seed=1)
    with eager_attentions(model) as attentions, torch.no_grad():
        expected = observed(attentions, [batch], symbol)
    for layer, (symbols, mass) in zip(score(model, [batch], symbol=symbol), expected, strict=True):
        flat = symbols.reshape(len(symbols), symbols.shape[1], -1)
        assert layer.entropy.tolist() == pytest.approx([entropy(flat[:, head]) for head in range(flat.shape[1])])
        assert layer.first_key_mass.tolist() == pytest.approx(mass.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("symbol", ["key", "offset"])
def test_dense_and_sparse_storage_give_the_same_bits(build, batches, score, kind, symbol):
    """Symbols past the budget go by way of the disk, too."""
    model, settings = build(kind, dtype=torch.float32), {"symbol": symbol, "triple_layers": [1]}
    dense, sparse = (score(model, batches, memory_budget=budget, **settings) for budget in (2**30, 1))
    for left, right in zip(dense, sparse, strict=True):
        assert left.observations == right.observations
        for name in ("phi", "entropy", "pair_dividends", "coverage", "first_key_mass", "output_norm"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert dense[0].dividends == sparse[0].dividends == {}
    assert torch.equal(dense[1].dividends["3"], sparse[1].dividends["3"])


def test_storage_is_dense_while_it_fits_a_quarter_of_the_free_memory(build, make_batch, score, monkeypatch):
    """GPT-2: two layers of ten pairs, a head with itself being one, of 16² eight-byte counts."""
    needed = 2 * 8 * 10 * 16**2
    model, used = build("gpt2", dtype=torch.float32), []
    make = PairHistogram.of
    monkeypatch.setattr(
        PairHistogram, "of", staticmethod(lambda *sizes, **how: (used.append(how["dense"]), make(*sizes, **how))[1])
    )
    for free, dense in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(scoring, "free_memory", lambda device, free=free: free)
        score(model, [make_batch()], triple_layers=[])
        assert used[-2:] == [dense, dense]


def test_symbols_are_kept_only_where_pairs_are_not_enough(build, batches, score, monkeypatch):
    kept = []
    keep = SymbolTable.update
    monkeypatch.setattr(SymbolTable, "update", lambda self, symbols: (kept.append(1), keep(self, symbols))[1])
    model = build("gpt2", dtype=torch.float32)
    for analysis, tables in (
        (Analysis(layers=()), 0),
        (Analysis(layers=(1,)), 1),
        (Analysis(layers=(0, 1), order=2), 0),
        (Analysis(layers=(), coalitions=(((0, 1), (0, 2)),)), 1),
        (Analysis(layers=(), values=("marginal",)), 2),
        (Analysis(layers=(), resamples=2), 2),
    ):
        kept.clear()
        score(model, batches, analysis=analysis)
        assert len(kept) == tables * len(batches)


def test_the_machine_tells_its_free_memory():
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(facts["MemTotal"].split()[0])
    assert 0 < scoring.free_memory(CPU) <= total


def test_batches_and_their_order_mean_nothing(build, make_batch, score):
    model, batch = build("llama", dtype=torch.float64), make_batch("none", 6, 8)
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(6)]
    whole, split, backwards = score(model, [batch]), score(model, rows), score(model, rows[::-1])
    for first, second, third in zip(whole, split, backwards, strict=True):
        for name in ("phi", "entropy", "pair_dividends"):
            assert torch.equal(getattr(first, name), getattr(second, name))
            assert torch.equal(getattr(first, name), getattr(third, name))
        assert torch.allclose(first.first_key_mass, second.first_key_mass)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_the_language_model_head_is_never_called(build, batches, score, kind):
    model, calls = build(kind, dtype=torch.float32), []
    layers = attention_layers(model)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    score(model, batches, layers=layers)
    assert not calls
    model(**batches[0])
    assert calls  # the hook works


def snapshot(model):
    return (
        model.config._attn_implementation,
        [
            (name, set(vars(module)) - {"_indices"}, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_unchanged(model, before):
    implementation, hooks, weights = snapshot(model)
    assert (implementation, hooks) == before[:2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[2].items())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_model_is_as_it_was_after_scoring(build, batches, score, kind):
    model = build(kind, dtype=torch.float32)
    before = snapshot(model)
    score(model, batches)
    assert_unchanged(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_model_is_as_it_was_after_an_exception_in_a_batch(build, batches, score, kind):
    model = build(kind, dtype=torch.float32)
    before = snapshot(model)
    broken = {"input_ids": torch.full((1, 4), 999), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(IndexError):
        score(model, [batches[0], broken])
    assert_unchanged(model, before)
    assert len(score(model, batches)) == 2


def test_the_model_is_as_it_was_after_ctrl_c(build, batches, score, monkeypatch):
    model = build("gpt2", dtype=torch.float32)
    before = snapshot(model)

    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "predict_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score(model, batches)
    assert_unchanged(model, before)


def test_an_exception_in_the_callback_itself_leaves_the_model_alone(build, batches, score, monkeypatch):
    model = build("gpt2", dtype=torch.float32)
    before = snapshot(model)

    def full(self, mass, mask):
        raise MemoryError("no room")

    monkeypatch.setattr(FirstKeyMass, "update", full)
    with pytest.raises(MemoryError, match="no room"):
        score(model, batches)
    assert_unchanged(model, before)


def test_dropout_does_not_disturb_the_scores(build, batches, score):
    """Scoring happens in evaluation mode, whatever mode the model came in."""
    quiet = score(build("gpt2", dtype=torch.float32), batches)
    noisy = score(build("gpt2", dtype=torch.float32, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train(), batches)
    for left, right in zip(quiet, noisy, strict=True):
        assert torch.equal(left.phi, right.phi)


def test_a_callback_can_be_used_again(build, batches):
    model = build("gpt2", dtype=torch.float32)
    callback = HeadScoring(attention_layers(model), 16)
    results = []
    for _ in range(2):
        run_scoring(LanguageModel(model, "causal"), Batches(*batches), callback, CPU)
        results.append(callback.layers_scored)
    for first, second in zip(*results, strict=True):
        assert first.observations == second.observations
        assert torch.equal(first.phi, second.phi)


def random_documents(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 37, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


def test_distinct_documents_saturate_sequence_symbols(build, score):
    """The paper's artefact: with `sequence` symbols every entropy is exactly ln N, whatever the heads do."""
    model = build("gpt2", dtype=torch.float32)
    found = score(model, random_documents(64, 16), symbol="sequence", triple_layers=[0, 1])
    ceiling = torch.tensor(64.0, dtype=torch.float64).log()
    for layer in found:
        assert layer.observations == 64
        assert layer.entropy.eq(ceiling).all()
        assert layer.pair_dividends.eq(ceiling * (1 - torch.eye(4, dtype=torch.float64))).all()
        assert layer.dividends["3"].tolist() == pytest.approx([-math.log(64)] * 4)
        assert is_saturated(layer)


def test_token_symbols_of_the_same_documents_are_not_saturated(build, score):
    found = score(build("gpt2", dtype=torch.float32), random_documents(64, 16))
    assert not any(is_saturated(layer) for layer in found)
    assert all(float(layer.entropy.max()) <= math.log(16) for layer in found)


def test_one_observation_is_not_called_saturated(build, score):
    model = build("gpt2", dtype=torch.float32)
    (layer, _) = score(model, random_documents(1, 16), symbol="sequence")
    assert layer.observations == 1
    assert layer.entropy.eq(0).all()
    assert not is_saturated(layer)


def test_layers_without_heads_keep_their_place(build, batches, score):
    model = prune_heads(build("gpt2", dtype=torch.float32), {0: range(4)}, allow_empty=True)
    empty, rest = score(model, batches, triple_layers=[0, 1])
    assert (empty.observations, empty.dividends) == (0, {})
    assert empty.phi.shape == empty.entropy.shape == empty.first_key_mass.shape == empty.output_norm.shape == (0,)
    assert empty.pair_dividends.shape == (0, 0)
    assert not is_saturated(rest)
    assert rest.phi.shape == (4,)
    for entry in (entry for entry in criteria() if entry.needs is None):
        assert entry(Scores((empty, rest), {})).units_per_layer == (0, 4)


def test_an_empty_layer_is_not_saturated(build, batches, score):
    model = prune_heads(build("gpt2", dtype=torch.float32), {0: range(4)}, allow_empty=True)
    assert not is_saturated(score(model, batches)[0])


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize("kept", [1, 2])
def test_layers_of_one_or_two_heads(build, batches, score, eager_attentions, monkeypatch, storage, kept):
    dense = build("gpt2", dtype=torch.float32)
    with eager_attentions(dense) as attentions, torch.no_grad():
        symbols, mass = observed(attentions, batches, "key")[0]
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**40 if storage == "dense" else 0)
    model = prune_heads(dense, {0: range(kept, 4)})
    layer, _ = score(model, batches)
    assert layer.phi.shape == layer.entropy.shape == layer.first_key_mass.shape == layer.output_norm.shape == (kept,)
    assert layer.pair_dividends.shape == (kept, kept)
    assert layer.dividends["3"].shape == (0,)
    assert layer.entropy.tolist() == pytest.approx([entropy(symbols[:, head]) for head in range(kept)])
    assert layer.first_key_mass.tolist() == pytest.approx(mass[:kept].tolist(), rel=1e-4)
    if kept == 1:
        assert torch.equal(layer.phi, layer.entropy)
    for entry in (entry for entry in criteria() if entry.needs is None):
        assert entry(Scores((layer,), {})).units_per_layer == (kept,)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_pruned_models_with_uneven_groups_are_scored(build, batches, score, eager_attentions, monkeypatch, storage):
    dense = build("llama", dtype=torch.float32)
    with eager_attentions(dense) as attentions, torch.no_grad():
        symbols = observed(attentions, batches, "key")[0][0][:, [1, 2, 3, 4, 5]]
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**40 if storage == "dense" else 0)
    layer, _ = score(prune_heads(dense, {0: [0]}), batches)
    assert layer.entropy.tolist() == pytest.approx([entropy(symbols[:, head]) for head in range(5)])


def test_an_uneven_model_can_be_trained_after_scoring(build, batches, score):
    """Lightning predicts in inference mode; nothing made there may stay in the model."""
    model = prune_heads(build("llama", dtype=torch.float32), {0: [0]})
    score(model, batches)
    ids = batches[2]["input_ids"]
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_nothing_to_score_is_said_in_one_line(build, score, monkeypatch, storage):
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**40 if storage == "dense" else 0)
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    model = build("gpt2", dtype=torch.float32)
    with pytest.raises(DataError, match="nothing to score") as caught:
        score(model, [padding])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_models_that_bypass_the_interface_are_scored_alike(build, batches, score, monkeypatch, implementation):
    model = build("gpt2", implementation=implementation, dtype=torch.float32)
    expected = score(model, batches)
    monkeypatch.setattr(AttentionInterface, "get_interface", AttentionInterface.get_interface.__wrapped__)
    found = score(model, batches)
    assert AttentionProbe(model, attention_layers(model)).fallback
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left.phi, right.phi)
        assert torch.allclose(left.first_key_mass, right.first_key_mass)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("kind", ["bloom", "mpnet", "deepseek_v3", "gpt_bigcode"])
@pytest.mark.parametrize("symbol", ["key", "offset", "sequence"])
def test_other_layouts_are_scored_by_what_transformers_hands_out(build, batches, score, eager_attentions, kind, symbol):
    """Two of them attend by themselves, one has latent keys, one a single key for all heads."""
    model = build(kind, dtype=torch.float32)
    with eager_attentions(model) as attentions, torch.no_grad():
        expected = observed(attentions, batches, symbol)
    for layer, (symbols, mass) in zip(score(model, batches, symbol=symbol), expected, strict=True):
        flat = symbols.reshape(len(symbols), symbols.shape[1], -1)
        assert layer.observations == len(symbols)
        assert layer.entropy.tolist() == pytest.approx([entropy(flat[:, head]) for head in range(4)], abs=1e-12)
        assert layer.first_key_mass.tolist() == pytest.approx(mass.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_every_use_of_a_shared_layer_is_observed(build, batches, score, eager_attentions, monkeypatch, storage):
    """ALBERT applies one layer several times: each token is as many observations of the same heads."""
    model = build("albert", dtype=torch.float32, num_hidden_layers=3)
    with eager_attentions(model) as attentions, torch.no_grad():
        uses = observed(attentions, batches, "key")
    symbols = np.concatenate([part for part, _ in uses])
    monkeypatch.setattr(scoring, "free_memory", lambda device: 2**40 if storage == "dense" else 0)
    (layer,) = score(model, batches)
    assert layer.observations == len(symbols) == 3 * sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert layer.entropy.tolist() == pytest.approx([entropy(symbols[:, head]) for head in range(4)], abs=1e-12)
    assert layer.pair_dividends[0, 1].item() == pytest.approx(
        entropy(symbols[:, [0]]) + entropy(symbols[:, [1]]) - entropy(symbols[:, [0, 1]]), abs=1e-11
    )
    mass = np.mean([part for _, part in uses], axis=0)
    assert layer.first_key_mass.tolist() == pytest.approx(mass.tolist(), rel=1e-4, abs=1e-6)


def test_the_uses_of_a_shared_layer_make_one_tuple(build, batches, score, eager_attentions):
    """With `sequence` symbols a document stays one observation, of all that a head attends to in it."""
    model = build("albert", dtype=torch.float32, num_hidden_layers=2)
    with eager_attentions(model) as attentions, torch.no_grad():
        uses = observed(attentions, batches, "sequence")
    symbols = np.concatenate([part for part, _ in uses], axis=-1)
    (layer,) = score(model, batches, symbol="sequence")
    assert layer.observations == len(symbols)
    assert layer.entropy.tolist() == pytest.approx([entropy(symbols[:, head]) for head in range(4)], abs=1e-12)


@pytest.mark.parametrize("triple_layers", [[2], [0, -1], [99]])
def test_triple_layers_that_do_not_exist_are_refused(build, triple_layers):
    with pytest.raises(RecipeError, match="the model has layers 0 to 1"):
        HeadScoring(attention_layers(build("gpt2")), 16, analysis=Analysis(layers=tuple(triple_layers)))


def test_unknown_symbols_are_refused(build):
    with pytest.raises(CompressorError, match="expected one of key, offset, sequence"):
        HeadScoring(attention_layers(build("gpt2")), 16, symbol="keys")


def test_first_key_mass_is_the_mean_over_real_queries():
    generator = torch.Generator().manual_seed(0)
    metric, parts = FirstKeyMass(3), []
    for shape in ((2, 3, 5), (4, 3, 7)):
        mass = torch.rand(shape, generator=generator)
        mask = (torch.rand(shape[0], shape[2], generator=generator) < 0.7).long()
        metric.update(mass, mask)
        parts.append(mass.transpose(1, 2)[mask.bool()])
    expected = torch.cat(parts).double().mean(0)
    assert torch.allclose(metric.compute(), expected)


def test_first_key_mass_of_16_bit_attention_is_not_summed_in_16_bits():
    """The fallback hands over masses in the model's dtype; 1,000 of them must not be rounded to 8 bits."""
    metric = FirstKeyMass(2)
    value = torch.tensor(0.30078125, dtype=torch.bfloat16)
    metric.update(value.expand(1, 2, 1000), torch.ones(1, 1000, dtype=torch.long))
    assert metric.compute().tolist() == pytest.approx([float(value)] * 2, rel=1e-6)


def test_windows_of_one_document_are_one_observation(build, score):
    """With `sequence` symbols N counts documents, as the paper does, also where they are longer than the context."""
    windows = random_documents(30, 16)
    places = [(index // 3, index % 3) for index in range(30)]
    start = 0
    for batch in windows:
        batch["places"] = torch.tensor(places[start : start + len(batch["input_ids"])])
        start += len(batch["input_ids"])
    (layer, *_) = score(build("gpt2"), windows, symbol="sequence")
    assert layer.observations == 10
    assert layer.entropy.tolist() == pytest.approx([math.log(10)] * len(layer.entropy))

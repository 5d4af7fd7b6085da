"""What an analysis asks for and gets: against the game on bare arrays, a dictionary, and resamples written out."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor import analysis as module
from compressor import game
from compressor.analysis import VALUES, Analysis, Evidence, analyse
from compressor.data import TextDataModule
from compressor.errors import CompressorError, RecipeError
from compressor.game.estimators import ESTIMATORS
from compressor.game.resampling import draw_examples
from compressor.game.shuffling import shuffle_null
from tests.conftest import CONTEXT, tiny_model, tiny_tokenizer
from tests.unit.game import reference

LENGTHS = [1, 5, 9, 3, 12, 7, 8, 2, 13, 6] * 3


def evidence(heads: int, alphabet: int = 4, seed: int = 0, lengths=LENGTHS, estimator: str = "plug-in") -> Evidence:
    """Heads that share something, in documents that differ."""
    generator = np.random.default_rng(seed)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    own = generator.integers(0, alphabet, (len(documents), heads))
    liking = generator.integers(0, alphabet, (len(lengths), heads))[documents]
    shared = generator.integers(0, alphabet, (len(documents), 1))
    draw = generator.random(own.shape)
    rows = torch.from_numpy(np.where(draw < 0.4, own, np.where(draw < 0.7, liking, shared)))
    places = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    pairs = game.pair_entropies(rows, estimator=estimator)
    return Evidence(rows, pairs, torch.from_numpy(documents), places)


# --- what can be asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        ({"estimator": "plugin"}, ["unknown estimator 'plugin'", "did you mean", *ESTIMATORS]),
        ({"estimator": ""}, ["unknown estimator ''"]),
        ({"values": ("shapley", "shapely")}, ["unknown value 'shapely'", "did you mean", *VALUES]),
        ({"values": ("phi",)}, ["unknown value 'phi'"]),
        ({"layers": (0, 3)}, ["layer 3", "the model has layers 0 to 2"]),
        ({"layers": (-1,)}, ["layer -1", "the model has layers 0 to 2"]),
        ({"coalitions": (((0, 1), (0, 4)),)}, ["head 0.4"]),
        ({"coalitions": (((0, 1),), ((3, 0), (0, 1)))}, ["head 3.0"]),
        ({"coalitions": (((1, 0),),)}, ["head 1.0"]),
        ({"coalitions": (((0, -1),),)}, ["head 0.-1"]),
        ({"coalitions": (((-1, 0),),)}, ["head -1.0"]),
    ],
)
def test_what_the_model_cannot_answer_is_refused_in_one_line(asked, messages):
    with pytest.raises(RecipeError) as caught:
        Analysis(**asked).check([4, 0, 2])
    assert "\n" not in str(caught.value)
    assert all(message in str(caught.value) for message in messages)


def test_what_the_model_can_answer_is_not_refused():
    Analysis().check([4])
    for name in ESTIMATORS:
        Analysis(estimator=name).check([4])
    Analysis(layers=(0, 1, 2), order=16, values=VALUES, coalitions=(((0, 3), (2, 1)),), shuffles=3).check([4, 0, 2])


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, [0]),
        ({"layers": ()}, []),
        ({"layers": (1, 2)}, [1, 2]),
        ({"layers": (1, 2), "order": 2}, []),
        ({"layers": (1,), "order": 5}, [1]),
        ({"layers": (), "shuffles": 9}, []),
        ({"layers": (), "values": ("eta",)}, [0, 1, 2]),
        ({"layers": (), "resamples": 1}, [0, 1, 2]),
        ({"layers": (), "coalitions": (((0, 1), (2, 0)), ((2, 1),))}, [0, 2]),
        ({"layers": (1,), "coalitions": (((0, 1),),)}, [0, 1]),
    ],
)
def test_symbols_are_wanted_where_pairs_do_not_tell(asked, wanted):
    assert [layer for layer in range(3) if Analysis(**asked).wants_symbols(layer)] == wanted


# --- dividends and values -------------------------------------------------------------------------------------------


def test_nothing_is_found_that_was_not_asked_for():
    seen = evidence(4)
    assert analyse(seen, 1, Analysis()) == {}
    assert analyse(seen, 0, Analysis(order=2)) == {}
    assert analyse(seen, 0, Analysis(layers=(), shuffles=5, coalitions=(((0, 1),),))) == {}
    assert analyse(seen, 0, Analysis()).keys() == {"dividends", "triples"}
    assert analyse(seen, 1, Analysis(values=("marginal",), resamples=2)).keys() == {"values", "resampled"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_findings_are_those_of_the_game(estimator):
    seen = evidence(5, estimator=estimator)
    found = analyse(seen, 2, Analysis(estimator=estimator, layers=(2,), order=4, values=VALUES))
    how = {"estimator": estimator}
    assert found["dividends"].keys() == {"3", "4"}
    assert torch.equal(found["dividends"]["3"], game.triple_dividends(seen.symbols, **how))
    assert torch.equal(found["dividends"]["4"], game.dividends(seen.symbols, 4, **how))
    assert torch.equal(found["triples"]["entropy"], game.triple_entropies(seen.symbols, **how))
    for name, expected in {
        "third-order": game.third_order(seen.symbols, **how),
        "shapley": game.shapley_values(seen.symbols, **how),
        "eta": game.eta(seen.symbols, **how),
        "marginal": game.marginal_contributions(seen.symbols, **how),
    }.items():
        assert torch.allclose(found["values"][name], expected, rtol=0, atol=1e-12), name
    assert found["values"].keys() == set(VALUES)


def test_findings_are_those_of_a_dictionary():
    seen = evidence(4)
    rows = seen.symbols.numpy()
    found = analyse(seen, 0, Analysis(order=4, values=VALUES))
    for order in (3, 4):
        expected = [reference.dividend(rows, coalition) for coalition in combinations(range(4), order)]
        assert found["dividends"][str(order)].tolist() == pytest.approx(expected, abs=1e-12)
    triples = list(combinations(range(4), 3))
    assert found["triples"]["entropy"].tolist() == pytest.approx([reference.joint(rows, c) for c in triples], abs=1e-12)
    once = [sum(count == 1 for count in reference.counts_of(rows, c).values()) for c in triples]
    assert max(once) > 0
    assert found["triples"]["coverage"].tolist() == pytest.approx([1 - n / len(rows) for n in once], abs=1e-15)
    shapley = reference.shapley(rows, 4)
    everyone = reference.joint(rows, range(4))
    singles = [reference.joint(rows, [head]) for head in range(4)]
    others = [[other for other in range(4) if other != head] for head in range(4)]
    third = [
        sum(
            reference.dividend(rows, c) / len(c)
            for size in (1, 2, 3)
            for c in combinations(range(4), size)
            if head in c
        )
        for head in range(4)
    ]
    for name, expected in {
        "shapley": shapley,
        "eta": [2 * single - value for single, value in zip(singles, shapley, strict=True)],
        "marginal": [everyone - reference.joint(rows, rest) for rest in others],
        "third-order": third,
    }.items():
        assert found["values"][name].tolist() == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize(
    ("heads", "orders"), [(1, {"3": 0}), (2, {"3": 0}), (3, {"3": 1}), (4, {"3": 4, "4": 1}), (5, {"3": 10, "4": 5})]
)
def test_orders_end_where_the_heads_do(heads, orders):
    found = analyse(evidence(heads), 0, Analysis(order=4 if heads == 5 else 9, shuffles=2, values=VALUES, resamples=2))
    assert {order: len(values) for order, values in found["dividends"].items()} == orders
    assert all(len(values) == orders["3"] for values in found["triples"].values())
    assert all(values.shape == (heads,) for values in found["values"].values())
    assert all(values.shape == (2, heads) for values in found["resampled"].values())


@pytest.mark.parametrize("name", VALUES)
def test_values_are_found_one_by_one(name):
    seen = evidence(4)
    alone = analyse(seen, 3, Analysis(layers=(), values=(name,)))["values"]
    whole = analyse(seen, 3, Analysis(layers=(), values=VALUES))["values"]
    assert torch.equal(alone[name], whole[name])
    assert alone.keys() <= {name, "shapley", "eta"}


def test_more_than_sixteen_heads_have_sampled_shapley_values(monkeypatch):
    monkeypatch.setattr(module, "PERMUTATIONS", 6)
    seen = evidence(17, lengths=[5, 9, 8])
    found = analyse(seen, 0, Analysis(layers=(), values=("shapley", "eta"), seed=5))["values"]
    values, errors = game.sampled_shapley_values(seen.symbols, 6, 5)
    assert torch.equal(found["shapley"], values)
    assert torch.equal(found["shapley-error"], errors)
    assert float(errors.min()) > 0
    assert torch.allclose(found["eta"], 2 * seen.pairs.diagonal() - values)
    everyone = reference.joint(seen.symbols, range(17))
    assert float(found["shapley"].sum()) == pytest.approx(everyone, abs=1e-12)
    other = analyse(seen, 0, Analysis(layers=(), values=("eta",), seed=6))["values"]
    assert not torch.equal(other["shapley"], values)


def test_sampled_values_lie_about_the_exact_ones(monkeypatch):
    seen = evidence(6)
    asked = Analysis(layers=(), values=("shapley",))
    exact = analyse(seen, 0, asked)["values"]
    assert exact.keys() == {"shapley", "eta"}
    monkeypatch.setattr(module, "MAX_HEADS", 5)
    sampled = analyse(seen, 0, asked)["values"]
    assert sampled.keys() == {"shapley", "eta", "shapley-error"}
    distance = (sampled["shapley"] - exact["shapley"]).abs()
    assert float((distance / sampled["shapley-error"]).max()) < 4
    assert 0 < float(distance.max()) < 0.05


# --- resamples ------------------------------------------------------------------------------------------------------


def test_resamples_are_those_of_documents_written_out():
    seen = evidence(4)
    found = analyse(seen, 1, Analysis(layers=(), resamples=5, seed=9))["resampled"]
    documents = seen.symbols.split(LENGTHS)
    for one, draw in enumerate(draw_examples(len(LENGTHS), 5, 9)):
        rows = torch.cat([document for document, times in zip(documents, draw, strict=True) for _ in range(times)])
        assert torch.allclose(found["phi"][one], game.phi(rows), rtol=0, atol=1e-12)
        assert torch.allclose(found["entropy"][one], game.entropies(rows), rtol=0, atol=1e-12)


def test_one_document_says_nothing_about_others():
    assert "resampled" not in analyse(evidence(3, lengths=[20]), 1, Analysis(layers=(), resamples=5))


def test_layers_resample_together_and_seeds_do_not():
    """A resampled plan speaks of one set of documents in all layers."""
    whole = evidence(6)
    half = Evidence(whole.symbols[:, :3], whole.pairs[:3, :3], whole.documents, whole.places)
    resampled = [
        analyse(seen, layer, Analysis(layers=(), resamples=4, seed=seed))["resampled"]["entropy"][:, :3]
        for seen, layer, seed in ((whole, 0, 3), (half, 1, 3), (half, 1, 4))
    ]
    assert torch.equal(resampled[0], resampled[1])
    assert not torch.equal(resampled[1], resampled[2])


# --- shuffles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "documents"])
def test_shuffles_are_those_of_the_null(whole):
    """By documents, plain and stratified by place; a document's symbol as a whole has no place."""
    seen = evidence(4, alphabet=3)
    if whole:
        seen = seen._replace(places=None, documents=torch.arange(len(seen.symbols)))
    found = analyse(seen, 0, Analysis(shuffles=12, seed=4))["triples"]
    names = {"entropy", "coverage", "excess", "p"}
    assert found.keys() == (names if whole else names | {"stratified_excess", "stratified_p"})
    for start, strata in (("", None), *([] if whole else [("stratified_", seen.places)])):
        expected = shuffle_null(seen.symbols, list(combinations(range(4), 3)), 12, 4, strata, seen.documents)
        assert found[f"{start}excess"].tolist() == expected.excess.tolist()
        assert found[f"{start}p"].tolist() == expected.p_value.tolist()
    assert found["p"].dtype == found["excess"].dtype == torch.float64
    assert 1 / 13 - 1e-12 <= float(found["p"].min()) <= float(found["p"].max()) <= 1


@pytest.fixture
def by_place() -> dict[str, torch.Tensor]:
    """Tested triples of three heads that look at the first key or one before the query, and one that follows two."""
    generator = np.random.default_rng(0)
    places = np.tile(np.arange(1, 13), 40)
    rows = np.where(generator.random((480, 3)) < 0.5, places[:, None] - 1, 0)
    tied = np.where((rows[:, 0] > 0) ^ (rows[:, 1] > 0), places - 1, 0)
    symbols = torch.from_numpy(np.column_stack([rows, tied]))
    documents = torch.arange(40).repeat_interleave(12)
    seen = Evidence(symbols, game.pair_entropies(symbols), documents, torch.from_numpy(places))
    return analyse(seen, 0, Analysis(shuffles=39))["triples"]


ALONE, TIED = 0, 1  # heads 0, 1, 2 have nothing in common but the place; heads 0, 1, 3 have


def test_ties_by_place_alone_go_with_the_strata(by_place):
    assert float(by_place["stratified_p"][ALONE]) > 0.05
    assert float(by_place["stratified_p"][TIED]) == pytest.approx(1 / 40)
    assert float(by_place["stratified_excess"][TIED]) > 0.1


def test_ties_by_place_alone_are_found_without_the_strata(by_place):
    assert float(by_place["p"][ALONE]) == pytest.approx(1 / 40)
    assert float(by_place["excess"][ALONE]) < -0.1


# --- through a scoring run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attended(texts) -> list[list[torch.Tensor]]:
    """Keys attended to most, by document and layer, [tokens, heads]: transformers' own matrices, one at a time."""
    data = TextDataModule(tiny_tokenizer("gpt2"), task="causal", data=texts, samples=0, max_length=CONTEXT)
    data.setup()
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [
            [weights[0].argmax(-1).T for weights in model(input_ids=ids[None], output_attentions=True).attentions]
            for ids in data.calibration.input_ids
        ]


def test_coalitions_reach_across_layers(here: Path, models, texts, attended):
    names = ["0.1+1.2", "1.3+0.0+0.2", "1.1", "0.0+0.1+0.2+1.0+1.1"]
    run = compressor.score(model=models["gpt2"], data=texts, coalitions=names, triple_layers=[], bootstrap=0)
    rows = torch.cat([torch.cat(document, dim=1) for document in attended]).tolist()  # layer 1 from column 4 on
    found = run.scores.facts["coalitions"]
    assert len(found) == len(names)
    for name, one in zip(names, found, strict=True):
        members = [[int(part) for part in member.split(".")] for member in name.split("+")]
        columns = [4 * layer + head for layer, head in members]
        assert one["heads"] == members
        assert one["entropy"] == pytest.approx(reference.joint(rows, columns), abs=1e-9)
        assert one["dividend"] == pytest.approx(reference.dividend(rows, columns), abs=1e-9)
        once = Counter(reference.counts_of(rows, columns).values())[1]
        assert one["coverage"] == pytest.approx(1 - once / len(rows), abs=1e-12)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.1+7.2"], "head 7.2"),
        (["0.1+0.4"], "head 0.4"),
        (["0.1+0.1"], "different heads"),
        (["0.1+"], "one like 0.1"),
        (["0.1 1.2"], "one like 0.1"),
        ([""], "one like 0.1"),
        (["0.-1"], "one like 0.1"),
        (["+".join(f"0.{head}" for head in range(17))], "16 at most"),
    ],
)
def test_coalitions_that_there_are_not_are_refused_in_one_line(here: Path, models, texts, names, message):
    with pytest.raises(RecipeError) as caught:
        compressor.score(model=models["gpt2"], data=texts, coalitions=names)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(here.iterdir())


@pytest.mark.parametrize("max_length", [CONTEXT, 9], ids=["whole", "split"])
@pytest.mark.parametrize("symbol", ["key", "sequence"])
def test_a_run_resamples_documents(here: Path, models, texts, symbol, max_length):
    """Whatever the batches, and whether or not documents are longer than the window."""
    settings = {"model": models["gpt2"], "data": texts, "symbol": symbol, "max_length": max_length, "bootstrap": 3}
    one, other = (
        compressor.score(**settings, batch_size=size, seed=2, output_dir=str(size), samples=0).scores for size in (1, 5)
    )
    data = TextDataModule(tiny_tokenizer("gpt2"), task="causal", data=texts, samples=0, max_length=max_length, seed=2)
    data.setup()
    windows = data.calibration
    assert (windows.split_documents > 0) == (max_length == 9)
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    documents: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for ids, place in zip(windows.input_ids, windows.places, strict=True):
            weights = model(input_ids=ids[None], output_attentions=True).attentions[1][0]
            documents.setdefault(int(place[0]), []).append(weights.argmax(-1).T)
    parts = [torch.cat(windows_of) for _, windows_of in sorted(documents.items())]
    if symbol == "sequence":
        tuples = [[tuple(column) for column in part.T.tolist()] for part in parts]
        numbers = {one: number for number, one in enumerate(sorted({one for row in tuples for one in row}))}
        parts = [torch.tensor([[numbers[one] for one in row]]) for row in tuples]
    for run in (one, other):
        found = run.layers[1].resampled["phi"]
        for resample, draw in enumerate(draw_examples(len(parts), 3, 2)):
            rows = torch.cat([part for part, times in zip(parts, draw, strict=True) for _ in range(times)])
            assert torch.allclose(found[resample], game.phi(rows), rtol=0, atol=1e-9)


def test_a_model_without_any_head_is_no_traceback(here: Path, models, texts):
    pruned = compressor.score(model=models["gpt2"], data=texts, bootstrap=0, output_dir="scores")
    gone = compressor.prune(scores=pruned.directory, ratio=0.99, allow_empty=True, export=True, output_dir="pruned")
    assert gone.plan.removed == gone.plan.total
    try:
        run = compressor.score(model=str(gone.checkpoint), data=texts)
    except CompressorError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is fine
    else:
        assert [layer.observations for layer in run.scores.layers] == [0, 0]

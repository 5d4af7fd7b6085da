"""Criteria on hand-made scores, whose values are written down here a second time."""

from dataclasses import replace

import pytest
import torch

from compressor.criteria import criteria, criterion, random_channel_scores, random_scores, register
from compressor.criteria import registry as registry_module
from compressor.errors import RecipeError
from compressor.types import LayerScores, MLPScores, Scores, UnitScores

# Which a scoring run computes only when asked, in the order of their made-up values.
ASKED = ["eta", "marginal", "shapley", "third-order"]
ASKED += ["loss-game", "taylor", "fisher", "loo", "activation", "fluctuation"]
NAMES = {*ASKED, "gt-fep", "entropy", "second-order", "bos-sink", "magnitude", "random"}


def layer(phi: list[float], entropy: list[float], mass: list[float], norm: list[float]) -> LayerScores:
    def vector(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    pairs = torch.zeros(len(phi), len(phi), dtype=torch.float64)
    values = {name: vector(phi) + place for place, name in enumerate(ASKED)} if phi else {}
    return LayerScores(vector(phi), vector(entropy), pairs, pairs, vector(mass), vector(norm), 10, values=values)


OF_CHANNELS = ["loss-game", "taylor", "fisher", "activation", "fluctuation"]


def mlp(norms: list[float]) -> MLPScores:
    vector = torch.tensor(norms, dtype=torch.float64)
    return MLPScores(vector, {name: vector * 10 + place for place, name in enumerate(OF_CHANNELS) if norms})


SCORES = Scores(
    (
        layer([3.0, 1.5, 2.0], [0.5, 0.25, 1.0], [0.75, 0.0, 1.0], [7.0, 8.0, 9.0]),
        layer([], [], [], []),
        layer([4.0], [2.0], [0.5], [6.0]),
    ),
    {},
    (mlp([0.5, 0.25]), mlp([]), mlp([3.0, 1.0, 2.0])),
)


@pytest.fixture(autouse=True)
def scratch(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gt-fep", ((3.0, 1.5, 2.0), (), (4.0,))),
        ("entropy", ((0.5, 0.25, 1.0), (), (2.0,))),
        ("second-order", ((-2.0, -1.0, 0.0), (), (0.0,))),  # H − (φ − H)
        ("eta", ((3.0, 1.5, 2.0), (), (4.0,))),
        ("marginal", ((4.0, 2.5, 3.0), (), (5.0,))),
        ("shapley", ((5.0, 3.5, 4.0), (), (6.0,))),
        ("third-order", ((6.0, 4.5, 5.0), (), (7.0,))),
        ("loss-game", ((7.0, 5.5, 6.0), (), (8.0,))),
        ("fluctuation", ((12.0, 10.5, 11.0), (), (13.0,))),
        ("bos-sink", ((0.25, 1.0, 0.0), (), (0.5,))),
        ("magnitude", ((7.0, 8.0, 9.0), (), (6.0,))),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_values(name, values, seed):
    scores = criterion(name)(SCORES, seed)
    assert scores == UnitScores(name, values)
    assert scores.units_per_layer == (3, 0, 1)
    assert all(type(value) is float for row in scores.values for value in row)


def test_every_criterion_scores_every_head():
    assert {entry.name for entry in criteria()} == NAMES
    for entry in criteria():
        assert entry(SCORES).criterion == entry.name
        assert entry(SCORES).units_per_layer == (3, 0, 1)
        assert entry.summary
        assert entry.cost
        assert "\n" not in entry.summary


@pytest.mark.parametrize("name", ASKED)
def test_values_that_were_not_asked_for_are_named(name):
    bare = Scores(tuple(replace(layer, values={}) for layer in SCORES.layers), {})
    assert not criterion(name).answered_by(bare)
    assert criterion(name).answered_by(SCORES)
    with pytest.raises(RecipeError, match=f"score again with --values {name}") as caught:
        criterion(name)(bare)
    assert "\n" not in str(caught.value)


def test_only_what_is_counted_is_worth_what_the_counts_are():
    loss = set(ASKED[4:])
    assert {entry.name for entry in criteria() if not entry.counted} == {"bos-sink", "magnitude", "random"} | loss


def test_random_is_the_same_for_a_seed_and_different_over_seeds():
    draws = [criterion("random")(SCORES, seed) for seed in range(20)]
    assert draws == [criterion("random")(SCORES, seed) for seed in range(20)]
    assert len({draw.values for draw in draws}) == 20
    assert draws[3] == random_scores([3, 0, 1], 3)
    assert all(0 <= value < 1 for draw in draws for row in draw.values for value in row)


def test_random_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = random_scores([4, 4], 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert random_scores([4, 4], 0) == first


def test_random_is_uniform_over_heads():
    """Each of four heads is the lowest in about a quarter of 2,000 draws: 500 ± 4 standard deviations of 19."""
    lowest = [min(range(4), key=random_scores([4], seed).values[0].__getitem__) for seed in range(2000)]
    assert all(420 < lowest.count(head) < 580 for head in range(4))


def test_random_layers_differ_from_each_other():
    first, second = random_scores([5, 5], 0).values
    assert first != second


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("magnitude", ((0.5, 0.25), (), (3.0, 1.0, 2.0))),
        ("loss-game", ((5.0, 2.5), (), (30.0, 10.0, 20.0))),
        ("taylor", ((6.0, 3.5), (), (31.0, 11.0, 21.0))),
        ("fisher", ((7.0, 4.5), (), (32.0, 12.0, 22.0))),
        ("activation", ((8.0, 5.5), (), (33.0, 13.0, 23.0))),
        ("fluctuation", ((9.0, 6.5), (), (34.0, 14.0, 24.0))),
    ],
)
def test_values_of_channels(name, values):
    assert criterion(name).answers_channels(SCORES)
    assert criterion(name).channel_scores(SCORES) == UnitScores(name, values)


def test_who_speaks_of_channels_and_who_in_nats():
    able = {"magnitude", "random", *OF_CHANNELS}
    assert {entry.name for entry in criteria() if entry.channels is not None} == able
    assert {entry.name for entry in criteria() if entry.in_loss} == {"loss-game", "taylor", "fisher", "loo"}
    for entry in criteria():
        assert entry.answers_channels(SCORES) == (entry.name in able)
        if entry.name not in able:
            with pytest.raises(RecipeError, match=f"^{entry.name} says nothing of channels") as caught:
                entry.channel_scores(SCORES)
            message = str(caught.value)
            assert "--structures heads" in message
            assert all(name in message for name in able)
            assert "\n" not in message


@pytest.mark.parametrize("name", ["magnitude", "random", *OF_CHANNELS])
def test_channels_that_were_not_looked_at_are_not_answered_for(name):
    """Not even where one MLP of many has no values."""
    entry = criterion(name)
    again = f"--criterion {name}" if name in ("magnitude", "random") else f"--values {name}"
    cases = [replace(SCORES, mlps=())]
    if name in OF_CHANNELS:
        cases.append(replace(SCORES, mlps=(SCORES.mlps[0], replace(SCORES.mlps[2], values={}))))
    for scores in cases:
        assert not entry.answers_channels(scores)
        with pytest.raises(RecipeError, match=f"the scores hold no .*of.*; score again with {again}$") as caught:
            entry.channel_scores(scores)
        assert "\n" not in str(caught.value)
        known = replace(scores, facts={"no_channels": "its MLPs are experts"})
        with pytest.raises(RecipeError, match=r"; its MLPs are experts; give --structures heads$"):
            entry.channel_scores(known)


def test_random_channels_are_drawn_apart_from_heads():
    draws = [criterion("random").channel_scores(SCORES, seed) for seed in range(20)]
    assert draws == [criterion("random").channel_scores(SCORES, seed) for seed in range(20)]
    assert len({draw.values for draw in draws}) == 20
    assert draws[3] == random_channel_scores([2, 0, 3], 3)
    assert all(type(value) is float and 0 <= value < 1 for draw in draws for row in draw.values for value in row)
    everything = [value for seed in range(50) for value in random_scores([50], seed).values[0]]
    others = [value for seed in range(50) for value in random_channel_scores([50], seed).values[0]]
    assert not set(everything) & set(others)
    assert abs(float(torch.corrcoef(torch.tensor([everything, others]))[0, 1])) < 0.1


def test_a_criterion_of_ones_own_may_speak_of_channels():
    @register("mine", "for this test", cost="nothing", channels=lambda scores, seed: [[float(seed)]])
    def mine(scores: Scores, seed: int) -> list[list[float]]:
        return [[0.0] * len(entry.phi) for entry in scores.layers]

    assert criterion("mine").channel_scores(SCORES, 4).values == ((4.0,),)
    assert not criterion("mine").in_loss


def test_a_name_is_taken_once():
    @register("mine", "for this test", cost="nothing")
    def mine(scores: Scores, seed: int) -> list[list[float]]:
        return [[float(seed)] * len(entry.phi) for entry in scores.layers]

    assert criterion("mine")(SCORES, 2).values == ((2.0, 2.0, 2.0), (), (2.0,))
    assert criteria()[-1].name == "mine"
    for name in ("mine", "gt-fep"):
        with pytest.raises(ValueError, match=f"already a criterion named '{name}'"):
            register(name, "again", cost="nothing")(mine)
    assert criterion("gt-fep")(SCORES).values[0] == (3.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("gt_fep", "gt-fep"), ("entropi", "entropy"), ("magnitute", "magnitude"), ("bos-sinks", "bos-sink")],
)
def test_a_misspelt_name_is_answered_with_the_right_one(wrong, meant):
    with pytest.raises(RecipeError, match="did you mean") as caught:
        criterion(wrong)
    message = str(caught.value)
    assert meant in message.split("known:")[0]
    assert "\n" not in message
    assert all(name in message for name in NAMES)


def test_an_unlike_name_is_refused_without_a_guess():
    with pytest.raises(RecipeError) as caught:
        criterion("zzzzzz")
    assert "did you mean" not in str(caught.value)

"""The bootstrap against resamples written out row by row, closed forms, and the coverage it promises."""

import math

import numpy as np
import pytest
import torch

from compressor.game import pair_entropies
from compressor.game.resampling import (
    bootstrap_pairs,
    draw_examples,
    interval,
    rank_interval,
    share_removed,
)


def layer(documents: int, heads: int, seed: int, longest: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Documents of unequal lengths, each with symbols of its own liking: (symbols, examples)."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, documents)
    examples = np.repeat(np.arange(documents), lengths)
    liking = generator.integers(0, 3, (documents, heads))
    return liking[examples] + generator.integers(0, 2 + seed % 2, (len(examples), heads)), examples


def written_out(symbols, examples, draws) -> np.ndarray:
    """Pair entropies of each resample, its documents' rows put one after another."""
    documents = [symbols[examples == number] for number in np.unique(examples)]
    return np.stack(
        [
            pair_entropies(np.concatenate([documents[d] for d, times in enumerate(draw) for _ in range(times)])).numpy()
            for draw in draws
        ]
    )


@pytest.mark.parametrize(("documents", "heads"), [(1, 1), (2, 3), (7, 2), (25, 4)])
@pytest.mark.parametrize("change", ["as it is", "interleaved", "other numbers", "all unique", "constant"])
def test_the_bootstrap_is_that_of_rows_written_out(documents, heads, change):
    symbols, examples = layer(documents, heads, seed=documents)
    if change == "interleaved":
        order = np.random.default_rng(0).permutation(len(examples))
        symbols, examples = symbols[order] - 2, examples[order]
    if change == "other numbers":
        examples = examples * 7 - 3
    if change == "all unique":
        symbols = np.arange(symbols.size).reshape(symbols.shape)
    if change == "constant":
        symbols = np.full_like(symbols, 5)
    found = bootstrap_pairs(symbols, examples, 12, seed=3)
    assert found.shape == (12, heads, heads)
    assert found.dtype == np.float64
    expected = written_out(symbols, examples, draw_examples(documents, 12, seed=3))
    assert np.abs(found - expected).max() < 1e-12
    assert (found >= 0).all()


def test_one_document_leaves_no_spread():
    symbols = layer(1, 3, seed=1, longest=40)[0]
    found = bootstrap_pairs(symbols, np.zeros(len(symbols), int), 5, seed=0)
    assert np.ptp(found, axis=0).max() == 0
    assert np.abs(found[0] - pair_entropies(symbols).numpy()).max() < 1e-12


def test_identical_documents_leave_no_spread():
    once = layer(1, 3, seed=2, longest=40)[0]
    symbols, examples = np.tile(once, (15, 1)), np.repeat(np.arange(15), len(once))
    found = bootstrap_pairs(symbols, examples, 5, seed=0)
    assert np.ptp(found, axis=0).max() == 0
    assert np.abs(found[0] - pair_entropies(once).numpy()).max() < 1e-12


def test_documents_of_one_symbol_each_are_a_multinomial():
    """H of a resample is then the entropy of the draw itself."""
    draws = draw_examples(6, 20, seed=4)
    found = bootstrap_pairs(np.arange(6)[:, None], np.arange(6), 20, seed=4)[:, 0, 0]
    for draw, entropy in zip(draws, found, strict=True):
        assert entropy == pytest.approx(-math.fsum(n / 6 * math.log(n / 6) for n in draw if n), abs=1e-14)


def test_layers_resample_together():
    """The same seed draws the same documents, whatever the layer: blocks of a joint run, to the bit."""
    symbols, examples = layer(20, 5, seed=3)
    whole = bootstrap_pairs(symbols, examples, 6, seed=1)
    assert np.array_equal(bootstrap_pairs(symbols[:, :2], examples, 6, seed=1), whole[:, :2, :2])
    assert np.array_equal(bootstrap_pairs(symbols[:, 2:], examples, 6, seed=1), whole[:, 2:, 2:])
    assert not np.array_equal(bootstrap_pairs(symbols, examples, 6, seed=2), whole)
    tensors = bootstrap_pairs(torch.from_numpy(symbols), torch.from_numpy(examples), 6, seed=1)
    assert np.array_equal(tensors, whole)


def test_draws_are_with_replacement():
    draws = draw_examples(50, 4000, seed=0)
    assert draws.shape == (4000, 50)
    assert draws.dtype == np.int64
    assert (draws.sum(axis=1) == 50).all()
    # Binomial(50, 1/50): mean 1, variance 49/50, missing with probability (49/50)⁵⁰.
    assert draws.mean(axis=0) == pytest.approx(np.ones(50), abs=0.08)
    assert draws.var() == pytest.approx(0.98, abs=0.02)
    assert (draws == 0).mean() == pytest.approx(0.98**50, abs=0.005)
    assert np.array_equal(draw_examples(50, 10, seed=0), draws[:10])
    assert not np.array_equal(draw_examples(50, 10, seed=1), draws[:10])


def test_intervals_over_documents_cover_the_truth_and_intervals_over_tokens_do_not():
    """Documents of 20 tokens lean to either symbol; 95 % intervals from 40 documents, 150 times."""
    generator = np.random.default_rng(0)
    share = 0.3 * 0.1 + 0.7 * 0.8
    truth = -share * math.log(share) - (1 - share) * math.log(1 - share)
    covered = {"documents": 0, "tokens": 0}
    for seed in range(150):
        leaning = np.where(generator.random(40) < 0.3, 0.1, 0.8)
        symbols = (generator.random((40, 20)) < leaning[:, None]).astype(int).reshape(-1, 1)
        for unit, examples in (("documents", np.repeat(np.arange(40), 20)), ("tokens", np.arange(800))):
            low, high = interval(bootstrap_pairs(symbols, examples, 80, seed)[:, 0, 0][:, None])
            covered[unit] += bool(low[0] <= truth <= high[0])
    assert 0.88 * 150 <= covered["documents"] <= 0.99 * 150
    assert covered["tokens"] < 0.7 * 150


def test_percentiles_by_hand():
    samples = np.stack([np.arange(101.0), 2 * np.arange(101.0)[::-1], np.full(101, 7.0)], axis=1)
    low, high = interval(samples)
    assert low.tolist() == pytest.approx([2.5, 5, 7])
    assert high.tolist() == pytest.approx([97.5, 195, 7])
    low, high = interval(samples, level=0.5)
    assert (low[0], high[0]) == pytest.approx((25, 75))
    assert interval(np.zeros((4, 3, 2)))[0].shape == (3, 2)


def test_ranks_by_hand():
    """Head 2 is always the highest; heads 0 and 1 change places in one resample of twenty; ties go to the lower."""
    samples = np.array([[1.0, 2.0, 3.0]] * 19 + [[2.0, 1.0, 3.0]])
    low, high = rank_interval(samples)
    assert (low.tolist(), high.tolist()) == ([0, 0, 2], [1, 1, 2])
    assert low.dtype == high.dtype == np.int64
    low, high = rank_interval(samples, level=0.8)
    assert (low.tolist(), high.tolist()) == ([0, 1, 2], [0, 1, 2])
    low, high = rank_interval(np.full((5, 4), 3.0))
    assert low.tolist() == high.tolist() == [0, 1, 2, 3]


def test_removals_by_hand():
    masks = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    assert share_removed(masks).tolist() == [0.75, 0.5, 0.5, 0.25]


SYMBOLS, EXAMPLES = layer(4, 2, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_pairs(SYMBOLS, EXAMPLES[:-1], 5, 0), "examples are int64"),
        (lambda: bootstrap_pairs(SYMBOLS, EXAMPLES[:, None], 5, 0), "one per observation"),
        (lambda: bootstrap_pairs(SYMBOLS, EXAMPLES * 1.0, 5, 0), "examples are float64"),
        (lambda: bootstrap_pairs(SYMBOLS, EXAMPLES, 0, 0), "resamples is 0; expected at least 1"),
        (lambda: bootstrap_pairs(SYMBOLS[:0], EXAMPLES[:0], 5, 0), "expected integers"),
        (lambda: bootstrap_pairs(SYMBOLS * 0.5, EXAMPLES, 5, 0), "expected integers"),
        (lambda: draw_examples(0, 5, 0), "examples is 0"),
        (lambda: draw_examples(5, -1, 0), "resamples is -1"),
        (lambda: interval(np.zeros((0, 3))), "at least one resample"),
        (lambda: interval(np.zeros(3)), "samples are of shape"),
        (lambda: interval(np.zeros((2, 3)), level=1.0), "level is 1"),
        (lambda: rank_interval(np.zeros((2, 3)), level=0.0), "level is 0"),
        (lambda: rank_interval(np.zeros((0, 3))), "at least one resample"),
        (lambda: share_removed(np.zeros((0, 3), bool)), "at least one resample"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

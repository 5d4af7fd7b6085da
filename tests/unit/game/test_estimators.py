"""Entropy estimators against hand-worked closed forms, loops over the published formulas, and known distributions."""

import inspect
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from compressor.game.entropy import plugin_entropy
from compressor.game.estimators import ESTIMATORS, coverage, estimator

LN2, GAMMA = math.log(2), 0.5772156649015329


def spectrum(counts) -> tuple[np.ndarray, np.ndarray]:
    """What estimators take, of one count per symbol."""
    found = sorted(Counter(int(count) for count in counts if count).items())
    values, multiplicity = zip(*found, strict=True) if found else ((), ())
    return np.array(values, dtype=np.int64), np.array(multiplicity, dtype=np.int64)


def estimate(name, counts) -> float:
    return estimator(name)(*spectrum(counts))


def digamma(n: int) -> float:
    """ψ of an integer, from an exact sum."""
    return float(sum((Fraction(1, k) for k in range(1, n)), Fraction(0))) - GAMMA


# --- the published formulas, symbol by symbol ---------------------------------------------------------------------


def slow_plug_in(counts):
    total = sum(counts)
    return -math.fsum(count / total * math.log(count / total) for count in counts)


def slow_miller_madow(counts):
    return slow_plug_in(counts) + (len(counts) - 1) / (2 * sum(counts))


def slow_grassberger(counts):
    """G_1 = −γ − ln 2, G_2 = 2 − γ − ln 2, G_{2n+1} = G_{2n}, G_{2n+2} = G_{2n} + 2 / (2n + 1)."""
    g = {1: -GAMMA - LN2, 2: 2 - GAMMA - LN2}
    for n in range(1, max(counts)):
        g[2 * n + 1] = g[2 * n]
        g[2 * n + 2] = g[2 * n] + 2 / (2 * n + 1)
    total = sum(counts)
    return math.log(total) - math.fsum(count * g[count] for count in counts) / total


def slow_chao_shen(counts):
    total, once = sum(counts), counts.count(1)
    once = total - 1 if once == total else once
    result = 0.0
    for count in counts:
        share = (1 - once / total) * count / total
        result -= share * math.log(share) / (1 - (1 - share) ** total)
    return result


def slow_chao_wang_jost(counts):
    """In fractions, but for the two logarithms; ln A is taken as −Σ_{r≥1} (1 − A)ʳ / r, whose first terms cancel."""
    total, once, twice = sum(counts), counts.count(1), counts.count(2)
    result = Fraction(0)
    for count in counts:
        result += Fraction(count, total) * sum((Fraction(1, k) for k in range(count, total)), Fraction(0))
    if twice:
        share = Fraction(2 * twice, (total - 1) * once + 2 * twice)
    else:
        share = Fraction(2, (total - 1) * (once - 1) + 2) if once else Fraction(1)
    if share == 1:
        return float(result)
    rest = 1 - float(share)
    tail, r = 0.0, total
    while (term := rest ** (r - total + 1) / r) > 1e-19:
        tail += term
        r += 1
    return float(result) + once / total * tail


SLOW = {
    "plug-in": slow_plug_in,
    "miller-madow": slow_miller_madow,
    "grassberger": slow_grassberger,
    "chao-shen": slow_chao_shen,
    "chao-wang-jost": slow_chao_wang_jost,
}
SAMPLES = {
    "one observation": [1],
    "one symbol": [7],
    "two unique": [1, 1],
    "all unique": [1] * 60,
    "no doubles": [1, 1, 1, 5, 9],
    "one single, no doubles": [1, 3, 4],
    "no singles": [2, 2, 3, 40],
    "all kinds": [1, 1, 1, 1, 2, 2, 3, 5, 8, 13],
    "mostly doubles": [1] + [2] * 30 + [17],
    "at the table's end": [63, 64, 65, 66, 127, 128, 1],
    "large": [1, 1, 2, 3, 700, 1300],
    "zipf": sorted(150 // rank for rank in range(1, 100)),
}


@pytest.mark.parametrize("counts", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_the_published_formulas(name, counts):
    assert estimate(name, counts) == pytest.approx(SLOW[name](counts), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("plug-in", [1, 3], 2 * LN2 - 0.75 * math.log(3)),
        ("plug-in", [4, 4], LN2),
        ("miller-madow", [1, 3], 2 * LN2 - 0.75 * math.log(3) + 1 / 8),
        ("grassberger", [1], GAMMA + LN2),
        ("grassberger", [2], 2 * LN2 - 2 + GAMMA),  # ln 2 − G(2)
        ("grassberger", [1, 3], 2 * LN2 + GAMMA + LN2 - 0.75 * 2),  # G(3) = G(2) = G(1) + 2
        # C = 1/2; q = 1/4 twice, each seen with probability 1 − (3/4)² = 7/16
        ("chao-shen", [1, 1], 2 * (1 / 4) * math.log(4) * 16 / 7),
        # C = 3/4; q = 3/16 and 9/16
        (
            "chao-shen",
            [1, 3],
            3 / 16 * math.log(16 / 3) / (1 - (13 / 16) ** 4) + 9 / 16 * math.log(16 / 9) / (1 - (7 / 16) ** 4),
        ),
        # seen: 2 · ½ · 1; A = 2 / (1 · 1 + 2) = 2/3; unseen: (1/3)⁻¹ (ln 3/2 − 1/3)
        ("chao-wang-jost", [1, 1], 1 + 3 * math.log(1.5) - 1),
        # seen: ⅓ (1 + ½) + ⅔ · ½; A = 2 / (2 · 1 + 2) = ½; unseen: ⅓ · 4 (ln 2 − ½ − ⅛)
        ("chao-wang-jost", [1, 2], 5 / 6 + 4 / 3 * (LN2 - 5 / 8)),
        ("chao-wang-jost", [3, 3], 1 / 3 + 1 / 4 + 1 / 5),  # no singles, nothing unseen
    ],
)
def test_small_samples_by_hand(name, counts, expected):
    assert estimate(name, counts) == pytest.approx(expected, abs=1e-14)


def test_grassberger_is_digamma_and_an_integral():
    """G(n) = ψ(n) + (−1)ⁿ ∫₀¹ xⁿ⁻¹ / (1 + x) dx, by the midpoint rule; one symbol gives ln n − G(n)."""
    x = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 3, 10, 63, 64, 131):
        integral = float((x ** (n - 1) / (1 + x)).mean())
        expected = math.log(n) - (digamma(n) + (-1) ** n * integral)
        assert estimate("grassberger", [n]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("twice", [2, 1000, 2400, 2600, 9000, 100_000])
def test_the_two_ways_to_sum_chao_wang_jost_agree_with_a_loop(twice):
    """N·A is about 2 f₂ / f₁: from 0.004 to 200, on both sides of where the way changes."""
    counts = np.array([1, 2, 50])
    multiplicity = np.array([1000, twice, 300])
    total = 1000 + 2 * twice + 15_000
    share = 2 * twice / ((total - 1) * 1000 + 2 * twice)
    tail = math.fsum((1 - share) ** s / (total - 1 + s) for s in range(1, min(1_000_000, int(45 / share))))
    if 45 / share > 1_000_000:  # a loop would take minutes: the closed form is safe where N·A is small
        sums = math.fsum((1 - share) ** r / r for r in range(1, total))
        tail = (1 - share) ** (1 - total) * (-math.log(share) - sums)
    shares = counts / total * multiplicity
    seen = sum(
        part * math.fsum(1 / k for k in range(count, total)) for part, count in zip(shares, (1, 2, 50), strict=True)
    )
    assert estimator("chao-wang-jost")(counts, multiplicity) == pytest.approx(seen + 1000 / total * tail, abs=1e-11)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_million_observations_stay_finite(name):
    """Powers like (1 − A)^{1−N} must not overflow, whatever was seen once and twice."""
    for once, twice in [(0, 0), (0, 5), (1, 0), (1, 1), (1, 400_000), (2, 0), (10, 499_995), (10**6, 0), (10**5, 3)]:
        rest = 10**6 - once - 2 * twice
        counts, multiplicity = np.array([1, 2, max(rest, 3)]), np.array([once, twice, int(rest > 0)])
        kept = multiplicity > 0
        assert -1e-9 < estimator(name)(counts[kept], multiplicity[kept]) < 40


def test_plug_in_is_the_games_own():
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.geometric(0.1, generator.integers(1, 60))
        assert estimate("plug-in", counts) == pytest.approx(float(plugin_entropy(torch.from_numpy(counts))), abs=1e-14)
    for count in range(1, 500):  # rounding must not make a constant symbol worth less than nothing
        assert 0 <= estimate("plug-in", [count]) < 1e-14


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_counted_is_nothing(name):
    assert estimate(name, []) == 0.0
    assert coverage(*spectrum([])) == 0.0


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 1, 1], 0.0), ([2, 2], 1.0), ([1, 3], 0.75), ([1, 1, 2, 6], 0.8), ([1], 0.0)]
)
def test_coverage(counts, expected):
    assert coverage(*spectrum(counts)) == pytest.approx(expected, abs=1e-15)


def test_coverage_estimates_the_mass_that_was_seen():
    """The mean of 1 − f₁/N against the mean true mass of the symbols in the sample."""
    truth = np.array([1 / rank for rank in range(1, 301)])
    truth /= truth.sum()
    generator = np.random.default_rng(5)
    samples = generator.multinomial(400, truth, size=400)
    estimated = np.mean([coverage(*spectrum(sample)) for sample in samples])
    assert estimated == pytest.approx(((samples > 0) @ truth).mean(), abs=0.005)


UNIFORM = np.full(100, 1 / 100)
GEOMETRIC = 0.9 ** np.arange(150) / (0.9 ** np.arange(150)).sum()


@pytest.mark.parametrize("truth", [UNIFORM, GEOMETRIC], ids=["uniform", "geometric"])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "plug-in"])
def test_corrections_are_less_biased_than_plug_in(truth, name):
    """120 observations; the mean over 400 samples has a standard error of about 0.004 nats."""
    entropy = -float((truth * np.log(truth)).sum())
    samples = np.random.default_rng(1).multinomial(120, truth, size=400)
    bias = {each: np.mean([estimate(each, sample) for sample in samples]) - entropy for each in ("plug-in", name)}
    assert bias["plug-in"] < -0.1  # theory: about −(K − 1) / 2N
    assert abs(bias[name]) < 0.6 * abs(bias["plug-in"])
    if name == "chao-wang-jost":
        assert abs(bias[name]) < 0.04


@pytest.mark.parametrize("name", ESTIMATORS)
def test_large_samples_leave_no_bias(name):
    truth = np.array([0.5, 0.25, 0.125, 0.125])
    sample = np.random.default_rng(2).multinomial(1_000_000, truth)
    assert estimate(name, sample) == pytest.approx(1.75 * LN2, abs=0.003)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="estimator is 'jackknife'; expected one of plug-in, miller-madow") as caught:
        estimator("jackknife")
    assert "\n" not in str(caught.value)


def test_every_correction_names_its_source():
    for name, function in ESTIMATORS.items():
        assert estimator(name) is function
        assert name == "plug-in" or "Source:" in inspect.getdoc(function)

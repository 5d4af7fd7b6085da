"""A sample's counts → an estimate of Shannon entropy, in nats.

Every estimator sees the spectrum of a sample: the distinct positive counts, ascending, and how many symbols have each.
None knows how large the alphabet is, and nothing counted is 0. Only plug-in keeps the identities of the game exact;
corrections remove some of its bias, each under its own assumptions, and may take an entropy past ln N or below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Estimator = Callable[[np.ndarray, np.ndarray], float]  # (counts int64 [distinct], multiplicity int64 [distinct]) → nats

_TABLED = 64  # from here on four terms of the asymptotic series of the harmonic numbers are exact to 1e-16
_HARMONIC = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, _TABLED))])


def plug_in(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """The entropy of the sample itself, H = ln N − Σ m·c·ln c / N; biased downwards, by about (K − 1) / 2N."""
    total = _total(counts, multiplicity)
    if not total:
        return 0.0
    return max(0.0, math.log(total) - float((multiplicity * counts * np.log(counts)).sum()) / total)


def miller_madow(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """Plug-in + (K − 1) / 2N, the first order of its bias, with the K symbols that were seen.

    Source: G. A. Miller (1955), Note on the bias of information estimates, Information Theory in Psychology.
    """
    total = _total(counts, multiplicity)
    return plug_in(counts, multiplicity) + (int(multiplicity.sum()) - 1) / (2 * total) if total else 0.0


def grassberger(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """Estimate H = ln N − Σ m·c·G(c) / N with G(c) = ψ(c) + (−1)ᶜ ∫₀¹ xᶜ⁻¹ / (1 + x) dx.

    In closed form G(2n) = G(2n + 1) = −γ − ln 2 + Σ_{k≤n} 2 / (2k − 1).
    Source: P. Grassberger (2003), Entropy estimates from insufficient samplings, arXiv physics/0307138, the estimator
    with G_n and its recursion; not the one of 1988.
    """
    total = _total(counts, multiplicity)
    if not total:
        return 0.0
    half = counts // 2
    terms = 2 * _harmonic(2 * half) - _harmonic(half) - np.euler_gamma - math.log(2)
    return math.log(total) - float((multiplicity * counts * terms).sum()) / total


def chao_shen(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """Estimate H = −Σ m·q·ln q / (1 − (1 − q)ᴺ) with q = C·c / N: shares shrunk by the coverage C = 1 − f₁ / N.

    Where every symbol is unique C would be 0; as is usual, one of them then counts as seen again: f₁ = N − 1.
    Source: A. Chao, T.-J. Shen (2003), Nonparametric estimation of Shannon's index of diversity when there are unseen
    species in sample, Environmental and Ecological Statistics 10 (Horvitz and Thompson's estimator of −Σ p ln p).
    """
    total = _total(counts, multiplicity)
    if not total:
        return 0.0
    shares = (coverage(counts, multiplicity) or 1 / total) * counts / total
    with np.errstate(divide="ignore"):  # a symbol of share 1 was surely seen: ln(1 − 1) = −∞ gives it exactly that
        seen = -np.expm1(total * np.log1p(-shares))
    return float(-(multiplicity * shares * np.log(shares) / seen).sum())


def chao_wang_jost(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """Estimate H = Σ m·(c / N)·Σ_{c≤k<N} 1/k + (f₁ / N)·(1 − A)^{1−N}·(−ln A − Σ_{r<N} (1 − A)ʳ / r).

    A is the mean share of the symbols seen once, from how many were seen once and twice: 2f₂ / ((N − 1)f₁ + 2f₂), or
    2 / ((N − 1)(f₁ − 1) + 2) where f₂ = 0.
    Source: A. Chao, Y. T. Wang, L. Jost (2013), Entropy and the species accumulation curve: a novel entropy estimator
    via discovery rates of new species, Methods in Ecology and Evolution 4, its main estimator and the A in it.
    """
    total = _total(counts, multiplicity)
    if not total:
        return 0.0
    sums = _harmonic(np.array([total - 1])) - _harmonic(counts - 1)
    seen = float((multiplicity * counts * sums).sum()) / total
    once, twice = (int(multiplicity[counts == count].sum()) for count in (1, 2))
    if not once:
        return seen
    ones, twos = (once, twice) if twice else (once - 1, 1)
    share = 2 * twos / ((total - 1) * ones + 2 * twos)
    return seen + once / total * _unseen(total, share)


def coverage(counts: np.ndarray, multiplicity: np.ndarray) -> float:
    """The share of the distribution whose symbols were seen, estimated as 1 − f₁ / N; of nothing counted it is 0.

    Source: I. J. Good (1953), The population frequencies of species and the estimation of population parameters,
    Biometrika 40 (Turing's estimate).
    """
    total = _total(counts, multiplicity)
    return 1 - int(multiplicity[counts == 1].sum()) / total if total else 0.0


ESTIMATORS: dict[str, Estimator] = {
    "plug-in": plug_in,
    "miller-madow": miller_madow,
    "grassberger": grassberger,
    "chao-shen": chao_shen,
    "chao-wang-jost": chao_wang_jost,
}


def estimator(name: str) -> Estimator:
    """Look an estimator up.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator is {name!r}; expected one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _total(counts: np.ndarray, multiplicity: np.ndarray) -> int:
    """N, the number of observations."""
    return int((counts * multiplicity).sum())


def _harmonic(numbers: np.ndarray) -> np.ndarray:
    """Harmonic numbers H_n = Σ_{k≤n} 1/k = ψ(n + 1) + γ of integers from 0 on, without a sum up to n."""
    n = np.maximum(numbers, _TABLED).astype(np.float64)
    tail = 1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) - 1 / (252 * n**6)
    large = np.log(n) + np.euler_gamma + tail
    chosen: np.ndarray = np.where(numbers < _TABLED, _HARMONIC[np.minimum(numbers, _TABLED - 1)], large)
    return chosen


def _unseen(total: int, share: float) -> float:
    """Σ_{s≥1} (1 − A)ˢ / (N − 1 + s): what (1 − A)^{1−N}·(−ln A − Σ_{r<N} (1 − A)ʳ / r) is, term by term.

    The closed form loses all digits once N·A is large, where the series, of about 40 / A terms, is short.
    """
    if share == 1:
        return 0.0
    decay = math.log1p(-share)
    if total * share < 5:
        r = np.arange(1, total)
        return math.exp((1 - total) * decay) * float(-math.log(share) - (np.exp(r * decay) / r).sum())
    s = np.arange(1, math.ceil(40 / share) + 1)
    return float((np.exp(s * decay) / (total - 1 + s)).sum())

"""The game once more, by dictionary and by definition: slow, and independent of everything it is compared with."""

import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np

LN2 = math.log(2)


def counts_of(rows, coalition) -> Counter:
    """How often each joint symbol of a coalition occurs."""
    return Counter(tuple(int(row[head]) for head in coalition) for row in rows)


def joint(rows, coalition) -> float:
    """H of a coalition, in nats."""
    counts = counts_of(rows, coalition)
    total = sum(counts.values())
    return -math.fsum(count / total * math.log(count / total) for count in counts.values())


def moebius(rows, coalition) -> float:
    """m(B) = Σ_{A⊆B} (−1)^{|B|−|A|} H(A)."""
    return math.fsum(
        (-1) ** (len(coalition) - size) * joint(rows, part)
        for size in range(1, len(coalition) + 1)
        for part in combinations(coalition, size)
    )


def dividend(rows, coalition) -> float:
    """The paper's: the Möbius transform, its sign flipped above size one."""
    return moebius(rows, coalition) * (1 if len(coalition) == 1 else -1)


def arrivals(rows, order) -> dict[int, float]:
    """What each head adds when the heads arrive in this order."""
    before = [joint(rows, order[:place]) if place else 0.0 for place in range(len(order) + 1)]
    return {head: before[place + 1] - before[place] for place, head in enumerate(order)}


def shapley(rows, heads: int) -> list[float]:
    """Mean marginal contribution over all orders of arrival."""
    orders = [arrivals(rows, order) for order in permutations(range(heads))]
    return [math.fsum(added[head] for added in orders) / len(orders) for head in range(heads)]


def coalitions_of(heads: int) -> list[tuple[int, ...]]:
    """All coalitions in the order of the lattice: bit i of the place says whether head i is in."""
    return [tuple(head for head in range(heads) if place >> head & 1) for place in range(1 << heads)]


def bits(observations: int, heads: int, alphabet: int, seed: int) -> np.ndarray:
    """Independent uniform symbols."""
    return np.random.default_rng(seed).integers(0, alphabet, (observations, heads))


A, B = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
UNIFORM = bits(400, 4, 5, seed=1)
SYMBOLS = {
    "xor": np.stack([A, B, A ^ B], 1),
    "copies": np.stack([UNIFORM[:, 0]] * 3, 1),
    "constant": np.full((50, 3), 7),
    "independent": np.array([[a, b, c] for a in range(3) for b in range(4) for c in range(2)]),
    "random": UNIFORM,
    "skewed": (np.random.default_rng(2).geometric(0.4, (300, 5))).astype(np.int64),
    "dependent": np.cumsum(bits(200, 5, 3, seed=3), axis=1),
    "single": bits(60, 1, 4, seed=4),
    "couple": bits(60, 2, 4, seed=5),
    "one observation": np.array([[3, 1, 4]]),
    "negative": bits(120, 3, 6, seed=6) - 3,
    "huge": bits(120, 3, 4, seed=7) + 2**31 - 3,
    "enormous": bits(120, 4, 4, seed=8) * 2**61 - 2**62,
    "saturated": np.stack([np.random.default_rng(seed).permutation(90) for seed in range(4)], 1),
    "wide": np.random.default_rng(9).zipf(1.3, (700, 4)).clip(max=10**12),
}

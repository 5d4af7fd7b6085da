"""Could a triple dividend be sampling? A shuffle null that breaks the ties of one head at a time.

Dividends are plug-in, in nats, with the signs of arXiv 2605.09515. All shuffles come from numpy's PCG64, so that equal
seeds give equal results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from compressor.game.entropy import as_symbols
from compressor.game.resampling import at_least_one, compact_labels, join_ids

_ROUNDING = 1e-11  # nats; smaller differences come from the order of summation
_DENSE = 4  # histograms of up to so many cells per observation are counted faster than sorted

_Turn = tuple[int, int, int]  # the head that is shuffled, and the two that stay, in ascending order


@dataclass(frozen=True)
class TripleTest:
    """The outcome of `shuffle_null`, float64 [triples] each. It is a test, not an estimate."""

    dividend: np.ndarray  # plug-in, in nats: negative for redundancy, positive for synergy
    excess: np.ndarray  # nats over the mean of the null, for the head where it is smallest; 0 where signs disagree
    p_value: np.ndarray  # two-sided, of the head where it is largest


def shuffle_null(
    symbols: ArrayLike | torch.Tensor,
    triples: Sequence[tuple[int, int, int]],
    shuffles: int,
    seed: int,
    strata: ArrayLike | torch.Tensor | None = None,
    examples: ArrayLike | torch.Tensor | None = None,
) -> TripleTest:
    """Compare the dividends of triples with what remains of them when one head's symbols are shuffled.

    Shuffling a head breaks its ties with the other two and keeps everything else, the estimator's bias included. Each
    head of a triple is shuffled in turn while the others stay (to shuffle all would break a tie that only two of them
    have), and the least remarkable of the three outcomes counts. Distances are taken from the mean of the null and the
    observed dividend together: p = (1 + #{shuffles at least as far out}) / (1 + shuffles), which is exact for each head
    where what changes places is exchangeable (B. Phipson, G. K. Smyth 2010, Permutation p-values should never be zero);
    the largest of the three is conservative.

    This is a test, not an estimate: the excess is shrunk, being the smallest of three. And what is tested is whether
    one of the heads is independent of the other two. Three heads that are tied, with a dividend near 0, are found tied,
    and the sign of that dividend may still be chance.

    Args:
        symbols: integers [observations, heads].
        triples: heads (i, j, k).
        shuffles: how many times each head is shuffled; no p falls below 1 / (1 + shuffles).
        seed: of the shuffles; a triple's outcome does not depend on which others are asked for.
        strata: a label for each observation, integers [observations]; symbols change places only within a label. With
            the query's position as label they travel between documents, and heads that are tied by the position alone
            ("the previous token", "the first token") are no finding.
        examples: which document each observation is of, integers [observations]. Documents then swap a head's symbols
            as wholes, as far as their lengths let them: with strata the n-th of one for the n-th of another, without
            them rotated by a random number of tokens, so that the position ties nothing. Without examples symbols
            travel one by one, as though successive tokens were independent; where a head lingers on a key p is far too
            small, and independent heads look tied.

    Raises:
        ValueError: symbols that `pair_entropies` refuses, labels that do not fit them, triples that are not three
            different heads, or no shuffles.
    """
    columns = np.ascontiguousarray(as_symbols(symbols).cpu().numpy().T)
    heads, observations = columns.shape
    at_least_one("shuffles", shuffles)
    for triple in triples:
        if len(triple) != 3 or len(set(triple)) != 3 or not set(triple) <= set(range(heads)):
            raise ValueError(f"a triple is {tuple(triple)}; expected three different heads from 0 to {heads - 1}")
    labels = np.zeros(observations, np.int64) if strata is None else compact_labels("strata", strata, observations)
    units = np.arange(observations) if examples is None else compact_labels("examples", examples, observations)

    turns = [(i, min(j, k), max(j, k)) for a, b, c in triples for i, j, k in ((a, b, c), (b, a, c), (c, a, b))]
    kept = sorted({(j, k) for _, j, k in turns})
    pairs = {(j, k): np.unique(join_ids(columns[j], columns[k]), return_inverse=True)[1] for j, k in kept}
    logs = _count_logs(observations)
    singles = [_entropy(column, int(column.max()) + 1, logs) for column in columns]
    fixed = {pair: _entropy(codes, int(codes.max()) + 1, logs) for pair, codes in pairs.items()}
    base = np.array([fixed[j, k] - singles[i] - singles[j] - singles[k] for i, j, k in turns])

    generator = np.random.Generator(np.random.PCG64(seed))
    places = _places(labels, units)
    orders = (_exchange(places, units, generator) for _ in range(shuffles))
    if examples is not None and strata is None:
        orders = (order[_rotation(units, generator)] for order in orders)
    observed = base + _ties(columns, columns, pairs, turns, logs)
    null = np.stack([base + _ties(columns[:, order], columns, pairs, turns, logs) for order in orders])
    return _least_remarkable(observed.reshape(-1, 3), null.reshape(shuffles, -1, 3))


def verdicts(dividends: ArrayLike, p_values: ArrayLike, level: float = 0.05) -> dict[str, int]:
    """Count triples that are "negative", "undecided" and "positive", with false discoveries held to a rate of `level`.

    Source: Y. Benjamini, Y. Hochberg (1995), Controlling the false discovery rate, J. R. Stat. Soc. B 57, §3.1; it is
    proven for p-values that are independent or positively dependent, and triples share heads. Of m triples r can be
    decided only if the p-values reach down to level · r / m: with s shuffles, if 1 / (1 + s) is no more than that.

    Args:
        dividends: whose signs count, [triples]: `TripleTest.excess`, for bias alone can give the plug-in its sign.
        p_values: [triples], of the triples of one layer.
        level: rate of false discoveries among the triples that are decided.

    Raises:
        ValueError: there are not as many p-values as dividends, or the level is not between 0 and 1.
    """
    values, p = np.asarray(dividends, np.float64), np.asarray(p_values, np.float64)
    if values.ndim != 1 or values.shape != p.shape:
        raise ValueError(f"p_values are of shape {p.shape}; expected one for each dividend, which are {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected a share between 0 and 1, both excluded")
    ordered = np.sort(p)
    bounds = level * np.arange(1, len(p) + 1) / max(len(p), 1)
    decided = p <= ordered[ordered <= bounds + 1e-12].max(initial=-1.0)
    negative, positive = int((decided & (values < 0)).sum()), int((decided & (values > 0)).sum())
    return {"negative": negative, "undecided": len(p) - negative - positive, "positive": positive}


def _places(labels: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Number the places that exchange symbols, int64 [observations]: the n-th of a unit with a label."""
    order = np.lexsort((units, labels))  # stable: within a unit, observations keep their order
    first = _starts(labels[order], units[order])
    nth = np.empty(len(labels), np.int64)
    nth[order] = np.arange(len(labels)) - np.repeat(first, np.diff(first, append=len(labels)))
    return join_ids(labels, nth)


def _exchange(places: np.ndarray, units: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw whose symbol each observation gets, int64 [observations]: that of the next unit which has its place.

    Units stand in the cycles of one random permutation. To skip those that lack a place leaves a uniform permutation of
    the rest, and units keep their donor for as long as both last. Cycles are cut out of a random word before each
    letter that is larger than all before it (Foata's bijection).
    """
    word = generator.permutation(int(units.max()) + 1)
    rank, cycle = np.empty_like(word), np.empty_like(word)
    rank[word] = np.arange(len(word))
    cycle[word] = np.cumsum(word == np.maximum.accumulate(word))
    order = np.lexsort((rank[units], places))
    first = _starts(places[order], cycle[units[order]])
    following = np.arange(1, len(order) + 1)
    following[np.append(first[1:], len(order)) - 1] = first  # the last of a cycle gets the first one's
    donors = np.empty_like(order)
    donors[order] = order[following]
    return donors


def _rotation(units: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Turn every unit's observations by a random number of them: for each the one that takes its place."""
    order = np.argsort(units, kind="stable")
    first = _starts(units[order])
    lengths = np.diff(first, append=len(units))
    turns = np.repeat(generator.integers(lengths), lengths)
    start, length = np.repeat(first, lengths), np.repeat(lengths, lengths)
    turned = np.empty_like(order)
    turned[order] = order[start + (np.arange(len(order)) - start + turns) % length]
    return turned


def _starts(*keys: np.ndarray) -> np.ndarray:
    """Indices at which a run of equal keys begins."""
    changes = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.flatnonzero(np.concatenate([[True], changes]))


def _ties(
    moved: np.ndarray,
    columns: np.ndarray,
    pairs: dict[tuple[int, int], np.ndarray],
    turns: Sequence[_Turn],
    logs: np.ndarray,
) -> np.ndarray:
    """H_ij + H_ik − H_ijk for each turn (i, j, k), head i taken from `moved` [heads, observations]: float64 [turns]."""
    alphabets = [int(column.max()) + 1 for column in columns]
    alone = {
        (i, other): _entropy(moved[i] * alphabets[other] + columns[other], alphabets[i] * alphabets[other], logs)
        for i, other in {(i, other) for i, *others in turns for other in others}
    }
    result = []
    for i, j, k in turns:
        codes = pairs[j, k]
        joint = _entropy(codes * alphabets[i] + moved[i], (int(codes.max()) + 1) * alphabets[i], logs)
        result.append(alone[i, j] + alone[i, k] - joint)
    return np.array(result, np.float64)


def _least_remarkable(observed: np.ndarray, null: np.ndarray) -> TripleTest:
    """Of the three turns of each triple: observed [triples, 3], null [shuffles, triples, 3], in nats."""
    shuffles = len(null)
    centre = (null.sum(axis=0) + observed) / (1 + shuffles)  # the observed one too, or it would be the odd one out
    further = np.abs(null - centre) >= np.abs(observed - centre) - _ROUNDING
    excesses = observed - null.mean(axis=0)
    agree = (excesses > _ROUNDING).all(axis=1) | (excesses < -_ROUNDING).all(axis=1)
    smallest = np.take_along_axis(excesses, np.abs(excesses).argmin(axis=1)[:, None], axis=1)[:, 0]
    p_values = (1 + further.sum(axis=0)) / (1 + shuffles)
    return TripleTest(observed[:, 0], np.where(agree, smallest, 0.0), p_values.max(axis=1))


def _count_logs(observations: int) -> np.ndarray:
    """c·ln c for every count c a sample can have, float64 [observations + 1]."""
    counts = np.arange(observations + 1, dtype=np.float64)
    counts[1:] *= np.log(counts[1:])
    return counts


def _entropy(codes: np.ndarray, size: int, logs: np.ndarray) -> float:
    """Plug-in entropy of codes from 0 to size − 1, in nats."""
    if size <= _DENSE * len(codes):
        counts = np.bincount(codes, minlength=size)
    else:
        ordered = np.sort(codes)
        last = np.flatnonzero(ordered[1:] != ordered[:-1])
        counts = np.diff(last, prepend=-1, append=len(codes) - 1)
    return max(0.0, math.log(len(codes)) - float(logs[counts].sum()) / len(codes))

"""All coalitions of up to 16 heads at a time. Bit i of a coalition's place in the lattice says whether head i is in."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike

from compressor.game.counting import columns_of
from compressor.game.entropy import entropies_of

MAX_HEADS = 16  # 65,536 coalitions


def lattice_entropies(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Joint entropies of all coalitions: integers [observations, heads] → float64 [2^heads], in nats.

    The empty coalition's, the first, is 0; the last is that of all heads.

    Raises:
        ValueError: there are more than 16 heads, the symbols are no table of integers, or there is no such estimator.
    """
    columns = columns_of(symbols)
    if len(columns) > MAX_HEADS:
        raise ValueError(
            f"{len(columns)} heads have 2^{len(columns)} coalitions; expected at most {MAX_HEADS} heads: "
            "beyond, use sampled_shapley_values"
        )
    return entropies_of(columns, subsets(tuple(range(len(columns)))), estimator)


def subsets(coalition: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All subsets in the order of the lattice: bit i of the place says whether the i-th member is in."""
    parts: list[tuple[int, ...]] = [()]
    for head in coalition:
        parts += [(*part, head) for part in parts]
    return parts


def heads_of(lattice: torch.Tensor) -> int:
    """Number of heads whose coalitions a lattice [2^heads] holds.

    Raises:
        ValueError: it is not a vector, or its length is not a power of two.
    """
    if lattice.ndim != 1 or lattice.numel().bit_count() != 1:
        raise ValueError(f"the lattice is {list(lattice.shape)}; expected one value per coalition, [2^heads]")
    return lattice.numel().bit_length() - 1


def mobius(symbols: ArrayLike | torch.Tensor, *, estimator: str = "plug-in") -> torch.Tensor:
    """Möbius transform m(B) = Σ_{A⊆B} (−1)^{|B|−|A|} H(A) of all coalitions of up to 16 heads, float64 [2^heads], nats.

    Its sign is that of +H throughout; the dividends of arXiv 2605.09515 are −m above size one.
    """
    return mobius_from(lattice_entropies(symbols, estimator=estimator))


def mobius_from(lattice: torch.Tensor) -> torch.Tensor:
    """Möbius transform of the values of all coalitions, [2^heads] → [2^heads]."""
    result = lattice.clone()
    for head in range(heads_of(lattice)):
        without, with_head = split(result, head)
        with_head -= without
    return result


def split(lattice: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the coalitions without a head, and of the same with it: [2^(heads − head − 1), 2^head] each."""
    without, with_head = lattice.view(-1, 2, 1 << head).unbind(1)
    return without, with_head

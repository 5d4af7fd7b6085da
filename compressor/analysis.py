"""What symbols tell about one layer's heads beyond φ: higher orders, other values, and how sure all of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from compressor.errors import RecipeError
from compressor.files import did_you_mean
from compressor.game.counting import columns_of, measure_coalitions
from compressor.game.dividends import dividends, triple_dividends_from
from compressor.game.entropy import triple_entropies
from compressor.game.estimators import ESTIMATORS, coverage
from compressor.game.lattice import MAX_HEADS, lattice_entropies
from compressor.game.resampling import bootstrap_pairs
from compressor.game.sampling import sampled_shapley_values
from compressor.game.shuffling import shuffle_null
from compressor.game.values import marginal_contributions, phi_from, shapley_values_from, third_order_from

VALUES = ("third-order", "shapley", "eta", "marginal")
PERMUTATIONS = 500  # pairs of a permutation and its reverse, for layers too wide for exact Shapley values
Findings = dict[str, Mapping[str, torch.Tensor]]  # by field of `LayerScores`
Coalition = tuple[tuple[int, int], ...]  # (layer, head), of any layers


@dataclass(frozen=True)
class Analysis:
    """What to find out about layers beyond entropies, pairs and φ.

    Args:
        estimator: of every entropy; see `estimators`.
        layers: those whose dividends above pairs are computed, up to `order`.
        order: the largest coalitions there.
        shuffles: of the null by which the triples there are tested; 0 for no test.
        values: further values of all heads, out of `VALUES`.
        resamples: of the documents, for the uncertainty of φ; 0 for none.
        coalitions: single ones, also across layers.
        seed: of every draw.
    """

    estimator: str = "plug-in"
    layers: tuple[int, ...] = (0,)
    order: int = 3
    shuffles: int = 0
    values: tuple[str, ...] = ()
    resamples: int = 0
    coalitions: tuple[Coalition, ...] = ()
    seed: int = 0

    def check(self, heads: Sequence[int]) -> None:
        """Refuse what layers of so many heads cannot answer.

        Raises:
            RecipeError: names what was asked for and what there is.
        """
        if self.estimator not in ESTIMATORS:
            raise RecipeError(_unknown("estimator", self.estimator, ESTIMATORS))
        if self.order > MAX_HEADS:
            raise RecipeError(f"order is {self.order}; expected {MAX_HEADS} at most")
        for value in self.values:
            if value not in VALUES:
                raise RecipeError(_unknown("value", value, VALUES))
        for layer in self.layers:
            if not 0 <= layer < len(heads):
                raise RecipeError(f"triple_layers names layer {layer}; the model has layers 0 to {len(heads) - 1}")
        for coalition in self.coalitions:
            for layer, head in coalition:
                if not (0 <= layer < len(heads) and 0 <= head < heads[layer]):
                    raise RecipeError(f"coalitions name head {layer}.{head}, which the model does not have")

    def wants_symbols(self, layer: int) -> bool:
        """Whether pair counts are not enough for a layer."""
        deep = layer in self.layers and self.order > 2
        return deep or bool(self.values or self.resamples) or layer in {n for c in self.coalitions for n, _ in c}


class Evidence(NamedTuple):
    """What was observed of one layer: symbols [N, H], and the entropies of its pairs [H, H].

    Every observation is of a document [N], at a place there [N], which is None where it is the whole document.
    """

    symbols: torch.Tensor
    pairs: torch.Tensor
    documents: torch.Tensor
    places: torch.Tensor | None


def analyse(evidence: Evidence, layer: int, analysis: Analysis) -> Findings:
    """Answer what `analysis` asks about a layer: → the optional fields of `LayerScores`."""
    found: Findings = {}
    triples = None
    deep = layer in analysis.layers and analysis.order > 2
    if deep or "third-order" in analysis.values:
        triples = triple_entropies(evidence.symbols, estimator=analysis.estimator)
    if deep and triples is not None:
        found["dividends"] = {"3": triple_dividends_from(evidence.pairs, triples)} | {
            str(order): dividends(evidence.symbols, order, estimator=analysis.estimator)
            for order in range(4, min(analysis.order, evidence.symbols.shape[1]) + 1)
        }
        found["triples"] = {"entropy": triples, **_tested_triples(evidence, analysis)}
    if analysis.values:
        found["values"] = _values(evidence, triples, analysis)
    if analysis.resamples and evidence.documents.min() < evidence.documents.max():  # one says nothing about others
        resampled = bootstrap_pairs(evidence.symbols, evidence.documents, analysis.resamples, analysis.seed)
        pairs = torch.from_numpy(resampled)
        found["resampled"] = {
            "phi": torch.stack([phi_from(one) for one in pairs]),
            "entropy": pairs.diagonal(dim1=1, dim2=2).contiguous(),
        }
    return found


def _tested_triples(evidence: Evidence, analysis: Analysis) -> dict[str, torch.Tensor]:
    coalitions = list(combinations(range(evidence.symbols.shape[1]), 3))
    columns = columns_of(evidence.symbols)
    found = {"coverage": torch.from_numpy(measure_coalitions(columns, coalitions, coverage))}
    if analysis.shuffles and coalitions:
        kinds = {"": None, "stratified_": evidence.places}
        for name, strata in kinds.items():
            if name and strata is None:
                continue
            test = shuffle_null(
                evidence.symbols, coalitions, analysis.shuffles, analysis.seed, strata, evidence.documents
            )
            found |= {f"{name}excess": torch.from_numpy(test.excess), f"{name}p": torch.from_numpy(test.p_value)}
    return found


def _values(evidence: Evidence, triples: torch.Tensor | None, analysis: Analysis) -> dict[str, torch.Tensor]:
    symbols, kind, found = evidence.symbols, analysis.estimator, {}
    if "third-order" in analysis.values and triples is not None:
        found["third-order"] = third_order_from(evidence.pairs, triples)
    if {"shapley", "eta"} & set(analysis.values):
        if symbols.shape[1] <= MAX_HEADS:
            shapley = shapley_values_from(lattice_entropies(symbols, estimator=kind))
        else:
            shapley, error = sampled_shapley_values(symbols, PERMUTATIONS, analysis.seed, estimator=kind)
            found["shapley-error"] = error
        found["shapley"] = shapley
        found["eta"] = 2 * evidence.pairs.diagonal() - shapley
    if "marginal" in analysis.values:
        found["marginal"] = marginal_contributions(symbols, estimator=kind)
    return found


def _unknown(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    return f"unknown {kind} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"

"""A scoring run on disk: safetensors for the numbers, JSON for the facts. The same inputs give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressor.errors import ArtefactError
from compressor.files import read_json, to_json
from compressor.types import LayerScores, MLPScores, Scores

SCHEMA_VERSION = 4
TENSORS, FACTS = "scores.safetensors", "scores.json"
_FACTS = {
    "num_layers": int,
    "layers": list,
    "mlps": list,
    "model": str,
    "identity": dict,
    "task": str,
    "data": dict,
    "settings": dict,
}
_FIELDS = ("phi", "entropy", "pair_dividends", "coverage", "first_key_mass", "output_norm")
_SQUARE = ("pair_dividends", "coverage")
_OPTIONAL = ("dividends", "triples", "values", "resampled")


def save_scores(scores: Scores, directory: Path) -> None:
    """Write `scores.safetensors` and `scores.json`.

    The keys of the tensors are `layers.<index>.<field>[.<key>]`, see `LayerScores`, and `mlps.<index>.output_norm` and
    `mlps.<index>.values.<name>`, see `MLPScores`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(scores.layers):
        named = {field: getattr(layer, field) for field in _FIELDS}
        named |= {f"{field}.{key}": value for field in _OPTIONAL for key, value in getattr(layer, field).items()}
        named["observations"] = torch.tensor(layer.observations)
        tensors |= {f"layers.{index}.{name}": value.contiguous() for name, value in named.items()}
    for index, mlp in enumerate(scores.mlps):
        named = {"output_norm": mlp.output_norm} | {f"values.{name}": value for name, value in mlp.values.items()}
        tensors |= {f"mlps.{index}.{name}": value.contiguous() for name, value in named.items()}
    save_file(tensors, directory / TENSORS)
    facts = {"schema_version": SCHEMA_VERSION, "num_layers": len(scores.layers), **scores.facts}
    (directory / FACTS).write_text(to_json(facts), encoding="utf-8")


def load_scores(directory: Path) -> Scores:
    """Read what `save_scores` wrote.

    Raises:
        ArtefactError: there is no scoring run, or it is damaged or of another schema.
    """
    if not (directory / FACTS).is_file():
        raise ArtefactError(f"{directory} holds no scores ({FACTS}); expected a directory that `compress score` wrote")
    facts = read_json(directory / FACTS)
    if facts.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"{directory} has schema version {facts.get('schema_version')!r}; this version reads {SCHEMA_VERSION}: "
            "score the model again"
        )
    damaged = [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]
    try:
        tensors = load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"the scores in {directory} are damaged ({error}); score the model again") from error
    if not damaged and len(facts["layers"]) != facts["num_layers"]:
        damaged = ["num_layers"]
    if not damaged:
        expected = _shapes(_counts(facts["layers"], "heads"), _counts(facts["mlps"], "channels"))
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = {name for name in expected if expected[name] != found.get(name)}
        damaged = sorted(
            wrong | {name for name in found.keys() - expected.keys() if not _is_optional(name, found, expected)}
        )
    if damaged:
        raise ArtefactError(f"the scores in {directory} are damaged ({damaged[0]}); score the model again")
    layers = []
    for index in range(facts["num_layers"]):
        given: dict[str, Any] = {field: tensors[f"layers.{index}.{field}"] for field in _FIELDS}
        for field in _OPTIONAL:
            start = f"layers.{index}.{field}."
            given[field] = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
        layers.append(LayerScores(**given, observations=int(tensors[f"layers.{index}.observations"])))
    mlps = []
    for index in range(len(facts["mlps"])):
        start = f"mlps.{index}.values."
        values = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
        mlps.append(MLPScores(tensors[f"mlps.{index}.output_norm"], values))
    kept = {key: value for key, value in facts.items() if key not in ("schema_version", "num_layers")}
    return Scores(tuple(layers), kept, tuple(mlps))


def _counts(entries: list[Any], name: str) -> list[Any]:
    """A number of every entry's; None where it has none."""
    return [entry.get(name) if isinstance(entry, dict) else None for entry in entries]


def _shapes(heads: list[int], channels: list[int]) -> dict[str, tuple[int, ...]]:
    """The shapes that layers of so many heads, and MLPs of so many channels, have on disk."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, count in enumerate(heads):
        shapes |= {f"layers.{index}.{field}": (count, count) if field in _SQUARE else (count,) for field in _FIELDS}
        shapes[f"layers.{index}.observations"] = ()
    return shapes | {f"mlps.{index}.output_norm": (count,) for index, count in enumerate(channels)}


def _is_optional(name: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> bool:
    """Whether a tensor is one of those that a layer or an MLP may have."""
    layer, _, field = name.rpartition(".")[0].rpartition(".")
    if layer.startswith("mlps."):
        return field == "values" and found[name] == expected.get(f"{layer}.output_norm")
    return field in _OPTIONAL and f"{layer}.phi" in expected

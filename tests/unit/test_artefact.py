"""A scoring run on disk: what goes in comes out, the same bytes for the same numbers, and no damage goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.artefact import load_scores, save_scores
from compressor.errors import ArtefactError
from compressor.types import LayerScores, MLPScores, Scores

FIELDS = ("phi", "entropy", "pair_dividends", "coverage", "first_key_mass", "output_norm")
OPTIONAL = {"dividends": "3", "triples": "coverage", "values": "marginal", "resampled": "phi"}


def layer(heads: int, more: bool, generator: torch.Generator) -> LayerScores:
    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    count = heads * (heads - 1) * (heads - 2) // 6
    return LayerScores(
        phi=draw(heads),
        entropy=draw(heads),
        pair_dividends=draw(heads, heads).T,  # not contiguous
        coverage=draw(heads, heads),
        first_key_mass=draw(heads),
        output_norm=draw(heads),
        observations=1234567890123,
        dividends={"3": draw(count), "4": draw(1)} if more else {},
        triples={"coverage": draw(count)} if more else {},
        values={"marginal": draw(heads)} if more else {},
        resampled={"phi": draw(5, heads)} if more else {},
    )


@pytest.fixture
def scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    facts: dict[str, Any] = {
        "model": "m",
        "identity": {"sha256": "0" * 64},
        "task": "causal",
        "data": {"name": "naïve"},
        "settings": {"symbol": "key"},
        "layers": [{"heads": heads} for heads in (4, 3, 0)],
        "mlps": [{"name": "mlp", "channels": channels, "projection": "down"} for channels in (5, 2)],
    }
    layers = (layer(4, True, generator), layer(3, False, generator), layer(0, False, generator))
    values = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    mlps = (MLPScores(values[:, 0], {"fisher": values[:, 1]}), MLPScores(values[:2, 0]))  # not contiguous
    return Scores(layers, facts, mlps)


def test_scores_come_back_as_they_were(scores: Scores, tmp_path: Path) -> None:
    save_scores(scores, tmp_path)
    again = load_scores(tmp_path)
    assert again.facts == scores.facts
    assert len(again.layers) == 3
    for before, after in zip(scores.layers, again.layers, strict=True):
        assert after.observations == before.observations
        for field in FIELDS:
            expected, found = getattr(before, field), getattr(after, field)
            assert found.dtype == torch.float64
            assert torch.equal(found, expected)
        for field in OPTIONAL:
            expected, found = getattr(before, field), getattr(after, field)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_channels_come_back_as_they_were(scores: Scores, tmp_path: Path) -> None:
    save_scores(scores, tmp_path)
    again = load_scores(tmp_path)
    assert [sorted(mlp.values) for mlp in again.mlps] == [["fisher"], []]
    assert torch.equal(again.mlps[0].values["fisher"], scores.mlps[0].values["fisher"])
    for before, after in zip(scores.mlps, again.mlps, strict=True):
        assert after.output_norm.dtype == torch.float64
        assert torch.equal(after.output_norm, before.output_norm)
    (tmp_path / "bare").mkdir()
    save_scores(Scores(scores.layers, {**scores.facts, "mlps": []}), tmp_path / "bare")
    assert load_scores(tmp_path / "bare").mlps == ()


def test_the_same_scores_give_the_same_bytes(scores: Scores, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        facts = dict(reversed(scores.facts.items())) if name == "b" else scores.facts
        save_scores(Scores(scores.layers, facts, scores.mlps), tmp_path / name)
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"scores.json", "scores.safetensors"}


def test_the_tensors_have_the_documented_names(scores: Scores, tmp_path: Path) -> None:
    save_scores(scores, tmp_path)
    expected = {f"layers.{index}.{field}" for index in range(3) for field in (*FIELDS, "observations")}
    expected |= {f"layers.0.{field}.{key}" for field, key in OPTIONAL.items()} | {"layers.0.dividends.4"}
    expected |= {"mlps.0.output_norm", "mlps.0.values.fisher", "mlps.1.output_norm"}
    assert set(load_file(tmp_path / "scores.safetensors")) == expected
    assert json.loads((tmp_path / "scores.json").read_text())["schema_version"] == 4


def test_one_head_more_or_less_is_damage(scores: Scores, tmp_path: Path) -> None:
    save_scores(scores, tmp_path)
    tensors = load_file(tmp_path / "scores.safetensors")
    for field in ("phi", "entropy", "first_key_mass", "output_norm"):
        changed = {**tensors, f"layers.0.{field}": tensors[f"layers.0.{field}"][:-1]}
        save_file(changed, tmp_path / "scores.safetensors")
        with pytest.raises(ArtefactError):
            load_scores(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"mlps.0.output_norm": None},
        {"mlps.0.output_norm": torch.zeros(4)},
        {"mlps.0.values.fisher": torch.zeros(4)},
        {"mlps.0.values.fisher": torch.zeros(5, 1)},
        {"mlps.1.values": torch.zeros(2)},
        {"mlps.1.resampled.fisher": torch.zeros(2)},
        {"mlps.2.output_norm": torch.zeros(2)},
        {"mlps.2.values.fisher": torch.zeros(2)},
        {"mlps.phi": torch.zeros(2)},
    ],
)
def test_one_channel_more_or_less_is_damage(
    scores: Scores, tmp_path: Path, changed: dict[str, torch.Tensor | None]
) -> None:
    save_scores(scores, tmp_path)
    tensors = {**load_file(tmp_path / "scores.safetensors"), **changed}
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, tmp_path / "scores.safetensors")
    with pytest.raises(ArtefactError, match=next(iter(changed))):
        load_scores(tmp_path)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / "scores.json").read_text())
        change(facts)
        (folder / "scores.json").write_text(json.dumps(facts))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no facts": lambda folder: (folder / "scores.json").unlink(),
    "no tensors": lambda folder: (folder / "scores.safetensors").unlink(),
    "empty tensors": lambda folder: (folder / "scores.safetensors").write_bytes(b""),
    "noise": lambda folder: (folder / "scores.safetensors").write_bytes(bytes(range(256))),
    "truncated": lambda folder: (folder / "scores.safetensors").write_bytes(
        (folder / "scores.safetensors").read_bytes()[:-8]
    ),
    "other schema": rewrite(lambda facts: facts.update(schema_version=1)),
    "schema as text": rewrite(lambda facts: facts.update(schema_version="1")),
    "no schema": rewrite(lambda facts: facts.pop("schema_version")),
    "too many layers": rewrite(lambda facts: facts.update(num_layers=4)),
    "layers unknown": rewrite(lambda facts: facts.pop("num_layers")),
    "layers as text": rewrite(lambda facts: facts.update(num_layers="3")),
    "no layer": rewrite(lambda facts: facts.update(num_layers=0)),
    "fewer layers": rewrite(lambda facts: facts.update(num_layers=1)),
    "layers that are none": rewrite(lambda facts: facts.update(layers=[4, 3, 0])),
    "no MLPs": rewrite(lambda facts: facts.pop("mlps")),
    "fewer MLPs": rewrite(lambda facts: facts["mlps"].pop()),
    "more MLPs": rewrite(lambda facts: facts["mlps"].append({"channels": 0})),
    "another width": rewrite(lambda facts: facts["mlps"][0].update(channels=4)),
    "MLPs without channels": rewrite(lambda facts: facts["mlps"][1].pop("channels")),
    "MLPs that are none": rewrite(lambda facts: facts.update(mlps=[5, 2])),
    "schema of old": rewrite(lambda facts: facts.update(schema_version=3)),
    "no identity": rewrite(lambda facts: facts.pop("identity")),
    "no model": rewrite(lambda facts: facts.pop("model")),
    "no task": rewrite(lambda facts: facts.pop("task")),
}


@pytest.mark.parametrize("how", list(DAMAGE))
def test_damage_is_a_users_mistake(scores: Scores, tmp_path: Path, how: str) -> None:
    save_scores(scores, tmp_path)
    DAMAGE[how](tmp_path)
    with pytest.raises(ArtefactError) as caught:
        load_scores(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="compress score"):
        load_scores(tmp_path / "missing")

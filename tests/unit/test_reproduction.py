"""The paper's protocol on tiny models: what is set beside its figures, and with which verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import compressor
from compressor.errors import RecipeError
from compressor.files import to_json
from compressor.reproduction import MODELS, PUBLISHED, RATIOS

QUICK: dict[str, Any] = {"repeats": 1, "prompt_length": 6, "new_tokens": 3, "random_seeds": 2}


def claims(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {claim["name"]: claim for claim in document["claims"]}


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "gpt2"), ("bert", "bert"), ("tinyllama", "llama")])
def test_the_protocol_runs_on_local_models(
    here: Path, models: dict[str, str], texts: str, name: str, kind: str
) -> None:
    run = compressor.paper(name, model=models[kind], data=texts, output_dir="paper", **QUICK)
    written = {file.name for file in Path("paper").iterdir()}
    assert {"paper.json", "scores.json", "scores.safetensors", "recipe.yaml"} <= written
    assert Path("paper/paper.json").read_text() == to_json(run.document)
    assert run.score.scores.facts["settings"]["symbol"] == "sequence"
    rows = {row["name"]: row for row in run.document["rows"]}
    assert [f"gt-fep {ratio:.0%}" in rows for ratio in RATIOS] == [True] * 3
    assert sum(row["kind"] == "random" for row in rows.values()) == 2
    told = claims(run.document)
    assert told["perplexity, dense"]["measured"] == rows["dense"]["perplexity"]
    for ratio in RATIOS:
        assert told[f"perplexity at {ratio:.0%}"]["measured"] == rows[f"gt-fep {ratio:.0%}"]["perplexity"]
    macs = [rows[row]["costs"]["macs"]["total"] for row in ("dense", "gt-fep 20%")]
    assert told["FLOPs saved at 20%"]["measured"] == pytest.approx(1 - macs[1] / macs[0])
    for figure, claim in told.items():
        assert claim["published"] == PUBLISHED[name].get(figure)
        assert bool(claim["verdict"]) is (claim["published"] is not None and claim["measured"] is not None)


def test_distinct_documents_make_an_artefact_of_the_dividends(here: Path, models: dict[str, str], texts: str) -> None:
    """Whatever the heads do, every pair shares ln N and every triple −ln N."""
    run = compressor.paper("gpt2", model=models["gpt2"], data=texts, output_dir="paper", **QUICK)
    observations = run.score.scores.layers[0].observations
    triple = claims(run.document)["mean triple dividend"]
    assert (triple["published"], triple["verdict"]) == (-5.403, "artefact")
    assert triple["measured"] == pytest.approx(-math.log(observations), rel=0.02)
    assert f"ln {observations}" in triple["reason"]
    assert claims(run.document)["perplexity at 20%"]["verdict"] == "not comparable"


def test_every_model_of_the_paper_has_a_recipe_of_its_own() -> None:
    from compressor.config import resolve

    assert MODELS.keys() == PUBLISHED.keys()
    for name in PUBLISHED:
        recipe = resolve(f"paper-{name}.yaml", {})
        assert recipe.model in MODELS[name]
        assert (recipe.symbol, recipe.samples, recipe.scope_in_force) == ("sequence", 500, "layer")


def test_a_model_the_paper_does_not_have(here: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'gpt2'"):
        compressor.paper("gpt-2")
    assert not list(here.iterdir())

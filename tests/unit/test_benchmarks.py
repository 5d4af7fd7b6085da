"""The documentation says what the benchmark JSON says, the JSON under what conditions; suites on tiny models."""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compressor.attention import prune_heads
from compressor.data import TextDataModule
from compressor.files import to_json
from compressor.loading import load_model
from tests.conftest import CONTEXT

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts import their neighbours
    sys.modules[name] = module  # as dataclasses want it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("tables")


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md", "benchmarks/MODELS.md"])
def test_tables_are_those_of_the_json(tables: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- table:")
    digit = next(i for i in range(text.index("| `gt-fep`", start), len(text)) if text[i].isdigit())
    forged = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert tables.filled(forged) == text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_tell_their_conditions(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"cores", "processor", "torch_threads", "device"} <= document["machine"].keys()
    assert {"python", "torch", "transformers", "lightning-compressor"} <= document["versions"].keys()
    assert document["settings"]
    if document["suite"] == "quality":
        assert document["calibration"]["fingerprint"] != document["evaluation"]["fingerprint"]
        for summary in document["summaries"].values():
            assert summary["random"]["draws"] >= 5


@pytest.mark.parametrize(
    "path", [path for path in RESULTS if path.stem.startswith("quality")], ids=lambda path: path.stem
)
def test_summaries_follow_from_the_rows(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    for column, summary in document["summaries"].items():
        scope, _, repaired = column.partition(" ")
        draws = [
            row["perplexity"]
            for row in document["rows"]
            if row["kind"] == "random" and row["plan"]["scope"] == scope and row["repaired"] == bool(repaired)
        ]
        mean = sum(draws) / len(draws)
        variance = sum((value - mean) ** 2 for value in draws) / (len(draws) - 1)
        assert summary["random"]["mean"] == pytest.approx(mean, rel=1e-12)
        assert summary["random"]["sd"] == pytest.approx(variance**0.5, rel=1e-9)
        for name, count in summary["random"].get("draws_beaten", {}).items():
            own = next(
                row["perplexity"]
                for row in document["rows"]
                if row["name"] == name and (row["plan"]["scope"], row["repaired"]) == (scope, bool(repaired))
            )
            assert count == sum(own * (1 + 1e-6) < draw for draw in draws)
            assert (name in summary["random"]["best_draw_beaten_by"]) == (own * (1 + 1e-6) < min(draws))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_stay_small(path: Path) -> None:
    assert path.stat().st_size < 1e6


def test_a_table_without_results_says_so(tables: ModuleType) -> None:
    text = "<!-- table: no-such-result -->\n| 1 |\n<!-- end -->"
    assert tables.filled(text) == "<!-- table: no-such-result -->\nNot run yet.\n<!-- end -->"


# --- suites -----------------------------------------------------------------------------------------------------------


COMMON: dict[str, Any] = {"eval_data": None, "samples": 6, "eval_samples": 8, "ratio": 0.3, "device": "cpu"}


def test_quality_compares_with_the_reference(
    tables: ModuleType, models: dict[str, str], texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = script("run")
    few = [rival for rival in run.criteria() if rival.name in ("loss-game", "loo", "magnitude", "random")]
    monkeypatch.setattr(run, "criteria", lambda: few)
    document = run.quality(argparse.Namespace(**COMMON, model=models["gpt2"], data=texts, unit="head", random_seeds=3))
    document = json.loads(to_json(document | {"model": "tiny"}))
    rows = {(row["name"], row["repaired"], (row["plan"] or {}).get("scope")): row for row in document["rows"]}
    for column, summary in document["summaries"].items():
        scope, _, repaired = column.partition(" ")
        differences = summary["differences"]
        assert differences["reference"] == "loss-game"
        own = rows["loss-game", bool(repaired), scope]["perplexity"]
        for name in ("loo", "magnitude", "random (seed 2)"):
            found, other = differences["against"][name], rows[name, bool(repaired), scope]["perplexity"]
            assert found["change"] == pytest.approx(own / other - 1, rel=1e-9, abs=1e-12)
            assert found["low"] <= found["change"] <= found["high"]
    written = tables.table(document)
    lines = {line.split("|")[1].strip(" `"): line for line in written.splitlines() if line.startswith("| `")}
    for name in ("loo", "magnitude"):
        near = [
            summary["differences"]["against"][name]["low"] <= 1e-6
            and summary["differences"]["against"][name]["high"] >= -1e-6
            for summary in document["summaries"].values()
        ]
        assert lines[name].count("≈") == sum(near)
    assert "≈" not in lines["loss-game"]
    assert "Better than random's best draw are, layer: " in written


def test_sensitivity_sets_sizes_and_texts_side_by_side(tables: ModuleType, models: dict[str, str], texts: str) -> None:
    suite = script("sensitivity")
    train, heldout = (str(Path(texts) / f"{split}.jsonl") for split in ("train", "test"))
    sizes = {"texts": [], "trained_on": train, "trained_samples": 4, "sizes": [3], "seeds": 2}
    given = argparse.Namespace(**COMMON | sizes | {"model": models["gpt2"], "data": train, "eval_data": heldout})
    document = json.loads(to_json(suite.sensitivity(given) | {"model": "tiny"}))
    rows = document["rows"]
    assert [row.get("role") for row in rows] == [None, *["size"] * 4, *["whole"] * 2, *["trained on"] * 2]
    assert [row["text"]["documents"] for row in rows[1:5]] == [3] * 4
    assert rows[1]["text"]["fingerprint"] == rows[2]["text"]["fingerprint"] != rows[3]["text"]["fingerprint"]
    assert document["evaluation"]["documents"] == 8
    for scope, differences in document["differences"].items():
        of = {row["name"]: row["perplexity"] for row in rows if row.get("scope", scope) == scope}
        assert differences["reference"] in of
        assert set(differences["against"]) == set(of) - {differences["reference"]}
        for name, found in differences["against"].items():
            assert found["change"] == pytest.approx(of[differences["reference"]] / of[name] - 1, abs=1e-12)
    lines = tables.table(document).splitlines()
    changes = [row["perplexity_change"] for row in rows if row.get("role") == "size" and row["scope"] == "layer"]
    assert f"{sum(changes) / 2:+.1%} ({min(changes):+.1%} to {max(changes):+.1%})" in lines[2]
    assert f"{rows[5]['perplexity_change']:+.1%} [" in lines[3]
    assert "of the model's training" in lines[4]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_torch_prunings_own_model_is_the_one_without_its_heads(models: dict[str, str], texts: str, scope: str) -> None:
    pytest.importorskip("torch_pruning")
    suite = script("torch_pruner")
    dense = load_model(models["gpt2"], device="cpu")
    data = TextDataModule(dense.tokenizer, task="causal", data=texts, samples=8, max_length=CONTEXT)
    data.setup()
    before = copy.deepcopy(dense.model.state_dict())
    batch = {"input_ids": torch.arange(3, 33)[None]}
    for name, cut in suite.cuts(dense, list(data.loss_dataloader()), 0.3, scope).items():
        removed = {layer: len(heads) for layer, heads in cut.plan.heads.items()}
        assert sum(removed.values()) == (4 if scope == "layer" else 3)  # of two layers of four heads
        assert scope == "global" or set(removed.values()) == {2}
        ours = prune_heads(copy.deepcopy(dense.model), cut.plan.heads, allow_empty=cut.plan.allow_empty)
        with torch.no_grad():
            expected, dense_logits, found = (model(**batch).logits for model in (ours, dense.model, cut.model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, dense_logits, rtol=1e-2, atol=1e-2), name
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())


def test_without_torch_pruning_there_are_no_rows_for_it(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script("torch_pruner")
    told: list[str] = []
    monkeypatch.setattr(suite.log, "info", told.append)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert suite.cuts(load_model(models["gpt2"], device="cpu"), [], 0.2, "layer") == {}
    monkeypatch.setitem(sys.modules, "torch_pruning", ModuleType("torch_pruning"))
    assert suite.cuts(load_model(models["llama"], device="cpu"), [], 0.2, "layer") == {}
    assert told[0] == "torch-pruning is not installed: no rows for it"
    assert told[1].endswith("not on LlamaForCausalLM")


def test_budgets_follow_the_verbs(tables: ModuleType, models: dict[str, str], texts: str, tmp_path: Path) -> None:
    run = script("budgets")
    settings = COMMON | {"ratio": None, "eval_data": texts, "train_data": None, "target_flops": 0.85, "rounds": [2]}
    settings |= {"minutes": 0.02, "epochs": 1, "train_samples": 12, "random_seeds": 2, "repeats": 1, "batch_size": 4}
    document = run.budgets(argparse.Namespace(**settings, model=models["gpt2"], data=texts), tmp_path)
    document = json.loads(to_json(document | {"model": "tiny", "machine": {"torch_threads": 1}}))
    rows = {row["name"]: row for row in document["rows"]}
    ways = ["repaired", "repaired, 2 rounds", "as cut", "heads alone, repaired", "repaired, recovered"]
    assert list(rows)[1:6] == ways
    for name in ways[:4]:
        left = rows[name]["costs"]["macs"]["total"] / rows["dense"]["costs"]["macs"]["total"]
        assert left == pytest.approx(rows[name]["target"]["found"])
        assert left <= 0.85
    assert rows["repaired, 2 rounds"]["plan"]["rounds"] == 2
    assert rows["heads alone, repaired"]["plan"]["removed_channels"] == 0
    assert document["differences"]["reference"] == "repaired"
    assert {"repaired, 2 rounds", "repaired, recovered", "dense"} < set(document["differences"]["against"])
    named = document["random"]
    assert {*named["draws_beaten"], *named["best_draw_beaten_by"]} <= rows.keys()
    assert str(tmp_path) not in json.dumps(document)
    written = tables.table(document)
    assert "| `loss-game`, repaired, recovered |" in written
    assert f"{rows['as cut']['perplexity_change']:+.2%}" in written


def test_pair_dividends_are_those_of_a_quadratic_game() -> None:
    run = script("pairs")
    generator = torch.Generator().manual_seed(0)
    units, windows = 5, 4000
    pairs = torch.randn(units, units, generator=generator, dtype=torch.float64)
    pairs = pairs + pairs.T
    single = torch.randn(units, generator=generator, dtype=torch.float64)
    drawn = torch.rand(windows, units, generator=generator, dtype=torch.float64)
    removed = drawn * (torch.rand(windows, units, generator=generator, dtype=torch.float64) < 0.4)
    tokens = torch.randint(5, 20, (windows,), generator=generator).double()
    slope = tokens[:, None] * (single + removed @ pairs)  # of the loss r · single + r · pairs · r / 2
    found = run.pair_dividends(run.Slopes(slope, removed, tokens, torch.arange(windows)), 1e-9)
    expected = pairs.clone().fill_diagonal_(0)
    assert torch.allclose(found, expected, atol=0.1)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(("scope", "count"), [("layer", 4), ("global", 3)])
def test_heads_leave_by_what_the_ones_before_leave_them_worth(scope: str, count: int) -> None:
    run = script("pairs")
    rise = torch.tensor([1.0, 2.0, 3.0, 1.5, 2.5, 9.0])
    pairs = torch.zeros(6, 6)
    pairs[0, 3] = pairs[3, 0] = 100.0  # the other one of a redundant pair
    gone = run.greedy(rise, pairs, [3, 3], 0.5, scope)
    assert len(gone) == count
    assert gone[:3] == [0, 1, 4]


def test_pairs_are_set_beside_singles_and_rounds(tables: ModuleType, models: dict[str, str], texts: str) -> None:
    run = script("pairs")
    settings = COMMON | {"passes": 2, "batch_size": 4}
    document = run.pairs(argparse.Namespace(**settings, model=models["gpt2"], data=texts))
    document = json.loads(to_json(document | {"model": "tiny"}))
    assert len(document["rows"]) == 15
    for row in document["rows"][1:]:
        scope = row["name"].split(",")[0]
        assert row["plan"]["scope"] == scope
        assert row["plan"]["removed_heads"] == (4 if scope == "layer" else 3)
    written = tables.table(document)
    assert "| 2 rounds |" in written
    assert "| 2 passes, pairs, ridge 100 |" in written

"""Pruning by targets, and plans fed back, from the command line to the counted model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor import contenders, pipeline, planning, pruning, removal
from compressor.artefact import load_scores
from compressor.attention import attention_layers
from compressor.errors import CompressorError, PlanError
from compressor.measure.latency import table_of
from compressor.mlp import mlp_layers
from compressor.types import MLPScores, PruningPlan, Scores
from tests.conftest import Outcome, tiny_model, write_documents

Compress = Callable[..., Outcome]
QUICK: dict[str, Any] = {"repeats": 1, "prompt_length": 6, "new_tokens": 3}
WIDTHS = {"gpt2": 128, "bert": 48, "llama": 64}


@pytest.fixture
def scored(
    request: pytest.FixtureRequest, here: Path, models: dict[str, str], texts: str, monkeypatch: pytest.MonkeyPatch
) -> pipeline.ScoreRun:
    """A score run with values of channels that are made by hand, as if it had looked at them."""
    kind = getattr(request, "param", "gpt2")
    run = compressor.score(model=models[kind], data=texts, output_dir="scores", values=["taylor"])
    generator = torch.Generator().manual_seed(5)

    def with_mlps(directory: Path) -> Scores:
        found = load_scores(directory)
        made = []
        for _ in range(2):
            draws = {
                name: torch.rand(WIDTHS[kind], generator=generator.manual_seed(5), dtype=torch.float64) for name in "a"
            }
            values = dict.fromkeys(("loss-game", "taylor"), draws["a"] * 0.001)
            made.append(MLPScores(draws["a"], values))
        facts = [{"name": f"mlp {i}", "channels": WIDTHS[kind], "projection": f"down {i}"} for i in range(2)]
        return replace(found, mlps=tuple(made), facts={**found.facts, "mlps": facts})

    for module in (pruning, contenders):
        monkeypatch.setattr(module, "load_scores", with_mlps)
    return run


def shares(document: dict[str, Any]) -> tuple[float, float]:
    """Counted shares of FLOPs and of parameters."""
    dense, pruned = document["costs"]["dense"], document["costs"]["pruned"]
    return pruned["macs"]["total"] / dense["macs"]["total"], pruned["parameters"] / dense["parameters"]


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", ["gpt2", "llama", "bert"], indirect=True)
@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("more", [{}, {"deployable": True}, {"criterion": "magnitude"}], ids=["loss", "even", "plain"])
def test_the_count_says_what_was_asked(scored: pipeline.ScoreRun, kind: str, more: dict[str, Any]) -> None:
    settings: dict[str, Any] = {f"target_{kind}": 0.8, "repair": False, **more}
    run = compressor.prune(scores=scored.directory, **settings)
    found = shares(run.document)[kind == "params"]
    plan, told = run.plan, run.document["target"]
    assert found <= 0.8
    assert plan.predicted == pytest.approx(found, rel=1e-6)  # not only near: prices are exact here
    expected = {"kind": kind, "target": 0.8, "predicted": plan.predicted, "found": found, "missed": False}
    assert told == pytest.approx(expected)
    portions = [*(len(gone) for gone in plan.heads.values()), *(len(gone) // 8 for gone in plan.channels.values())]
    assert sum(portions) >= 1
    assert plan.structures == ("heads", "channels")
    if more.get("criterion") == "magnitude":  # then as large a share of both
        gone = [len(heads) / plan.heads_per_layer[i] for i, heads in plan.heads.items()]
        gone += [len(channels) / plan.channels_per_layer[i] for i, channels in plan.channels.items()]
        assert len(gone) == 4
        assert max(gone) - min(gone) <= 1 / min(plan.heads_per_layer)
    left = [before - len(plan.channels.get(i, ())) for i, before in enumerate(plan.channels_per_layer)]
    assert all(width % 8 == 0 and width >= 8 for width in left)
    model = compressor.load(run.document["base"]["model"])
    counts = [layer.num_heads for layer in attention_layers(model)], [mlp.num_channels for mlp in mlp_layers(model)]
    assert (list(plan.heads_per_layer), list(plan.channels_per_layer)) == counts
    if more.get("deployable"):
        assert (plan.scope, plan.unit) == ("layer", "query")
        assert len(set(left)) == 1
        assert len({len(plan.heads.get(i, ())) for i in range(2)}) == 1
    else:
        assert plan.scope == "global"


def test_one_portion_less_would_miss_the_target(scored: pipeline.ScoreRun) -> None:
    """With 8 channels more the cut would not do: no more leaves than has to."""
    run = compressor.prune(scores=scored.directory, target_params=0.8, structures=["channels"], repair=False)
    found, dense = shares(run.document)[1], run.document["costs"]["dense"]["parameters"]
    assert run.plan.heads == {}
    assert found <= 0.8 < found + 8 * (2 * 32 + 1) / dense


def test_structures_and_alignment(scored: pipeline.ScoreRun) -> None:
    run = compressor.prune(scores=scored.directory, target_flops=0.9, structures=["heads"], dry_run=True)
    assert (run.plan.structures, run.plan.channels, run.plan.channels_per_layer) == (("heads",), {}, ())
    wide = compressor.prune(scores=scored.directory, target_flops=0.9, structures=["channels"], align=32, dry_run=True)
    assert wide.plan.heads == {}
    assert all(len(gone) % 32 == 0 for gone in wide.plan.channels.values())
    both = compressor.prune(scores=scored.directory, ratio=0.25, structures=["heads", "channels"], dry_run=True).plan
    assert {len(gone) for gone in both.heads.values()} == {1}
    assert {len(gone) for gone in both.channels.values()} == {32}
    assert not list(scored.directory.parent.glob("runs/**/plan.json"))


def test_criteria_without_values_of_channels_take_heads_alone(scored: pipeline.ScoreRun, compress: Compress) -> None:
    said = compress(
        "prune", "--scores", scored.directory, "--criterion", "entropy", "--target-flops", "0.95", "--dry-run"
    )
    assert said.code == 0
    assert "only heads may leave" in said.err
    assert (
        "heads and channels of MLPs may leave"
        in compress("prune", "--scores", scored.directory, "--target-flops", "0.95", "--dry-run").err
    )


def test_a_target_by_the_clock(
    scored: pipeline.ScoreRun, texts: str, monkeypatch: pytest.MonkeyPatch, compress: Compress
) -> None:
    """By a table that no clock made; the pruned model is timed, whatever comes of it."""
    left = dict.fromkeys(("heads", "channels"), (0.75, 0.5, 0.25))
    timed = {"heads": (1.0, 0.9, 0.8, 0.7), "channels": (1.0, 0.9, 0.92, 0.7)}
    table = table_of(left, timed, batch_size=8, prompt_length=6, repeats=1)
    monkeypatch.setattr(planning, "latency_table", lambda *args, **settings: table)
    words = ("--scores", scored.directory, "--target-latency", "0.85", "--no-repair", "--repeats", 1, "--export")
    said = compress("prune", *words, "--prompt-length", 6, "-o", "fast")
    assert said.code == 0, said.err
    assert "fewer channels were not always faster" in said.err
    document = json.loads(Path("fast/plan.json").read_text())
    told = document["target"]
    assert document["latency_table"] == json.loads(json.dumps(table.to_dict()))
    for points in {}, {"heads": document["latency_table"]["points"]["heads"]}:
        damaged = edited(document, latency_table=document["latency_table"] | {"points": points} if points else None)
        Path("bad.json").write_text(json.dumps(damaged))
        refused = compress("prune", "--plan", "bad.json", "--dry-run", "-q")
        assert (refused.code, "latency_table in bad.json is missing or damaged" in refused.err) == (2, True)
    assert 0.8 < told["predicted"] <= 0.85 + 1e-9
    assert told["found"] == told["timed"]["share"]["median"] > 0
    assert f"prefill time left: 85.00% asked, {told['predicted']:.2%} predicted, {told['found']:.2%} timed" in said.out
    bench = compressor.bench(against=["fast"], data=texts, random_seeds=2, **QUICK).document
    assert len([row for row in bench["rows"] if row["kind"] == "random"]) == 2


def test_bench_ranks_by_the_same_target(scored: pipeline.ScoreRun, texts: str) -> None:
    run = compressor.prune(scores=scored.directory, target_flops=0.8, export=True)
    assert run.checkpoint is not None
    document = compressor.bench(
        against=[run.checkpoint], scores=scored.directory, data=texts, random_seeds=3, **QUICK
    ).document
    rows = {row["name"]: row for row in document["rows"]}
    rivals = {name for name, row in rows.items() if row["kind"] == "rival"}
    assert {"taylor", "magnitude"} <= rivals
    assert not rivals & {"entropy", "gt-fep", "bos-sink", "loss-game", "random"}
    draws = [row for row in document["rows"] if row["kind"] == "random"]
    assert len(draws) == 3
    assert len({round(row["perplexity"], 6) for row in draws}) == 3
    dense = rows["dense"]["costs"]["macs"]["total"]
    for row in document["rows"][1:]:
        assert 0.7 < row["costs"]["macs"]["total"] / dense <= 0.8
    names = [name for name, row in rows.items() if row["kind"] == "pruned"]
    assert names == [f"loss-game {run.plan.removed}/8, {run.plan.removed_channels}/256 channels"]


def test_the_terminal_tells_both_tables_and_the_shares(scored: pipeline.ScoreRun, compress: Compress) -> None:
    said = compress("prune", "--scores", scored.directory, "--target-flops", "0.8")
    assert said.code == 0, said.err
    document = json.loads((Path("runs/gpt2/prune") / "plan.json").read_text())
    target, plan = document["target"], document["plan"]
    assert f"FLOPs left: 80.00% asked, {target['predicted']:.2%} predicted, {target['found']:.2%} counted" in said.out
    assert f"{plan['removed_channels']:,} of 256 channels" in said.out
    assert "MLP" in said.out
    assert "missed" not in said.out
    assert {entry["structure"] for entry in document["repair"]} <= {"heads", "channels"}


def test_a_missed_target_is_said(
    scored: pipeline.ScoreRun, monkeypatch: pytest.MonkeyPatch, compress: Compress
) -> None:
    monkeypatch.setattr(pruning, "remove", lambda *args: None)  # nothing leaves
    said = compress("prune", "--scores", scored.directory, "--target-flops", "0.8", "--no-repair")
    assert "the target was missed: 100.00% is left, 80.00% was asked for" in said.out
    assert "target_flops is 0.8, but 1.0000 is left" in said.err


# --- plans fed back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("--ratio", "0.3"), ("--target-flops", "0.8")], ids=["ratio", "target"])
@pytest.mark.parametrize("repair", [("--repair",), ("--no-repair",)], ids=["repair", "bare"])
def test_a_plan_comes_back_as_it_was(
    scored: pipeline.ScoreRun, compress: Compress, how: Sequence[str], repair: Sequence[str]
) -> None:
    """The same weights, whether chosen or read from a dry run's output, or from the plan.json of the first."""
    scores = ("--scores", scored.directory)
    printed = compress("prune", *scores, *how, "--dry-run", "--json")
    Path("plan.json").write_text(printed.out)
    assert compress("prune", *scores, *how, *repair, "--export", "-o", "first").code == 0
    assert compress("prune", "--plan", "plan.json", *repair, "--export", "-o", "second").code == 0
    assert compress("prune", "--plan", "first/plan.json", *repair, "--export", "-o", "third").code == 0
    documents = [json.loads(Path(name, "plan.json").read_text()) for name in ("first", "second", "third")]
    weights = [Path(name, "checkpoint", "model.safetensors").read_bytes() for name in ("first", "second", "third")]
    assert weights[0] == weights[1] == weights[2]
    assert documents[0]["plan"] == documents[1]["plan"] == documents[2]["plan"]
    assert not documents[1]["plan"]["edited"]
    assert documents[1]["given"] == "plan.json"
    assert documents[0]["scores"] == documents[1]["scores"]
    assert documents[0]["repair"] == documents[1]["repair"]


def dry(compress: Compress, scored: pipeline.ScoreRun, *words: str) -> dict[str, Any]:
    printed = compress("prune", "--scores", scored.directory, "--dry-run", "--json", *words)
    assert printed.code == 0, printed.err
    document: dict[str, Any] = printed.json
    return document


def test_an_edited_plan_is_done_and_called_so(scored: pipeline.ScoreRun, compress: Compress, texts: str) -> None:
    document = dry(compress, scored, "--target-flops", "0.8")
    document["plan"] |= {"heads": {"1": [0, 2]}, "channels": {"0": [5, 6, 7]}}
    Path("mine.json").write_text(json.dumps(document))
    run = compressor.prune(plan="mine.json", export=True)
    assert (run.plan.heads, run.plan.channels) == ({1: (0, 2)}, {0: (5, 6, 7)})
    assert (run.plan.edited, run.plan.criterion, run.plan.predicted) == (True, "loss-game", None)
    assert run.document["target"]["target"] is None
    assert run.checkpoint is not None
    slim = compressor.load(run.checkpoint)
    assert [layer.num_heads for layer in attention_layers(slim)] == [4, 2]
    assert [mlp.num_channels for mlp in mlp_layers(slim)] == [125, 128]
    again = compressor.prune(plan="runs/gpt2/prune/plan.json", dry_run=True).plan
    assert again == run.plan
    bench = compressor.bench(against=[run.checkpoint], scores=scored.directory, data=texts, random_seeds=2, **QUICK)
    rows = bench.document["rows"]
    assert {row["name"] for row in rows} >= {"loss-game 2/8, 3/256 channels edited", "loss-game", "magnitude"}
    for row in rows[1:]:
        assert row["costs"]["heads"] == [4, 2]
        assert row["costs"]["parameters"] == run.document["costs"]["pruned"]["parameters"]


@pytest.mark.parametrize(
    "changes",
    [{"ratio": 0.3}, {"scope": "global"}, {"unit": "query"}, {"align": 4}, {"allow_empty": True}, {"rounds": 2}],
)
def test_an_edited_rule_is_an_edit(scored: pipeline.ScoreRun, compress: Compress, changes: dict[str, Any]) -> None:
    document = dry(compress, scored, "--ratio", "0.2")
    for what, by_hand in (({}, False), (changes, True)):
        Path("mine.json").write_text(json.dumps(edited(document, **what)))
        assert compressor.prune(plan="mine.json", dry_run=True).plan.edited is by_hand


def test_rounds_of_a_plan_are_kept(scored: pipeline.ScoreRun, compress: Compress) -> None:
    document = dry(compress, scored, "--ratio", "0.5", "--rounds", "2")
    Path("mine.json").write_text(json.dumps(document))
    plan = compressor.prune(plan="mine.json", dry_run=True).plan
    assert (plan.rounds, plan.edited) == (2, False)


def test_a_plan_of_an_older_version_is_no_edit(scored: pipeline.ScoreRun, compress: Compress) -> None:
    document = edited(dry(compress, scored, "--ratio", "0.2"), fingerprint=None)
    for changes, by_hand in ({}, False), ({"heads": {"0": [1]}}, True), ({"heads_per_layer": None}, True):
        Path("mine.json").write_text(json.dumps(edited(document, **changes)))
        assert compressor.prune(plan="mine.json", dry_run=True).plan.edited is by_hand


def test_the_text_that_chose_a_plan_is_remembered_beside_other_scores(
    here: Path, models: dict[str, str], compress: Compress, tmp_path: Path
) -> None:
    first, second, third = (write_documents(tmp_path / f"{seed}.jsonl", 20, seed) for seed in (71, 72, 73))
    for name, text in ("sa", first), ("sb", second):
        compressor.score(model=models["gpt2"], data=str(text), eval_data=str(third), samples=0, output_dir=name)
    Path("plan.json").write_text(compress("prune", "--scores", "sa", "--dry-run", "--json").out)
    mine = compressor.prune(plan="plan.json", scores="sb", export=True, repair=False, output_dir="mine")
    again = compressor.prune(plan="mine/plan.json", scores="sb", export=True, repair=False, output_dir="again")
    assert again.document["base"] == mine.document["base"]
    for run in (mine, again):
        assert run.document["scores"]["data"]["name"] == second.name
        for text in (first, second):
            refused = compress("bench", "--against", run.checkpoint, "--data", third, "--eval-data", text, "-q")
            assert (refused.code, "documents of" in refused.err, "calibrated" in refused.err) == (2, True, True)


def test_a_plan_by_hand_needs_no_scores(here: Path, models: dict[str, str], texts: str) -> None:
    """It is repaired on the text that is named."""
    Path("mine.json").write_text(json.dumps({"plan": {"heads": {"0": [3]}}}))
    run = compressor.prune(plan="mine.json", model=models["gpt2"], data=texts, samples=9, export=True)
    assert (run.plan.heads, run.plan.criterion, run.plan.edited) == ({0: (3,)}, "by hand", True)
    assert run.document["scores"]["settings"]["samples"] == 9
    assert ("heads", 0) in {(entry["structure"], entry["layer"]) for entry in run.document["repair"]}
    assert run.checkpoint is not None
    document = compressor.bench(against=[run.checkpoint], random_seeds=2, **QUICK).document
    assert [sum(row["costs"]["heads"]) for row in document["rows"]] == [8, 7, 7, 7]


def test_a_layer_is_emptied_where_the_plan_allows(here: Path, models: dict[str, str], texts: str) -> None:
    plan = {"heads": {"0": [0, 1, 2, 3]}}
    Path("mine.json").write_text(json.dumps({"plan": plan}))
    with pytest.raises(PlanError, match="removes all 4 heads of layer 0"):
        compressor.prune(plan="mine.json", model=models["gpt2"], repair=False)
    Path("mine.json").write_text(json.dumps({"plan": plan | {"allow_empty": True}}))
    assert compressor.prune(plan="mine.json", model=models["gpt2"], repair=False).plan.removed == 4


SETTINGS = {"data": None, "eval_data": None, "part": "both", "samples": 0, "max_length": None}
TABLE = {"batch_size": 1, "prompt_length": 1, "repeats": 1, "timed": {}, "smoothed": []}


def edited(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A document with another plan, or with parts of it changed; None takes a part away."""
    made = copy.deepcopy(document)
    for name, value in changes.items():
        where = made if name in ("plan", "base", "scores", "latency_table") else made["plan"]
        where[name] = value
        if value is None:
            del where[name]
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": {"7": [0]}}, "layer 7"),
        ({"heads": {"0": [9]}}, "head 9 of layer 0"),
        ({"heads": {"0": [1.5]}}, "head 1.5"),
        ({"heads": {"0": [True]}}, "head True"),
        ({"heads": {"0": [[1]]}}, "head [1]"),
        ({"heads": {"0": [1, 1]}}, "twice"),
        ({"heads": {"0": [0, 1, 2, 3]}}, "all 4 heads"),
        ({"heads": {"x": [0]}}, "no lists by layer"),
        ({"heads": {"-1": [0]}}, "no lists by layer"),
        ({"heads": {"0": 1}}, "no lists by layer"),
        ({"heads": [1]}, "no lists by layer"),
        ({"channels": {"0": [128]}}, "channel 128"),
        ({"channels": {"0": list(range(128))}}, "all 128 channels"),
        ({"heads": {}}, "removes nothing"),
        ({"heads_per_layer": [4, 4, 4]}, "heads_per_layer"),
        ({"channels": {"0": [1]}, "channels_per_layer": [64, 64]}, "channels_per_layer"),
        ({"ratio": "much"}, "ratio"),
        ({"target": {"time": 0.8}}, "target"),
        ({"align": 0}, "align"),
        ({"scope": "here"}, "scope"),
        ({"unit": ["head"]}, "unit"),
        ({"seed": "x"}, "seed"),
        ({"plan": None}, "no plan"),
        ({"plan": {}}, "no plan"),
        ({"plan": []}, "no plan"),
        ({"base": []}, "base"),
        ({"scores": {"seed": 1}}, "scores"),
        ({"scores": {"seed": 1, "data": {"fingerprint": "x"}, "settings": {}}}, "scores"),
        ({"scores": {"seed": 1, "data": {}, "settings": SETTINGS}}, "scores"),
        ({"scores": {"seed": 1, "data": {"fingerprint": "x", "hashes": 3}, "settings": SETTINGS}}, "scores"),
        ({"scores": {"seed": 1, "data": {"fingerprint": "x"}, "settings": SETTINGS | {"samples": "x"}}}, "samples"),
        ({"latency_table": {"points": {"heads": [[1, 1]]}}}, "latency_table"),
        ({"latency_table": TABLE | {"points": {}}}, "latency_table"),
        ({"latency_table": TABLE | {"points": {"heads": [[1.0, "x"]]}}}, "latency_table"),
        ({"base": {"scored": [1]}}, "base"),
        ({"predicted": "x"}, "predicted"),
        ({"structures": 3}, "structures"),
        ({"structures": ["neurons"]}, "structures"),
        ({"rounds": "two"}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"base": {"model": None, "identity": {"x": 1}}}, "which model"),
    ],
)
def test_bad_plans_are_refused_in_one_line(
    scored: pipeline.ScoreRun, compress: Compress, changes: dict[str, Any], says: str
) -> None:
    document = dry(compress, scored, "--ratio", "0.2")
    Path("bad.json").write_text(json.dumps(edited(document, **changes)))
    said = compress("prune", "--plan", "bad.json", "-q")
    assert said.code == 2, said.err
    assert says in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not list(Path("runs").glob("**/plan.json"))


def test_a_plan_for_other_weights(scored: pipeline.ScoreRun, compress: Compress, models: dict[str, str]) -> None:
    Path("plan.json").write_text(json.dumps(dry(compress, scored)))
    said = compress("prune", "--plan", "plan.json", "--model", models["other"], "-q")
    assert (said.code, "another model" in said.err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--ratio", "0.2"),
        ("--target-flops", "0.8"),
        ("--criterion", "loo"),
        ("--structures", "heads"),
        ("--unit", "query"),
        ("--scope", "layer"),
        ("--align", "4"),
        ("--deployable",),
        ("--allow-empty",),
    ],
)
def test_a_plan_and_a_rule_are_one_too_many(compress: Compress, words: Sequence[str]) -> None:
    said = compress("prune", "--plan", "plan.json", *words, "-q")
    assert said.code == 2
    assert "a plan says what leaves" in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"plan": 3}'])
def test_files_that_are_no_plans(compress: Compress, content: str) -> None:
    Path("bad.json").write_text(content)
    said = compress("prune", "--plan", "bad.json", "-q")
    assert (said.code, len(said.err.strip().splitlines())) == (2, 1)
    assert compress("prune", "--plan", "nowhere.json", "-q").code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--target-flops", "1"), "target_flops is 1; expected"),
        (("--target-params", "0"), "target_params is 0; expected"),
        (("--target-latency", "nan"), "target_latency is nan; expected"),
        (("--target-flops", "0.8", "--ratio", "0.2"), "ratio and target_flops both say"),
        (("--target-flops", "0.8", "--target-params", "0.8"), "target_flops and target_params both say"),
        (("--structures", "neurons"), "structures names 'neurons'"),
        (("--structures", "heads,heads"), "names one twice"),
        (("--align", "0"), "align is 0; expected 1 or more"),
        (("--deployable", "--scope", "global"), "leave out one"),
        (("--target-flops", "0.01"), "is the least"),
        (("--criterion", "entropy", "--structures", "channels"), "says nothing of channels"),
    ],
)
def test_budgets_out_of_bounds(scored: pipeline.ScoreRun, compress: Compress, words: Sequence[str], says: str) -> None:
    said = compress("prune", "--scores", scored.directory, *words, "-q")
    assert said.code == 2
    assert says in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_no_repair_is_made_for_a_plan_that_cannot_be_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights stay as they were, down to the last bit."""
    model = tiny_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refuse(*args: Any, **settings: Any) -> None:
        raise PlanError("cannot leave")

    monkeypatch.setattr("compressor.mlp.surgery._try", refuse)
    plan = PruningPlan({0: (1,)}, "x", 0.2, "layer", (4, 4), channels={0: (1,)}, channels_per_layer=(128, 128))
    for text in ([], None):
        with pytest.raises(CompressorError, match="cannot leave"):
            removal.remove(model, "causal", plan, text)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

"""Intervals of differences between models: the loop written out, coverage of what is known, what stays undecided."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor.comparison import summarise
from compressor.game.resampling import draw_examples
from compressor.measure import DocumentLosses
from compressor.paired import RESAMPLES, PairedBootstrap, undecided
from tests.conftest import Outcome


def losses_of(nll: np.ndarray, tokens: np.ndarray) -> DocumentLosses:
    return DocumentLosses(torch.from_numpy(nll), torch.from_numpy(tokens))


def some(documents: int = 30, seed: int = 0, rise: float = 0.1) -> dict[str, DocumentLosses]:
    """Documents of unequal lengths and difficulties, and a model that is a little worse on most of them."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 200, documents)
    dense = tokens * generator.gamma(4, 0.5, documents)
    pruned = dense + tokens * generator.normal(rise, 0.1, documents)
    return {"dense": losses_of(dense, tokens), "pruned": losses_of(pruned, tokens)}


def test_the_interval_is_that_of_a_loop_over_documents() -> None:
    """Every resample written out: its documents one by one, two perplexities, their ratio; the quantiles by sorting."""
    losses = some()
    ratios = []
    for draw in draw_examples(30, RESAMPLES, seed=5):
        drawn = [document for document in range(30) for _ in range(draw[document])]
        perplexities = {
            name: math.exp(sum(float(own.nll[one]) for one in drawn) / sum(int(own.tokens[one]) for one in drawn))
            for name, own in losses.items()
        }
        ratios.append(perplexities["pruned"] / perplexities["dense"] - 1)
    ratios.sort()
    found = PairedBootstrap(losses, seed=5)
    told = found.interval("pruned", "dense")
    assert told is not None
    assert told["level"] == 0.95
    for name, share in (("low", 0.025), ("high", 0.975)):
        place = share * (RESAMPLES - 1)
        below = math.floor(place)
        assert ratios[below] - 1e-12 <= told[name] <= ratios[below + 1] + 1e-12
        mixed = (below + 1 - place) * ratios[below] + (place - below) * ratios[below + 1]
        assert told[name] == pytest.approx(mixed, rel=1e-4)
    whole = losses["pruned"].perplexity / losses["dense"].perplexity - 1
    assert found.change("pruned", "dense") == pytest.approx(whole, rel=1e-12)
    assert told["low"] < whole < told["high"]


def test_it_covers_what_is_true_about_as_often_as_it_says() -> None:
    """True change of perplexity: the limit of the ratio of sums, known because the text is drawn by a known rule."""
    rise, trials, hits = 0.1, 250, 0
    truth = math.expm1(rise)
    for trial in range(trials):
        told = PairedBootstrap(some(60, seed=trial, rise=rise), seed=trial).interval("pruned", "dense")
        assert told is not None
        hits += told["low"] <= truth <= told["high"]
    assert 0.90 <= hits / trials <= 0.985  # 95 % give or take 3 standard errors, a little less for few documents


def test_pairing_sees_what_either_interval_hides() -> None:
    """Documents differ by far more than models; a constant rise over all of them has no uncertainty at all."""
    tokens = np.arange(10, 50)
    dense = tokens * np.linspace(1, 6, 40)
    losses = {"dense": losses_of(dense, tokens), "pruned": losses_of(dense + 0.01 * tokens, tokens)}
    told = PairedBootstrap(losses).interval("pruned", "dense")
    assert told is not None
    assert told["low"] == pytest.approx(math.expm1(0.01), rel=1e-9)
    assert told["high"] == pytest.approx(math.expm1(0.01), rel=1e-9)


def test_turned_round_it_is_the_same_interval() -> None:
    found = PairedBootstrap(some())
    there, back = found.interval("pruned", "dense"), found.interval("dense", "pruned")
    assert there is not None
    assert back is not None
    assert 1 + back["low"] == pytest.approx(1 / (1 + there["high"]), rel=1e-12)
    assert 1 + back["high"] == pytest.approx(1 / (1 + there["low"]), rel=1e-12)


def test_documents_without_a_predicted_token_change_nothing() -> None:
    losses = some()
    longer = {
        name: losses_of(np.append(own.nll.numpy(), 0.0), np.append(own.tokens.numpy(), 0))
        for name, own in losses.items()
    }
    assert PairedBootstrap(longer).interval("pruned", "dense") == PairedBootstrap(losses).interval("pruned", "dense")


def test_a_single_document_decides_nothing() -> None:
    losses = some(documents=1)
    assert PairedBootstrap(losses).interval("pruned", "dense") is None
    assert undecided(None)


def test_other_tokens_cannot_be_compared() -> None:
    losses = some()
    other = losses_of(losses["dense"].nll.numpy(), losses["dense"].tokens.numpy() + 1)
    with pytest.raises(ValueError, match="other was measured on other documents or tokens than dense"):
        PairedBootstrap({**losses, "other": other})


def test_a_broken_model_has_a_finite_interval() -> None:
    tokens = np.full(5, 2)
    losses = {"dense": losses_of(np.ones(5), tokens), "broken": losses_of(np.array([9e3, 0, 0, 0, 0]), tokens)}
    told = PairedBootstrap(losses).interval("broken", "dense")
    assert told is not None
    assert told["low"] == pytest.approx(math.expm1(-0.5))
    assert math.isfinite(told["high"])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.1, 0.1, True), (0.01, 0.02, False), (-0.2, -0.1, False), (0.0, 0.1, True), (3e-8, 5e-8, True)],
)
def test_undecided_where_the_interval_holds_nought(low: float, high: float, expected: bool) -> None:
    assert undecided({"low": low, "high": high}) is expected


def summary_of(shifts: dict[str, float], kinds: dict[str, str], noise: float = 0.02) -> tuple[dict[str, Any], Any]:
    """A summary of models whose losses differ from the dense one's by a shift and by noise of the documents."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(50, 150, 200)
    dense = tokens * generator.gamma(4, 0.5, 200)
    losses = {"dense": losses_of(dense, tokens)}
    for name, shift in shifts.items():
        losses[name] = losses_of(dense + tokens * (shift + generator.normal(0, noise, 200)), tokens)
    rows = [
        {"name": name, "kind": kinds.get(name, "rival"), "perplexity": own.perplexity} for name, own in losses.items()
    ]
    return summarise(rows, losses, "ours", seed=3), losses


def test_the_verdict_says_what_is_not_told_apart() -> None:
    kinds = {"dense": "dense", "ours": "pruned"}
    summary, losses = summary_of({"ours": 0.1, "near": 0.1005, "far": 0.15, "better": 0.05}, kinds)
    paired = PairedBootstrap({name: losses[name] for name in losses}, seed=3)
    differences = summary["differences"]
    assert (differences["reference"], differences["level"]) == ("ours", 0.95)
    assert set(differences["against"]) == {"dense", "near", "far", "better"}
    for name, found in differences["against"].items():
        assert found["change"] == pytest.approx(losses["ours"].perplexity / losses[name].perplexity - 1, rel=1e-12)
        assert found == {**(paired.interval("ours", name) or {}), "change": found["change"]}
    verdict = summary["verdict"]
    assert verdict.count("not told apart") == 1
    assert verdict.index("near") < verdict.index("not told apart from ours") < verdict.index("far")
    harmless = summary_of({"ours": 0.0, "far": 0.15}, kinds)[0]["verdict"]
    assert "ours (" in harmless
    assert harmless.count("not told apart from dense") == 1


def test_the_rank_among_random_draws_is_told() -> None:
    draws = {f"random (seed {seed})": 0.1 * seed for seed in range(1, 6)}
    kinds = {"dense": "dense", "ours": "pruned", **dict.fromkeys(draws, "random")}
    summary, _ = summary_of({"ours": 0.25, "best": 0.01, "worst": 0.9, "same": 0.3, **draws}, kinds, noise=0.0)
    random = summary["random"]
    assert random["draws_beaten"] == {"ours": 3, "best": 5, "worst": 0, "same": 2}  # a draw of the same heads is not
    assert random["best_draw_beaten_by"] == ["best"]
    assert summary["verdict"].endswith("; ours beats 3 of the 5 random draws")


def test_without_a_reference_nothing_is_compared() -> None:
    losses = some()
    rows = [{"name": name, "kind": name, "perplexity": own.perplexity} for name, own in losses.items()]
    summary = summarise(rows, losses, None)
    assert summary["differences"] is None
    assert summary["random"] is None
    assert "told apart" not in summary["verdict"]


def test_bench_prints_what_its_json_says(
    compress: Callable[..., Outcome],
    models: dict[str, str],
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    scores = compressor.score(model=models["gpt2"], data=texts, output_dir="scores").directory
    pruned = compressor.prune(scores=scores, export=True, output_dir="pruned").checkpoint
    given = ("bench", "--against", pruned, "--scores", scores, "--data", texts, "--repeats", 1)
    given += ("--prompt-length", 6, "--new-tokens", 3, "--random-seeds", 3)
    document = compress(*given, "--json").json
    shown = compress(*given).out
    assert document["rows"][0]["perplexity_change_interval"] is None
    reference = document["rows"][1]["name"]
    assert document["differences"]["reference"] == reference
    assert f"{reference} over it" in shown
    assert document["verdict"] in shown
    assert f"beats {document['random']['draws_beaten'][reference]} of the 3 random draws" in shown
    for row in document["rows"][1:]:
        found = {"change": row["perplexity_change"], **row["perplexity_change_interval"]}
        assert found["low"] <= found["change"] <= found["high"]
        told = [found] if row["name"] == reference else [found, document["differences"]["against"][row["name"]]]
        for each in told if row["kind"] != "random" else ():
            assert f"{each['change']:+.1%} [{each['low']:+.1%}, {each['high']:+.1%}]" in shown

"""The verbs as functions: what they write, from what, and that every measured number is what a plain loop measures."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedModel

import compressor
from compressor import pipeline
from compressor.data import TextDataModule
from compressor.errors import ArtefactError, CompressorError, DataError
from compressor.loading import load_model
from tests.conftest import CONTEXT, WORDS, Outcome, save_tiny, snapshot, tiny_model, tiny_tokenizer, write_documents

Compress = Callable[..., Outcome]
QUICK: dict[str, Any] = {"repeats": 1, "prompt_length": 6, "new_tokens": 3}
RESULT_FILES = {"recipe.yaml", "run.json"}


def documents(folder: str, split: str) -> list[str]:
    return [json.loads(line)["text"] for line in (Path(folder) / f"{split}.jsonl").read_text().splitlines()]


def plain_nll(model: PreTrainedModel, kind: str, texts: Sequence[str], context: int = CONTEXT) -> tuple[float, int]:
    """Sum of negative log-likelihoods and tokens: one document at a time, no padding, no Lightning, float64 sums."""
    tokenizer = tiny_tokenizer(kind)
    total, count = 0.0, 0
    for text in texts:
        ids = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        for start in range(0, len(ids), context - 1):
            window = [tokenizer.bos_token_id, *ids[start : start + context - 1]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window])).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1)[range(len(window) - 1), window[1:]].sum())
            count += len(window) - 1
    return total, count


def plain_perplexity(model: PreTrainedModel, kind: str, texts: Sequence[str], context: int = CONTEXT) -> float:
    total, count = plain_nll(model, kind, texts, context)
    return math.exp(total / count)


def muted(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """The dense tiny GPT-2 with some heads' outputs zeroed before the output projection."""
    for layer, gone in heads.items():

        def zero(_: Any, args: tuple[torch.Tensor], gone: Sequence[int] = tuple(gone)) -> tuple[torch.Tensor]:
            states = args[0].clone()
            for head in gone:
                states[..., 8 * head : 8 * head + 8] = 0
            return (states,)

        model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(zero)
    return model


@pytest.fixture
def scored(here: Path, models: dict[str, str], texts: str) -> pipeline.ScoreRun:
    return compressor.score(model=models["gpt2"], data=texts, output_dir="scores")


def set_scores(folder: Path, field: str, values: Sequence[Sequence[float]]) -> None:
    """Overwrite one field of a score run."""
    tensors = load_file(folder / "scores.safetensors")
    for layer, numbers in enumerate(values):
        tensors[f"layers.{layer}.{field}"] = torch.tensor(numbers, dtype=torch.float64)
    save_file(tensors, folder / "scores.safetensors")


# --- score ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_the_same_inputs_give_the_same_bytes(here: Path, models: dict[str, str], texts: str, kind: str) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name) + ord(name))  # of no concern to a scoring run
        random.seed(ord(name))
        compressor.score(model=models[kind], data=texts, output_dir=name, triple_layers=[0, 1])
    for file in ("scores.json", "scores.safetensors", "recipe.yaml"):
        assert (here / "a" / file).read_bytes() == (here / "b" / file).read_bytes()
    assert {file.name for file in (here / "a").iterdir()} == {"scores.json", "scores.safetensors", *RESULT_FILES}


def test_wall_time_and_host_go_to_run_json_only(scored: pipeline.ScoreRun) -> None:
    run = json.loads((scored.directory / "run.json").read_text())
    assert {"verb", "model", "started", "seconds", "finished", "machine"} <= run.keys()
    assert (run["verb"], run["machine"]["device"]) == ("score", "cpu")
    assert run["machine"]["torch_threads"] == torch.get_num_threads()
    facts = json.loads((scored.directory / "scores.json").read_text())
    names = {name.lower() for name in (*facts, *facts["settings"], *facts["data"])}
    assert not names & {"started", "seconds", "finished", "machine", "host", "time", "date", "device"}


def test_batches_do_not_change_what_is_counted(here: Path, models: dict[str, str], texts: str) -> None:
    one = compressor.score(model=models["gpt2"], data=texts, batch_size=1)
    many = compressor.score(model=models["gpt2"], data=texts, batch_size=7)
    for left, right in zip(one.scores.layers, many.scores.layers, strict=True):
        assert left.observations == right.observations
        torch.testing.assert_close(left.first_key_mass, right.first_key_mass, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(left.phi, right.phi, rtol=1e-2, atol=1e-2)  # an argmax may tip


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_scores_are_what_the_attention_matrices_say(here: Path, models: dict[str, str], texts: str, kind: str) -> None:
    """Entropies by plain counting over transformers' own eager attention matrices, one document at a time."""
    run = compressor.score(model=models[kind], data=texts, samples=0, batch_size=5)
    data = TextDataModule(
        tiny_tokenizer(kind), task="masked" if kind == "bert" else "causal", data=texts, samples=0, max_length=CONTEXT
    )
    data.setup()
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    keys: list[list[torch.Tensor]] = [[], []]
    mass: list[list[torch.Tensor]] = [[], []]
    for window in data.calibration.input_ids:
        with torch.no_grad():
            for layer, weights in enumerate(
                model.base_model(input_ids=window[None], output_attentions=True).attentions
            ):
                keys[layer].append(weights[0].argmax(-1).T)
                mass[layer].append(weights[0, :, :, 0].T)
    for layer in (0, 1):
        symbols = torch.cat(keys[layer]).tolist()
        total = len(symbols)

        def entropy(*heads: int, symbols: list[list[int]] = symbols, total: int = total) -> float:
            counts: dict[tuple[int, ...], int] = {}
            for row in symbols:
                key = tuple(row[head] for head in heads)
                counts[key] = counts.get(key, 0) + 1
            return -sum(count / total * math.log(count / total) for count in counts.values())

        heads = range(len(symbols[0]))
        found = run.scores.layers[layer]
        assert found.observations == total
        assert found.entropy.tolist() == pytest.approx([entropy(i) for i in heads], abs=1e-9)
        expected = [
            entropy(i) + sum(entropy(i) + entropy(j) - entropy(i, j) for j in heads if j != i) / 2 for i in heads
        ]
        assert found.phi.tolist() == pytest.approx(expected, abs=1e-9)
        assert found.first_key_mass.tolist() == pytest.approx(torch.cat(mass[layer]).mean(0).tolist(), abs=1e-5)
        if layer == 0:
            triples = [
                -(entropy(i) + entropy(j) + entropy(k))
                + (entropy(i, j) + entropy(i, k) + entropy(j, k))
                - entropy(i, j, k)
                for i, j, k in itertools.combinations(heads, 3)
            ]
            assert found.dividends["3"].tolist() == pytest.approx(triples, abs=1e-9)
        else:
            assert not found.dividends


def test_the_facts_tell_what_was_counted(scored: pipeline.ScoreRun, models: dict[str, str], texts: str) -> None:
    facts = scored.scores.facts
    train = documents(texts, "train")
    assert facts["data"]["documents"] == len(train)
    assert facts["data"]["tokens"] == sum(len(text.split()) for text in train)
    assert scored.scores.layers[0].observations == facts["data"]["tokens"] + len(train)  # each document's BOS
    assert facts["model"] == models["gpt2"]
    assert facts["identity"] == load_model(models["gpt2"]).identity
    assert facts["settings"] | {"symbol": "key", "estimator": "plug-in", "unit": "nats"} == facts["settings"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["seed"] == 0


def test_other_seeds_choose_other_documents(here: Path, models: dict[str, str], texts: str) -> None:
    prints = {
        compressor.score(model=models["gpt2"], data=texts, samples=6, seed=seed).scores.facts["data"]["fingerprint"]
        for seed in (0, 1, 2)
    }
    assert len(prints) == 3


def test_scoring_leaves_the_model_as_it_was(here: Path, models: dict[str, str], texts: str) -> None:
    from compressor.config import Recipe
    from compressor.scoring import score_model

    loaded = load_model(models["gpt2"])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
    implementation = loaded.model.config._attn_implementation
    score_model(loaded, Recipe(model=models["gpt2"], data=texts))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    assert loaded.model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


# --- settings -------------------------------------------------------------------------------------------------------


def test_defaults_then_yaml_then_flags_through_the_command_line(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    recipe = {"model": models["gpt2"], "data": texts, "samples": 5, "batch_size": 2, "symbol": "offset"}
    (here / "r.yaml").write_text(yaml.safe_dump(recipe))
    document = compress("score", "-c", "r.yaml", "--samples", 9, "--json").json
    settings = document["facts"]["settings"]
    assert (settings["samples"], settings["batch_size"], settings["symbol"]) == (9, 2, "offset")
    assert document["facts"]["data"]["documents"] == 9
    assert settings["part"] == "both"  # the default
    saved = yaml.safe_load((here / "runs" / "gpt2" / "score" / "recipe.yaml").read_text())
    assert {name: saved[name] for name in recipe} == {**recipe, "samples": 9}
    assert saved["ratio"] == 0.2


def test_a_saved_recipe_runs_to_the_same_bytes(here: Path, models: dict[str, str], texts: str) -> None:
    settings: dict[str, Any] = {"model": models["gpt2"], "data": texts, "samples": 9, "seed": 3, "triple_layers": [1]}
    compressor.score(**settings, symbol="offset", output_dir="first")
    compressor.score(config="first/recipe.yaml", output_dir="second")
    compressor.prune(scores="first", ratio=0.6, criterion="entropy", export=True, output_dir="p1")
    compressor.prune(config="p1/recipe.yaml", scores="second", export=True, output_dir="p2")
    for one, two in (("first", "second"), ("p1", "p2")):
        names = {name: content for name, content in snapshot(here / one).items() if name != "run.json"}
        assert {name: content for name, content in snapshot(here / two).items() if name != "run.json"} == names


def test_every_result_has_its_recipe(here: Path, models: dict[str, str], texts: str) -> None:
    whole = compressor.run(model=models["gpt2"], data=texts, random_seeds=2, ratio=0.3, **QUICK)
    for folder in ("", "scores", "pruned", "bench"):
        saved = yaml.safe_load((whole.directory / folder / "recipe.yaml").read_text())
        assert (saved["model"], saved["ratio"], saved["prompt_length"]) == (models["gpt2"], 0.3, 6)
    verbs = [
        json.loads((whole.directory / folder / "run.json").read_text())["verb"]
        for folder in ("", "scores", "pruned", "bench")
    ]
    assert verbs == ["run", "score", "prune", "bench"]


# --- prune ----------------------------------------------------------------------------------------------------------


def test_prune_takes_up_the_newest_score_run_and_says_so(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    """Newest by the time it finished; not by name, and not by the directory's own time stamps."""
    for name in ("z-first", "a-second"):
        compressor.score(model=models["gpt2"], data=texts, output_dir=here / "runs" / "gpt2" / name)
    os.utime(here / "runs" / "gpt2" / "z-first")
    outcome = compress("prune")
    assert outcome.code == 0
    assert "newest score run" in outcome.err
    assert "runs/gpt2/a-second" in outcome.err
    later = here / "runs" / "gpt2" / "z-first" / "run.json"
    facts = json.loads(later.read_text())
    later.write_text(json.dumps({**facts, "finished": facts["finished"] + 10**15}))
    assert "runs/gpt2/z-first" in compress("prune").err


def test_default_directories_count_up_and_the_last_one_is_the_newest(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    for _ in range(11):
        compressor.score(model=models["gpt2"], data=texts, samples=2)
    names = {"score", *(f"score-{number}" for number in range(2, 12))}
    assert {folder.name for folder in (here / "runs" / "gpt2").iterdir()} == names
    assert "runs/gpt2/score-11" in compress("prune", "--dry-run").err


def test_prune_takes_the_newest_of_the_model_that_is_named(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    compressor.score(model=models["other"], data=texts)
    assert "runs/other/score" in compress("prune").err
    outcome = compress("prune", "--model", models["gpt2"])
    assert outcome.code == 0
    assert "runs/gpt2/score" in outcome.err


def test_unfinished_and_foreign_directories_are_no_score_runs(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    good = here / "runs" / "gpt2" / "score"
    for name in (".score-2.partial-x", "deep/.hidden/score"):
        copy = Path(shutil.copytree(good, here / "runs" / "gpt2" / name))
        facts = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps({**facts, "finished": facts["finished"] + 10**18}))
    shutil.copytree(good, here / "runs" / "gpt2" / "unmarked")
    (here / "runs" / "gpt2" / "unmarked" / "run.json").unlink()
    (here / "runs" / "gpt2" / "foreign").mkdir()
    (here / "runs" / "gpt2" / "foreign" / "run.json").write_text('{"laps": 12}')
    outcome = compress("prune", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "newest score run, runs/gpt2/score\n" in outcome.err


@pytest.mark.parametrize("content", ["{", "[]", '{"verb": "score"}', '{"verb": "score", "finished": "soon"}'])
def test_a_damaged_run_json_elsewhere_is_no_reason_to_fail(
    compress: Compress, here: Path, models: dict[str, str], texts: str, content: str
) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    (here / "runs" / "odd").mkdir()
    (here / "runs" / "odd" / "run.json").write_text(content)
    outcome = compress("prune", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "runs/gpt2/score" in outcome.err


def test_prune_by_a_directory_of_scores(compress: Compress, here: Path, models: dict[str, str], texts: str) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    compressor.score(model=models["gpt2"], data=texts, samples=4, output_dir="mine")
    set_scores(here / "mine", "phi", [[3, 2, 1, 0], [0, 1, 2, 3]])
    outcome = compress("prune", "--scores", "mine", "--criterion", "gt-fep", "--json")
    assert outcome.json["plan"]["heads"] == {"0": [3], "1": [0]}
    assert "newest" not in outcome.err


def test_prune_without_scores_scores_first(compress: Compress, here: Path, models: dict[str, str], texts: str) -> None:
    compressor.score(model=models["other"], data=texts)
    outcome = compress("prune", "--model", models["gpt2"], "--data", texts, "--samples", 5, "--export")
    assert outcome.code == 0, outcome.err
    assert "scoring first" in outcome.err
    facts = json.loads((here / "runs" / "gpt2" / "score" / "scores.json").read_text())
    assert facts["settings"]["samples"] == 5
    assert (here / "runs" / "gpt2" / "prune" / "checkpoint").is_dir()


def test_prune_loads_the_model_for_the_task_it_was_scored_for(here: Path, texts: str) -> None:
    """A BERT that may decode does both; left to its config it would be the causal one."""
    model = tiny_model("bert")
    model.config.is_decoder = True
    model.config.architectures = ["BertLMHeadModel"]
    model.save_pretrained("both")
    config = json.loads(Path("both/config.json").read_text())
    Path("both/config.json").write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}))
    tiny_tokenizer("bert").save_pretrained("both")
    assert load_model("both").task == "causal"
    scored = compressor.score(model="both", data=texts, task="masked", samples=4)
    assert scored.scores.facts["task"] == "masked"
    assert compressor.prune(criterion="gt-fep", scores=scored.directory).document["base"]["task"] == "masked"


def test_a_dry_run_writes_nothing(compress: Compress, here: Path, models: dict[str, str], texts: str) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    before = snapshot(here)
    outcome = compress("prune", "--dry-run", "--export", "--json", "-o", "out")
    assert outcome.code == 0
    assert (outcome.json["directory"], outcome.json["checkpoint"]) == (None, None)
    assert outcome.json["plan"]["removed_heads"] == 2
    assert snapshot(here) == before
    assert compress("prune", "-o", "out", "--json").json["plan"] == outcome.json["plan"]


def test_a_dry_run_without_scores_writes_nothing_either(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compress("prune", "--dry-run", "--model", models["gpt2"], "--data", texts)
    assert snapshot(here) == {}


@pytest.mark.parametrize(
    ("criterion", "field", "sign"),
    [
        ("gt-fep", "phi", 1),
        ("entropy", "entropy", 1),
        ("bos-sink", "first_key_mass", -1),
        ("magnitude", "output_norm", 1),
    ],
)
def test_each_criterion_removes_the_lowest_of_its_own_numbers(
    here: Path, scored: pipeline.ScoreRun, criterion: str, field: str, sign: int
) -> None:
    values = [[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]]
    set_scores(scored.directory, field, values)
    plan = compressor.prune(scores=scored.directory, criterion=criterion, ratio=0.5, dry_run=True).plan
    expected = {
        layer: tuple(sorted(sorted(range(4), key=lambda head: sign * row[head])[:2]))
        for layer, row in enumerate(values)
    }
    assert dict(plan.heads) == expected


@pytest.mark.parametrize(("ratio", "gone"), [(0.05, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.99, 3)])
def test_heads_per_layer_are_rounded_up_and_one_stays(
    here: Path, scored: pipeline.ScoreRun, ratio: float, gone: int
) -> None:
    run = compressor.prune(criterion="gt-fep", scores=scored.directory, ratio=ratio)
    assert [len(heads) for heads in run.plan.heads.values()] == [gone, gone]
    assert run.document["costs"]["pruned"]["heads"] == [4 - gone, 4 - gone]


def test_an_emptied_layer_on_request(here: Path, scored: pipeline.ScoreRun) -> None:
    set_scores(scored.directory, "phi", [[1, 2, 3, 4], [11, 12, 13, 14]])
    with pytest.raises(CompressorError):
        compressor.prune(criterion="gt-fep", scores=scored.directory, scope="global", ratio=0.9)
    run = compressor.prune(
        criterion="gt-fep",
        scores=scored.directory,
        scope="global",
        ratio=0.5,
        allow_empty=True,
        repair=False,
        export=True,
    )
    assert dict(run.plan.heads) == {0: (0, 1, 2, 3)}
    assert run.checkpoint is not None
    again = compressor.load(run.checkpoint)
    twin = muted(tiny_model("gpt2"), {0: range(4)})
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, twin(input_ids=ids).logits)
    # and such a checkpoint goes through the whole line itself
    whole = compressor.run(model=str(run.checkpoint), data=documents_folder(scored), random_seeds=2, **QUICK)
    assert whole.prune.plan.heads_per_layer == (0, 4)


def documents_folder(scored: pipeline.ScoreRun) -> str:
    return str(yaml.safe_load((scored.directory / "recipe.yaml").read_text())["data"])


def test_the_costs_are_those_of_the_models(here: Path, scored: pipeline.ScoreRun) -> None:
    """One head of four in either layer: 3·32·8 weights and 3·8 biases in, 8·32 weights out."""
    costs = compressor.prune(criterion="gt-fep", scores=scored.directory, ratio=0.2).document["costs"]
    assert costs["dense"]["parameters"] == sum(parameter.numel() for parameter in tiny_model("gpt2").parameters())
    assert costs["dense"]["parameters"] - costs["pruned"]["parameters"] == 2 * (3 * 32 * 8 + 3 * 8 + 8 * 32)
    assert costs["dense"]["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4
    assert costs["pruned"]["kv_cache_bytes_per_token"] == 2 * 2 * 24 * 4
    tokens = costs["dense"]["length"]
    assert tokens == CONTEXT
    for name, heads in (("dense", 4), ("pruned", 3)):
        width = 8 * heads
        assert costs[name]["macs"]["attention"] == 2 * (
            tokens * 32 * 3 * width + 2 * tokens**2 * width + tokens * width * 32
        )
        assert costs[name]["macs"]["lm_head"] == tokens * 32 * len(tiny_tokenizer("gpt2"))
        assert costs[name]["macs"]["mlp"] == 2 * tokens * 2 * 32 * 128


def test_the_random_criterion_has_its_own_seed(here: Path, scored: pipeline.ScoreRun) -> None:
    def plan(seed: int) -> Any:
        return compressor.prune(scores=scored.directory, criterion="random", ratio=0.4, seed=seed, dry_run=True).plan

    assert plan(1) == plan(1)
    assert len({tuple(sorted(plan(seed).heads.items())) for seed in range(12)}) > 4
    assert plan(3).seed == 3


# --- bench ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(here: Path, scored: pipeline.ScoreRun) -> Path:
    run = compressor.prune(
        criterion="gt-fep", scores=scored.directory, ratio=0.3, repair=False, export=True, output_dir="pruned"
    )
    assert run.checkpoint is not None
    return run.checkpoint


def test_perplexity_is_that_of_a_plain_loop(
    here: Path, checkpoint: Path, scored: pipeline.ScoreRun, texts: str
) -> None:
    """For the dense model, the checkpoint, the other criteria (as masked twins) and the random draws."""
    document = compressor.bench(
        against=[checkpoint], scores=scored.directory, data=texts, eval_samples=0, random_seeds=4, batch_size=5, **QUICK
    ).document
    held_out = documents(texts, "test")
    rows = {row["name"]: row for row in document["rows"]}
    assert document["data"]["documents"] == len(held_out)
    assert document["data"]["tokens"] == sum(len(text.split()) for text in held_out)
    dense = plain_perplexity(tiny_model("gpt2"), "gpt2", held_out)
    assert rows["dense"]["perplexity"] == pytest.approx(dense, rel=1e-5)
    pruned = plain_perplexity(compressor.load(checkpoint), "gpt2", held_out)
    assert rows["gt-fep 4/8"]["perplexity"] == pytest.approx(pruned, rel=1e-5)
    for rival in ("entropy", "bos-sink", "magnitude"):
        plan = compressor.prune(scores=scored.directory, criterion=rival, ratio=0.3, dry_run=True).plan
        twin = plain_perplexity(muted(tiny_model("gpt2"), plan.heads), "gpt2", held_out)
        assert rows[rival]["perplexity"] == pytest.approx(twin, rel=1e-5)
    pairs = list(itertools.combinations(range(4), 2))
    every = [
        plain_perplexity(muted(tiny_model("gpt2"), {0: first, 1: second}), "gpt2", held_out)
        for first, second in itertools.product(pairs, pairs)
    ]
    draws = [row for row in document["rows"] if row["kind"] == "random"]
    assert [row["name"] for row in draws] == [f"random (seed {seed})" for seed in range(4)]
    for row in draws:  # each is one of the 36 ways to remove two heads of four from either layer
        assert any(row["perplexity"] == pytest.approx(one, rel=1e-5) for one in every)
    assert len({round(row["perplexity"], 6) for row in draws}) > 1
    for row in document["rows"]:
        assert row["perplexity_change"] == pytest.approx(row["perplexity"] / dense - 1, abs=1e-4)


def test_the_random_rows_are_summed_up_truly(here: Path, checkpoint: Path, texts: str) -> None:
    document = compressor.bench(against=[checkpoint], data=texts, random_seeds=5, seed=7, **QUICK).document
    draws = [row["perplexity"] for row in document["rows"] if row["kind"] == "random"]
    assert len(draws) == 5
    mean = sum(draws) / 5
    sd = math.sqrt(sum((draw - mean) ** 2 for draw in draws) / 4)
    assert document["random"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert document["random"]["sd"] == pytest.approx(sd, rel=1e-9)
    assert (document["random"]["min"], document["random"]["max"]) == (min(draws), max(draws))
    assert document["random"]["draws"] == 5
    assert [row["name"] for row in document["rows"]][-5:] == [f"random (seed {seed})" for seed in range(7, 12)]
    for row in document["rows"]:
        if row["kind"] != "dense":  # every contender lost as much
            assert sum(row["costs"]["heads"]) == 4
            assert row["costs"]["macs"] == document["rows"][1]["costs"]["macs"]


def test_documents_longer_than_the_context(here: Path, models: dict[str, str], tmp_path: Path) -> None:
    """Every token is predicted once, from its own window."""
    write_documents(tmp_path / "long.jsonl", 6, seed=4, longest=70)
    write_documents(tmp_path / "train.jsonl", 6, seed=5)
    held_out = [json.loads(line)["text"] for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    assert max(len(text.split()) for text in held_out) > CONTEXT
    document = compressor.bench(
        model=models["gpt2"],
        against=[models["other"]],
        data=str(tmp_path / "train.jsonl"),
        eval_data=str(tmp_path / "long.jsonl"),
        eval_samples=0,
        **QUICK,
    ).document
    file = [json.loads(line)["text"] for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    used = file if document["data"]["documents"] == len(file) else []
    assert used
    expected = plain_perplexity(tiny_model("gpt2"), "gpt2", used)
    assert document["rows"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    other = plain_perplexity(tiny_model("gpt2", seed=1), "gpt2", used)
    assert document["rows"][1]["perplexity"] == pytest.approx(other, rel=1e-5)


def test_pseudo_perplexity_is_that_of_a_plain_loop(here: Path, models: dict[str, str], texts: str) -> None:
    whole = compressor.run(model=models["bert"], data=texts, eval_samples=0, batch_size=5, random_seeds=2, **QUICK)
    data = TextDataModule(
        tiny_tokenizer("bert"), task="masked", data=texts, eval_samples=0, batch_size=1, max_length=CONTEXT
    )
    data.setup()
    assert whole.prune.checkpoint is not None
    for row, model in ((0, tiny_model("bert")), (1, compressor.load(whole.prune.checkpoint))):
        total, count = 0.0, 0
        for batch in data.test_dataloader():
            assert bool(batch["attention_mask"].all())  # no padding
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"]).logits[0].double()
            total += float(functional.cross_entropy(logits, batch["labels"][0], ignore_index=-100, reduction="sum"))
            count += int((batch["labels"] != -100).sum())
        assert count > 20
        found = whole.bench.document["rows"][row]["perplexity"]
        assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    for row in whole.bench.document["rows"]:
        assert row["costs"]["kv_cache_bytes_per_token"] is None
        assert "decode" not in (row["throughput"] or {})
    assert whole.bench.document["task"] == "masked"


def test_who_is_timed_and_in_which_words(here: Path, checkpoint: Path, scored: pipeline.ScoreRun, texts: str) -> None:
    document = compressor.bench(
        against=[checkpoint],
        scores=scored.directory,
        data=texts,
        random_seeds=2,
        repeats=3,
        prompt_length=6,
        new_tokens=3,
    ).document
    for row in document["rows"]:
        if row["kind"] in ("rival", "random"):
            assert row["throughput"] is None
            continue
        assert set(row["throughput"]) == {"prefill", "decode"}
        for phase in row["throughput"].values():
            assert set(phase) == {"tokens_per_second", "speedup"}
            for summary in phase.values():
                assert len(summary["values"]) == 3
                assert summary["median"] == statistics.median(summary["values"])
                assert (summary["min"], summary["max"]) == (min(summary["values"]), max(summary["values"]))
                assert summary["min"] > 0
    dense, pruned = (row["throughput"] for row in document["rows"][:2])
    for phase in ("prefill", "decode"):
        assert list(dense[phase]["speedup"]["values"]) == [1.0, 1.0, 1.0]
        speeds = [timed[phase]["tokens_per_second"]["values"] for timed in (pruned, dense)]
        assert list(pruned[phase]["speedup"]["values"]) == pytest.approx([a / b for a, b in zip(*speeds, strict=True)])


def sampled_from(model: PreTrainedModel, path: Path, count: int, length: int) -> None:
    """Documents drawn from a model itself: nothing predicts them better on average."""
    tokenizer = tiny_tokenizer("gpt2")
    words = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in WORDS])
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones(count, 1, dtype=torch.long)
    for _ in range(length):
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1, words].softmax(-1)
        ids = torch.cat([ids, words[torch.multinomial(chances, 1, generator=generator)]], dim=1)
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row[1:].tolist())) for row in ids]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def crafted(folder: Path) -> None:
    """A model that only head 3 of either layer does anything in, and documents of its own making."""
    model = save_model_with(folder / "model", lambda layer: layer.attn.c_proj.weight[:24].zero_())
    for split, count in (("train", 8), ("test", 40)):
        sampled_from(model, folder / f"{split}.jsonl", count, 20)
    test = (folder / "test.jsonl").read_text()
    train = [line for line in (folder / "train.jsonl").read_text().splitlines() if line not in test]
    if not train:
        write_documents(folder / "train.jsonl", 8, seed=9)


def save_model_with(folder: Path, change: Callable[[Any], object]) -> PreTrainedModel:
    model = tiny_model("gpt2")
    with torch.no_grad():
        for layer in model.transformer.h:
            change(layer)
            layer.attn.c_proj.weight[24:] *= 3
    model.save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    return model


def test_rivals_of_a_repaired_model_are_repaired_too(here: Path, scored: pipeline.ScoreRun):
    """The same heads by another name are the same model; and repair lowers what it was fitted for."""
    ranked = [[float(head) for head in range(4)]] * 2
    for field in ("phi", "entropy"):
        set_scores(scored.directory, field, ranked)
    pruned = compressor.prune(criterion="gt-fep", scores=scored.directory, ratio=0.5, export=True)
    assert pruned.checkpoint is not None
    sites = pruned.document["repair"]
    assert [(site["structure"], site["layer"]) for site in sites] == [
        ("heads", 0),
        ("channels", 0),
        ("heads", 1),
        ("channels", 1),
    ]
    assert all(site["after"] < site["before"] for site in sites if site["structure"] == "heads")
    document = compressor.bench(against=[pruned.checkpoint], scores=scored.directory, **QUICK).document
    rows = {row["name"]: row["perplexity"] for row in document["rows"]}
    assert rows["entropy"] == pytest.approx(rows["gt-fep 4/8"], rel=1e-4)
    bare = compressor.prune(criterion="gt-fep", scores=scored.directory, ratio=0.5, repair=False, export=True)
    assert bare.checkpoint is not None
    assert bare.document["repair"] is None
    document = compressor.bench(against=[bare.checkpoint, pruned.checkpoint], **QUICK).document
    unlike = {row["name"]: row["perplexity"] for row in document["rows"]}
    assert unlike["gt-fep 4/8"] != pytest.approx(rows["gt-fep 4/8"], rel=1e-3)
    assert str(pruned.checkpoint) not in document["verdict"]  # which is about models that were not repaired


def test_scoring_shows_what_each_head_is_worth(compress: Compress, models: dict[str, str], texts: str) -> None:
    told = compress("score", "--model", models["gpt2"], "--data", texts, "--json").json["layers"]
    shown = compress("score", "--model", models["gpt2"], "--data", texts).out
    for layer in told:
        for rise in layer["values"]["loss-game"]:
            assert f"{1000 * rise:.1f}" in shown
    assert "loss-game" not in compress("score", "--model", models["gpt2"], "--data", texts, "--criterion", "gt-fep").out


def test_text_that_is_gone_repairs_nothing(here: Path, models: dict[str, str]) -> None:
    write_documents(here / "mine.jsonl", 20, 5)
    compressor.score(model=models["gpt2"], data="mine.jsonl", output_dir="s")
    (here / "mine.jsonl").unlink()
    with pytest.raises(DataError, match=r"needs the text that was scored, or prune with --no-repair: .*mine\.jsonl"):
        compressor.prune(scores="s")
    assert compressor.prune(scores="s", repair=False).document["repair"] is None


def test_what_the_repair_mends_is_told(compress: Compress, here: Path, scored: pipeline.ScoreRun) -> None:
    told = compress("prune", "--scores", scored.directory, "--json").json["repair"]
    assert [entry["layer"] for entry in told if entry["structure"] == "heads"] == [0, 1]
    shown = compress("prune", "--scores", scored.directory).out
    for entry in told:
        if entry["structure"] == "heads":
            assert f"{entry['before']:.1%} → {entry['after']:.1%}" in shown
    assert "output error" not in compress("prune", "--scores", scored.directory, "--no-repair").out


def test_text_that_has_changed_repairs_nothing(here: Path, scored: pipeline.ScoreRun):
    facts = scored.directory / "scores.json"
    document = json.loads(facts.read_text(encoding="utf-8"))
    document["data"]["fingerprint"] = "0" * 16
    facts.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(
        ArtefactError, match=r"has changed since .* score it again, or prune with --no-repair"
    ) as caught:
        compressor.prune(criterion="gt-fep", scores=scored.directory)
    assert "\n" not in str(caught.value)
    assert not list(here.glob("runs/*/prune*"))
    compressor.prune(criterion="gt-fep", scores=scored.directory, repair=False)


@pytest.mark.parametrize(("removed", "winner"), [("idle", "gt-fep"), ("busy", "magnitude")])
def test_the_verdict_names_the_winner(here: Path, tmp_path: Path, removed: str, winner: str) -> None:
    """The plan of the checkpoint removes the idle heads, or (made to) the busy one; magnitude knows the idle ones."""
    crafted(tmp_path)
    data = {"model": str(tmp_path / "model"), "data": str(tmp_path)}
    compressor.score(**data, criterion="gt-fep", output_dir="scores")
    busy_last = [[0.1, 0.2, 0.3, 9.0]] * 2
    set_scores(here / "scores", "phi", busy_last if removed == "idle" else [[-x for x in row] for row in busy_last])
    set_scores(here / "scores", "entropy", [[1.0, 2.0, 3.0, 0.0]] * 2)
    set_scores(here / "scores", "first_key_mass", [[0.1, 0.1, 0.1, 0.9]] * 2)
    pruned = compressor.prune(criterion="gt-fep", scores="scores", ratio=0.2, repair=False, export=True)
    assert pruned.checkpoint is not None
    document = compressor.bench(against=[pruned.checkpoint], scores="scores", **data, random_seeds=6, **QUICK).document
    rows = {row["name"]: row["perplexity"] for row in document["rows"]}
    dense = plain_perplexity(compressor.load(tmp_path / "model"), "gpt2", documents(str(tmp_path), "test"))
    assert rows["dense"] == pytest.approx(dense, rel=1e-5)
    assert rows["magnitude"] == pytest.approx(dense, rel=1e-5)  # idle heads are not missed
    assert rows["entropy"] > 1.02 * dense  # the busy one is
    ours = "gt-fep 2/8"
    assert (rows[ours] > 1.02 * dense) == (removed == "busy")
    verdict = document["verdict"]
    best = verdict.partition("; then ")[0]
    if removed == "busy":
        assert best.startswith("lowest perplexity: magnitude")
        assert winner in best
        assert f"{ours} ({rows[ours] / rows['dense'] - 1:+.1%})" in verdict
        assert verdict.index("magnitude") < verdict.index("random (") < verdict.index("entropy")
    else:
        leaders = verdict.index(winner), verdict.index("magnitude")
        assert max(leaders) < min(verdict.index("random ("), verdict.index("entropy"))
    spread, base = document["random"], rows["dense"]
    assert f"random ({spread['mean'] / base - 1:+.1%} ± {spread['sd'] / base:.1%}, 6 draws)" in verdict


def test_equal_plans_share_the_place(here: Path, scored: pipeline.ScoreRun, texts: str) -> None:
    """Two criteria that remove the same heads give the same model; neither of them is the winner."""
    values = [[1.0, 2.0, 3.0, 4.0]] * 2
    for field in ("phi", "entropy", "output_norm", "values.loss-game"):
        set_scores(scored.directory, field, values)
    # second-order is 2 H − φ: the same again
    set_scores(scored.directory, "first_key_mass", [[0.9, 0.8, 0.7, 0.6]] * 2)
    pruned = compressor.prune(criterion="gt-fep", scores=scored.directory, export=True)
    assert pruned.checkpoint is not None
    document = compressor.bench(
        against=[pruned.checkpoint], scores=scored.directory, data=texts, random_seeds=2, **QUICK
    ).document
    rows = {row["name"]: row["perplexity"] for row in document["rows"] if row["kind"] in ("pruned", "rival")}
    assert max(rows.values()) == pytest.approx(min(rows.values()), rel=1e-6)
    phrases = [phrase for part in document["verdict"].split("; then ") for phrase in part.split("), ")]
    assert any(all(name in phrase for name in rows) for phrase in phrases), document["verdict"]


def test_a_worse_criterion_than_random_is_told_so(here: Path, tmp_path: Path) -> None:
    crafted(tmp_path)
    data = {"model": str(tmp_path / "model"), "data": str(tmp_path)}
    compressor.score(**data, output_dir="scores")
    set_scores(here / "scores", "phi", [[9.0, 9.0, 9.0, 0.0]] * 2)
    pruned = compressor.prune(criterion="gt-fep", scores="scores", export=True)
    assert pruned.checkpoint is not None
    verdict = compressor.bench(against=[pruned.checkpoint], **data, random_seeds=6, **QUICK).document["verdict"]
    assert verdict.startswith("lowest perplexity: random (")
    assert "; then gt-fep 2/8 (+" in verdict


def test_bench_takes_up_the_newest_checkpoint(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compressor.score(model=models["gpt2"], data=texts)
    compressor.prune(criterion="gt-fep", ratio=0.3, export=True, output_dir="runs/gpt2/z-first")
    compressor.prune(criterion="gt-fep", ratio=0.2, export=True, output_dir="runs/gpt2/a-second")
    compressor.prune(criterion="gt-fep", ratio=0.6)  # newer, but without a checkpoint
    flags = ("--data", texts, "--repeats", 1, "--prompt-length", 5, "--new-tokens", 2, "--random-seeds", 2)
    outcome = compress("bench", *flags, "--json")
    assert outcome.code == 0, outcome.err
    assert "runs/gpt2/a-second/checkpoint" in outcome.err
    assert [row["kind"] for row in outcome.json["rows"]] == ["dense", "pruned", "random", "random"]
    assert sum(outcome.json["rows"][1]["costs"]["heads"]) == 6


def test_several_checkpoints(here: Path, scored: pipeline.ScoreRun, texts: str) -> None:
    folders = []
    for ratio in (0.2, 0.5):
        run = compressor.prune(criterion="gt-fep", scores=scored.directory, ratio=ratio, export=True)
        assert run.directory is not None
        folders.append(run.directory)  # the run's directory stands for the checkpoint in it
    document = compressor.bench(against=folders, data=texts, random_seeds=2, **QUICK).document
    assert [row["name"] for row in document["rows"][:3]] == ["dense", "gt-fep 2/8", "gt-fep 4/8"]
    assert all(row["throughput"] for row in document["rows"][:3])
    assert {sum(row["costs"]["heads"]) for row in document["rows"] if row["kind"] == "random"} == {6}


def test_two_checkpoints_that_lost_as_many_heads(
    here: Path, scored: pipeline.ScoreRun, models: dict[str, str], texts: str
) -> None:
    """One scored by keys, one by offsets: comparing the two is what a user wants to do."""
    compressor.score(model=models["gpt2"], data=texts, symbol="offset", output_dir="by-offset")
    set_scores(here / "by-offset", "phi", [[4, 3, 2, 1], [4, 3, 2, 1]])
    folders = []
    for scores in (scored.directory, "by-offset"):
        run = compressor.prune(criterion="gt-fep", scores=scores, export=True)
        assert run.directory is not None
        folders.append(run.directory)
    document = compressor.bench(against=folders, data=texts, random_seeds=2, **QUICK).document
    assert [row["kind"] for row in document["rows"]][:3] == ["dense", "pruned", "pruned"]


def test_a_checkpoint_whose_folder_is_called_dense(here: Path, models: dict[str, str], texts: str) -> None:
    shutil.copytree(models["other"], "dense")
    document = compressor.bench(model=models["gpt2"], against=["dense"], data=texts, **QUICK).document
    names = [row["name"] for row in document["rows"]]
    assert len(set(names)) == len(names)


def test_scores_given_for_nothing_are_not_passed_over_in_silence(
    compress: Compress, here: Path, scored: pipeline.ScoreRun, models: dict[str, str], texts: str
) -> None:
    """`--against` has no record of pruning, so there is no plan to give the rivals: say it, or refuse."""
    outcome = compress(
        "bench", "--model", models["gpt2"], "--against", models["other"], "--scores", scored.directory, "--data", texts,
        "--repeats", 1, "--prompt-length", 5, "--new-tokens", 2, "--quiet",
    )  # fmt: skip
    assert outcome.code == 2 or "warning" in outcome.err


def test_random_rows_missing_for_a_reason_are_told(
    compress: Compress, here: Path, checkpoint: Path, models: dict[str, str], texts: str
) -> None:
    """A checkpoint of another model: no random pruning can be drawn for it."""
    outcome = compress(
        "bench", "--model", models["other"], "--against", checkpoint, "--data", texts,
        "--repeats", 1, "--prompt-length", 5, "--new-tokens", 2, "--quiet",
    )  # fmt: skip
    assert outcome.code == 2 or "warning" in outcome.err


def test_checkpoints_of_other_budgets_are_measured_but_not_ranked(
    here: Path, scored: pipeline.ScoreRun, texts: str
) -> None:
    """Random pruning removes as much as the first checkpoint lost; one that lost more is no match for it."""
    prune = partial(compressor.prune, criterion="gt-fep", scores=scored.directory, export=True)
    runs = {ratio: prune(ratio=ratio).directory for ratio in (0.2, 0.5)}
    for first, other in ((0.2, 0.5), (0.5, 0.2)):
        folders = [runs[first], runs[other]]
        assert all(folder is not None for folder in folders)
        document = compressor.bench(against=folders, data=texts, random_seeds=2, **QUICK).document
        names = {0.2: "gt-fep 2/8", 0.5: "gt-fep 4/8"}
        assert [row["name"] for row in document["rows"][:3]] == ["dense", names[first], names[other]]
        assert names[first] in document["verdict"]
        assert names[other] not in document["verdict"]


def test_documents_that_chose_the_heads_are_no_evaluation(
    compress: Compress, here: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """All of a file calibrates where `eval_data` is another; later the same file's held-out fifth is no test of it."""
    model = models["gpt2"]
    mine, other = (write_documents(tmp_path / f"{seed}.jsonl", 20, seed) for seed in (71, 72))
    compressor.score(model=model, data=str(mine), eval_data=str(other), samples=0)
    pruned = compressor.prune(criterion="gt-fep", export=True)
    assert pruned.checkpoint is not None
    before = snapshot(here)
    refused = compress("bench", "--against", pruned.checkpoint, "--data", mine, "--quiet")
    assert refused.code == 2
    assert "4 of the 4" in refused.err
    assert "gt-fep 2/8" in refused.err
    assert snapshot(here) == before
    document = compressor.bench(against=[pruned.checkpoint], **QUICK, random_seeds=2).document  # the text of the scores
    assert document["data"]["name"] == other.name
    # Pruned once more by other text, it still remembers the first.
    compressor.score(model=str(pruned.checkpoint), data=str(other), output_dir="again")
    twice = compressor.prune(scores="again", criterion="gt-fep", export=True, repair=False, output_dir="twice")
    assert twice.checkpoint is not None
    with pytest.raises(DataError, match=r"20 of the 20 documents of 71\.jsonl calibrated"):
        compressor.bench(against=[twice.checkpoint], data=str(other), eval_data=str(mine), **QUICK)


def test_a_part_of_the_text_is_remembered(here: Path, models: dict[str, str], tmp_path: Path) -> None:
    records = [{"question": f"w{n} w{n + 1} w1", "answer": f"w2 w{n} w3"} for n in range(3, 33)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    compressor.score(model=models["gpt2"], data=str(tmp_path / "qa.jsonl"), part="answer", output_dir="s")
    pruned = compressor.prune(scores="s", export=True, repair=False)
    measured = compressor.bench(against=[pruned.checkpoint], random_seeds=2, **QUICK).document["data"]
    plain = compressor.bench(against=[pruned.checkpoint], random_seeds=2, part="question", **QUICK).document["data"]
    assert measured["fingerprint"] != plain["fingerprint"]


def test_pruning_by_saturated_scores_is_warned_of(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compressor.score(model=models["gpt2"], data=texts, symbol="sequence")
    assert "saturated" in compress("prune", "--quiet", "--dry-run", "--criterion", "gt-fep").err
    assert "saturated" not in compress("prune", "--quiet", "--dry-run", "--criterion", "magnitude").err


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_is_the_three_verbs_in_one_directory(here: Path, models: dict[str, str], texts: str) -> None:
    settings: dict[str, Any] = {"model": models["gpt2"], "data": texts, "samples": 9, "seed": 2, "ratio": 0.3}
    whole = compressor.run(**settings, random_seeds=2, output_dir="whole", **QUICK)
    scores = compressor.score(**settings, output_dir="s")
    pruned = compressor.prune(scores="s", **settings, export=True, output_dir="p")
    assert pruned.checkpoint is not None
    measured = compressor.bench(
        against=[pruned.checkpoint], scores="s", **settings, random_seeds=2, output_dir="b", **QUICK
    )
    for file in ("scores.json", "scores.safetensors"):
        assert (here / "whole" / "scores" / file).read_bytes() == (here / "s" / file).read_bytes()
    for name in ("plan.json", "checkpoint/model.safetensors", "checkpoint/config.json", "checkpoint/pruning.json"):
        assert (here / "whole" / "pruned" / name).read_bytes() == (here / "p" / name).read_bytes()
    assert whole.score.scores.facts == scores.scores.facts
    for one, two in zip(whole.bench.document["rows"], measured.document["rows"], strict=True):
        assert {name: value for name, value in one.items() if name != "throughput"} == {
            name: value for name, value in two.items() if name != "throughput"
        }
    assert whole.directory == Path("whole")
    assert whole.score.directory.is_dir()
    assert whole.prune.checkpoint is not None
    assert compressor.load(whole.prune.checkpoint)
    assert (whole.bench.directory / "bench.json").is_file()


def test_prune_and_bench_take_up_what_run_made(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    compressor.run(model=models["gpt2"], data=texts, random_seeds=2, **QUICK)
    assert "runs/gpt2/run/scores" in compress("prune", "--ratio", "0.4").err
    flags = ("--data", texts, "--repeats", 1, "--prompt-length", 5, "--new-tokens", 2, "--random-seeds", 2)
    assert "runs/gpt2/run/pruned/checkpoint" in compress("bench", *flags).err


@pytest.mark.parametrize("stage", ["score_model", "write_checkpoint", "comparison.compare"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_nothing(
    here: Path,
    models: dict[str, str],
    texts: str,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("planted")

    monkeypatch.setattr(f"compressor.pipeline.{stage}", fail)
    with pytest.raises(error, match="planted"):
        compressor.run(model=models["gpt2"], data=texts, **QUICK)
    assert snapshot(here) == {}


def test_the_directory_is_named_after_the_model(here: Path, texts: str) -> None:
    save_tiny("gpt2", here / "my model+")
    run = compressor.score(model="./my model+", data=texts, samples=2)
    assert run.directory.parts[:1] == ("runs",)
    assert run.directory.parts[2:] == ("score",)
    assert all(letter.isalnum() or letter in "-_." for letter in run.directory.parts[1])


@pytest.mark.slow
def test_the_embedded_model_end_to_end(here: Path) -> None:
    """The default job: pruning by any sensible criterion hurts, and the numbers hang together."""
    whole = compressor.run(samples=20, eval_samples=6, repeats=1, random_seeds=2)
    rows = whole.bench.document["rows"]
    assert whole.directory == Path("runs/embedded/run")
    assert rows[0]["perplexity"] < 3
    assert all(row["perplexity"] > rows[0]["perplexity"] for row in rows[1:])
    assert {row["kind"] for row in rows} == {"dense", "pruned", "rival", "random"}

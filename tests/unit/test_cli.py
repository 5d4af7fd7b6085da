"""The command line from outside: bad input, exit codes, what goes to stdout and what to stderr, and the README."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from compressor import console, pipeline
from compressor.cli.app import app
from compressor.config import resolve
from tests.conftest import CONTEXT, ROOT, Outcome, save_tiny, snapshot, tiny_model, tiny_tokenizer, write_documents

Compress = Callable[..., Outcome]

QUICK = ("--repeats", 1, "--prompt-length", 6, "--new-tokens", 3, "--random-seeds", 2)


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line that says all of `words`, and nothing on stdout."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) > len("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def refuse(compress: Compress, here: Path) -> Compress:
    """Run a command that has to fail, quietly, and leave the working directory as it was."""

    def call(*words: object, says: tuple[str, ...] = ()) -> Outcome:
        before = snapshot(here)
        outcome = compress(*words, "--quiet")
        assert_refused(outcome, *says)
        assert snapshot(here) == before
        return outcome

    return call


@pytest.fixture
def scored(compress: Compress, models: dict[str, str], texts: str, tmp_path: Path) -> Path:
    """A score run of the tiny GPT-2, outside the working directory."""
    folder = tmp_path / "scored"
    outcome = compress("score", "--model", models["gpt2"], "--data", texts, "-o", folder, "--quiet")
    assert outcome.code == 0, outcome.err
    return folder


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["score", "prune", "run"])
def test_an_unknown_model_offline(refuse: Compress, verb: str) -> None:
    refuse(verb, "--model", "nobody/nothing", says=("nobody/nothing", "embedded", "director"))


@pytest.mark.parametrize("path", ["./missing", "/missing/model", "~/missing-model-of-nobody", "a/b/c", "missing"])
def test_a_path_that_does_not_exist(refuse: Compress, path: str) -> None:
    refuse("score", "--model", path, says=(path,))


def test_a_model_that_is_a_file_or_an_empty_folder(refuse: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    refuse("score", "--model", tmp_path / "file", says=("is a file",))
    (tmp_path / "empty").mkdir()
    refuse("score", "--model", tmp_path / "empty", says=("config.json",))


def test_a_path_too_long_for_the_file_system_is_a_bad_model(refuse: Compress) -> None:
    outcome = refuse("score", "--model", "m" * 300)
    assert "cannot write" not in outcome.err  # it is not the output that is at fault


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "masked"), ("bert", "causal"), ("llama", "masked")])
def test_the_wrong_task(refuse: Compress, models: dict[str, str], texts: str, kind: str, task: str) -> None:
    right = {"masked": "causal", "causal": "masked"}[task]
    refuse("score", "--model", models[kind], "--data", texts, "--task", task, says=(task, f"--task {right}"))


def test_a_task_nobody_knows(refuse: Compress, models: dict[str, str]) -> None:
    refuse("score", "--model", models["gpt2"], "--task", "casual", says=("'casual'", "'causal'"))


@pytest.mark.parametrize("flags", [(), ("--task", "causal"), ("--task", "masked")])
def test_a_sequence_to_sequence_model(refuse: Compress, tmp_path: Path, texts: str, flags: tuple[str, ...]) -> None:
    config = T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "t5")
    refuse("score", "--model", tmp_path / "t5", "--data", texts, *flags, says=("t5",))


def test_a_model_without_attention(refuse: Compress, tmp_path: Path, texts: str) -> None:
    folder = tmp_path / "mamba"
    config = MambaConfig(vocab_size=70, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    for verb in ("score", "run"):
        refuse(verb, "--model", folder, "--data", texts, says=("Mamba", "no attention"))


def test_a_checkpoint_of_pickles_only(refuse: Compress, tmp_path: Path, texts: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "pickled")
    torch.save(tiny_model("gpt2").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refuse("score", "--model", folder, "--data", texts, says=("safetensors", "pickled"))


def test_weights_that_are_cut_short(refuse: Compress, tmp_path: Path, texts: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "short")
    whole = (folder / "model.safetensors").read_bytes()
    for length in (len(whole) // 2, 4, 0):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refuse("score", "--model", folder, "--data", texts, says=(str(folder),))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"model_type": "nothing-known"}', '{"model_type": "gpt2", "n_head": "x"}'],
)
def test_a_config_that_is_damaged(refuse: Compress, tmp_path: Path, texts: str, text: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "damaged")
    (folder / "config.json").write_text(text)
    refuse("score", "--model", folder, "--data", texts, says=("damaged",))


def test_weights_of_another_task(refuse: Compress, models: dict[str, str], tmp_path: Path, texts: str) -> None:
    folder = save_tiny("bert", tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    headless = {name: weight for name, weight in weights.items() if not name.startswith("cls.")}
    assert len(headless) < len(weights)
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    refuse("score", "--model", folder, "--data", texts, says=("cls.predictions", "masked"))


def test_a_missing_tokenizer(refuse: Compress, tmp_path: Path, texts: str) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "mute")
    refuse("score", "--model", tmp_path / "mute", "--data", texts, says=("tokenizer",))


def test_a_tokenizer_of_a_larger_vocabulary(refuse: Compress, tmp_path: Path, texts: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "large")
    model = tiny_model("gpt2")
    model.resize_token_embeddings(10)
    model.save_pretrained(folder)
    refuse("score", "--model", folder, "--data", texts, says=("tokenizer",))


def test_a_masked_model_without_a_mask_token(refuse: Compress, tmp_path: Path, texts: str) -> None:
    folder = save_tiny("bert", tmp_path / "maskless")
    tiny_tokenizer("gpt2").save_pretrained(folder)
    refuse("score", "--model", folder, "--data", texts, says=("mask token",))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--device", "abacus"), ("--device", "cuda:99"), ("--device", ""), ("--dtype", "int8"), ("--dtype", "float23")],
)
def test_an_unknown_device_or_dtype(
    refuse: Compress, models: dict[str, str], texts: str, flag: str, value: str
) -> None:
    refuse("score", "--model", models["gpt2"], "--data", texts, flag, value, says=(flag.strip("-"), repr(value)))


# --- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "", "no text"),
        ("blank.jsonl", "\n\n", "no text"),
        ("silent.jsonl", '{"text": " "}\n', "no text"),
        ("malformed.jsonl", '{"text": "w1 w2"}\n{"text": \n', "line 2"),
        ("list.jsonl", "[1]\n", "line 1"),
        ("fields.jsonl", '{"body": "w1"}\n', "body"),
        ("empty.txt", "", "no text"),
        ("empty.parquet", "", "parquet"),
        ("table.csv", "text\nw1\n", ".jsonl"),
    ],
)
@pytest.mark.parametrize("verb", ["score", "run"])
def test_data_that_is_empty_or_malformed(
    refuse: Compress, models: dict[str, str], tmp_path: Path, verb: str, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    refuse(verb, "--model", models["gpt2"], "--data", tmp_path / name, says=(name, says))


def test_data_that_is_not_there(refuse: Compress, models: dict[str, str]) -> None:
    refuse("score", "--model", models["gpt2"], "--data", "missing.jsonl", says=("missing.jsonl",))
    refuse("score", "--model", models["gpt2"], "--data", "gsm8k", says=("openai/gsm8k", "embedded"))
    refuse("score", "--model", models["gpt2"], says=("openai/gsm8k",))  # the default
    refuse("score", "--model", models["gpt2"], "--data", "gsm9k", says=("did you mean 'gsm8k'",))


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.5", "nan", "inf"])
@pytest.mark.parametrize("verb", ["prune", "run"])
def test_a_ratio_out_of_range(refuse: Compress, verb: str, ratio: str) -> None:
    refuse(verb, f"--ratio={ratio}", says=("ratio", ratio, "between 0 and 1"))


@pytest.mark.parametrize(
    ("verb", "flag", "value"),
    [
        ("score", "--samples", -1),
        ("score", "--batch-size", 0),
        ("score", "--max-length", 1),
        ("score", "--seed", -1),
        ("score", "--part", "middle"),
        ("score", "--symbol", "keys"),
        ("score", "--triple-layers", "first"),
        ("score", "--triple-layers", "0,,1"),
        ("prune", "--scope", "everywhere"),
        ("bench", "--repeats", 0),
        ("bench", "--random-seeds", 1),
        ("bench", "--prompt-length", 0),
        ("bench", "--new-tokens", 0),
        ("bench", "--eval-samples", -5),
    ],
)
def test_a_setting_out_of_range(refuse: Compress, models: dict[str, str], verb: str, flag: str, value: object) -> None:
    outcome = refuse(verb, "--model", models["gpt2"], f"{flag}={value}", says=(str(value), "expected"))
    assert flag.strip("-").replace("-", "_") in outcome.err.replace("-", "_")


def test_a_seed_too_large_for_a_generator(refuse: Compress, scored: Path, models: dict[str, str]) -> None:
    huge = 2**70
    refuse("prune", "--scores", scored, "--criterion", "random", "--seed", huge, says=("seed",))


@pytest.mark.parametrize("layers", ["2", "-1", "0,7"])
def test_triple_layers_out_of_range(refuse: Compress, models: dict[str, str], texts: str, layers: str) -> None:
    wrong = layers.split(",")[-1]
    refuse(
        "score", "--model", models["gpt2"], "--data", texts, f"--triple-layers={layers}",
        says=("triple", f"layer {wrong}", "0 to 1"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--values", "shaply", ("value 'shaply'", "did you mean 'shapley'")),
        ("--estimator", "plugin", ("estimator 'plugin'", "did you mean 'plug-in'")),
        ("--coalitions", "0.1+5.0", ("5.0",)),
        ("--coalitions", "0.1+x", ("0.1+x", "expected one like")),
        ("--coalitions", "0.1+0.1", ("0.1+0.1", "different heads")),
        ("--order", "17", ("order is 17", "16 at most")),
        ("--order", "1", ("order is 1", "expected 2 or more")),
        ("--memory-budget", "0", ("memory_budget is 0", "GiB")),
        ("--memory-budget", "inf", ("memory_budget is inf", "GiB")),
        ("--bootstrap", "-1", ("bootstrap is -1",)),
    ],
)
def test_what_scoring_cannot_find_out(
    refuse: Compress, models: dict[str, str], texts: str, flag: str, value: str, says: tuple[str, ...]
) -> None:
    refuse("score", "--model", models["gpt2"], "--data", texts, f"{flag}={value}", says=says)


def test_only_what_is_counted_becomes_stable(refuse: Compress, models: dict[str, str], texts: str) -> None:
    flags = ("--model", models["gpt2"], "--data", texts, "--until-stable", "--criterion", "magnitude")
    refuse("score", *flags, says=("until_stable", "gt-fep", "magnitude"))


def test_a_criterion_that_was_not_asked_for(refuse: Compress, scored: Path) -> None:
    refuse("prune", "--scores", scored, "--criterion", "shapley", says=("shapley", "--values shapley"))


def test_a_criterion_that_asks_for_itself(compress: Compress, models: dict[str, str], texts: str, here: Path) -> None:
    flags = ("--model", models["gpt2"], "--data", texts, "--criterion", "shapley", "--json")
    document = compress("prune", *flags).json
    assert document["plan"]["criterion"] == "shapley"
    assert document["scores"]["settings"]["values"] == ["shapley"]


def test_a_max_length_above_the_context(refuse: Compress, models: dict[str, str], texts: str) -> None:
    flags = ("--model", models["gpt2"], "--data", texts, "--max-length", CONTEXT + 1)
    refuse("score", *flags, says=(str(CONTEXT + 1), str(CONTEXT)))
    refuse("run", *flags, says=(str(CONTEXT + 1), str(CONTEXT)))


@pytest.mark.parametrize("tokens", [CONTEXT, CONTEXT + 5])
def test_more_new_tokens_than_the_context(refuse: Compress, models: dict[str, str], texts: str, tokens: int) -> None:
    flags = ("--model", models["gpt2"], "--data", texts, "--new-tokens", tokens, "--random-seeds", 2)
    refuse("run", *flags, says=("new_tokens", str(tokens), str(CONTEXT)))
    refuse("bench", *flags, "--against", models["other"], says=("new_tokens", str(tokens), str(CONTEXT)))


@pytest.mark.parametrize("verb", ["score", "prune", "recover", "bench", "run"])
def test_an_unknown_flag_and_a_missing_value(compress: Compress, here: Path, verb: str) -> None:
    for words in (
        (verb, "--modle", "x"),
        (verb, {"bench": "--repeats", "recover": "--epochs"}.get(verb, "--samples"), "many"),
    ):
        assert_refused(compress(*words), "--help")
    assert not list(here.iterdir())


def test_an_unknown_command(compress: Compress, here: Path) -> None:
    assert_refused(compress("sqore"), "sqore")
    assert not list(here.iterdir())


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("modle: gpt2", ("'modle'", "did you mean 'model'?")),
        ("ratios: 0.5", ("'ratios'", "did you mean 'ratio'?")),
        ("samples: many", ("samples", "'many'", "whole number")),
        ("samples: 2.5", ("samples", "2.5", "whole number")),
        ("samples: true", ("samples", "True", "whole number")),
        ("samples:", ("samples", "None", "whole number")),
        ("ratio: high", ("ratio", "'high'", "number")),
        ("ratio: 1.5", ("ratio", "1.5")),
        ("allow_empty: 1", ("allow_empty", "true or false")),
        ("model: 3", ("model", "3", "text")),
        ("triple_layers: 0", ("triple_layers", "list")),
        ("triple_layers: [a]", ("triple_layers", "list")),
        ("part: both halves", ("part", "question")),
        ("- ratio", ("list",)),
        ("just words", ("setting: value",)),
        ("ratio: [", ("cannot read",)),
        ("1: 2", ("1",)),
    ],
)
@pytest.mark.parametrize("verb", ["score", "prune", "recover", "bench", "run"])
def test_a_recipe_that_cannot_be_used(
    refuse: Compress, tmp_path: Path, verb: str, recipe: str, says: tuple[str, ...]
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    refuse(verb, "--config", tmp_path / "recipe.yaml", says=says)


def test_a_recipe_that_is_not_there_or_no_text(refuse: Compress, tmp_path: Path) -> None:
    refuse("score", "-c", "missing.yaml", says=("missing.yaml",))
    refuse("score", "-c", tmp_path, says=("recipe",))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refuse("score", "-c", tmp_path / "bytes.yaml", says=("cannot read",))


# --- criteria, scores and checkpoints -------------------------------------------------------------------------------


def test_an_unknown_criterion(refuse: Compress, scored: Path, models: dict[str, str], texts: str) -> None:
    says = ("'entropie'", "did you mean 'entropy'?")
    refuse("prune", "--scores", scored, "--criterion", "entropie", says=says)
    refuse("run", "--model", models["gpt2"], "--data", texts, "--criterion", "entropie", says=says)


def test_an_unknown_criterion_costs_no_scoring_epoch(refuse: Compress, models: dict[str, str], texts: str) -> None:
    refuse("prune", "--model", models["gpt2"], "--data", texts, "--criterion", "entropie", says=("'entropie'",))


def test_scores_of_another_model(refuse: Compress, scored: Path, models: dict[str, str]) -> None:
    refuse("prune", "--scores", scored, "--model", models["other"], says=(str(scored), "another model"))
    refuse("prune", "--scores", scored, "--model", models["other"], "--export", says=("another model",))


def test_scores_of_a_model_whose_weights_changed(
    compress: Compress, refuse: Compress, texts: str, tmp_path: Path
) -> None:
    folder = save_tiny("gpt2", tmp_path / "model")
    scores = tmp_path / "scores"
    assert compress("score", "--model", folder, "--data", texts, "-o", scores).code == 0
    assert compress("prune", "--scores", scores, "-o", tmp_path / "fine").code == 0
    save_tiny("gpt2", folder, seed=5)
    refuse("prune", "--scores", scores, says=("changed",))
    refuse(
        "bench", "--model", folder, "--against", tmp_path / "fine", "--scores", scores, "--data", texts,
        says=(str(tmp_path / "fine"),),
    )  # fmt: skip


def damaged(scored: Path, how: str) -> str:
    """Damage a score run and say which word of the message tells."""
    facts_file, tensors_file = scored / "scores.json", scored / "scores.safetensors"
    facts = json.loads(facts_file.read_text())
    tensors = load_file(tensors_file)
    if how == "no directory":
        for file in scored.iterdir():
            file.unlink()
        scored.rmdir()
        return "no scores"
    if how == "no facts":
        facts_file.unlink()
        return "no scores"
    if how == "no tensors":
        tensors_file.unlink()
        return "damaged"
    if how == "truncated tensors":
        tensors_file.write_bytes(tensors_file.read_bytes()[:-20])
        return "damaged"
    if how == "truncated facts":
        facts_file.write_text(facts_file.read_text()[:-30])
        return "scores.json"
    if how == "a list":
        facts_file.write_text("[]")
        return "scores.json"
    if how == "schema":
        facts_file.write_text(json.dumps({**facts, "schema_version": 99}))
        return "99"
    if how == "layers":
        facts_file.write_text(json.dumps({**facts, "num_layers": 3}))
        return "damaged"
    if how == "text for a number":
        facts_file.write_text(json.dumps({**facts, "num_layers": "two"}))
        return str(scored)
    if how in facts:
        del facts[how]
        facts_file.write_text(json.dumps(facts))
        return str(scored)
    if how == "shape":
        save_file({**tensors, "layers.0.phi": tensors["layers.0.phi"][:1]}, tensors_file)
        return str(scored)
    save_file({name: tensor for name, tensor in tensors.items() if name != how}, tensors_file)
    return str(scored)


@pytest.mark.parametrize(
    "how",
    [
        "no directory",
        "no facts",
        "no tensors",
        "truncated tensors",
        "truncated facts",
        "a list",
        "schema",
        "layers",
        "text for a number",
        "num_layers",
        "schema_version",
        "model",
        "identity",
        "task",
        "data",
        "settings",
        "shape",
        "layers.1.phi",
        "layers.0.observations",
        "layers.0.first_key_mass",
    ],
)
def test_damaged_scores(refuse: Compress, scored: Path, how: str) -> None:
    word = damaged(scored, how)
    refuse("prune", "--scores", scored, "--export", says=(word,))


def test_bench_with_nothing_to_compare(refuse: Compress, models: dict[str, str], texts: str) -> None:
    refuse("bench", says=("--against", "compress prune --export"))
    refuse("bench", "--model", models["gpt2"], "--data", texts, says=("--against",))
    refuse("bench", "--against", models["other"], says=("--model",))
    refuse("bench", "--model", models["gpt2"], "--data", texts, "--against", "missing", says=("missing",))


def test_bench_against_the_same_twice(refuse: Compress, models: dict[str, str], texts: str) -> None:
    twice = ("--against", models["other"], "--against", models["other"])
    refuse("bench", "--model", models["gpt2"], "--data", texts, *twice, says=("twice",))


def test_bench_against_another_tokenizer(refuse: Compress, models: dict[str, str], texts: str) -> None:
    flags = ("--model", models["gpt2"], "--data", texts, *QUICK)
    refuse("bench", *flags, "--against", models["llama"], says=("tokenizer",))


def test_bench_against_another_task(refuse: Compress, models: dict[str, str], texts: str) -> None:
    refuse("bench", "--model", models["gpt2"], "--data", texts, "--against", models["bert"], says=("task",))


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"plan": {}}', '{"base": {}, "plan": {"heads": {}}}'])
def test_bench_against_a_damaged_record(
    refuse: Compress, models: dict[str, str], texts: str, tmp_path: Path, record: str
) -> None:
    folder = save_tiny("gpt2", tmp_path / "pruned", seed=1)
    (folder / "pruning.json").write_text(record)
    refuse("bench", "--against", folder, "--data", texts, *QUICK, says=("pruning.json",))
    refuse("bench", "--model", models["gpt2"], "--against", folder, "--data", texts, *QUICK, says=("pruning.json",))


# --- the output directory -------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_empty(
    refuse: Compress, models: dict[str, str], texts: str, scored: Path, here: Path
) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years of work")
    model = ("--model", models["gpt2"], "--data", texts)
    commands: list[tuple[object, ...]] = [
        ("score", *model),
        ("prune", *model),  # no scores yet: even those must not be made
        ("prune", "--scores", scored),
        ("prune", "--scores", scored, "--export"),
        ("bench", *model, "--against", models["other"]),
        ("run", *model),
    ]
    for command in commands:
        refuse(*command, "--output-dir", "mine", says=("mine", "not empty", "--force"))
        refuse(*command, "--output-dir", "mine", "--force", says=("mine", "not written by compressor"))


def test_force_spares_a_stranger_who_has_a_run_json(
    refuse: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "run.json").write_text('{"laps": 12}')
    (here / "mine" / "thesis.tex").write_text("years of work")
    refuse("score", "--model", models["gpt2"], "--data", texts, "-o", "mine", "--force", says=("mine",))


def test_force_replaces_what_we_wrote(compress: Compress, models: dict[str, str], texts: str, here: Path) -> None:
    command = ("score", "--data", texts, "-o", "mine", "--model")
    assert compress(*command, models["gpt2"]).code == 0
    first = snapshot(here / "mine")
    assert compress(*command, models["other"]).code == 2
    assert snapshot(here / "mine") == first
    (here / "mine" / "left over").write_text("of the first run")
    assert compress(*command, models["other"], "--force").code == 0
    second = snapshot(here)
    assert sorted(second) == sorted(["mine", *(f"mine/{name}" for name in first)])
    assert second["mine/scores.safetensors"] != first["scores.safetensors"]


def test_a_failing_command_with_force_keeps_the_earlier_result(
    compress: Compress, refuse: Compress, models: dict[str, str], texts: str
) -> None:
    assert compress("score", "--data", texts, "-o", "mine", "--model", models["gpt2"]).code == 0
    refuse("score", "--data", "missing.jsonl", "-o", "mine", "--model", models["gpt2"], "--force")


def test_an_output_that_is_a_file_or_below_one(
    refuse: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    (here / "file").write_text("mine")
    model = ("--model", models["gpt2"], "--data", texts)
    refuse("score", *model, "-o", "file", says=("file",))
    refuse("score", *model, "-o", "file", "--force", says=("file",))
    refuse("score", *model, "-o", "file/below", says=("file/below",))


def test_bad_input_leaves_no_new_parents_of_the_output(refuse: Compress, models: dict[str, str], here: Path) -> None:
    refuse("score", "--model", models["gpt2"], "--data", "missing.jsonl", "-o", "a/b/c")
    (here / "a").mkdir()
    refuse("score", "--model", models["gpt2"], "--data", "missing.jsonl", "-o", "a/b/c")


# --- faults of the model that show only in numbers -------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model whose weights hold a NaN."""
    folder = save_tiny("gpt2", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.ln_1.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("verb", ["score", "run"])
def test_a_model_of_nan(refuse: Compress, broken: Path, texts: str, verb: str) -> None:
    refuse(verb, "--model", broken, "--data", texts, "--json", says=("finite",))


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_users_mistake_shows_its_traceback_on_request(here: Path, debug: bool) -> None:
    """In a process of its own, on a mistake that is found before anything heavy is imported."""
    environment = {**os.environ, "COMPRESSOR_DEBUG": "1" if debug else ""}
    command = [sys.executable, "-c", "from compressor.__main__ import main; main()", "score", "--triple-layers", "x"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=here)
    assert ("Traceback (most recent call last)" in shown.stderr) == debug
    assert ("RecipeError" in shown.stderr) == debug
    assert "--triple-layers is 'x'" in shown.stderr
    assert shown.stdout == ""
    assert not list(here.iterdir())
    assert shown.returncode == 2  # with its traceback it is still the user's mistake


def test_a_fault_of_ours_is_no_users_mistake(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, models: dict[str, str], texts: str, here: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(pipeline, "save_scores", fail)
    with pytest.raises(ZeroDivisionError):  # Python's own handling: traceback, exit code 1
        compress("score", "--model", models["gpt2"], "--data", texts)
    assert not list(here.iterdir())


@pytest.mark.parametrize("where", ["pipeline.save_scores", "scoring.run_scoring", "pipeline.load_for"])
def test_ctrl_c_in_process(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, models: dict[str, str], texts: str, here: Path, where: str
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"compressor.{where}", interrupt)
    outcome = compress("score", "--model", models["gpt2"], "--data", texts, "--quiet")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert "interrupted" in outcome.err
    assert outcome.out == ""
    assert not list(here.iterdir())


@pytest.mark.parametrize("verb", ["score", "run"])
def test_a_real_sigint_while_lightning_works(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, models: dict[str, str], texts: str, here: Path, verb: str
) -> None:
    from compressor.module import LanguageModel

    step = "predict_step" if verb == "score" else "test_step"

    def kill(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the signal arrives long before

    monkeypatch.setattr(LanguageModel, step, kill)
    before = signal.getsignal(signal.SIGINT)
    outcome = compress(verb, "--model", models["gpt2"], "--data", texts, "--quiet")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert not list(here.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


# --- stdout and stderr ----------------------------------------------------------------------------------------------


def all_verbs(models: dict[str, str], texts: str) -> list[tuple[object, ...]]:
    common = ("--model", models["gpt2"], "--data", texts)
    return [
        ("score", *common),
        ("prune", "--export"),
        ("bench", *common, *QUICK),
        ("run", *common, *QUICK),
    ]


def test_json_is_one_document_and_says_what_the_files_say(
    compress: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    scores, plan, measured, whole = (compress(*command, "--json") for command in all_verbs(models, texts))
    for outcome in (scores, plan, measured, whole):
        assert outcome.code == 0, outcome.err
        assert isinstance(outcome.json, dict)  # json.loads refuses a second document
        assert outcome.out.endswith("}\n")

    def assert_score(document: dict[str, Any], folder: Path) -> None:
        facts = json.loads((folder / "scores.json").read_text())
        assert facts == {**document["facts"], "schema_version": 4, "num_layers": len(document["layers"])}
        tensors = load_file(folder / "scores.safetensors")
        for index, layer in enumerate(document["layers"]):
            assert layer["layer"] == index
            for field in ("phi", "entropy", "first_key_mass", "output_norm"):
                assert torch.equal(torch.tensor(layer[field], dtype=torch.float64), tensors[f"layers.{index}.{field}"])
            assert layer["observations"] == int(tensors[f"layers.{index}.observations"])
        for index, mlp in enumerate(document["mlps"]):
            norms = tensors[f"mlps.{index}.output_norm"]
            assert (mlp["mlp"], mlp["channels"]) == (index, len(norms))
            assert mlp["output_norm"]["most"] == float(norms.max())
            assert mlp["values"]["loss-game"]["least"] == float(tensors[f"mlps.{index}.values.loss-game"].min())
        assert len(document["mlps"]) == 2
        triples = tensors["layers.0.dividends.3"]
        told = document["layers"][0]["dividends"]["3"]
        assert (told["count"], told["negative"]) == (4, int((triples < 0).sum()))
        assert told["positive"] == int((triples > 0).sum())
        assert told["mean"] == pytest.approx(float(triples.numpy().mean()))
        pairs = tensors["layers.1.pair_dividends"].numpy()
        assert document["layers"][1]["mean_pair_dividend"] == pytest.approx(pairs.sum() / 12)
        assert document["layers"][1]["dividends"] == {}
        assert "layers.1.dividends.3" not in tensors

    def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
        return {name: value for name, value in document.items() if name not in names}

    runs = here / "runs" / "gpt2"
    assert Path(scores.json["directory"]) == Path("runs/gpt2/score")
    assert_score(scores.json, runs / "score")
    assert Path(plan.json["directory"]) == Path("runs/gpt2/prune")
    assert Path(plan.json["checkpoint"]) == Path("runs/gpt2/prune/checkpoint")
    written = json.loads((runs / "prune" / "plan.json").read_text())
    assert without(plan.json, "directory", "checkpoint") == written
    assert json.loads((runs / "prune" / "checkpoint" / "pruning.json").read_text()) == written
    assert Path(measured.json["directory"]) == Path("runs/gpt2/bench")
    assert without(measured.json, "directory") == json.loads((runs / "bench" / "bench.json").read_text())
    assert set(whole.json) == {"score", "prune", "bench", "directory"}
    assert Path(whole.json["directory"]) == Path("runs/gpt2/run")
    assert_score(whole.json["score"], runs / "run" / "scores")
    written = json.loads((runs / "run" / "pruned" / "plan.json").read_text())
    assert without(whole.json["prune"], "directory", "checkpoint") == written
    assert whole.json["bench"] == json.loads((runs / "run" / "bench" / "bench.json").read_text())
    for place in (
        whole.json["score"]["directory"],
        whole.json["prune"]["directory"],
        whole.json["prune"]["checkpoint"],
    ):
        assert Path(place).is_dir()


def test_no_written_file_names_the_temporary_directory(
    compress: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    whole = all_verbs(models, texts)[-1]
    outcome = compress(*whole)
    assert outcome.code == 0
    assert ".partial" not in outcome.out
    for name, content in snapshot(here).items():
        assert ".partial" not in name
        assert b".partial" not in (content or b"")


def test_results_on_stdout_and_logs_on_stderr(
    compress: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    for command in all_verbs(models, texts):
        outcome = compress(*command)
        assert outcome.code == 0, outcome.err
        assert "on cpu" in outcome.err  # the device and the reason for it
        assert "no accelerator" in outcome.err
        assert "on cpu" not in outcome.out
        assert "\x1b" not in outcome.out + outcome.err
        assert "%|" not in outcome.err  # nobody else's progress bars
        assert "━" not in outcome.err
        folder = {"score": "score", "prune": "prune", "bench": "bench", "run": "run"}[str(command[0])]
        assert f"runs/gpt2/{folder}" in outcome.out


def test_quiet_says_nothing_but_warnings(compress: Compress, models: dict[str, str], texts: str, here: Path) -> None:
    for command in all_verbs(models, texts):
        outcome = compress(*command, "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out
    saturated = compress("score", "--model", models["gpt2"], "--data", texts, "--symbol", "sequence", "--quiet")
    assert saturated.code == 0
    assert [line.partition(":")[0] for line in saturated.err.splitlines()] == ["warning"]
    assert "saturated" in saturated.err


def test_the_sequence_symbol_reproduces_the_ceiling(
    compress: Compress, models: dict[str, str], texts: str, here: Path
) -> None:
    """24 documents, none alike: every head's entropy is ln 24, and the pairs' too."""
    flags = ("--model", models["gpt2"], "--data", texts, "--symbol", "sequence", "--json")
    document = compress("score", *flags).json
    assert document["facts"]["saturated_layers"] == [0, 1]
    assert document["facts"]["settings"]["symbol"] == "sequence"
    for layer in document["layers"]:
        assert layer["observations"] == 24
        assert layer["entropy"] == pytest.approx([3.1780538303479458] * 4, rel=1e-12)  # ln 24


def test_the_progress_bar_is_for_terminals(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, models: dict[str, str], texts: str, here: Path
) -> None:
    command = ("score", "--model", models["gpt2"], "--data", texts)

    def watched(terminal: bool, *more: str) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=terminal, width=100))
        assert compress(*command, *more).code == 0
        return screen.getvalue()

    drawn = watched(True)
    assert "scoring" in drawn
    assert re.search(r"\d/3", drawn)  # 24 documents in batches of 8
    assert "left" in drawn
    assert "scoring" not in watched(False)
    assert watched(True, "--quiet") == ""


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """On a terminal, where colours would be drawn otherwise."""
    import pty

    program = (
        "from compressor.console import stderr\nfrom rich.console import Console\n"
        "stderr.print('[red]word[/red]'); Console().print('[red]word[/red]')"
    )

    def printed(**environment: str) -> bytes:
        master, slave = pty.openpty()
        variables = {**os.environ, "TERM": "xterm", **environment}
        process = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, env=variables)
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 1000)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        process.wait()
        os.close(master)
        return shown

    assert printed().count(b"\x1b[31m") == 2
    assert b"\x1b[31m" not in printed(NO_COLOR="1")


def test_the_version(compress: Compress) -> None:
    from importlib.metadata import version

    outcome = compress("--version")
    assert (outcome.code, outcome.out) == (0, f"lightning-compressor {version('lightning-compressor')}\n")


def test_help_names_every_command_and_flags_mean_the_same_everywhere(compress: Compress) -> None:
    shown = compress("--help")
    assert shown.code == 0
    for verb in ("score", "prune", "recover", "bench", "run", "paper", "models"):
        assert verb in shown.out
        assert compress(verb, "--help").code == 0
    meanings: dict[str, set[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        for parameter in options:
            for flag in parameter.opts:
                if flag != "--scores":  # what to prune by, and what else to measure
                    meanings.setdefault(flag, set()).add(f"{parameter.name}: {parameter.help}")
        required = {"--model", "--revision", "--device", "--dtype", "--batch-size", "--seed", "--config", "-c"}
        required |= {"--output-dir", "-o", "--trust-remote-code", "--json", "--quiet", "--force"}
        if name == "models":  # reads a list that ships with the package
            required = {"--json"}
        assert required <= {flag for parameter in options for flag in parameter.opts}, name
    assert all(len(different) == 1 for different in meanings.values()), meanings
    assert all(re.fullmatch(r"--[a-z]+(-[a-z]+)*|-[a-z]", flag) for flag in meanings)


# --- the commands that we tell people to type -----------------------------------------------------------------------


class Parsed(BaseException):
    """Where a verb would have started to work."""


@pytest.fixture
def parse(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], str | None]:
    """Let the command line read its arguments and hand them over; returns what it said, None if it was content."""

    def stop(**arguments: Any) -> None:
        words = ("config", "output_dir", "force", "scores", "plan", "export", "dry_run", "against", "name")
        for name in (*words, "checkpoint", "resume"):
            arguments.pop(name, None)
        resolve(None, arguments)  # the settings themselves are sound too
        raise Parsed

    for verb in ("score", "prune", "recover", "bench", "run", "paper"):
        monkeypatch.setattr(pipeline, verb, stop)

    def call(words: list[str]) -> str | None:
        try:
            outcome = compress(*words)
        except Parsed:
            return None
        return None if outcome.code == 0 else outcome.err  # --help and --version

    return call


def commands_of(markdown: str) -> list[list[str]]:
    """The arguments of every `compress …` line in the code blocks of a page."""
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words[:3] == ["python", "-m", "compressor"]:
                words = ["compress", *words[3:]]
            if words[:1] == ["compress"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize(
    "line",
    [
        "score --model gpt2",
        "prune --ratio 0.2 --export",
        "prune --scores DIR --ratio 0.05 --dry-run",
        "bench --model A --against B --against C --json",
        "recover --checkpoint DIR --data A --eval-data B --lora 8 --max-minutes 5 --resume",
        "recover --objective loss --learning-rate 1e-4 --epochs 2 --eval-every 20 --train-samples 100",
        "run",
        "run -c recipe.yaml -o out --force --quiet --trust-remote-code",
    ],
)
def test_the_commands_of_the_specification_parse(parse: Callable[[list[str]], str | None], line: str) -> None:
    assert parse(line.split()) is None


@pytest.mark.parametrize(
    "wrong",
    ["score --repeats 2", "prune --modle x", "bench extra", "sqore", "run --ratio much", "run --ratio 2"],
)
def test_the_parser_of_this_test_refuses_what_is_wrong(parse: Callable[[list[str]], str | None], wrong: str) -> None:
    assert parse(wrong.split())


def test_the_readmes_commands_parse(parse: Callable[[list[str]], str | None]) -> None:
    commands = commands_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"score", "prune", "bench", "run"} <= {command[0] for command in commands if command}
    for command in commands:
        assert parse(command) is None, command


def test_the_shipped_recipes_are_recipes() -> None:
    recipes = sorted((ROOT / "configs").glob("**/*.yaml"))
    for recipe in recipes:
        assert isinstance(yaml.safe_load(recipe.read_text(encoding="utf-8")), dict)
        resolve(recipe, {})


def test_the_documents_of_this_file_are_what_they_seem(tmp_path: Path) -> None:
    lines = write_documents(tmp_path / "x.jsonl", 24, seed=1).read_text().splitlines()
    assert len(set(lines)) == 24

"""`recover` from end to end: what is trained on and what never is, what comes of it, and going on after Ctrl-C."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import compressor
from compressor import pipeline
from compressor.data.documents import short_hash
from compressor.errors import CompressorError
from compressor.training import Recovery
from tests.conftest import Outcome, save_tiny, snapshot, tiny_model, tiny_tokenizer, write_documents

Compress = Callable[..., Outcome]
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4, "eval_every": 4, "max_minutes": 0.0}
QUICK: dict[str, Any] = {"repeats": 1, "prompt_length": 6, "new_tokens": 3, "random_seeds": 2}


def documents(folder: str, split: str) -> list[str]:
    return [json.loads(line)["text"] for line in (Path(folder) / f"{split}.jsonl").read_text().splitlines()]


def prune(model: str, texts: str, output: Path | str) -> Path:
    """Prune half of the heads of a tiny model; returns the checkpoint."""
    scored = compressor.score(model=model, data=texts, output_dir=f"{output}-scores", bootstrap=0, samples=8)
    run = compressor.prune(scores=scored.directory, ratio=0.5, repair=False, export=True, output_dir=output)
    assert run.checkpoint is not None
    return run.checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], texts: str) -> dict[str, Path]:
    """A pruned checkpoint of every kind of tiny model."""
    folder = tmp_path_factory.mktemp("pruned")
    return {kind: prune(models[kind], texts, folder / kind) for kind in ("gpt2", "llama", "bert")}


@pytest.fixture
def pruned(here: Path, checkpoints: dict[str, Path]) -> Path:
    return checkpoints["gpt2"]


def weights(run: pipeline.RecoverRun) -> bytes:
    return (run.checkpoint / "model.safetensors").read_bytes()


class Stop:
    """Stands in for Ctrl-C at the n-th training step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left = -1
        original = Recovery.training_step

        def step(module: Recovery, batch: Any, index: int) -> torch.Tensor:
            self.left -= 1
            if self.left == 0:
                raise error("planted")
            return original(module, batch, index)

        monkeypatch.setattr(Recovery, "training_step", step)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


# --- what comes of it -----------------------------------------------------------------------------------------------


def test_the_embedded_model_recovers_in_seconds(here: Path) -> None:
    """On the documents it stops by, and on those of the test split, which had no say in anything."""
    compressor.score(samples=8, bootstrap=0, output_dir="s")
    compressor.prune(scores="s", criterion="magnitude", ratio=0.4, repair=False, export=True, output_dir="runs/p")
    run = compressor.recover(train_samples=120, epochs=1, eval_every=9)
    assert run.directory == Path("runs/embedded/recover")
    found = run.document["recovery"]["perplexity"]
    assert found["dense"] < found["after"] < found["before"]
    assert run.document["recovery"]["ended"] == "epochs"
    rows = compressor.bench(against=["runs/p", run.directory], eval_samples=16, **QUICK).document["rows"]
    dense, before, after = (row["perplexity"] for row in rows[:3])
    assert after - dense < 0.5 * (before - dense)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("settings", [{}, {"objective": "loss"}, {"hidden_weight": 0.5}, {"lora": 2}])
def test_every_kind_of_model_and_objective(
    here: Path, checkpoints: dict[str, Path], kind: str, settings: dict[str, Any]
) -> None:
    pruned = checkpoints[kind]
    run = compressor.recover(checkpoint=pruned, **SHORT, **settings, output_dir="out")
    recovery = run.document["recovery"]
    assert recovery["perplexity"]["after"] <= recovery["perplexity"]["before"]
    assert ("dense" in recovery["perplexity"]) == (settings.get("objective") != "loss")
    stored, before = (load_file(folder / "model.safetensors") for folder in (run.checkpoint, pruned))
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert (run.checkpoint / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert any(not torch.equal(value, before[name]) for name, value in stored.items()) == (recovery["best_step"] > 0)
    assert compressor.load(run.checkpoint)  # an ordinary checkpoint


def test_distillation_moves_the_pruned_model_towards_the_dense_one(here: Path, pruned: Path, texts: str) -> None:
    run = compressor.recover(checkpoint=pruned, epochs=12, batch_size=4, eval_every=10, learning_rate=5e-3)
    dense = tiny_model("gpt2")
    ids = torch.tensor([[1, *tiny_tokenizer("gpt2").convert_tokens_to_ids(documents(texts, "train")[0].split())]])

    def distance(folder: Path) -> float:
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (dense, compressor.load(folder)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert run.document["recovery"]["best_step"] > 0
    assert distance(run.checkpoint) < 0.7 * distance(pruned)


def test_the_record_tells_what_was_done(here: Path, pruned: Path, texts: str) -> None:
    run = compressor.recover(checkpoint=pruned, **SHORT, seed=3, output_dir="out")
    before = json.loads((pruned / "pruning.json").read_text())
    after = json.loads((run.checkpoint / "pruning.json").read_text())
    assert after == run.document == json.loads((run.directory / "recover.json").read_text())
    for name in ("plan", "base", "scores", "costs"):
        assert after[name] == before[name]
    recovery = after["recovery"]
    assert recovery["objective"] == "distill"
    assert recovery["settings"] | {"epochs": 2, "batch_size": 4, "seed": 3, "lora": None} == recovery["settings"]
    assert recovery["settings"]["learning_rate"] == pytest.approx(0.05 / 32)
    every = {short_hash(text) for text in documents(texts, "train")}
    parts = [set(recovery[name]["hashes"]) for name in ("data", "held_out")]
    assert parts[0] | parts[1] == every
    assert not parts[0] & parts[1]
    assert recovery["data"]["documents"] == 22
    assert (recovery["steps"], recovery["steps_planned"], recovery["ended"]) == (12, 12, "epochs")
    assert [step for step, _ in recovery["history"]] == [0, 4, 8, 12]
    assert recovery["earlier"] is None
    again = compressor.recover(checkpoint=run.directory, **SHORT, output_dir="again")  # of what was recovered before
    assert again.document["recovery"]["earlier"] == recovery


def test_the_perplexities_are_those_of_a_plain_loop(here: Path, pruned: Path, texts: str) -> None:
    run = compressor.recover(checkpoint=pruned, **SHORT, learning_rate=3e-3, output_dir="out")
    recovery = run.document["recovery"]
    held = [text for text in documents(texts, "train") if short_hash(text) in recovery["held_out"]["hashes"]]
    assert len(held) == 2
    tokenizer = tiny_tokenizer("gpt2")
    for name, model in (
        ("dense", tiny_model("gpt2")),
        ("before", compressor.load(pruned)),
        ("after", compressor.load(run.checkpoint)),
    ):
        total, count = 0.0, 0
        for text in held:
            ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(text.split())]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
        assert recovery["perplexity"][name] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)


@pytest.mark.parametrize("settings", [{"learning_rate": 30.0}, {"learning_rate": 1e12, "lora": 2}])
def test_what_makes_it_worse_is_not_kept(here: Path, pruned: Path, settings: dict[str, Any]) -> None:
    run = compressor.recover(checkpoint=pruned, **SHORT, **settings, output_dir="out")
    recovery = run.document["recovery"]
    assert recovery["best_step"] == 0
    assert recovery["perplexity"]["after"] == recovery["perplexity"]["before"]
    assert (run.checkpoint / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_the_weights_of_the_lowest_perplexity_are_exported(
    here: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch, stop: Stop
) -> None:
    """Those after step 4, which are found again in the state of a training that was stopped after it."""

    def script(*values: float) -> None:
        remaining = iter(values)
        monkeypatch.setattr("compressor.recovery.held_out_perplexity", lambda *_: next(remaining))

    script(9.0, 5.0, 7.0, 8.0, 5.0, 1.0)
    run = compressor.recover(checkpoint=pruned, **SHORT, output_dir="out")
    assert run.document["recovery"]["perplexity"] == {"before": 9.0, "after": 5.0, "dense": 1.0}
    assert run.document["recovery"]["best_step"] == 4
    script(9.0, 5.0)
    stop.left = 6
    with pytest.raises(KeyboardInterrupt):
        compressor.recover(checkpoint=pruned, **SHORT, output_dir="parts")
    kept = load_file("parts.resume/best-4.safetensors")
    exported = compressor.load(run.checkpoint).state_dict()
    assert len(kept) > 20
    for name, value in kept.items():
        assert torch.equal(exported[name.removeprefix("weight.")], value)


def test_a_checkpoint_of_sixteen_bits_stays_one(here: Path, texts: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    pruned = prune(str(tmp_path / "half"), texts, "half")
    run = compressor.recover(checkpoint=pruned, **SHORT, learning_rate=3e-3, output_dir="out")
    recovery = run.document["recovery"]
    assert recovery["perplexity"]["after"] <= recovery["perplexity"]["before"]
    tensors = load_file(run.checkpoint / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert recovery["best_step"] > 0


# --- what is never trained on ---------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Hashes of the documents that training steps get to see."""
    found: set[str] = set()
    original = Recovery.training_step
    tokenizer = tiny_tokenizer("gpt2")

    def spy(module: Recovery, batch: Any, index: int) -> torch.Tensor:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.add(short_hash(" ".join(tokenizer.convert_ids_to_tokens(ids[mask == 1][1:].tolist()))))
        return original(module, batch, index)

    monkeypatch.setattr(Recovery, "training_step", spy)
    return found


def test_neither_evaluation_nor_held_out_documents_are_trained_on(
    here: Path, pruned: Path, tmp_path: Path, texts: str, seen: set[str]
) -> None:
    """Even where the training file contains documents of the evaluation file."""
    mine, report = tmp_path / "mine.jsonl", tmp_path / "report.jsonl"
    write_documents(mine, 30, seed=11)
    write_documents(report, 5, seed=12)
    mine.write_text(mine.read_text() + report.read_text())
    settings = {"data": str(mine), "eval_data": str(report)}
    run = compressor.recover(checkpoint=pruned, **SHORT, **settings, output_dir="out")
    reported = {short_hash(json.loads(line)["text"]) for line in report.read_text().splitlines()}
    recovery = run.document["recovery"]
    assert seen == set(recovery["data"]["hashes"])
    assert len(seen) == 27
    assert not seen & reported
    assert not seen & set(recovery["held_out"]["hashes"])
    assert not reported & set(recovery["held_out"]["hashes"])


def test_what_pruning_is_reported_on_is_refused_as_training_text(
    compress: Compress, here: Path, pruned: Path, texts: str, tmp_path: Path
) -> None:
    mixed = write_documents(tmp_path / "mixed.jsonl", 20, seed=5)
    mixed.write_text((Path(texts) / "test.jsonl").read_text() + mixed.read_text())
    before = snapshot(here)
    outcome = compress("recover", "--checkpoint", pruned, "--data", mixed, "--quiet")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "evaluation set" in outcome.err
    assert "--eval-data" in outcome.err
    assert snapshot(here) == before


def test_bench_refuses_what_was_trained_on(compress: Compress, here: Path, pruned: Path, tmp_path: Path) -> None:
    mine, other = (write_documents(tmp_path / f"{seed}.jsonl", 20, seed) for seed in (71, 72))
    run = compressor.recover(checkpoint=pruned, **SHORT, data=str(mine), eval_data=str(other), output_dir="runs/out")
    outcome = compress("bench", "--against", run.checkpoint, "--eval-data", mine, "--eval-samples", 0, "--quiet")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "20 of the 20 documents of 71.jsonl recovered" in outcome.err
    again = compressor.recover(checkpoint=run.checkpoint, **SHORT, output_dir="runs/again")  # on other text
    outcome = compress("bench", "--against", again.checkpoint, "--eval-data", mine, "--eval-samples", 0, "--quiet")
    assert "20 of the 20" in outcome.err
    assert compressor.bench(against=[run.checkpoint], eval_data=str(other), **QUICK).document["rows"]


def test_a_model_that_was_trained_and_pruned_again_remembers(
    compress: Compress, here: Path, pruned: Path, tmp_path: Path, texts: str
) -> None:
    mine, other = (write_documents(tmp_path / f"{seed}.jsonl", 20, seed) for seed in (71, 72))
    run = compressor.recover(checkpoint=pruned, **SHORT, data=str(mine), eval_data=str(other), output_dir="runs/out")
    again = prune(str(run.directory), texts, "runs/again")
    outcome = compress("bench", "--against", again, "--eval-data", mine, "--eval-samples", 0, "--quiet")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "20 of the 20 documents of 71.jsonl recovered" in outcome.err


def test_bench_takes_up_what_was_recovered_last_and_says_that_it_was(
    compress: Compress, here: Path, models: dict[str, str], texts: str
) -> None:
    prune(models["gpt2"], texts, "runs/gpt2/p")
    compressor.recover(**SHORT)
    flags = ("--repeats", 1, "--prompt-length", 5, "--new-tokens", 2, "--random-seeds", 2)
    outcome = compress("bench", *flags, "--json")
    assert outcome.code == 0, outcome.err
    assert "runs/gpt2/recover/checkpoint" in outcome.err
    assert outcome.json["rows"][1]["name"] == "loss-game 4/8 recovered"
    assert "random pruning was not trained" in outcome.err
    both = compress("bench", "--against", "runs/gpt2/p", "--against", "runs/gpt2/recover", *flags, "--json")
    assert [row["name"] for row in both.json["rows"][:3]] == ["dense", "loss-game 4/8", "loss-game 4/8 recovered"]
    prune(models["gpt2"], texts, "runs/gpt2/newer")
    assert "runs/gpt2/newer/checkpoint" in compress("bench", *flags).err


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {}), ("bert", {"hidden_weight": 0.5}), ("llama", {"lora": 2}), ("gpt2", {"objective": "loss"})],
)
def test_a_resumed_recovery_gives_the_same_weights(
    here: Path, checkpoints: dict[str, Path], stop: Stop, kind: str, settings: dict[str, Any]
) -> None:
    """Bit for bit, though it is stopped twice: in the first epoch, and in the second."""
    pruned = checkpoints[kind]
    settings = {**SHORT, **settings, "eval_every": 2, "learning_rate": 1e-3}
    whole = compressor.recover(checkpoint=pruned, **settings, output_dir="whole")
    stop.left = 6
    with pytest.raises(KeyboardInterrupt):
        compressor.recover(checkpoint=pruned, **settings, output_dir="parts")
    assert not Path("parts").exists()
    state = json.loads(Path("parts.resume/state.json").read_text())
    assert state["step"] == 4
    torch.manual_seed(1234)  # of no concern to what was begun
    stop.left = 5
    with pytest.raises(KeyboardInterrupt):
        compressor.recover(resume=True, output_dir="parts")
    assert json.loads(Path("parts.resume/state.json").read_text())["step"] == 8
    parts = compressor.recover(resume=True, output_dir="parts")
    assert len({value for _, value in whole.document["recovery"]["history"]}) > 4  # all that happened is compared
    assert weights(parts) == weights(whole)
    one, other = (
        {name: value for name, value in run.document["recovery"].items() if name != "minutes"} for run in (parts, whole)
    )
    assert one == other
    assert not Path("parts.resume").exists()


def test_a_resumed_recovery_on_the_command_line(
    compress: Compress, here: Path, models: dict[str, str], texts: str, stop: Stop
) -> None:
    prune(models["gpt2"], texts, "runs/gpt2/p")
    flags = ("--epochs", 1, "--batch-size", 4, "--eval-every", 2)
    stop.left = 4
    outcome = compress("recover", *flags)
    assert (outcome.code, outcome.out) == (130, "")
    assert "--resume goes on from step 2" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("interrupted")
    names = {Path(name).suffix for name, content in snapshot(here / "runs/gpt2/recover.resume").items() if content}
    assert names == {".json", ".safetensors"}
    refused = compress("recover", *flags, "--quiet")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "--resume" in refused.err
    done = compress("recover", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["directory"] == "runs/gpt2/recover"
    assert done.json["recovery"]["steps"] == 6
    assert not Path("runs/gpt2/recover.resume").exists()
    shown = compress("recover", *flags)
    assert shown.code == 0
    for word in ("recovered", "dense", "held-out", "runs/gpt2/recover-2/checkpoint", "next: compress bench"):
        assert word in shown.out


def test_force_starts_anew(here: Path, pruned: Path, stop: Stop) -> None:
    stop.left = 4
    with pytest.raises(KeyboardInterrupt):
        compressor.recover(checkpoint=pruned, **SHORT, output_dir="out")
    run = compressor.recover(checkpoint=pruned, **SHORT, seed=1, output_dir="out", force=True)
    assert run.document["recovery"]["settings"]["seed"] == 1
    assert not Path("out.resume").exists()


def test_what_fails_after_the_training_is_no_reason_to_train_again(
    here: Path, pruned: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_checkpoint", fail)
        with pytest.raises(RuntimeError, match="planted"):
            compressor.recover(checkpoint=pruned, **SHORT, output_dir="out")
    stop.left = 1  # no step is taken
    run = compressor.recover(resume=True, output_dir="out")
    assert run.document["recovery"]["ended"] == "epochs"
    assert stop.left == 1


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(compress: Compress, here: Path) -> Callable[..., None]:
    def call(*words: object, says: tuple[str, ...]) -> None:
        before = snapshot(here)
        outcome = compress("recover", *words, "--quiet")
        assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1), outcome.err
        for word in says:
            assert word in outcome.err
        assert snapshot(here) == before

    return call


def test_the_task_is_the_one_that_was_pruned_for(here: Path, texts: str) -> None:
    """A BERT that may decode does both; left to its config it would be the causal one."""
    model = tiny_model("bert")
    model.config.is_decoder = True
    model.save_pretrained("both")
    config = json.loads(Path("both/config.json").read_text())
    Path("both/config.json").write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}))
    tiny_tokenizer("bert").save_pretrained("both")
    scored = compressor.score(model="both", data=texts, task="masked", samples=4, bootstrap=0)
    pruned = compressor.prune(scores=scored.directory, export=True)
    run = compressor.recover(checkpoint=pruned.directory, **SHORT)
    assert yaml.safe_load((run.directory / "recipe.yaml").read_text())["task"] == "masked"


def test_nothing_to_recover(refuse: Callable[..., None], models: dict[str, str], pruned: Path) -> None:
    refuse(says=("--checkpoint", "prune --export"))  # `pruned` is not under runs/
    refuse("--checkpoint", models["gpt2"], says=("does not say what it was pruned from",))
    refuse("--checkpoint", "missing", says=("missing",))
    refuse("--resume", says=("no interrupted recovery", "under runs"))
    refuse("--resume", "-o", "out", says=("no interrupted recovery", "out"))


def test_another_dense_model(refuse: Callable[..., None], models: dict[str, str], pruned: Path) -> None:
    refuse("--checkpoint", pruned, "--model", models["other"], says=("was not pruned from", "--objective loss"))


def test_a_broken_checkpoint(here: Path, pruned: Path) -> None:
    from safetensors.torch import save_file

    file = Path(shutil.copytree(pruned, "broken")) / "model.safetensors"
    tensors = {name: torch.full_like(value, float("nan")) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match="not finite"):
        compressor.recover(checkpoint="broken", **SHORT, output_dir="out")
    assert not Path("out.resume").exists()


def test_adapters_without_peft(refuse: Callable[..., None], pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refuse("--checkpoint", pruned, "--lora", 4, says=("lightning-compressor[recover]",))


def test_a_recovery_is_resumed_as_it_was_begun(
    refuse: Callable[..., None], compress: Compress, here: Path, pruned: Path, texts: str, tmp_path: Path, stop: Stop
) -> None:
    mine = tmp_path / "mine.jsonl"
    shutil.copy(Path(texts) / "train.jsonl", mine)
    stop.left = 4
    with pytest.raises(KeyboardInterrupt):
        compressor.recover(checkpoint=pruned, **SHORT, data=str(mine), output_dir="out")
    refuse("--resume", "-o", "out", "--seed", 5, says=("seed is 5", "begun with 0"))
    refuse("--resume", "-o", "out", "--checkpoint", "else", says=("--checkpoint",))
    (here / "r.yaml").write_text("learning_rate: 0.5\n")
    refuse("--resume", "-o", "out", "-c", "r.yaml", says=("learning_rate is 0.5",))
    write_documents(mine, 24, seed=9)
    refuse("--resume", "-o", "out", says=("changed",))
    shutil.copy(Path(texts) / "train.jsonl", mine)
    flags = ("--checkpoint", pruned, "--epochs", 2, "--batch-size", 4)  # what agrees may be said again
    assert compress("recover", "--resume", "-o", "out", *flags).code == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "distil"),
        ("hidden_weight", -1.0),
        ("hidden_weight", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("epochs", 0),
        ("max_minutes", -1.0),
        ("max_minutes", float("inf")),
        ("eval_every", 0),
        ("train_samples", -1),
        ("lora", 0),
    ],
)
def test_settings_out_of_range(here: Path, field: str, value: object) -> None:
    with pytest.raises(CompressorError, match=f"^{field} is "):
        compressor.recover(**{field: value})


def test_hidden_states_of_no_model(here: Path) -> None:
    with pytest.raises(CompressorError, match="hidden_weight"):
        compressor.recover(objective="loss", hidden_weight=1.0)

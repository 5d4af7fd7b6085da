"""The parts of a training: losses against sums written out, schedules against formulas, adapters, batches, state."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compressor import trainer
from compressor.attention import prune_heads
from compressor.callbacks import recovery as callback
from compressor.callbacks.recovery import Recovering
from compressor.data import StepBatches, TextDataModule, held_out_batches, load_training_text, training_batches
from compressor.data.documents import hold_out, hold_out_to_stop
from compressor.errors import ArtefactError, CompressorError, ModelError, RecipeError
from compressor.trainer import run_recovery
from compressor.training import (
    Budget,
    Recovery,
    Standing,
    StateFiles,
    adapt,
    divergence,
    held_out_perplexity,
    hidden_distance,
    learning_rate_factor,
    read_state,
)
from compressor.training.schedule import WARMUP
from compressor.types import Task
from tests.conftest import CONTEXT, tiny_model, tiny_tokenizer, write_documents

KINDS: list[tuple[str, Task]] = [("gpt2", "causal"), ("llama", "causal"), ("bert", "masked")]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the objective --------------------------------------------------------------------------------------------------


def test_the_divergence_is_the_sum_written_out() -> None:
    logits, wanted = noise(2, 5, 7, seed=1), noise(2, 5, 7, seed=2)
    labels = torch.tensor([[3, -100, 0, 1, -100], [-100, 2, -100, -100, -100]])
    total = 0.0
    for row, place in [(0, 0), (0, 2), (0, 3), (1, 1)]:
        p = [math.exp(value) for value in wanted[row, place].tolist()]
        q = [math.exp(value) for value in logits[row, place].tolist()]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(divergence(logits, wanted, labels)) == pytest.approx(total / 4, rel=1e-12)


def test_the_dense_model_comes_first_in_the_divergence() -> None:
    """Wanted: even odds on two of eight; learnt: even odds on all. One way that is ln 4, the other way it is ∞."""
    wanted = torch.full((1, 1, 8), -1e9, dtype=torch.float64)
    wanted[..., :2] = 0
    assert float(divergence(torch.zeros(1, 1, 8), wanted, torch.zeros(1, 1))) == pytest.approx(math.log(4), rel=1e-6)


def test_equal_models_have_nothing_to_learn() -> None:
    logits = noise(2, 4, 9).requires_grad_()
    loss = divergence(logits, logits.detach().clone(), torch.zeros(2, 4))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-15


def test_the_gradient_of_the_divergence_is_the_difference_of_the_probabilities() -> None:
    logits, wanted = noise(1, 3, 5, seed=3).requires_grad_(), noise(1, 3, 5, seed=4)
    divergence(logits, wanted, torch.zeros(1, 3)).backward()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - wanted.softmax(-1)) / 3)


def test_sixteen_bits_are_widened_and_nothing_to_predict_is_zero() -> None:
    logits = noise(1, 3, 5).bfloat16()
    assert divergence(logits, logits + 1, torch.zeros(1, 3)).dtype == torch.float32
    assert float(divergence(logits, logits.flip(-1), torch.full((1, 3), -100))) == 0


def test_the_hidden_distance_is_the_mean_written_out() -> None:
    states, wanted = [noise(2, 3, 4, seed=seed) for seed in (1, 2)], [noise(2, 3, 4, seed=seed) for seed in (3, 4)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    squares = [
        float((own[row, place, channel] - other[row, place, channel]) ** 2)
        for own, other in zip(states, wanted, strict=True)
        for row, place in [(0, 0), (0, 1), (0, 2), (1, 0)]
        for channel in range(4)
    ]
    expected = sum(squares) / len(squares)
    assert float(hidden_distance(states, wanted, mask)) == pytest.approx(expected, rel=1e-12)
    wider = [*states, noise(2, 3, 6)], [*wanted, noise(2, 3, 5)]
    assert float(hidden_distance(*wider, mask)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ModelError, match="equal width"):
        hidden_distance([noise(2, 3, 6)], [noise(2, 3, 5)], mask)


def batch_of(task: Task) -> dict[str, torch.Tensor]:
    ids = torch.randint(6, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[2, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if task == "masked":
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[:, 1::4] = True
        labels = labels.masked_fill(~hidden, -100)
        ids = ids.masked_fill(hidden & (mask == 1), 4)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("kind", "task"), KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_that_of_documents_one_by_one(kind: str, task: Task, weight: float) -> None:
    """No padding, no alignment, no Lightning: every position that predicts something, on its own."""
    dense, slim = tiny_model(kind), prune_heads(tiny_model(kind), {0: [1, 2], 1: [0]})
    batch = batch_of(task)
    found = Recovery(slim, task, dense, 1e-3, weight).training_step(batch, 0)
    total, places, squares = 0.0, 0, []
    for row, length in enumerate((12, 9, 5)):
        ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row, :length]
        with torch.no_grad():
            learnt, wanted = (model(input_ids=ids, output_hidden_states=True) for model in (slim, dense))
        p, q = (output.logits[0].double().softmax(-1) for output in (wanted, learnt))
        real = range(length - 1) if task == "causal" else [place for place in range(length) if labels[place] != -100]
        for place in real:
            total += float((p[place] * (p[place] / q[place]).log()).sum())
            places += 1
        squares += [
            (own[0] - other[0]).square().mean(-1)
            for own, other in zip(learnt.hidden_states, wanted.hidden_states, strict=True)
        ]
    distance = float(torch.cat(squares).mean())  # as many layers for every token
    assert places > 5
    assert distance > 1e-3
    assert found.item() == pytest.approx(total / places + weight * distance, rel=1e-4)


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_a_model_that_is_the_dense_one_stays_where_it_is(kind: str, task: Task) -> None:
    module = Recovery(tiny_model(kind), task, tiny_model(kind), 1e-3, hidden_weight=1.0)
    loss = module.training_step(batch_of(task), 0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for name, parameter in module.trained.items():
        assert parameter.grad is None or float(parameter.grad.abs().max()) < 1e-6, name
    assert module.dense is not None
    assert all(parameter.grad is None for parameter in module.dense.parameters())


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_without_a_dense_model_the_loss_is_hugging_faces(kind: str, task: Task) -> None:
    model, batch = tiny_model(kind), batch_of(task)
    found = Recovery(model, task, None, 1e-3).training_step(batch, 0)
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_only_the_pruned_model_is_trained_and_without_decay() -> None:
    module = Recovery(tiny_model("gpt2"), "causal", tiny_model("gpt2", seed=1), 0.02)
    optimiser = module.configure_optimizers()
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.model.parameters()}
    assert {(group["lr"], group["weight_decay"]) for group in optimiser.param_groups} == {(0.02, 0.0)}


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    assert learning_rate_factor(0) == 0
    assert learning_rate_factor(WARMUP / 4) == pytest.approx(0.25)
    assert learning_rate_factor(WARMUP) == 1
    assert learning_rate_factor((1 + WARMUP) / 2) == pytest.approx(0.5)
    assert learning_rate_factor(WARMUP + (1 - WARMUP) / 3) == pytest.approx(0.75)  # (1 + cos 60°) / 2
    assert learning_rate_factor(1) == pytest.approx(0, abs=1e-12)
    values = [learning_rate_factor(WARMUP + (1 - WARMUP) * place / 50) for place in range(51)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_the_budget_is_what_ends_first() -> None:
    assert Budget(200, 60).progress(50, 6) == 0.25
    assert Budget(200, 60).progress(50, 45) == 0.75
    assert Budget(200, 60).progress(3, 61) == 1
    assert Budget(200).progress(50, 1e9) == 0.25  # no limit on time
    assert Budget(200).progress(200, 0) == 1


# --- the text -------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_whatever_the_order_and_never_more_than_200() -> None:
    texts = [f"text {number}" for number in range(57)]
    learnt, held = hold_out_to_stop(texts)
    assert len(held) == 5
    assert sorted((*learnt, *held)) == sorted(texts)
    assert set(hold_out_to_stop(texts[::-1])[1]) == set(held)
    assert set(held) != set(hold_out(texts)[1][:5])
    assert len(hold_out_to_stop([str(number) for number in range(5000)])[1]) == 200
    assert len(hold_out_to_stop(["a", "b"])[1]) == 1


def test_a_text_that_occurs_twice_is_on_one_side_only() -> None:
    learnt, held = hold_out_to_stop([f"text {number % 15}" for number in range(100)])  # 10 of them
    assert held
    assert not set(learnt) & set(held)


def test_the_batches_of_a_training_are_those_of_its_epochs_from_any_step_on() -> None:
    windows = [torch.ones(length) for length in (5, 9, 3, 3, 8, 7, 2)]
    batches = StepBatches(windows, 2, seed=3, epochs=3)
    every = list(batches)
    assert (len(batches), len(every), batches.per_epoch) == (12, 12, 4)
    for epoch in range(3):
        seen = [draw for batch in every[4 * epoch : 4 * epoch + 4] for draw in batch]
        assert sorted(seen) == [(index, epoch) for index in range(7)]
    orders = {tuple(index for batch in every[4 * epoch : 4 * epoch + 4] for index, _ in batch) for epoch in range(3)}
    assert len(orders) > 1
    for start in range(13):
        rest = StepBatches(windows, 2, seed=3, epochs=3, start=start)
        assert list(rest) == every[start:]
        assert len(rest) == 12 - start
    assert list(StepBatches(windows, 2, seed=4, epochs=3)) != every


def test_the_batches_are_the_data_modules(texts: str) -> None:
    """Epoch by epoch the same tensors as from its own loader; a masked model's masks are new in every epoch."""
    tokenizer = tiny_tokenizer("bert")
    text = load_training_text(tokenizer, "masked", texts, None, "both", 0, CONTEXT, 5)
    data = TextDataModule(tokenizer, task="masked", data=texts, max_length=CONTEXT, batch_size=4, seed=5)
    data.setup()
    data._windows = (text.train, text.held_out)
    batches = StepBatches(text.train.input_ids, 4, 5, epochs=2)
    ours = list(training_batches(text.train, tokenizer, "masked", batches))
    loader = data.train_dataloader()
    theirs: list[dict[str, torch.Tensor]] = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        theirs += list(loader)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_adapters_change_nothing_at_first_and_are_an_ordinary_model_when_merged(kind: str, task: Task) -> None:
    model = prune_heads(tiny_model(kind), {0: [1, 2, 3], 1: [0]})
    batch = batch_of(task)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = model(**inputs).logits
        adapted = adapt(model, 3, seed=0)
        assert torch.equal(model(**inputs).logits, first)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert {name.rpartition("lora_")[2][:1] for name in trained} == {"A", "B"}
        for seed, value in enumerate(trained.values()):
            value.copy_(noise(*value.shape, seed=seed) / 5)
        moved = model(**inputs).logits
        adapted.merge()
        torch.testing.assert_close(model(**inputs).logits, moved, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, first, atol=1e-2)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert [type(module) for module in model.modules()] == kinds
    assert all(value.requires_grad for value in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
    }
    assert changed == linear


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_merged_adapter_is_the_product_of_its_factors(kind: str) -> None:
    """W + 2 B A, transposed where `Conv1D` keeps its weight so."""
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = adapt(model, 2, seed=1)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for seed, (name, value) in enumerate(model.named_parameters()):
            if value.requires_grad:
                value.copy_(noise(*value.shape, seed=seed))
                place, _, rest = name.partition(".lora_")
                factors.setdefault(place, {})[rest[0]] = value.detach().clone()
    adapted.merge()
    assert len(factors) == (8 if kind == "gpt2" else 14)
    for name, pair in factors.items():
        delta = 2 * pair["B"] @ pair["A"]
        weight = before[f"{name}.weight"] + (delta.T if kind == "gpt2" else delta)
        torch.testing.assert_close(model.state_dict()[f"{name}.weight"], weight, rtol=1e-4, atol=1e-4)


def test_adapters_are_drawn_by_their_seed() -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(99)
        before = torch.get_rng_state()
        model = adapt(tiny_model("gpt2"), 2, seed).model
        torch.manual_seed(99)
        assert torch.equal(torch.get_rng_state(), before)
        return [value for name, value in model.named_parameters() if "lora_A" in name]

    one, same, other = factors(1), factors(1), factors(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_peft_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"lightning-compressor\[recover\]"):
        adapt(tiny_model("gpt2"), 2, 0)


# --- the training itself --------------------------------------------------------------------------------------------


class Clock:
    """Time that passes by as much as it is told, every time somebody looks."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def train(tmp_path: Path, texts: str) -> Callable[..., tuple[Recovering, Recovery]]:
    """Train the tiny GPT-2 without some heads; 22 documents, in batches of two."""

    def call(
        folder: str = "state",
        *,
        seconds: float = 0.0,
        tick: float = 0.0,
        every: int = 3,
        rate: float = 1e-3,
        values: list[float] | None = None,
        epochs: int = 2,
    ) -> tuple[Recovering, Recovery]:
        tokenizer = tiny_tokenizer("gpt2")
        text = load_training_text(tokenizer, "causal", texts, None, "both", 0, CONTEXT, 0)
        slim: PreTrainedModel = prune_heads(tiny_model("gpt2"), {0: [1, 2], 1: [0]})
        module = Recovery(slim, "causal", tiny_model("gpt2"), rate)
        batches = StepBatches(text.train.input_ids, 2, 0, epochs)
        files = StateFiles(tmp_path / folder, {"a": 1})
        script = iter(values or [])
        loader = list(held_out_batches(text.held_out, tokenizer, "causal", 2, 0))

        def evaluate() -> float:
            return next(script) if values else held_out_perplexity(module, loader)

        recovering = Recovering(Budget(batches.steps, seconds), every, evaluate, files, Clock(tick))
        batches.start = recovering.standing.step
        run_recovery(
            module, training_batches(text.train, tokenizer, "causal", batches), recovering, torch.device("cpu")
        )
        return recovering, module

    return call


def test_it_evaluates_before_the_first_step_at_every_interval_and_after_the_last(train: Any) -> None:
    recovering, _ = train(every=3)
    steps = [step for step, _ in recovering.standing.history]
    total = recovering.budget.steps
    assert total == 22
    assert steps == [*range(0, total, 3), total]
    assert (recovering.standing.step, recovering.standing.ended) == (total, "epochs")


def test_distillation_brings_the_pruned_model_nearer_to_the_dense_one(train: Any) -> None:
    _, module = train(rate=5e-3, epochs=8)
    slim = prune_heads(tiny_model("gpt2"), {0: [1, 2], 1: [0]})
    batch = batch_of("causal")
    losses = [
        Recovery(model, "causal", tiny_model("gpt2"), 1e-3).training_step(batch, 0).item()
        for model in (slim, module.model)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_the_learning_rate_of_every_step_follows_the_schedule(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    norms: list[float] = []
    original = Recovery.training_step

    def spy(self: Recovery, batch: Any, index: int) -> torch.Tensor:
        rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return 1000 * original(self, batch, index)  # whose gradient is far above what is let through

    def clipped(self: Recovery, optimiser: Any) -> None:
        grads = [value.grad for value in self.trained.values() if value.grad is not None]
        if grads:  # of the step before
            norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    monkeypatch.setattr(Recovery, "training_step", spy)
    monkeypatch.setattr(Recovery, "on_before_zero_grad", clipped)
    recovering, _ = train(rate=0.01)
    total = recovering.budget.steps
    assert rates == pytest.approx([0.01 * learning_rate_factor((step + 0.5) / total) for step in range(total)])
    assert rates[0] > 0
    assert max(norms) < 1.001
    assert min(norms) > 0.9


def test_a_clock_that_runs_out_ends_the_training_with_a_whole_schedule(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    original = Recovery.training_step

    def spy(self: Recovery, batch: Any, index: int) -> torch.Tensor:
        rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return original(self, batch, index)

    monkeypatch.setattr(Recovery, "training_step", spy)
    recovering, _ = train(rate=0.01, seconds=30.0, tick=1.0, every=100)
    assert recovering.standing.ended == "max_minutes"
    assert 3 < recovering.standing.step < recovering.budget.steps
    assert recovering.standing.history[-1][0] == recovering.standing.step
    assert max(rates) > 0.008
    assert rates[-1] < 0.002  # it has come down all the same
    assert recovering.standing.seconds < 40.0  # the clock looks a second on with every look


def test_bfloat16_is_for_gpus_that_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Nobody:
        def fit(self, *args: object, **kwargs: object) -> None: ...

    def spy(device: torch.device, callbacks: list[Any], **settings: Any) -> Nobody:
        asked.append(settings["precision"])
        return Nobody()

    monkeypatch.setattr(trainer, "_trainer", spy)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    for device, supported in (("cpu", True), ("cuda", True), ("cuda", False)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        run_recovery(Recovery(tiny_model("gpt2"), "causal", None, 0.1), None, None, torch.device(device))  # type: ignore[arg-type]
    assert asked == ["32-true", "bf16-mixed", "32-true"]


def test_in_mixed_precision_the_weights_stay_wide(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer._trainer
    dtypes: set[torch.dtype] = set()
    output = Recovery._output

    def spy(module: Recovery, model: PreTrainedModel, batch: Any) -> Any:
        found = output(module, model, batch)
        dtypes.add(found.logits.dtype)
        return found

    def mixed(device: torch.device, callbacks: list[Any], **settings: Any) -> Any:
        return original(device, callbacks, **{**settings, "precision": "bf16-mixed"})

    plain = train("plain", rate=5e-3, epochs=4)[0].standing
    monkeypatch.setattr(trainer, "_trainer", mixed)
    monkeypatch.setattr(Recovery, "_output", spy)
    recovering, module = train(rate=5e-3, epochs=4)
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in module.model.state_dict().values()} == {torch.float32}
    assert recovering.standing.history[-1][1] == pytest.approx(plain.history[-1][1], rel=0.1)


def test_weights_are_kept_at_the_lowest_perplexity(train: Any, tmp_path: Path) -> None:
    values = [9.0, 8.0, 5.0, 6.0, 7.0, 8.0, 5.0, 9.0, 9.0]
    recovering, module = train(every=3, values=values)
    assert recovering.standing.best == (6, 5.0)  # the earlier of equals
    at_six, after = train("other", every=3, values=[3.0, 2.0, 1.0, *values[3:]], epochs=2)[1], module
    files = StateFiles(tmp_path / "state", {})
    last = {name: value.detach().clone() for name, value in after.trained.items()}
    files.restore_best(after.trained)
    assert any(not torch.equal(value, last[name]) for name, value in after.trained.items())
    StateFiles(tmp_path / "other", {}).restore_best(at_six.trained)
    for name, value in after.trained.items():
        assert torch.equal(value, at_six.trained[name])


def test_what_does_not_get_better_is_ended(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback, "PATIENCE", 3)
    recovering, _ = train(every=1, values=[5.0, 4.0, *[4.5] * 9])
    assert recovering.standing.ended == "no improvement"
    assert recovering.standing.step == 4
    assert recovering.standing.best == (1, 4.0)


def test_what_is_no_longer_finite_is_ended(train: Any, tmp_path: Path) -> None:
    recovering, _ = train(every=2, values=[5.0, 4.0, math.inf])
    assert recovering.standing.ended == "not finite"
    assert recovering.standing.history == ((0, 5.0), (2, 4.0), (4, None))
    document = read_state(tmp_path / "state")  # which is JSON all the same
    assert document is not None
    assert document["history"][-1] == [4, None]


def test_a_model_that_is_broken_from_the_start_is_not_trained(train: Any, tmp_path: Path) -> None:
    recovering, _ = train(values=[math.inf, 1.0, 1.0])
    assert recovering.standing.history == ()
    assert read_state(tmp_path / "state") is None


# --- the state ------------------------------------------------------------------------------------------------------


def small() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    parameters = {name: nn.Parameter(noise(3, 2, seed=seed).float()) for seed, name in enumerate(("a.b", "c"))}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)


def step(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    sum((value**2 * torch.rand(())).sum() for value in parameters.values()).backward()  # type: ignore[union-attr]
    optimiser.step()


def test_a_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights, moments and the random stream: a step after reading is the step that would have come."""
    torch.manual_seed(0)
    parameters, optimiser = small()
    for _ in range(3):
        step(parameters, optimiser)
    files = StateFiles(tmp_path / "s", {"x": 1})
    standing = Standing(3, 1.25, ((0, 2.0), (3, 1.0)))
    files.save(standing, parameters, optimiser)
    for _ in range(2):
        step(parameters, optimiser)
    again, fresh = small()
    assert files.standing() == standing
    files.restore(again, fresh)
    for _ in range(2):
        step(again, fresh)
    for name, value in parameters.items():
        assert torch.equal(again[name], value)
    state = [copy.deepcopy(one.state_dict()["state"]) for one in (optimiser, fresh)]
    assert torch.equal(state[0][1]["exp_avg_sq"], state[1][1]["exp_avg_sq"])
    assert {file.suffix for file in (tmp_path / "s").iterdir()} == {".json", ".safetensors"}


def test_a_new_state_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    parameters, optimiser = small()
    files = StateFiles(tmp_path / "s", {})
    files.save(Standing(0, 0.0, ((0, 2.0),)), parameters, optimiser)
    files.save(Standing(5, 0.5, ((0, 2.0), (5, 1.0))), parameters, optimiser)
    files.save(Standing(9, 0.9, ((0, 2.0), (5, 1.0), (9, 3.0))), parameters, optimiser)
    assert {file.name for file in (tmp_path / "s").iterdir()} == {
        "state.json", "step-9.safetensors", "best-5.safetensors"
    }  # fmt: skip


def test_a_write_that_fails_leaves_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimiser = small()
    files = StateFiles(tmp_path / "s", {})
    files.save(Standing(1, 0.1, ((0, 2.0), (1, 1.0))), parameters, optimiser)
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    step(parameters, optimiser)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compressor.training.state.to_json", full)
    with pytest.raises(ArtefactError, match="No space left"):
        files.save(Standing(2, 0.2, ((0, 2.0), (1, 1.0), (2, 0.5))), parameters, optimiser)
    assert files.standing().step == 1
    files.restore(parameters, optimiser)
    assert all(torch.equal(value, kept[name]) for name, value in parameters.items())


@pytest.mark.parametrize("how", ["no tensors", "cut short", "no number", "no json", "other shapes"])
def test_a_damaged_state_is_refused(tmp_path: Path, how: str) -> None:
    parameters, optimiser = small()
    files = StateFiles(tmp_path / "s", {})
    files.save(Standing(0, 0.0, ((0, 2.0),)), parameters, optimiser)
    tensors, state = tmp_path / "s" / "step-0.safetensors", tmp_path / "s" / "state.json"
    if how == "no tensors":
        tensors.unlink()
    elif how == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:60])
    elif how == "no number":
        state.write_text(state.read_text().replace('"step": 0', '"step": "x"'))
    elif how == "no json":
        state.write_text("{")
    else:
        parameters["c"] = nn.Parameter(noise(2, 2))

    def read() -> None:
        files.standing()
        files.restore(parameters, optimiser)

    with pytest.raises(CompressorError) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_documents_of_one_text_are_too_few(tmp_path: Path) -> None:
    write_documents(tmp_path / "train.jsonl", 1, seed=1)
    write_documents(tmp_path / "test.jsonl", 2, seed=2)
    with pytest.raises(CompressorError, match="one document"):
        load_training_text(tiny_tokenizer("gpt2"), "causal", str(tmp_path), None, "both", 0, CONTEXT, 0)

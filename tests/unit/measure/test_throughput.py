"""What is run, in which order and between which readings of the clock."""

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from compressor.errors import RecipeError
from compressor.measure import Samples, measure_throughput, speedup, throughput, throughput_steps

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def gpt2(vocabulary: int = 50) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(**ENCODER, vocab_size=50, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    )


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**ENCODER, vocab_size=50))


Call = tuple[str, torch.Tensor]


def record(models: dict[str, PreTrainedModel]) -> list[Call]:
    """(name, input ids) of every forward to come."""
    calls: list[Call] = []
    for name, model in models.items():

        def note(module: object, args: object, kwargs: dict[str, torch.Tensor], name: str = name) -> None:
            calls.append((name, kwargs["input_ids"].clone()))

        model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.fixture
def half_a_second_per_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = itertools.count(step=0.5)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("half_a_second_per_reading")
def test_rates_are_tokens_over_seconds() -> None:
    measured = measure_throughput(
        {"a": gpt2(), "b": gpt2()}, causal=True, batch_size=3, prompt_length=8, new_tokens=5, repeats=2
    )
    for result in measured.values():
        assert result.prefill == Samples((48.0, 48.0))  # 3 x 8 / 0.5
        assert result.decode == Samples((30.0, 30.0))  # 3 x 5 / 0.5


def test_every_repeat_times_every_model_once_in_rotating_order() -> None:
    models = {"a": gpt2(), "b": gpt2(), "c": gpt2()}
    calls = record(models)
    measure_throughput(models, causal=True, batch_size=2, prompt_length=4, new_tokens=2, repeats=4)
    order = "".join(name for name, _ in calls[::3])  # one prompt and two tokens each
    assert order == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [ids.shape for _, ids in calls] == [(2, 4), (2, 1), (2, 1)] * 15
    prompts = [ids for _, ids in calls[::3]]
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_decoding_is_greedy_generation_past_any_end(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build()
    calls = record({"model": model})
    measure_throughput({"model": model}, causal=True, batch_size=2, prompt_length=6, new_tokens=8, repeats=1)
    fed = [ids for _, ids in calls[-9:]]
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    generated = model.eval().generate(fed[0], attention_mask=torch.ones_like(fed[0]), do_sample=False, max_new_tokens=8)
    assert torch.equal(torch.cat(fed, dim=1), generated)


def test_the_seed_decides_the_prompt_and_the_smallest_vocabulary_bounds_it() -> None:
    def prompt(seed: int) -> torch.Tensor:
        models: dict[str, PreTrainedModel] = {"large": gpt2(50), "small": gpt2(5)}
        calls = record(models)
        measure_throughput(models, causal=True, batch_size=4, prompt_length=16, new_tokens=1, repeats=1, seed=seed)
        return calls[0][1]

    assert torch.equal(prompt(1), prompt(1))
    assert not torch.equal(prompt(1), prompt(2))
    assert prompt(1).max() == 4


def test_masked_models_do_not_decode() -> None:
    models: dict[str, PreTrainedModel] = {"bert": bert()}
    calls, steps = record(models), []
    measured = measure_throughput(
        models,
        causal=False,
        batch_size=2,
        prompt_length=32,
        new_tokens=99,
        repeats=3,
        on_step=lambda: steps.append(None),
    )
    assert measured["bert"].decode is None
    assert len(measured["bert"].prefill.values) == 3
    assert len(calls) == 4
    assert len(steps) == throughput_steps(1, 3, causal=False)


def test_steps_are_announced_and_flags_restored() -> None:
    models: dict[str, PreTrainedModel] = {"a": gpt2(), "b": llama()}
    models["a"].train()
    models["a"].transformer.h[0].eval()
    flags = [module.training for model in models.values() for module in model.modules()]
    training_seen = []
    steps = []

    def on_step() -> None:
        steps.append(None)
        training_seen.extend(module.training for model in models.values() for module in model.modules())

    measure_throughput(models, causal=True, batch_size=1, prompt_length=4, new_tokens=2, repeats=3, on_step=on_step)
    assert len(steps) == throughput_steps(2, 3, causal=True) == 12
    assert not any(training_seen)
    assert [module.training for model in models.values() for module in model.modules()] == flags


def test_a_slower_model_measures_slower() -> None:
    models: dict[str, PreTrainedModel] = {"slow": gpt2(), "plain": gpt2()}
    models["slow"].register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    measured = measure_throughput(models, causal=True, batch_size=2, prompt_length=8, new_tokens=2, repeats=3)
    slow, plain = measured["slow"], measured["plain"]
    assert slow.decode is not None
    assert plain.decode is not None
    assert slow.prefill.maximum <= 2 * 8 / 0.05
    assert slow.decode.maximum <= 2 * 2 / (2 * 0.05)
    assert speedup(plain.prefill, slow.prefill).median > 1
    assert speedup(plain.decode, slow.decode).median > 1


def test_the_device_is_idle_at_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(f"wait for {device}"))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: events.append("clock") or float(len(events)))
    seconds, result = throughput._timed(torch.device("cuda:1"), lambda: events.append("work") or "done")
    assert events == ["wait for cuda:1", "clock", "work", "wait for cuda:1", "clock"]
    assert (seconds, result) == (3.0, "done")


def test_samples_and_speedup() -> None:
    samples = Samples((4.0, 1.0, 10.0, 6.0))
    assert (samples.median, samples.minimum, samples.maximum) == (5.0, 1.0, 10.0)
    assert speedup(samples, Samples((2.0, 2.0, 5.0, 6.0))) == Samples((2.0, 0.5, 2.0, 1.0))
    with pytest.raises(ValueError, match="zip"):
        speedup(samples, Samples((1.0,)))


GOOD = {"batch_size": 1, "prompt_length": 8, "new_tokens": 2, "repeats": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"prompt_length": 0}, "prompt_length = 0"),
        ({"new_tokens": 0}, "new_tokens = 0"),
        ({"repeats": 0}, "repeats = 0"),
        ({"prompt_length": 31}, "33 tokens, but GPT2LMHeadModel has 32 positions"),
    ],
)
def test_refuses_sizes_that_do_not_fit(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        measure_throughput({"a": gpt2()}, causal=True, **GOOD | wrong)


def test_refuses_an_empty_run() -> None:
    with pytest.raises(RecipeError, match="models = 0"):
        measure_throughput({}, causal=True, **GOOD)


def test_the_last_position_can_be_used() -> None:
    measure_throughput({"a": gpt2()}, causal=True, **GOOD | {"prompt_length": 30})
    roberta = RobertaForMaskedLM(RobertaConfig(**ENCODER, vocab_size=50))  # 32 rows, two of them not positions
    measure_throughput({"a": roberta}, causal=False, **GOOD | {"prompt_length": 30})
    with pytest.raises(RecipeError, match="30 positions"):
        measure_throughput({"a": roberta}, causal=False, **GOOD | {"prompt_length": 31})

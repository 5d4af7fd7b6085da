"""Tokens per second, measured side by side: every model in one run, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import RecipeError
from compressor.measure._forward import evaluating, require_length


@dataclass(frozen=True)
class Samples:
    """One number per repeat, in the order measured."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        """The least value."""
        return min(self.values)

    @property
    def maximum(self) -> float:
        """The greatest value."""
        return max(self.values)


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of one model.

    Attributes:
        prefill: prompt tokens per second of one forward over the whole batch of prompts.
        decode: generated tokens per second over the whole batch, one token a step; None for a masked model.
    """

    prefill: Samples
    decode: Samples | None


def speedup(samples: Samples, reference: Samples) -> Samples:
    """How many times faster than `reference`, repeat by repeat: what slowed a whole repeat slowed both.

    Raises:
        ValueError: the two were not measured over the same number of repeats.
    """
    return Samples(tuple(ours / theirs for ours, theirs in zip(samples.values, reference.values, strict=True)))


def throughput_steps(models: int, repeats: int, *, causal: bool) -> int:
    """How often `measure_throughput` will call `on_step`."""
    return models * repeats * (2 if causal else 1)


def measure_throughput(
    models: Mapping[str, PreTrainedModel],
    *,
    causal: bool,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Throughput]:
    """Time all models in one run, interleaved: each repeat times every model once, starting with the next one.

    Each model first runs once untimed. All see the same random token ids. Decoding continues from the timed prompt
    greedily with the key/value cache, through any end-of-sequence token.

    Args:
        models: name to model; training flags are left as they were.
        causal: whether the models are causal; masked models have no cache and no decoding.
        batch_size: sequences run together.
        prompt_length: tokens in each prompt.
        new_tokens: tokens decoded after each prompt, unused for masked models.
        repeats: timed runs of each model.
        seed: of the token ids.
        on_step: called after each timed unit, `throughput_steps` times.

    Raises:
        RecipeError: no model, a size below one, or more tokens than a model has positions for.
    """
    sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "repeats": repeats}
    sizes |= {"models": len(models)} | ({"new_tokens": new_tokens} if causal else {})
    for size, given in sizes.items():
        if given < 1:
            raise RecipeError(f"Got {size} = {given}; measuring throughput needs at least 1.")
    for model in models.values():
        require_length(model, prompt_length + (new_tokens if causal else 0))

    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (batch_size, prompt_length), generator=torch.Generator().manual_seed(seed))
    names = list(models)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    decoded = new_tokens if causal else 0

    with ExitStack() as stack, torch.inference_mode():
        for name in names:
            stack.enter_context(evaluating(models[name]))
            _time_once(models[name], prompt, decoded, None)
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                rates[name].append(_time_once(models[name], prompt, decoded, on_step))

    def samples(name: str, part: int) -> Samples:
        return Samples(tuple(rate[part] for rate in rates[name]))

    return {name: Throughput(samples(name, 0), samples(name, 1) if causal else None) for name in names}


def _time_once(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, on_step: Callable[[], None] | None
) -> tuple[float, float]:
    """Prompt tokens and generated tokens per second; without new tokens no cache is kept and the second is zero."""
    prompt = prompt.to(model.device)
    seconds, output = _timed(model.device, lambda: model(input_ids=prompt, use_cache=new_tokens > 0))
    prefill = prompt.numel() / seconds
    if on_step is not None:
        on_step()
    if new_tokens == 0:
        return prefill, 0.0

    token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    del output  # [B, T, V]
    seconds, _ = _timed(model.device, lambda: _decode(model, token, cache, new_tokens))
    if on_step is not None:
        on_step()
    return prefill, len(prompt) * new_tokens / seconds


def _decode(model: PreTrainedModel, token: Tensor, cache: Any, steps: int) -> None:
    """Feed `token` [B, 1] and each greedy successor, one a step, after what `cache` holds."""
    for _ in range(steps):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits.argmax(-1), output.past_key_values


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds `work` took, and what it returned, with the device idle at both readings of the clock."""
    _synchronize(device)
    start = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

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

    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (batch_size, prompt_length), generator=generator)
    names = list(models)
    prefill: dict[str, list[float]] = {name: [] for name in names}
    decode: dict[str, list[float]] = {name: [] for name in names}

    def run(name: str, *, timed: bool) -> None:
        model = models[name]
        prompt_seconds, output = _timed(model.device, lambda: _prefill(model, prompt.to(model.device), causal))
        if timed:
            prefill[name].append(batch_size * prompt_length / prompt_seconds)
            _step(on_step)
        if causal:
            decode_seconds, _ = _timed(model.device, lambda: _decode(model, output, new_tokens))
            if timed:
                decode[name].append(batch_size * new_tokens / decode_seconds)
                _step(on_step)

    with ExitStack() as stack, torch.inference_mode():
        for model in models.values():
            stack.enter_context(evaluating(model))
        for name in names:
            run(name, timed=False)
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                run(name, timed=True)
    return {
        name: Throughput(Samples(tuple(prefill[name])), Samples(tuple(decode[name])) if causal else None)
        for name in names
    }

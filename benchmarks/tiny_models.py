"""A tiny random instance of every language model class that transformers registers, from its configuration alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from tiny_sizes import HEADS, KEPT, LIMITS, OVERRIDES, SIZES, STATES, VARIANTS
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

# Classes whose own casts to single precision do not survive double: the mask, its lowest number, becomes -inf, a row
# that is masked throughout (padding on the left) NaN; XGLM and Inkling 2 fail outright.
DTYPE: dict[str, torch.dtype] = dict.fromkeys(
    (
        "BloomForCausalLM",
        "Gemma2ForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteSWAForCausalLM",
        "Inkling2ForCausalLM",
        "MptForCausalLM",
        "ProphetNetForCausalLM",
        "VaultGemmaForCausalLM",
        "XGLMForCausalLM",
    ),
    torch.float32,
)
BORROWED = "it takes every key and value from another model, which transformers refuses as having no layer to make them"
UNBUILDABLE = {
    "Gemma4AssistantForCausalLM": BORROWED,
    "Gemma4UnifiedAssistantForCausalLM": BORROWED,
    "MraForMaskedLM": "its attention is a CUDA kernel, without which every head gives zeros",
}


class Unbuildable(Exception):  # noqa: N818 - a finding, not a fault
    """The class has no consistent tiny instance here; the message says why."""


@dataclass(frozen=True, order=True)
class Entry:
    """One language model class, and the model type it is built from."""

    model_type: str
    class_name: str
    task: str
    variant: str = ""


@cache
def entries() -> tuple[Entry, ...]:
    """Every distinct class of the causal and the masked mapping."""
    found: dict[str, Entry] = {}
    mappings = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    for task, names in mappings.items():
        for model_type, name in names.items():
            known = found.setdefault(name, Entry(model_type, name, task))
            if plain(name).startswith(plain(model_type)) and not plain(name).startswith(plain(known.model_type)):
                found[name] = dataclasses.replace(known, model_type=model_type)  # llama, not one of its borrowers
    return tuple(sorted(found.values()))


def plain(name: str) -> str:
    """NAME in small letters and digits only."""
    return name.lower().replace("-", "").replace("_", "")


def variants() -> tuple[Entry, ...]:
    """Further attention layouts of classes that have several."""
    return tuple(
        dataclasses.replace(entry, variant=variant)
        for name, variant in VARIANTS
        for entry in entries()
        if entry.model_type == name
    )


def build(entry: Entry, seed: int = 0, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A tiny instance of ENTRY in eval mode, every weight drawn from SEED."""
    if entry.class_name in UNBUILDABLE:
        raise Unbuildable(UNBUILDABLE[entry.class_name])
    try:
        cls = getattr(transformers, entry.class_name)
        config = configuration(entry)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = cls(config)
    except ImportError as error:
        raise Unbuildable(str(error).strip().split(" but ")[0]) from error
    model = model.train(False).to(dtype or DTYPE.get(entry.class_name, torch.float64))
    randomise(model, seed)
    return model


def configuration(entry: Entry) -> PretrainedConfig:
    """The small configuration of ENTRY."""
    cls = getattr(transformers, entry.class_name).config_class
    chosen = {**OVERRIDES.get(entry.model_type, {}), **VARIANTS.get((entry.model_type, entry.variant), {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: PretrainedConfig = cls(**small(cls, chosen, entry.task == "causal"))
    config._experts_implementation = "eager"  # the grouped products know no double precision
    return config


def small(cls: type[PretrainedConfig], chosen: dict[str, Any], causal: bool, tower: bool = False) -> dict[str, Any]:
    """Keyword arguments that make a configuration of CLS small, those CHOSEN by hand first."""
    default = cls()
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    whole = sorted(name for name in names if isinstance(value_of(default, name), int))
    values: dict[str, Any] = {name: SIZES[name] for name in names & SIZES.keys()}
    values |= dict.fromkeys(LIMITS.intersection(whole), 4)
    values |= {n: 0.0 for n in names if re.search("dropout|pdrop", n) and isinstance(value_of(default, n), float)}
    values |= {name: i for i, name in enumerate(n for n in whole if n.endswith(("_token_id", "_token_index")))}
    if "qk_rope_head_dim" in names:  # latent attention: every head has its own keys, and head_dim follows
        values.pop("head_dim", None)
        values["num_key_value_heads"] = HEADS
    values |= dict.fromkeys(names & {"is_decoder", "causal"}, causal)
    values |= layers(default, names)
    if tower:
        values |= dict.fromkeys(names & {"num_hidden_layers", "encoder_layers", "decoder_layers"}, 1)
    for name in cls.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            is_text = "text" in name
            values[name] = small(type(part), chosen.get(name, {}), causal and is_text, tower=not is_text)
            values[name]["model_type"] = part.model_type
    return values | {name: value for name, value in chosen.items() if name not in cls.sub_configs}


def value_of(config: Any, name: str) -> Any:
    """What CONFIG has under NAME; None where it has nothing, or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def layers(default: Any, names: set[str]) -> dict[str, Any]:
    """The fewest of the default's layers that show every kind of layer, at least two of them attention."""
    count: int = getattr(default, "num_hidden_layers", 0)
    lists = {name: v for name in sorted(names) if isinstance(v := value_of(default, name), list) and len(v) == count}
    lists = {name: column for name, column in lists.items() if column != [*range(count)]}  # indices of layers
    if not lists:
        return {}
    kept: set[int] = set()
    for column in lists.values():
        for value in dict.fromkeys(map(str, column)):
            if value not in {str(column[i]) for i in kept}:
                kept.add(next(i for i, v in enumerate(column) if str(v) == value))
    types = next((lists[n] for n in ("layer_types", "layers_block_type") if n in lists), ["attention"] * count)
    attention = [i for i, kind in enumerate(types) if kind.startswith("hybrid") or "linear" not in kind]
    for i in reversed(attention):
        if len(kept.intersection(attention)) < 2:
            kept.add(i)
    order = sorted(kept)
    return {"num_hidden_layers": len(order)} | {n: [v[i] for i in order] for n, v in lists.items()}


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Noise in every parameter: a head that did nothing would hide a wrong cut."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        with torch.no_grad():
            if parameter.dim() < 2 or name.endswith(KEPT):  # norms, biases, sinks, decays: about their own start
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)


def inputs(
    model: PreTrainedModel,
    batch: int = 2,
    tokens: int = 9,
    padding: str | None = "right",
    seed: int = 0,
    *,
    second: bool = False,
) -> dict[str, torch.Tensor]:
    """Random tokens, no special ones among them; all rows but the first padded on one side.

    With SECOND also the other input of classes that can take one (an encoder's states, entities, which
    tokens are global), without which part of their attention stays idle.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config(decoder=True)
    streams = config.num_codebooks if model.config.model_type.startswith("musicgen") else 1
    ids = torch.randint(32, 90, (batch, streams, tokens), generator=generator)
    mask = torch.ones((batch, tokens), dtype=torch.long)
    if padding:
        mask[1:, : tokens // 3] = 0
        mask = mask if padding == "left" else mask.flip(1)
        ids = torch.where(mask[:, None].bool(), ids, getattr(config, "pad_token_id", None) or 0)
    given = {"input_ids": ids.flatten(0, 1), "attention_mask": mask}
    return given | (second_input(model, batch, tokens, generator) if second else {})


def second_input(
    model: PreTrainedModel, batch: int, tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What MODEL may be given beside its tokens; nothing for most."""
    if model.config.model_type == "luke":
        positions = torch.tensor([[0, 1, -1], [3, -1, -1]]).expand(batch, 2, 3)
        return {"entity_ids": torch.full((batch, 2), 6), "entity_position_ids": positions}
    accepted = inspect.signature(model.forward).parameters
    if "global_attention_mask" in accepted:
        return {"global_attention_mask": torch.eye(1, tokens, dtype=torch.long).expand(batch, tokens)}
    name = next((name for name in STATES if name in accepted), None)
    crosses = any(part.endswith(("encoder_attn", "cross_attn")) for part, _ in model.named_modules())
    if name is None or not crosses or model.config.is_encoder_decoder:
        return {}
    states = torch.randn((batch, 5, model.config.hidden_size), generator=generator, dtype=torch.float64)
    return {name: states.to(model.dtype)}

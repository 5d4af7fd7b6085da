"""What a config says of MLPs: the field that holds their width, found by its value, and what was removed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from compressor.attention.record import CHANNELS, by_layer, dense_config, layer_numbers, remember, removed, value_of
from compressor.attention.slim import Description
from compressor.mlp.nouns import MLPLayer

# Names for the width of an MLP; in fields of these names it is looked for first, then in any that sound like them.
_KNOWN = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim", "d_inner", "dff")
_SOUNDS = re.compile(r"intermediate|ffn|(^|_)ff(_|$)|inner|mlp|hidden_dim|feed_?forward")
_EXPERTS = re.compile(r"moe|expert")  # of many at a time; those that are shared have fields of their own


def sounds_like_width(name: str) -> bool:
    """Whether a name can be that of the width of an MLP."""
    return name in _KNOWN or (bool(_SOUNDS.search(name)) and ("shared" in name or not _EXPERTS.search(name)))


def removed_channels(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """Channels that a model's MLPs have lost, by layer, in the numbering of the dense model it came from."""
    return removed(model, CHANNELS)


def remember_channels(
    model: PreTrainedModel,
    record: Mapping[int, Sequence[int]],
    changes: Description,
    left: Sequence[tuple[MLPLayer, int]],
) -> None:
    """Write into a model's config what was done to its MLPs.

    Args:
        model: the model, changed already.
        record: all channels it ever lost, by layer.
        changes: what was just done to its modules.
        left: its MLPs as they were, with the numbers of channels they have now.
    """
    truth = partial(_channels_left, model, left, record)
    remember(model, CHANNELS, record, changes, [layer.name for layer, _ in left], truth)


def _channels_left(
    model: PreTrainedModel,
    left: Sequence[tuple[MLPLayer, int]],
    record: Mapping[int, Sequence[int]],
    config: PreTrainedConfig,
    mine: Sequence[int],
    dense: Mapping[str, Any],
) -> dict[str, Any]:
    """What the fields of a config should say of channels: one value where the stock class builds the same from it."""
    layers = [left[place] for place in mine]
    names = [layer.name for layer, _ in layers]
    places = dict(enumerate(layer_numbers(model, config, names) or ()))
    numbers: dict[str, dict[int, int]] = {}  # by field and place among the layers
    lists: dict[str, list[int]] = {}  # fields that have a value for every layer
    for place, (layer, now) in enumerate(layers):
        width = now + len(record.get(layer.index, ()))
        name = _field(config, dense, layer, width, places.get(place))
        if name and isinstance(value_of(config, name), list):
            lists.setdefault(name, list(value_of(config, name)))[places[place]] = now
        elif name:
            numbers.setdefault(name, {})[place] = now
    uniform = {name for name, found in numbers.items() if _is_told_by(model, config, name, set(found.values()), left)}
    return lists | by_layer(model, config, names, numbers, uniform, dense)


def _field(
    config: PreTrainedConfig, dense: Mapping[str, Any], layer: MLPLayer, width: int, number: int | None
) -> str | None:
    """Name under which a config keeps the width that an MLP of a dense model has, None if it keeps none."""
    side = next((part for part in layer.name.split(".") if part in ("encoder", "decoder")), "")

    def rank(name: str) -> tuple[bool, int]:
        known = next((place for place, word in enumerate(_KNOWN) if name == word), len(_KNOWN))
        return not (side and name.startswith(side)), known

    for name in sorted(filter(sounds_like_width, vars(config)), key=rank):
        value = dense.get(name, value_of(config, name))
        if isinstance(value, list) and number is not None and number < len(value):
            value = value[number]
        if value is None and name in _KNOWN:  # GPT-2 and its kin
            value = 4 * int(value_of(config, "hidden_size") or 0)
        if type(value) is int and value == width:
            return name
    return None


def _is_told_by(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    name: str,
    widths: set[int],
    left: Sequence[tuple[MLPLayer, int]],
) -> bool:
    """Whether the stock class, built with one width for all, comes to the shapes of a pruned model's MLPs.

    It does not where the width is also that of something that was not pruned, or the code rounds it.
    """
    if len(widths) > 1 or 0 in widths:
        return False
    whole = model.config.to_dict()
    path = next((path for path in model.config.sub_configs if getattr(model.config, path, None) is config), "")
    told = dense_config(whole | {"dense_config": whole.get("dense_config") or {"": {}}})
    (told[path] if path else told)[name] = next(iter(widths))
    own = {module for layer, _ in left for module in layer.modules}
    heads = {module for module in model.config.pruned_modules if module not in own}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = type(model)(type(model.config).from_dict(copy.deepcopy(told)))
    except Exception:  # whatever a class may have against it
        return False
    expected = {tensor: value.shape for tensor, value in built.state_dict().items()}
    return all(
        expected.get(tensor) == value.shape
        for tensor, value in model.state_dict().items()
        if tensor.rpartition(".")[0] not in heads
    )

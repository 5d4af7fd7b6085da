"""What a pruned model's config says: the truth about what is left, what was removed, how to build the same shapes.

`pruned_heads` lists the heads that ever left, by layer, in the dense model's numbering, and `pruned_channels` those of
the MLPs. `pruned_modules` describes every module that is not as the stock class builds it. `dense_config` keeps the
values that the stock class needs, for the config's own (`num_attention_heads`, `num_key_value_heads`, `head_dim`,
`intermediate_size`, `per_layer_config`) speak of the model as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from compressor.attention.nouns import AttentionLayer
from compressor.attention.slim import Description, Editor, config_value
from compressor.attention.trace import KEY_COUNTS
from compressor.errors import ModelError

_SLIM: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
HEADS, CHANNELS = "pruned_heads", "pruned_channels"
_OWN = (HEADS, CHANNELS, "pruned_modules", "dense_config")
# What the fields of a config should say, from the places of its layers and the values of the dense model's.
Truth = Callable[[PreTrainedConfig, Sequence[int], Mapping[str, Any]], dict[str, Any]]


def removed_heads(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """Heads that a model has lost, by layer, in the numbering of the dense model it came from."""
    return removed(model, HEADS)


def removed(model: PreTrainedModel, what: str) -> dict[int, tuple[int, ...]]:
    """What a model has lost, by layer, in the numbering of the dense model it came from; WHAT is HEADS or CHANNELS."""
    record = getattr(model.config, what, None) or {}
    return {int(index): tuple(gone) for index, gone in record.items()}


def surviving(left: int, removed: Sequence[int]) -> list[int]:
    """Original numbers of the heads or channels that a layer still has, LEFT of them, after it lost REMOVED."""
    gone = set(removed)
    return [number for number in range(left + len(gone)) if number not in gone]


def with_more(
    record: Mapping[int, Sequence[int]], left: Mapping[int, int], plan: Mapping[int, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """A record of what was removed with what a plan removes next, in the numbering of the dense model.

    Args:
        record: what is gone already, by layer.
        left: how many heads or channels each layer of the plan has.
        plan: which of these leave.
    """
    longer = {index: tuple(gone) for index, gone in record.items()}
    for index, leaving in plan.items():
        gone = longer.get(index, ())
        originals = surviving(left[index], gone)
        longer[index] = tuple(sorted((*gone, *(originals[number] for number in leaving))))
    return longer


def remember_heads(
    model: PreTrainedModel,
    heads: Mapping[int, Sequence[int]],
    changes: Description,
    left: Sequence[tuple[AttentionLayer, int, int]],
) -> None:
    """Write into a model's config what was done to its heads.

    Args:
        model: the model, changed already.
        heads: all heads it ever lost.
        changes: what was just done to its modules.
        left: its layers as they were, with the numbers of heads and of key/value heads they have now.
    """
    truth = partial(_heads_left, model, left)
    remember(model, HEADS, heads, changes, [layer.name for layer, _, _ in left], truth)


def remember(
    model: PreTrainedModel,
    what: str,
    record: Mapping[int, Sequence[int]],
    changes: Description,
    layers: Sequence[str],
    truth: Truth,
) -> None:
    """Write into a model's config what was done to it.

    Args:
        model: the model, changed already.
        what: HEADS or CHANNELS.
        record: all of them that it ever lost.
        changes: what was just done to its modules.
        layers: names of its layers.
        truth: what a config should say of those of its layers.
    """
    config = model.config
    modules: Description = dict(getattr(config, "pruned_modules", None) or {})
    for name, change in changes.items():
        before = {} if "empty" in change else modules.get(name, {})
        shapes = before.get("shapes", {}) | change.get("shapes", {})
        modules[name] = before | change | ({"shapes": shapes} if shapes else {})
    emptied = [name for name, change in modules.items() if "empty" in change]
    outputs = {f"{name}.{modules[name]['empty']['output_name']}" for name in emptied}
    setattr(config, what, {str(index): list(removed) for index, removed in sorted(record.items())})
    config.pruned_modules = {
        name: change
        for name, change in modules.items()
        if name in outputs or not any(name.startswith(f"{gone}.") for gone in emptied)
    }
    dense: dict[str, dict[str, Any]] = dict(getattr(config, "dense_config", None) or {})
    for path, part in _parts(model).items():
        mine = [place for place, name in enumerate(layers) if _owner(model, name) is part]
        if mine:
            told = truth(part, mine, dense.get(path, {}))
            dense[path] = {name: value_of(part, name) for name in told} | dense.get(path, {})
            _tell(part, told)
    config.dense_config = dense
    _tell(config, {})


def is_pruned(stored: Mapping[str, Any]) -> bool:
    """Whether a stored config is that of a pruned model."""
    return any(stored.get(name) for name in (HEADS, CHANNELS))


def dense_config(stored: dict[str, Any]) -> dict[str, Any]:
    """The config of the dense model, as a dictionary, from that of a pruned one.

    Raises:
        ModelError: the record of what was removed is incomplete.
    """
    if missing := [name for name in ("pruned_modules", "dense_config") if not stored.get(name)]:
        what = "heads" if stored.get(HEADS) else "channels"
        raise ModelError(f"the config has {what} removed but no {missing[0]}; it was not written by this package")
    dense = {name: value for name, value in copy.deepcopy(stored).items() if name not in _OWN}
    for path, values in stored["dense_config"].items():
        part = dense[path] if path else dense
        part.update(values)
        for name in [name for name in values if values[name] is None]:
            del part[name]
    return dense


def rebuild(model: PreTrainedModel, stored: dict[str, Any]) -> None:
    """Give a dense model, fresh from its class, the shapes of a pruned one. The values are still to be loaded."""
    Editor(model.get_submodule, model.set_submodule).repeat(stored["pruned_modules"])


def tell_stored(model: PreTrainedModel, stored: dict[str, Any]) -> None:
    """Let the config of a rebuilt model say again what the config of the pruned one said."""
    for path, values in stored["dense_config"].items():
        told = stored[path] if path else stored
        _tell(getattr(model.config, path) if path else model.config, {name: told.get(name) for name in values})
    for name in [name for name in _OWN if name in stored]:
        setattr(model.config, name, stored[name])
    _tell(model.config, {})


def _parts(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """A model's config and those inside it, by name."""
    inside = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {"": model.config} | {name: part for name, part in inside.items() if isinstance(part, PreTrainedConfig)}


def _owner(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """The config of the innermost model that holds a module."""
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        if isinstance(part, PreTrainedModel):
            return part.config
    return model.config


def value_of(config: PreTrainedConfig, name: str) -> Any:
    """A value of a config, None where it has none; also one that differs between layers."""
    if name == "per_layer_config":
        return config.to_dict().get(name)
    return config_value(config, name)


def _fields(config: PreTrainedConfig, layer: str) -> tuple[str, str]:
    """Names under which a config counts the heads and the key/value heads of a layer."""
    side = next((part for part in layer.split(".") if part in ("encoder", "decoder")), "")
    sided = (f"{side}_attention_heads", f"num_{side}_attention_heads")
    heads = next((name for name in sided if side and value_of(config, name) is not None), "num_attention_heads")
    names = config.attribute_map
    keys = next((name for name in KEY_COUNTS if value_of(config, name) is not None), KEY_COUNTS[0])
    return names.get(heads, heads), names.get(keys, keys)


def _beyond_stock(change: Mapping[str, Any]) -> bool:
    """Whether a module does what its stock class would not do if it were built with fewer heads."""
    return any(change.get(name) for name in ("key_value_index", "kept_outputs", "kept_arguments"))


def _heads_left(
    model: PreTrainedModel,
    left: Sequence[tuple[AttentionLayer, int, int]],
    config: PreTrainedConfig,
    mine: Sequence[int],
    dense: Mapping[str, Any],
) -> dict[str, Any]:
    """What the fields of a config should say of heads.

    Where stock code would build another model from one value, every layer gets its own, which it refuses to read; and
    where layers have no numbers, the dense model's value stays, whose shapes do not fit.
    """
    layers = [left[place] for place in mine]
    numbers: dict[str, dict[int, int]] = {}  # by field and place among the layers
    for place, (layer, heads, keys) in enumerate(layers):
        maps = max(map(len, layer.maps), default=1)
        for name, number in zip(_fields(config, layer.name), (heads * maps, keys), strict=True):
            if value_of(config, name) is not None:
                numbers.setdefault(name, {})[place] = number
    truth: dict[str, Any] = {}
    widths = {layer.head_dim for layer, _, _ in layers}
    if value_of(config, "head_dim") is None and not hasattr(type(config), "head_dim") and len(widths) == 1:
        truth["head_dim"] = widths.pop()
    stock = not any(_beyond_stock(change) for change in model.config.pruned_modules.values())
    uniform = {name for name, found in numbers.items() if stock and len(set(found.values())) == 1}
    return truth | by_layer(model, config, [layer.name for layer, _, _ in layers], numbers, uniform, dense)


def by_layer(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layers: Sequence[str],
    numbers: Mapping[str, Mapping[int, int]],
    uniform: Collection[str],
    dense: Mapping[str, Any],
) -> dict[str, Any]:
    """What fields of a config should say: one value for all layers where that is true, else a value for each.

    Args:
        model: the model.
        config: its config, or one inside it.
        layers: names of the layers that the config is about.
        numbers: what is true, by field and place among the layers.
        uniform: fields that say the same of all layers, and may say it in one value.
        dense: what the fields said before anything was removed.
    """
    truth: dict[str, Any] = {}
    places = layer_numbers(model, config, layers)
    known = value_of(config, "per_layer_config") or {}
    overrides = {int(number): {k: v for k, v in own.items() if k not in numbers} for number, own in known.items()}
    for name, found in numbers.items():
        truth[name] = dense.get(name, value_of(config, name))
        if name in uniform:
            truth[name] = next(iter(found.values()))
        elif places is not None:
            for place, number in found.items():
                overrides.setdefault(places[place], {})[name] = number
    overrides = {number: own for number, own in overrides.items() if own}
    if overrides or known:
        truth["per_layer_config"] = overrides
    return truth


def layer_numbers(model: PreTrainedModel, config: PreTrainedConfig, names: Sequence[str]) -> list[int] | None:
    """The number that a config gives to each attention layer, None where it does not number them."""
    total = value_of(config, "num_hidden_layers") or 0
    told = [getattr(model.get_submodule(name), "layer_idx", None) for name in names]
    written = [next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names]
    for numbers in (told, written):
        whole = [number for number in numbers if isinstance(number, int) and 0 <= number < total]
        if len(set(whole)) == len(names):
            return whole
    return None


def _tell(config: PreTrainedConfig, truth: Mapping[str, Any]) -> None:
    """Write values into a config; where its class has objections to slim shapes, they are overruled."""
    if "per_layer_config" in truth or truth:
        config.per_layer_config = None
    for name, value in truth.items():
        if name != "per_layer_config":
            setattr(config, name, value)
    if overrides := truth.get("per_layer_config"):
        config.per_layer_config = overrides
    if not isinstance(config, _Slim) and not _bears(config):
        config.__class__ = _slim(type(config))


def _bears(config: PreTrainedConfig) -> bool:
    """Whether a config's class can tell the truth about a slim model."""
    if isinstance(getattr(type(config), "head_dim", None), property):
        return False  # Falcon's computes it from the number of heads
    try:
        config.validate()
    except Exception:  # Llama's, for one, insists that the number of heads divides the hidden size
        return False
    return True


class _Slim:
    """A config whose class would not have its numbers of heads."""

    def validate(self) -> None:
        """Accept them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2], vars(self).copy())


def _slim(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    if stock not in _SLIM:
        derived = vars(stock).get("head_dim")
        own = {"head_dim": property(partial(_as_dense, derived))} if isinstance(derived, property) else {}
        _SLIM[stock] = type(stock.__name__, (_Slim, stock), {"__module__": stock.__module__, **own})
    return _SLIM[stock]


def _as_dense(derived: property, config: PreTrainedConfig) -> Any:
    """What a property of a config said before heads left."""
    before = getattr(config, "dense_config", {}).get("", {})
    return derived.__get__(SimpleNamespace(**vars(config) | before))


def _revive(stock: type[PreTrainedConfig], state: dict[str, Any]) -> PreTrainedConfig:
    config = stock.__new__(_slim(stock))
    config.__dict__.update(state)
    return config

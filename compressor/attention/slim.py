"""What is done to single modules when heads leave: tensors get smaller, and plain attributes say what follows.

Everything beyond the shapes is kept in plain attributes of the modules, so a slim module can be copied, described in a
config and built again from that description. `kept_outputs` selects what a module returns, `kept_arguments` what it is
called with, `key_value_index` spreads keys over heads (`compressor.attention.interface`).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compressor.attention.empty import EmptyAttention

Description = dict[str, dict[str, Any]]  # JSON-ready, by module name: the new shapes of its tensors, its attributes …


@dataclass(frozen=True)
class Habits:
    """Which of two readings of a module's code holds."""

    widths_count: bool = True
    groups_are_heads: bool = True


class Editor:
    """Changes modules, found by their names, and keeps a description of the changes from which they can be repeated.

    Two things cannot be seen, only tried (`Habits`): whether attributes that happen to equal the width of all heads
    mean it, and whether the groups of a convolution are heads.
    """

    def __init__(
        self, find: Callable[[str], nn.Module], replace: Callable[[str, nn.Module], None], habits: Habits | None = None
    ) -> None:
        self.find = find
        self.replace = replace
        self.habits = habits or Habits()
        self.description: Description = defaultdict(dict)

    def cut(self, name: str, tensor: str, dim: int, kept: Sequence[int]) -> None:
        """Keep some entries of a parameter or buffer along one dimension, and let the module's sizes follow."""
        module = self.find(name)
        before = getattr(module, tensor)
        index = torch.tensor(kept, dtype=torch.long, device=before.device)
        _put(module, tensor, before.detach().index_select(dim, index))
        self.description[name].setdefault("shapes", {})[tensor] = list(getattr(module, tensor).shape)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and tensor == "weight" and dim == 0:
            inputs, groups = module.in_channels, module.groups
            if self.habits.groups_are_heads and groups > 1:
                inputs, groups = (size * len(kept) // before.shape[0] for size in (inputs, groups))
            for attribute, size in (("out_channels", len(kept)), ("in_channels", inputs), ("groups", groups)):
                self.set(name, attribute, size)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)) and (tensor, dim) == ("weight", 1):
            self.set(name, "in_channels", len(kept) * module.groups)

    def set(self, name: str, attribute: str, value: Any) -> None:
        """Set a plain attribute of a module."""
        self.find(name).__dict__[attribute] = self.description[name][attribute] = value
        _arm(self.find(name))

    def keep_outputs(self, name: str, kept: Sequence[int]) -> None:
        """Let a module return only some entries of the last dimension of what it returns now."""
        before = getattr(self.find(name), "kept_outputs", None)
        self.set(name, "kept_outputs", list(kept if before is None else (before[place] for place in kept)))

    def keep_argument(self, name: str, argument: str, dim: int, kept: Sequence[int], period: int) -> None:
        """Let a module work on only some entries of one of its arguments.

        `period` is the length after which the entries repeat, as in [batch · heads, …]; 0 if they do not.
        """
        known = dict(getattr(self.find(name), "kept_arguments", {}))
        if argument in known:
            kept = [place for place in kept if place in known[argument][2]]
        self.set(name, "kept_arguments", known | {argument: [dim, period, list(kept)]})

    def drop(self, name: str) -> None:
        """Take a module out of the list it is in."""
        parent, _, entry = name.rpartition(".")
        modules = cast(nn.ModuleList, self.find(parent))
        gone = [*vars(modules).get("dropped", [])]
        originals = [place for place in range(len(modules) + len(gone)) if place not in gone]
        del modules[int(entry)]
        self.set(parent, "dropped", sorted([*gone, originals[int(entry)]]))

    def empty(self, name: str, **about: Any) -> None:
        """Put an `EmptyAttention` where an attention module was."""
        self.replace(name, EmptyAttention.of(self.find(name), **about))
        self.description[name] = {"empty": about}

    def repeat(self, description: Description) -> None:
        """Make described changes to modules that have not seen them; tensors get their shapes, not their values."""
        for name, changes in description.items():
            if "empty" in changes:
                self.empty(name, **changes["empty"])
                continue
            module = self.find(name)
            for entry in reversed(changes.get("dropped", [])):
                del cast(nn.ModuleList, module)[entry]
            for tensor, shape in changes.get("shapes", {}).items():
                _put(module, tensor, getattr(module, tensor).new_empty(shape))
            module.__dict__.update({key: value for key, value in changes.items() if key != "shapes"})
            _arm(module)


def index_on(module: nn.Module, name: str, index: Sequence[int], device: torch.device) -> torch.Tensor:
    """The index as a tensor on the device, made once."""
    cache: dict[tuple[str, torch.device], torch.Tensor] = module.__dict__.setdefault("_indices", {})
    if (name, device) not in cache:
        with torch.inference_mode(False):  # or training would choke on a tensor that inference made
            cache[name, device] = torch.tensor(index, device=device)
    return cache[name, device]


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a smaller tensor where a parameter or buffer was."""
    before = getattr(module, name)
    if isinstance(before, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=before.requires_grad))
    else:
        setattr(module, name, tensor)
    if name == "weight":
        for attribute, size in _sizes(module, tensor.shape).items():
            setattr(module, attribute, size)


def _sizes(module: nn.Module, now: torch.Size) -> dict[str, int]:
    """Attributes in which a module keeps the shape of its weight."""
    if isinstance(module, Conv1D):
        return {"nx": now[0], "nf": now[1]}
    if isinstance(module, nn.Linear):
        return {"out_features": now[0], "in_features": now[1]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": now[0], "embedding_dim": now[1]}
    return {}


def _arm(module: nn.Module) -> None:
    """Let the attributes of a module take effect."""
    own = vars(module)
    if "kept_outputs" in own and _select_outputs not in module._forward_hooks.values():
        module.register_forward_hook(_select_outputs)
    if "kept_arguments" in own and _select_arguments not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_select_arguments, with_kwargs=True)
    if "own_config" in own:
        shared = own["config"]
        own["config"] = LayerConfig(getattr(shared, "_shared", shared), own["own_config"])
    own.pop("_indices", None)


class LayerConfig:
    """A layer's view of the config it shares with others: some values of its own, all else as it stands there."""

    def __init__(self, shared: object, own: dict[str, Any]) -> None:
        names = getattr(shared, "attribute_map", {})
        self.__dict__.update(own, _shared=shared, **{names[name]: own[name] for name in own if name in names})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":  # while being copied, there is nothing to look into yet
            raise AttributeError(name)
        return getattr(self._shared, name)


def config_value(config: Any, name: str) -> Any:
    """A value of a config, None where it has none; also one of those that differ between layers."""
    if isinstance(config, LayerConfig):
        return vars(config).get(name, config_value(config._shared, name))
    return None if config is None else config._getattr_without_heterogeneous_validation(name, None)


def _select_outputs(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output.index_select(-1, index_on(module, "outputs", module.kept_outputs, output.device))  # type: ignore[arg-type]


def _select_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    for name, (dim, period, kept) in vars(module)["kept_arguments"].items():
        value = named.get(name)
        if not isinstance(value, torch.Tensor) or value.shape[dim] == 1:  # 1: the same for every head
            continue
        index = index_on(module, name, kept, value.device)
        if period:
            repeated = value.reshape(*value.shape[:dim], -1, period, *value.shape[dim + 1 :])
            named[name] = repeated.index_select(dim + 1, index).flatten(dim, dim + 1)
        else:
            named[name] = value.index_select(dim, index)
    return (), named

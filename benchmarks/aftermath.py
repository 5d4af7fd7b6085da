"""What else has to be right with a pruned model: the numbers that count heads, training, and the way by the disk."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from parity import Given, Layer, Mismatch, Plan, deviation, logits, output_weight, real, within
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.attention import AttentionLayer, attention_layers, removed_heads
from compressor.errors import ModelError
from compressor.loading import load
from compressor.mlp import removed_channels
from compressor.types import Task

ADDED = ("_name_or_path", "architectures", "dtype", "transformers_version")  # to a config, by saving it
HEADS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")
KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def check_books(dense: PreTrainedModel, pruned: PreTrainedModel, layers: Sequence[AttentionLayer], plan: Plan) -> None:
    """Layers, modules and the config of a pruned model all count the heads that are left."""
    found = attention_layers(pruned)
    for old, new in zip(layers, found, strict=True):
        left = [len(set(group) - set(plan.get(old.index, ()))) for group in old.groups]
        if (new.num_heads, [len(group) for group in new.groups]) != (sum(left), [size for size in left if size]):
            raise Mismatch(f"layer {old.index} has {new.groups} where groups of {left} should be")
        before, after = vars(dense.get_submodule(old.name)), vars(pruned.get_submodule(new.name))
        maps, even = len(old.maps[0]), len({size for size in left if size}) == 1
        for name, was, now in [(n, old.num_heads * maps, new.num_heads * maps) for n in HEADS] + [
            (n, len(old.groups), len(new.groups)) for n in KEYS if even
        ]:
            if before.get(name) == was and after.get(name) != now:
                raise Mismatch(f"{name} of layer {old.index} is {after.get(name)}, with {now} left")
    if {layer: sorted(heads) for layer, heads in removed_heads(pruned).items()} != dict(plan):
        raise Mismatch(f"config.pruned_heads is {removed_heads(pruned)}, and the plan was {dict(plan)}")
    check_config(dense, pruned, layers, found)
    check_sizes(pruned)


def check_sizes(pruned: PreTrainedModel) -> None:
    """Linear maps say the sizes that they have."""
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            linear = isinstance(module, nn.Linear)
            said = (module.out_features, module.in_features) if linear else (module.nx, module.nf)
            if tuple(module.weight.shape) != said:
                raise Mismatch(f"{name} says it is {said} and is {tuple(module.weight.shape)}")


def check_config(
    dense: PreTrainedModel, pruned: PreTrainedModel, before: Sequence[AttentionLayer], after: Sequence[AttentionLayer]
) -> None:
    """A number of heads that was true of the layers is true of them still, for all at once or layer by layer."""
    configs = [model.config.get_text_config(decoder=True) for model in (dense, pruned)]
    stored = [config.to_dict() for config in configs]
    numbers = numbers_of(dense, before)
    for kind in ("attention_heads", "key_value_heads"):
        fields: dict[str, list[int]] = {}
        for place, layer in enumerate(before):
            fields.setdefault(field(stored[0], configs[0].attribute_map, kind, layer.name), []).append(place)
        for key, places in fields.items():
            counts = [
                [
                    layer.num_key_value_heads if "key" in kind else layer.num_heads * len(layer.maps[0])
                    for layer in layers
                ]
                for layers in (before, after)
            ]
            if any(stored[0].get(key) != counts[0][place] for place in places):
                continue
            own = {int(number): told.get(key) for number, told in (stored[1].get("per_layer_config") or {}).items()}
            told = {place: own.get(numbers[place]) or stored[1].get(key) for place in places}
            uniform = len({counts[1][place] for place in places}) == 1
            if (uniform or own) and any(told[place] != counts[1][place] for place in places):
                raise Mismatch(f"config.{key} says {list(told.values())} of layers with {counts[1]}")


def numbers_of(model: PreTrainedModel, layers: Sequence[Layer]) -> list[int]:
    """The numbers that a model gives to its layers, else those written in their names."""
    told = [getattr(model.get_submodule(layer.name), "layer_idx", None) for layer in layers]
    if None not in told and len(set(told)) == len(told):
        return told
    written = [[int(part) for part in layer.name.split(".") if part.isdigit()] for layer in layers]
    return [(own or [place])[0] for place, own in enumerate(written)]


def field(stored: Mapping[str, Any], names: Mapping[str, str], kind: str, layer: str) -> str:
    """Name under which a config counts the heads of a layer."""
    sides = (f"{side}_{kind}" for side in ("encoder", "decoder") if side in layer.split("."))
    plain = [name for name in KEYS if name in stored] if "key" in kind else []
    name = next((side for side in sides if side in stored), (*plain, f"num_{kind}")[0])
    return names.get(name, name)


def check_training(pruned: PreTrainedModel, dense: PreTrainedModel, layers: Sequence[Layer], given: Given) -> bool:
    """One step changes every layer and leaves finite logits; False if the class cannot be trained itself."""
    try:
        train_step(pruned, given)
    except Exception:  # whatever the class trips over
        try:
            train_step(copy.deepcopy(dense), given)
        except Exception:
            return False
        raise
    if idle := [layer for layer in layers if not has_gradient(pruned, layer)]:
        train_step(twin := copy.deepcopy(dense), given)
        if any(has_gradient(twin, layer) for layer in idle):
            raise Mismatch(f"layer {idle[0].index} gets no gradient")
    if not all_finite(pruned, given):
        train_step(twin := copy.deepcopy(dense), given)
        if all_finite(twin, given):
            raise Mismatch("a training step leaves logits that are not finite")
        return False
    return True


def all_finite(model: PreTrainedModel, given: Given) -> bool:
    """Whether a model's logits of real tokens are numbers."""
    return bool(real(logits(model, given), given["attention_mask"]).isfinite().all())


def has_gradient(model: PreTrainedModel, layer: Layer) -> bool:
    """Whether a step reached a layer's output projection."""
    gradient = output_weight(model, layer).grad
    return isinstance(gradient, torch.Tensor) and bool(gradient.isfinite().all() and gradient.any())


def train_step(model: PreTrainedModel, given: Given) -> None:
    """One step of plain gradient descent, in training mode."""
    nn.Module.train(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    more = {"decoder_input_ids": given["input_ids"]} if model.config.is_encoder_decoder else {}
    found = real(model(**given, **more, use_cache=False).logits, given["attention_mask"]).flatten(0, -2)
    nn.functional.cross_entropy(found, torch.arange(len(found)) % found.shape[-1]).backward()
    optimiser.step()
    nn.Module.eval(model)


def check_reload(pruned: PreTrainedModel, dense: PreTrainedModel, task: Task, given: Given) -> str:
    """What is saved and loaded again gives the same logits; why not, where the full model cannot come back either."""
    try:
        again = saved_and_loaded(pruned, task)
    except ModelError as reason:
        try:
            saved_and_loaded(dense, task)
        except ModelError:
            return str(reason)
        raise
    if type(again) is not type(pruned):
        raise Mismatch(f"a {type(again).__name__} comes back from disk")
    configs = [lasting(model.config.to_dict()) for model in (pruned, again)]
    records = [(removed_heads(model), removed_channels(model)) for model in (pruned, again)]
    if configs[0] != configs[1] or records[0] != records[1]:
        raise Mismatch("the config is another after save and load")
    before, after = logits(pruned, given), logits(again, given)
    within(deviation(before, after, given["attention_mask"]), "save and load change logits")
    return ""


def lasting(config: Any) -> Any:
    """A config without what saving adds to it."""
    if not isinstance(config, dict):
        return config
    return {name: lasting(value) for name, value in config.items() if name not in ADDED}


def saved_and_loaded(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """A model by way of the disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            again = load(folder, task=task, device="cpu", dtype=str(model.dtype).removeprefix("torch."))
        except ModelError as error:
            raise ModelError(str(error).replace(folder, "its checkpoint")) from error
    nn.Module.to(again, model.dtype)  # XLNet's bare tensors come back in single precision, unpruned too
    with contextlib.suppress(ValueError, NotImplementedError):  # classes without experts
        again.set_experts_implementation("eager")
    return again

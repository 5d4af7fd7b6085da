"""A pruning plan made flesh: heads leave the weights, and every number that counted them follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.bookkeeping import counts_left, keep_count
from compressor.attention.layout import dissecting
from compressor.attention.nouns import AttentionLayer
from compressor.attention.record import remember, removed_heads, surviving_heads
from compressor.attention.silence import silence
from compressor.attention.slim import Description, Editor, Habits
from compressor.attention.specimen import Specimen, in_some_precision
from compressor.attention.trace import Site
from compressor.errors import PlanError

Model = TypeVar("Model", bound=PreTrainedModel)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative; many modules round to float32 on their way


def prune_heads(model: Model, heads: Mapping[int, Iterable[int]], *, allow_empty: bool = False) -> Model:
    """Remove attention heads from the weights of a model, in place.

    A key/value head goes when the last query head that reads it goes. The plan is checked as a whole, and tried on
    copies of the attention blocks, which must give what they give with the heads' outputs zeroed, before anything is
    changed. The model's config then tells what is left; `config.pruned_heads` records, in the numbering of the dense
    model, all that was ever removed. `save_pretrained` writes it, and `compressor.load` reads it.

    Args:
        model: a model whose heads `attention_layers` finds.
        heads: query heads to remove by layer index, in the numbering of the model as it is now.
        allow_empty: let a layer lose all of its heads; what remains of it is the bias of its output projection.

    Returns:
        The same model, smaller.

    Raises:
        PlanError: a layer or head that does not exist, a head named twice, a layer left without heads, or heads that
            cannot leave by themselves.
        ModelError: the model's heads cannot be told apart.
    """
    with dissecting(model) as found:
        layers = [layer for _, layer in found]
        plan = check_plan(layers, heads, allow_empty)
        habits: dict[int, Habits] = {}
        for index, removed in plan.items():
            habits[index] = _try(found[index][0], layers[index], removed)
    if not plan:
        return model
    record = removed_heads(model)
    description: Description = {}
    for layer in layers:
        editor = Editor(model.get_submodule, model.set_submodule, habits.get(layer.index))
        removed = plan.get(layer.index, ())
        if removed:
            gone = record.get(layer.index, ())
            originals = surviving_heads(layer.num_heads, gone)
            record[layer.index] = tuple(sorted((*gone, *(originals[head] for head in removed))))
        if layer.num_heads:
            _remove(editor, layer, removed)  # layers that lose nothing are told their own numbers too
        description |= editor.description
    left = [(layer, *counts_left(layer, plan.get(layer.index, ()))) for layer in layers]
    remember(model, record, description, left)
    return model


def check_plan(
    layers: Sequence[AttentionLayer], heads: Mapping[int, Iterable[int]], allow_empty: bool
) -> dict[int, tuple[int, ...]]:
    """The plan as sorted tuples, without layers that lose nothing.

    Raises:
        PlanError: the plan does not fit the layers.
    """
    plan: dict[int, tuple[int, ...]] = {}
    for index, requested in heads.items():
        removed = tuple(requested)
        if not _is_number(index) or not 0 <= index < len(layers):
            raise PlanError(f"the plan names layer {index!r}; the model has layers 0 to {len(layers) - 1}")
        count = layers[index].num_heads
        for head in removed:
            if not _is_number(head) or not 0 <= head < count:
                span = f"heads 0 to {count - 1}" if count else "no heads left"
                raise PlanError(f"the plan names head {head!r} of layer {index}, which has {span}")
        if len(set(removed)) < len(removed):
            raise PlanError(f"the plan names a head of layer {index} twice: {sorted(removed)}")
        if removed and len(removed) == count and not allow_empty:
            raise PlanError(f"the plan removes all {count} heads of layer {index}; leave one, or allow empty layers")
        if removed:
            plan[int(index)] = tuple(sorted(int(head) for head in removed))
    return plan


def _is_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _try(site: Site, layer: AttentionLayer, removed: Sequence[int]) -> Habits:
    """Remove heads from copies of a block, and compare with another copy in which they are silenced.

    Returns:
        The reading of the block's code under which the two agree.

    Raises:
        PlanError: they do not.
    """
    what = f"the plan removes heads {', '.join(map(str, removed))} of layer {layer.index} ({layer.name})"
    failures: list[str] = []
    for habits in [Habits(widths, groups) for widths in (True, False) for groups in (True, False)]:
        try:
            deviation, tolerance = in_some_precision(partial(_deviation, site, layer, removed, habits))
        except (RuntimeError, AssertionError, ValueError) as error:
            failures.append(f"whose code cannot run without them ({' '.join(str(error).split())})")
            continue
        if deviation <= tolerance:
            return habits
        failures.append(f"which does not work as before without them (it deviates by {deviation:.1e})")
    advice = "; try --unit query or --unit group" if len(layer.groups) < layer.num_heads else ""
    raise PlanError(f"{what}, {failures[0]}{advice}")


def _deviation(
    site: Site, layer: AttentionLayer, removed: Sequence[int], habits: Habits, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest relative difference between a block without heads and one in which they are silenced, and what may be."""
    depth = next(place for place, frame in enumerate(site.stack) if frame.name == layer.block)
    silenced, slim = Specimen(site, depth, dtype), Specimen(site, depth, dtype)
    silence(silenced.find(layer.output_projection), layer, removed)
    _remove(Editor(slim.find, slim.replace, habits), layer, removed)
    with torch.no_grad():
        expected, found = silenced.run(), slim.run()
    if expected.shape != found.shape:
        return math.inf, 0.0
    size = expected.abs().max().clamp(min=torch.finfo(dtype).tiny)  # without a bias, an emptied layer gives zeros
    return float((expected - found).abs().max() / size), TOLERANCE[dtype]


def _in_list(editor: Editor, layer: AttentionLayer, name: str) -> bool:
    """Whether a module is an entry of a list within the layer, as norms of single heads are."""
    return name != layer.block and isinstance(editor.find(name.rpartition(".")[0]), nn.ModuleList)


def _remove(editor: Editor, layer: AttentionLayer, removed: Sequence[int]) -> None:
    """Take heads out of one layer.

    Raises:
        PlanError: its key/value heads would come to be shared in a way that its code cannot express.
    """
    gone: list[str] = []
    for part in layer.slices:
        kept = part.kept(removed)
        if len(kept) == len(part):
            continue
        if part.kind == "output":
            editor.keep_outputs(part.module, kept)
        elif part.kind == "argument":
            editor.keep_argument(part.module, part.name, part.dim, kept, len(part) if part.periodic else 0)
        elif kept or not _in_list(editor, layer, part.module):
            editor.cut(part.module, part.name, part.dim, kept)
        else:
            gone.append(part.module)
    if len(removed) == layer.num_heads:
        inside = layer.output_projection.startswith(f"{layer.name}.")
        start = layer.name if inside else layer.name.rpartition(".")[0]
        output = layer.output_projection.removeprefix(f"{start}.")
        editor.empty(layer.name, head_dim=layer.head_dim, output_name=output if inside else f"..{output}")
        return
    keep_count(editor, layer, removed)
    for name in sorted(set(gone), key=lambda name: int(name.rpartition(".")[2]), reverse=True):
        editor.drop(name)

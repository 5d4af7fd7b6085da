"""A pruning plan made flesh: heads leave the weights, and every number that counted them follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from compressor.attention.bookkeeping import counts_left, keep_count
from compressor.attention.layout import dissecting
from compressor.attention.nouns import AttentionLayer
from compressor.attention.record import remember_heads, removed_heads, with_more
from compressor.attention.slim import Description, Editor, Habits
from compressor.attention.specimen import in_some_precision
from compressor.attention.trace import Site
from compressor.attention.trial import check_plan, deviation, first_that_works

Model = TypeVar("Model", bound=PreTrainedModel)


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
    layers, plan, habits = _tried(model, heads, allow_empty)
    if not plan:
        return model
    description: Description = {}
    for layer in layers:
        editor = Editor(model.get_submodule, model.set_submodule, habits.get(layer.index))
        removed = plan.get(layer.index, ())
        if layer.num_heads:
            _remove(editor, layer, removed)  # layers that lose nothing are told their own numbers too
        description |= editor.description
    record = with_more(removed_heads(model), {layer.index: layer.num_heads for layer in layers}, plan)
    left = [(layer, *counts_left(layer, plan.get(layer.index, ()))) for layer in layers]
    remember_heads(model, record, description, left)
    return model


def check_heads(model: PreTrainedModel, heads: Mapping[int, Iterable[int]], *, allow_empty: bool = False) -> None:
    """Check a plan as `prune_heads` does, on copies, and change nothing.

    Raises:
        PlanError: `prune_heads` would refuse it.
        ModelError: the model's heads cannot be told apart.
    """
    _tried(model, heads, allow_empty)


def _tried(
    model: PreTrainedModel, heads: Mapping[int, Iterable[int]], allow_empty: bool
) -> tuple[list[AttentionLayer], dict[int, tuple[int, ...]], dict[int, Habits]]:
    """The layers of a model, the plan as it was checked, and the readings of code under which it works."""
    with dissecting(model) as found:
        layers = [layer for _, layer in found]
        plan = check_plan([layer.num_heads for layer in layers], heads, allow_empty)
        return layers, plan, {index: _try(found[index][0], layers[index], gone) for index, gone in plan.items()}


def _try(site: Site, layer: AttentionLayer, removed: Sequence[int]) -> Habits:
    """Remove heads from copies of a block, and compare with another copy in which they are silenced.

    Returns:
        The reading of the block's code under which the two agree.

    Raises:
        PlanError: they do not.
    """
    advice = "; try --unit query or --unit group" if len(layer.groups) < layer.num_heads else ""

    def attempt(habits: Habits) -> tuple[float, float]:
        remove = partial(_remove, layer=layer, removed=removed)
        trial = partial(deviation, site, layer.block, layer.output_projection, layer, removed, remove, habits)
        return in_some_precision(trial)

    return first_that_works(
        [Habits(widths, groups) for widths in (True, False) for groups in (True, False)],
        attempt,
        f"the plan removes heads {', '.join(map(str, removed))} of layer {layer.index} ({layer.name})",
        advice,
    )


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

"""Channels leave the weights of MLPs, and every number that counted them follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from transformers import PreTrainedModel

from compressor.attention.record import with_more
from compressor.attention.slim import Description, Editor, Habits
from compressor.attention.specimen import in_some_precision
from compressor.attention.trace import Site
from compressor.attention.trial import check_plan, deviation, first_that_works, listed
from compressor.mlp.layout import dissecting
from compressor.mlp.nouns import MLPLayer
from compressor.mlp.record import remember_channels, removed_channels, sounds_like_width

Model = TypeVar("Model", bound=PreTrainedModel)


def prune_channels(model: Model, channels: Mapping[int, Iterable[int]], *, allow_empty: bool = False) -> Model:
    """Remove hidden channels from the weights of a model's MLPs, in place.

    The plan is checked as a whole, and tried on copies of the MLPs, which must give what they give with the channels
    zeroed before the down projection, before anything is changed. The model's config then tells what is left;
    `config.pruned_channels` records, in the numbering of the dense model, all that was ever removed. `save_pretrained`
    writes it, and `compressor.load` reads it.

    Args:
        model: a model whose MLPs `mlp_layers` finds.
        channels: channels to remove by layer index, in the numbering of the model as it is now.
        allow_empty: let an MLP lose all of its channels; what remains of it is the bias of its down projection.

    Returns:
        The same model, smaller.

    Raises:
        PlanError: a layer or channel that does not exist, a channel named twice, a layer left without channels, or
            channels that cannot leave by themselves.
        ModelError: there is no MLP whose channels can leave.
    """
    layers, plan, habits = _tried(model, channels, allow_empty)
    if not plan:
        return model
    description: Description = {}
    for index, removed in plan.items():
        editor = Editor(model.get_submodule, model.set_submodule, habits[index])
        _remove(editor, layers[index], removed)
        description |= editor.description
    counts = {layer.index: layer.num_channels for layer in layers}
    record = with_more(removed_channels(model), counts, plan)
    left = [(layer, layer.num_channels - len(plan.get(layer.index, ()))) for layer in layers]
    remember_channels(model, record, description, left)
    return model


def check_channels(model: PreTrainedModel, channels: Mapping[int, Iterable[int]], *, allow_empty: bool = False) -> None:
    """Check a plan as `prune_channels` does, on copies, and change nothing.

    Raises:
        PlanError: `prune_channels` would refuse it.
        ModelError: there is no MLP whose channels can leave.
    """
    _tried(model, channels, allow_empty)


def _tried(
    model: PreTrainedModel, channels: Mapping[int, Iterable[int]], allow_empty: bool
) -> tuple[list[MLPLayer], dict[int, tuple[int, ...]], dict[int, Habits]]:
    """The MLPs of a model, the plan as it was checked, and the readings of code under which it works."""
    with dissecting(model) as found:
        layers = [layer for _, layer in found]
        plan = check_plan([layer.num_channels for layer in layers], channels, allow_empty, "channel")
        return layers, plan, {index: _try(*found[index], gone) for index, gone in plan.items()}


def _try(site: Site, layer: MLPLayer, removed: Sequence[int]) -> Habits:
    """Remove channels from copies of a block, and compare with another copy in which they are silenced.

    Returns:
        The reading of the block's code under which the two agree.

    Raises:
        PlanError: they do not.
    """

    def attempt(habits: Habits) -> tuple[float, float]:
        remove = partial(_remove, layer=layer, removed=removed)
        trial = partial(deviation, site, layer.name, layer.down_projection, layer, removed, remove, habits)
        return in_some_precision(trial)

    what = f"the plan removes channels {listed(removed)} of layer {layer.index} ({layer.name})"
    return first_that_works([Habits(widths) for widths in (True, False)], attempt, what)


def _remove(editor: Editor, layer: MLPLayer, removed: Sequence[int]) -> None:
    """Take channels out of one MLP."""
    for part in layer.slices:
        kept = part.kept(removed)
        if len(kept) < len(part):
            editor.cut(part.module, part.name, part.dim, kept)
    if not editor.habits.widths_count:
        return
    own = {layer.name, *layer.modules, *(part.module for part in layer.slices)}
    for name in sorted(own | {name.rpartition(".")[0] for name in own - {layer.name}}):
        for attribute, value in list(vars(editor.find(name)).items()):
            if type(value) is int and value == layer.num_channels and sounds_like_width(attribute):
                editor.set(name, attribute, value - len(removed))

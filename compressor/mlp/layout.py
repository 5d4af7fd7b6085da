"""Where the MLPs of a model sit: which entries of which tensors belong to which hidden channel.

No architecture is listed. Whatever feeds a linear map alone, without a look at other tokens, and bends what it lets
through, makes a hidden layer; a copy of the module around it shows by gradients what each channel depends on. So plain
and gated MLPs, separate, fused and interleaved projections, biases and scales are all found the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.adapters import refuse_quantised
from compressor.attention.linear import side
from compressor.attention.nouns import Slice
from compressor.attention.specimen import Specimen, in_some_precision, signature
from compressor.attention.trace import Site
from compressor.errors import ModelError
from compressor.mlp.anatomy import SEVERAL, Needs, needs_of_channels
from compressor.mlp.nouns import MLPLayer
from compressor.mlp.trace import Place, tracing

REMEMBERED = 1024  # blocks of different build whose examination is kept
_EXAMINED: dict[tuple[object, ...], MLPLayer | str | None] = {}  # a string says why not; None: this is no MLP


def mlp_layers(model: PreTrainedModel) -> tuple[MLPLayer, ...]:
    """Find the MLPs that a model runs on text, in the order in which they are first applied.

    The model is run once, on a few token ids. An MLP that is applied several times counts once; those whose channels
    cannot leave one by one, such as experts that are chosen for every token, are left out.

    Raises:
        ModelError: there is no MLP whose channels can leave.
    """
    with dissecting(model) as found:
        return tuple(layer for _, layer in found)


@contextmanager
def dissecting(model: PreTrainedModel) -> Iterator[list[tuple[Site, MLPLayer]]]:
    """The places of a model's MLPs, with what was found out about them, while copies of them can be run."""
    with tracing(model) as places:
        found: list[tuple[Site, MLPLayer]] = []
        reasons: list[str] = []
        experts = {_container(model, place) for place in places if place.chosen}
        for place in places:
            if _container(model, place) in experts:
                reasons.append(_experts(model, place.down.stack[1].module))
                continue
            site = Site(place.down.stack, heads=0, uses=place.uses)
            layer = _dissect(site, place)
            if isinstance(layer, str):
                reasons.append(layer)
            elif layer is not None:
                found.append((site, replace(layer, index=len(found))))
        if not found:
            raise ModelError(next(iter(reasons), None) or _why_none(model))
        yield found


def output_norms(model: PreTrainedModel, layer: MLPLayer) -> torch.Tensor:
    """L2 norm of each channel's slice of the down projection, float64 [channels] on the CPU."""
    weight = model.get_submodule(layer.down_projection).get_parameter("weight").detach().cpu().double()
    return weight.movedim(layer.slices[0].dim, 0).flatten(1).square().sum(1).sqrt()


def _container(model: nn.Module, place: Place) -> str | None:
    """The innermost list or dictionary of modules that holds a down projection."""
    name = place.down.stack[0].name
    while name:
        name = name.rpartition(".")[0]
        if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            return name
    return None


def _why_none(model: PreTrainedModel) -> str:
    refuse_quantised(type(model).__name__, model)
    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and "expert" in f"{name} {type(module).__name__}".lower():
            return _experts(model, module)
    return f"{type(model).__name__} has no MLP whose hidden channels can be told apart"


def _experts(model: PreTrainedModel, module: nn.Module) -> str:
    name = type(model).__name__
    return f"{name} has its MLPs in experts ({type(module).__name__}), chosen for every token, which are not pruned"


def _dissect(site: Site, place: Place) -> MLPLayer | str | None:
    block = site.stack[place.depth]
    inside = {module: name for name, module in block.module.named_modules()}
    down, ups = inside[place.down.module], list(dict.fromkeys(inside[up.module] for up in place.ups))
    known = (*signature(site, place.depth), down, *ups)
    if known not in _EXAMINED:
        if len(_EXAMINED) >= REMEMBERED:
            _EXAMINED.clear()
        try:
            _EXAMINED[known] = in_some_precision(partial(_examine, site, place.depth, down, ups))
        except Exception as error:  # whatever a block may trip over
            _EXAMINED[known] = f"cannot be run by itself ({' '.join(str(error).split())})"
    layer = _EXAMINED[known]
    if isinstance(layer, str):
        return f"{block.name} ({type(block.module).__name__}) {layer}"
    return None if layer is None else _placed(layer, block.name, site.uses)


def _placed(layer: MLPLayer, block: str, uses: int) -> MLPLayer:
    """What was found out about another block of the same build, told of this one."""

    def moved(name: str) -> str:
        return ".".join(filter(None, (block, name)))

    return replace(
        layer,
        name=block,
        down_projection=moved(layer.down_projection),
        up_projections=tuple(map(moved, layer.up_projections)),
        slices=tuple(replace(part, module=moved(part.module)) for part in layer.slices),
        uses=uses,
    )


def _examine(site: Site, depth: int, down: str, ups: list[str], dtype: torch.dtype) -> MLPLayer | str | None:
    """The MLP of a block, by names within the block."""
    specimen = Specimen(site, depth, dtype)
    needs = needs_of_channels(specimen, down, ups)
    if not needs.bends:
        return None
    if reason := _mixture(needs, down):
        return reason
    projection = specimen.submodule(down)
    slices = [Slice("tensor", down, "weight", side(projection, "inputs"), tuple(_runs(range(needs.channels))))]
    for name, owners in needs.outputs.items():
        module = specimen.submodule(name)
        for tensor, dim in (("weight", side(module, "outputs")), ("bias", 0)):
            if getattr(module, tensor, None) is not None:
                slices.append(Slice("tensor", name, tensor, dim, tuple(_runs(owners))))
    for (name, dim), owners in needs.tensors.items():
        inside, _, tensor = name.rpartition(".")
        slices.append(Slice("tensor", inside, tensor, dim, tuple(_runs(owners))))
    return MLPLayer(0, "", down, tuple(ups), needs.channels, tuple(slices))


def _mixture(needs: Needs, down: str) -> str:
    """Why channels cannot leave one by one; nothing if they can."""
    if needs.arguments:
        return f"takes a part of its hidden channels from outside ({needs.arguments[0]}), so they cannot leave"
    shared = any(SEVERAL in owners and len(owners) >= needs.channels for owners in needs.outputs.values())
    owned = {owner for owners in needs.outputs.values() for owner in owners}
    if shared or not owned.issuperset(range(needs.channels)):
        return (
            f"mixes its {needs.channels} hidden channels before {down} takes them, as a norm over all of them does, so "
            "none can leave alone"
        )
    return ""


def _runs(owners: list[int] | range) -> Iterator[tuple[tuple[int, ...], int]]:
    for owner, run in groupby(owners):
        yield ((owner,) if owner >= 0 else ()), sum(1 for _ in run)

"""Where the attention heads of a model sit: which rows and columns of which weights belong to which head.

No architecture is listed. A module that attends is copied, with random weights, and played with: its heads' outputs
are shaken one at a time to see what they reach, and gradients from there tell which weights a head depends on. What
only the heads that leave depend on can leave with them. So fused, interleaved, grouped, latent, gated and unheard-of
projections are all found the same way, and sizes are as true of a pruned model as of a dense one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations, groupby
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from compressor.attention.adapters import AMENDED, DESCRIBED, refuse, refuse_model, refuse_quantised
from compressor.attention.anatomy import Owners, along, dependencies, owners, reached_by_heads, tells_heads_apart
from compressor.attention.empty import EmptyAttention
from compressor.attention.linear import is_linear, side
from compressor.attention.nouns import AttentionLayer, Slice
from compressor.attention.slim import config_value
from compressor.attention.specimen import Specimen, in_some_precision, signature
from compressor.attention.trace import BATCH, KEY_COUNTS, Site, tracing
from compressor.errors import ModelError

REMEMBERED = 1024  # blocks of different build whose examination is kept
REACH = 3  # frames outside the attention module within which its output projection is looked for


_EXAMINED: dict[tuple[object, ...], AttentionLayer | None] = {}


def attention_layers(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """Find the attention layers that a model runs on text, in the order in which they are first applied.

    The model is run once, on a few token ids. A layer that is applied several times counts once.

    Raises:
        ModelError: there are no attention heads, or they cannot be told apart.
    """
    with dissecting(model) as found:
        return tuple(layer for _, layer in found)


@contextmanager
def dissecting(model: PreTrainedModel) -> Iterator[list[tuple[Site, AttentionLayer]]]:
    """The places where a model attends, with what was found out about them, while copies of them can be run."""
    refuse_model(model)
    with tracing(model) as sites:
        name = type(model).__name__
        if not sites and config_value(model.config, "num_attention_heads"):
            raise ModelError(f"{name} attends without a softmax over keys, by which heads are found")
        if not sites:
            raise ModelError(f"{name} has no attention heads")
        yield [(site, dissect(site, index)) for index, site in enumerate(sites)]


def dissect(site: Site, index: int) -> AttentionLayer:
    """Find out, on copies of an attention block, which of its weights belong to which head.

    Raises:
        ModelError: the heads cannot be told apart.
    """
    module = site.stack[0].module
    if isinstance(module, EmptyAttention):
        output = _resolve(site.name, module.output_name)
        block = site.name if output.startswith(f"{site.name}.") else site.name.rpartition(".")[0]
        return AttentionLayer(
            index, site.name, block, output, 0, 0, module.head_dim, module.head_dim, 0, (), (), (), ()
        )
    refuse(module)
    kind = type(module).__name__
    if kind in DESCRIBED:
        return DESCRIBED[kind](site, index)
    for depth in range(min(len(site.stack), REACH)):
        known = signature(site, depth)
        if known not in _EXAMINED:
            if len(_EXAMINED) >= REMEMBERED:
                _EXAMINED.clear()
            _EXAMINED[known] = in_some_precision(partial(_examine, site, depth))
        if (layer := _EXAMINED[known]) is not None:
            layer = _placed(layer, site, index, depth)
            return AMENDED[kind](layer) if kind in AMENDED else layer
    raise ModelError(f"{site.name} ({type(module).__name__}) attends, but no linear map takes its heads' outputs")


def _placed(layer: AttentionLayer, site: Site, index: int, depth: int) -> AttentionLayer:
    """What was found out about another block of the same build, told of this one."""
    old, new = layer.block, site.stack[depth].name

    def moved(name: str) -> str:
        return ".".join(filter(None, (new, name.removeprefix(old).removeprefix("."))))

    return replace(
        layer,
        index=index,
        name=moved(layer.name),
        block=new,
        output_projection=moved(layer.output_projection),
        slices=tuple(replace(part, module=moved(part.module)) for part in layer.slices),
        uses=site.uses,
        cached=layer.cached if site.keys is None else site.cached,
        keys_shared=site.shares_keys,
    )


def _examine(site: Site, depth: int, dtype: torch.dtype) -> AttentionLayer | None:
    refuse_quantised(site.stack[depth].name, site.stack[depth].module)
    specimen = Specimen(site, depth, dtype)
    if specimen.inside is None:
        return None
    names = [name for name, part in specimen.block.named_modules() if is_linear(part)]
    found = reached_by_heads(specimen, names)
    return None if found is None else _describe(specimen, *found)


def _describe(specimen: Specimen, projection: str, reached: Owners) -> AttentionLayer:
    site = specimen.site
    sets = sorted({heads for heads in reached if heads})
    # Heads that cannot be separated, like the two maps of differential attention, are one.
    apart = all(set(one).isdisjoint(other) for one, other in combinations(sets, 2))
    if not apart or len({len(one) for one in sets}) > 1 or (len(sets) == 1 and site.heads > 2):
        raise ModelError(
            f"{site.name} mixes its {site.heads} heads before any linear map takes their outputs, as a norm over all "
            "of them does, so none can leave alone"
        )
    parts = [[place for place, heads in enumerate(reached) if heads == own] for own in sets]
    if len({len(part) for part in parts}) > 1:
        raise ModelError(f"{site.name} has heads of different widths, {sorted({len(part) for part in parts})}")
    place: dict[tuple[int, ...], tuple[int, ...]] = {heads: (number,) for number, heads in enumerate(sets)}
    place[()] = ()
    output = specimen.submodule(projection)
    slices = [
        _slice(
            specimen, "tensor", projection, "weight", side(output, "inputs"), tuple(place[heads] for heads in reached)
        )
    ]
    needs = dependencies(specimen, projection, parts) if len(sets) > 1 else {}
    slices += _slices(specimen, needs)
    mapping, spreadable = _sharing(site, needs, slices, len(sets))
    keys = max(mapping) + 1 if site.keys is None else site.keys
    if site.shares_keys:
        slices = [
            part
            for part in slices
            if not any(len({mapping[head] for head in own}) == 1 < len(own) for own, _ in part.runs)
        ]
    return AttentionLayer(
        index=0,
        name=site.name,
        block=specimen.name,
        output_projection=slices[0].module,
        num_heads=len(sets),
        num_key_value_heads=keys,
        head_dim=site.key_width or len(parts[0]),
        value_dim=len(parts[0]),
        cached=site.cached if site.keys is not None else keys * 2 * len(parts[0]),
        key_value_index=mapping,
        group_index=mapping,
        slices=tuple(slices),
        maps=tuple(sets),
        uses=site.uses,
        interface=site.keys is not None,
        spreadable=spreadable,
        keys_shared=site.shares_keys,
    )


def _slices(specimen: Specimen, needs: dict[tuple[str, str], torch.Tensor]) -> Iterator[Slice]:
    """The dimensions that tell heads apart. A linear map goes by its outputs: the gradient of a bias may vanish."""
    block = specimen.block
    uncut = {name for (kind, name) in needs if kind == "outputs" and _mixes(needs, name, block.get_submodule(name))}
    for name in uncut:
        yield _slice(specimen, "output", name, "", -1, owners(needs["outputs", name]))
    for (kind, name), needed in needs.items():
        if kind == "outputs" and name not in uncut and is_linear(module := block.get_submodule(name)):
            if tells_heads_apart(needed):
                entries = _completed(owners(needed), len(needed))
                for tensor, dim in (("weight", side(module, "outputs")), ("bias", 0)):
                    if getattr(module, tensor, None) is not None:
                        yield _slice(specimen, "tensor", name, tensor, dim, entries)
        elif kind == "tensor":
            inside, _, tensor = name.rpartition(".")
            if inside in uncut or is_linear(block.get_submodule(inside)):
                continue
            weight = needs.get(("tensor", f"{inside}.weight"))
            if tensor == "bias" and weight is not None and weight.shape[1] == needed.shape[1]:
                needed = along(weight, 0)  # a bias goes with its weight: its own gradient may vanish
            yield from _dimensions(specimen, "tensor", inside, tensor, needed)
        elif kind == "argument":
            yield from _dimensions(specimen, "argument", "", name, needed)


def _completed(needed: Owners, heads: int) -> Owners:
    """Entries that a short text never needs, as those for far positions, follow the pattern of those it does."""
    pattern = tuple((place % heads,) for place in range(len(needed)))
    return pattern if all(own in ((), told) for own, told in zip(needed, pattern, strict=True)) else needed


def _dimensions(
    specimen: Specimen, kind: Literal["tensor", "argument"], module: str, name: str, needed: torch.Tensor
) -> Iterator[Slice]:
    for dim in range(needed.ndim - 1):
        if tells_heads_apart(entries := along(needed, dim)):
            yield _slice(specimen, kind, module, name, dim, owners(entries))


def _mixes(needs: dict[tuple[str, str], torch.Tensor], name: str, module: nn.Module) -> bool:
    """Whether heads can be told apart behind a module, but not in front of it, as at a norm over all heads."""
    inputs, outputs = needs.get(("inputs", name)), needs["outputs", name]
    if is_linear(module) or inputs is None:
        return False
    if inputs.shape != outputs.shape and "kept_outputs" not in vars(module):  # but for norms that were pruned before
        return False
    return tells_heads_apart(outputs) and not tells_heads_apart(inputs)


def _slice(
    specimen: Specimen, kind: Literal["tensor", "output", "argument"], module: str, name: str, dim: int, needed: Owners
) -> Slice:
    # Of [batch · heads, …], only the heads of one sequence are told.
    period = len(needed) // BATCH
    periodic = kind == "argument" and dim == 0 and needed == needed[:period] * BATCH
    runs = tuple((heads, sum(1 for _ in run)) for heads, run in groupby(needed[:period] if periodic else needed))
    return Slice(kind, ".".join(filter(None, (specimen.name, module))), name, dim, runs, periodic)


def _sharing(
    site: Site, needs: dict[tuple[str, str], torch.Tensor], slices: Sequence[Slice], heads: int
) -> tuple[tuple[int, ...], bool]:
    """The key/value head of every head, and whether the attention function sees them as they are shared."""
    groups = sorted({own for part in slices for own, _ in part.runs if 1 < len(own) < heads})
    if groups and sorted(head for group in groups for head in group) == list(range(heads)):
        mapping = tuple(next(place for place, group in enumerate(groups) if head in group) for head in range(heads))
        return mapping, site.keys == len(groups)
    if ("keys", "") in needs:
        read = owners(needs["keys", ""].T)
        if all(len(own) == 1 for own in read):
            return tuple(own[0] for own in read), True
        sets = sorted(set(read))
        if sum(map(len, sets)) == site.keys:
            return tuple(sets.index(own) for own in read), False
    if any(vars(site.stack[0].module).get(name) == 1 for name in KEY_COUNTS):
        return (0,) * heads, True
    return tuple(range(heads)), True


def _resolve(qualified: str, relative: str) -> str:
    if relative.startswith(".."):
        return f"{qualified.rpartition('.')[0]}.{relative[2:]}"
    return f"{qualified}.{relative}"


def output_norms(model: PreTrainedModel, layer: AttentionLayer) -> torch.Tensor:
    """L2 norm of each head's slice of the output projection, float64 [heads] on the CPU."""
    projection = layer.slices[0]
    weight = model.get_submodule(projection.module).get_parameter(projection.name).detach()
    squares = weight.movedim(projection.dim, 0).flatten(1).double().square().sum(1).cpu()
    return torch.stack([squares[layer.entries([head])].sum().sqrt() for head in range(layer.num_heads)])

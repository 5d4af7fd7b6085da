"""Experiments on a copy of an attention block: what each head's output reaches, and what each head depends on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compressor.attention.linear import channel_axis
from compressor.attention.specimen import SEED, Specimen
from compressor.attention.trace import BATCH

Owners = tuple[tuple[int, ...], ...]  # for every entry along a dimension, the heads that need it


def reached_by_heads(specimen: Specimen, candidates: Sequence[str]) -> tuple[str, Owners] | None:
    """The first of the candidate modules that heads reach, and which heads reach each of its inputs.

    Every head's output is shaken in turn; what changes, depends on it.
    """
    before = _inputs(specimen, candidates, None)
    after = [_inputs(specimen, candidates, head) for head in range(specimen.site.heads)]
    for name in before:  # in the order in which they were called
        changed = torch.stack([_channels(_differ(before[name], inputs[name])) for inputs in after])
        if changed.any():
            return name, owners(changed)
    return None


def dependencies(
    specimen: Specimen, projection: str, parts: Sequence[Sequence[int]]
) -> dict[tuple[str, str], torch.Tensor]:
    """What the parts of a projection's input depend on, by gradients.

    Args:
        specimen: the block.
        projection: name of the projection within the block.
        parts: the inputs of the projection that belong to each head.

    Returns:
        Booleans [heads, …] by (kind, name): "outputs" and "inputs" of modules, [heads, width of the last dimension];
        "tensor" for parameters and buffers, "argument" for tensors among the arguments, both [heads, *shape];
        "keys" [heads, key heads], what the attention function was given.
    """
    seen: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    axes: dict[tuple[str, str], int] = {}

    def note(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> object:
            for kind, value in (("inputs", args[0] if args else None), ("outputs", output)):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    seen[kind, name].append(value)
                    axes[kind, name] = channel_axis(module)
            # A copy goes on, for what is changed in place would no longer be what was noted.
            return output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    block = specimen.block
    for buffer in block.buffers():
        if buffer.is_floating_point():
            buffer.requires_grad_()
    leaves = [name for name, module in block.named_modules() if not any(module.children())]
    with torch.enable_grad(), _hooked(block, leaves, note):
        specimen.run()
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if tensor.requires_grad:
            seen["tensor", name] = [tensor]
    for name, value in specimen.arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            seen["argument", name] = [value]
    if specimen.key is not None and specimen.key.requires_grad:
        seen["keys", ""] = [specimen.key]

    sources = seen.pop(("inputs", projection))
    for source, axis in axes.items():  # a module that works on anything, such as a norm without weights, tells nothing
        if len({tensor.shape[axis] for tensor in seen.get(source, ())}) > 1:
            del seen[source]
    tensors = [tensor for found in seen.values() for tensor in found]
    results: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(SEED)
    for part in parts:
        with torch.enable_grad():
            own = [source.movedim(axes["inputs", projection], -1)[..., list(part)] for source in sources]
            noise = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in own]
            total = torch.stack([(x * weights.to(x)).sum() for x, weights in zip(own, noise, strict=True)]).sum()
        gradients = iter(torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True))
        for (kind, name), found in seen.items():
            moved = [
                torch.zeros_like(tensor, dtype=torch.bool) if g is None else g != 0
                for tensor, g in zip(found, gradients, strict=False)
            ]
            if kind in ("inputs", "outputs"):
                results[kind, name].append(_channels([entry.movedim(axes[kind, name], -1) for entry in moved]))
            elif kind == "keys":
                results[kind, name].append(moved[0].transpose(0, 1).flatten(1).any(1))
            else:
                results[kind, name].append(moved[0])
    return {source: torch.stack(found) for source, found in results.items()}


def owners(needs: torch.Tensor) -> Owners:
    """From [heads, entries] booleans, the heads that need each entry."""
    return tuple(tuple(torch.nonzero(column).flatten().tolist()) for column in needs.T)


def along(needs: torch.Tensor, dim: int) -> torch.Tensor:
    """From [heads, *shape] booleans to [heads, entries] of one dimension of the shape."""
    return needs.movedim(dim + 1, 1).flatten(2).any(2) if needs.ndim > 2 else needs


def tells_heads_apart(needs: torch.Tensor) -> bool:
    """Whether some entry of [heads, entries] is needed by some heads and not by others."""
    count = needs.sum(0)
    return bool(((count > 0) & (count < len(needs))).any())


def _inputs(specimen: Specimen, candidates: Iterable[str], shaken: int | None) -> dict[str, list[torch.Tensor]]:
    """What the candidates are called with while one head's output is shaken."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(SEED)

    def shake(output: torch.Tensor, axis: int) -> torch.Tensor | None:
        if shaken is None:
            return None
        step = None if axis else output.shape[0] // BATCH
        changed = output.clone()
        place = changed.narrow(axis, shaken, 1) if axis else changed[shaken::step]
        place += 1 + torch.rand(place.shape, generator=generator, dtype=torch.float64).to(place)
        return changed

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen[name].append(args[0].movedim(channel_axis(module), -1))

    with torch.no_grad(), _hooked(specimen.block, candidates, note):
        specimen.run(shake)
    return seen


def _differ(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [~torch.isclose(old, new, rtol=1e-9, atol=1e-9) for old, new in zip(before, after, strict=True)]


def _channels(changed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Booleans of the last dimension: whether anything changed there."""
    return torch.stack([entry.flatten(0, -2).any(0) for entry in changed]).any(0)


@contextmanager
def _hooked(block: nn.Module, names: Iterable[str], hook: Callable[[str], Callable[..., object]]) -> Iterator[None]:
    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""What the loss says of the hidden channels of MLPs, from gradients of a pass that is taken for the heads anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from compressor.attention.linear import channel_axis
from compressor.damage.gates import Site, linear_at, real_rows
from compressor.measure._forward import evaluating
from compressor.measure.sums import float64_device
from compressor.module import Batch, LanguageModel


class ChannelSums(NamedTuple):
    """What slopes along the gates of a site's channels add up to over calibration text; float64 [channels] on the CPU.

    The slope at a token, in nats, is what the channel hands on there times the gradient of the window's summed loss
    with respect to it. A site that is applied several times has its slopes at a token added up for `total` and
    `windows`; for `tokens` each use is squared by itself.
    """

    total: torch.Tensor  # of all tokens
    windows: torch.Tensor  # of the squares of what each window's tokens come to
    tokens: torch.Tensor  # of the squares of each token's


class ChannelSlopes:
    """Adds up slopes along the gates of channels while batches go by; nothing is kept for tokens or windows.

    Args:
        model: what holds the sites.
        sites: the down projections, each of whose inputs is a channel, numbered as they lie.

    Raises:
        ModelError: a site is no linear map.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._maps = [linear_at(model, site) for site in sites]
        self._home = float64_device(next(model.parameters()).device)
        self._sums = [torch.zeros(3, site.units, dtype=torch.float64, device=self._home) for site in sites]

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[list[torch.Tensor]]:
        """Within the context, one forward and one backward pass over a batch is counted.

        Yields:
            What the forward pass fills with the tensors that the backward pass has to be asked for as well: inputs of
            sites that no gradient would reach, as in a first block that attends and computes in parallel.

        Raises:
            ModelError: what reaches a site has no row for each token.
        """
        windows = [sums.new_zeros(len(batch["input_ids"]), sums.shape[1]) for sums in self._sums]
        leaves: list[torch.Tensor] = []
        with ExitStack() as stack:
            for place, part in enumerate(self._maps):
                hook = self._hook(batch, place, windows[place], leaves)
                stack.callback(part.register_forward_pre_hook(hook).remove)
            yield leaves
        for sums, window in zip(self._sums, windows, strict=True):
            sums[0] += window.sum(0)
            sums[1] += window.square().sum(0)

    def sums(self) -> tuple[ChannelSums, ...]:
        """What was added up so far, by site."""
        return tuple(ChannelSums(*sums.cpu().unbind()) for sums in self._sums)

    def _hook(
        self, batch: Batch, place: int, windows: torch.Tensor, leaves: list[torch.Tensor]
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        tokens, lengths = batch["input_ids"].numel(), batch["attention_mask"].sum(1).tolist()

        def hook(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs, axis = args[0], channel_axis(part)
            if not inputs.requires_grad:
                inputs = inputs.detach().requires_grad_()
                leaves.append(inputs)
            real = batch["real"].to(inputs.device)
            given = real_rows(inputs.detach(), axis, real, tokens)

            def add(gradient: torch.Tensor) -> None:
                slopes = given.to(self._home).double()
                slopes *= real_rows(gradient, axis, real, tokens).to(self._home)
                windows.add_(torch.stack([own.sum(0) for own in torch.split(slopes, lengths)]))
                self._sums[place][2] += slopes.square_().sum(0)

            inputs.register_hook(add)
            return (inputs, *args[1:])

        return hook


def not_by_token(module: LanguageModel, batch: Batch, sites: Sequence[Site]) -> str | None:
    """The first site that is not given one row for each token, sequence by sequence; None where all are.

    Runs the backbone on the first and the last window of a batch.
    """
    few = {name: batch[name][[0, -1]].to(module.model.device) for name in ("input_ids", "attention_mask")}
    sequences, tokens = few["input_ids"].shape
    seen: dict[nn.Module, list[bool]] = {linear_at(module.model, site): [] for site in sites}

    def look(part: nn.Module, args: tuple[Any, ...]) -> None:
        rows = tuple(args[0].movedim(channel_axis(part), -1).shape[:-1]) if args else ()
        seen[part].append(rows in ((sequences, tokens), (sequences * tokens,)))

    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        for part in seen:
            stack.callback(part.register_forward_pre_hook(look).remove)
        module.predict_step(few, 0)
    told = (site.module for site, found in zip(sites, seen.values(), strict=True) if not found or not all(found))
    return next(told, None)

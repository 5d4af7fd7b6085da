"""Channels kept in the model but silenced: they add nothing to the MLP's output. The yardstick of their removal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from compressor.attention.silence import silence
from compressor.mlp.layout import mlp_layers


@contextmanager
def silenced_channels(model: PreTrainedModel, channels: Mapping[int, Iterable[int]]) -> Iterator[PreTrainedModel]:
    """Within the context, channels `{layer: [channel, …]}` contribute nothing: the model gives what it would without.

    Raises:
        ModelError: there is no MLP whose channels can leave.
    """
    layers = mlp_layers(model)
    with ExitStack() as stack:
        for index, gone in channels.items():
            stack.callback(silence(model.get_submodule(layers[index].down_projection), layers[index], gone))
        yield model

"""Channels of the MLPs of a Hugging Face model: found, silenced and removed. Knows nothing of scores."""

from compressor.mlp.layout import mlp_layers
from compressor.mlp.nouns import MLPLayer
from compressor.mlp.record import removed_channels
from compressor.mlp.silence import silenced_channels
from compressor.mlp.surgery import check_channels, prune_channels

__all__ = ["MLPLayer", "check_channels", "mlp_layers", "prune_channels", "removed_channels", "silenced_channels"]

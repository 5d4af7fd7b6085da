"""What the model's own loss says about heads and channels: criteria that predict what removing them costs."""

from compressor.damage.channels import ChannelSums, not_by_token
from compressor.damage.gates import Site, gated, linear_at, site_of
from compressor.damage.slopes import Slopes, ablations, slopes
from compressor.damage.surrogate import (
    Worth,
    channel_curvature,
    channel_first_order,
    channel_second_moment,
    first_order,
    loss_game,
    resampled_loss_game,
    second_moment,
)
from compressor.damage.values import DAMAGES, OF_CHANNELS, Damages, damages

__all__ = [
    "DAMAGES",
    "OF_CHANNELS",
    "ChannelSums",
    "Damages",
    "Site",
    "Slopes",
    "Worth",
    "ablations",
    "channel_curvature",
    "channel_first_order",
    "channel_second_moment",
    "damages",
    "first_order",
    "gated",
    "linear_at",
    "loss_game",
    "not_by_token",
    "resampled_loss_game",
    "second_moment",
    "site_of",
    "slopes",
]

"""What the model's own loss says about heads: criteria that predict the damage of removing them."""

from compressor.damage.gates import Site, gated, linear_at, site_of
from compressor.damage.slopes import Slopes, ablations, slopes
from compressor.damage.surrogate import Worth, first_order, loss_game, resampled_loss_game, second_moment
from compressor.damage.values import DAMAGES, Damages, damages

__all__ = [
    "DAMAGES",
    "Damages",
    "Site",
    "Slopes",
    "Worth",
    "ablations",
    "damages",
    "first_order",
    "gated",
    "linear_at",
    "loss_game",
    "resampled_loss_game",
    "second_moment",
    "site_of",
    "slopes",
]

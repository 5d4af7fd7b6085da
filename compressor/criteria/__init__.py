"""Pruning criteria: from a scoring run to one number per head or channel. Importing this package registers them."""

from compressor.criteria.game import gt_fep  # isort: skip  # first, for φ comes first
from compressor.criteria import loss as _loss  # noqa: F401
from compressor.criteria.basic import random_channel_scores, random_scores
from compressor.criteria.registry import Criterion, criteria, criterion, register

__all__ = ["Criterion", "criteria", "criterion", "gt_fep", "random_channel_scores", "random_scores", "register"]

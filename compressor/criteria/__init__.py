"""Pruning criteria: each turns a scoring run into one number per head. Importing this package registers them."""

from compressor.criteria import basic as _basic  # noqa: F401  (its import is what registers)
from compressor.criteria.registry import Criterion, criteria, criterion, register

__all__ = ["Criterion", "criteria", "criterion", "register"]

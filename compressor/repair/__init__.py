"""Closed-form repair: what stays in a model's maps is refitted to make up for what leaves."""

from compressor.repair.refit import RIDGES, Repair, is_shared, repair
from compressor.repair.solve import HELD

__all__ = ["HELD", "RIDGES", "Repair", "is_shared", "repair"]

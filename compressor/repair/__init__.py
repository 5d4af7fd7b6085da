"""Closed-form repair: what stays in a model's maps is refitted to make up for what leaves."""

from compressor.repair.refit import HELD, RIDGES, Repair, repair

__all__ = ["HELD", "RIDGES", "Repair", "repair"]

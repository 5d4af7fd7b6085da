"""Scores and a budget → a plan: how many heads and channels go, from where, and which."""

from compressor.budget.aim import Costs
from compressor.budget.ratio import SCOPES, UNITS, allocate, heads_to_remove
from compressor.budget.rule import COSTS, STRUCTURES, Rule, choose

__all__ = ["COSTS", "SCOPES", "STRUCTURES", "UNITS", "Costs", "Rule", "allocate", "choose", "heads_to_remove"]

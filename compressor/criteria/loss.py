"""Criteria that ask the model's loss on calibration text."""

from __future__ import annotations

from compressor.criteria.registry import BACKWARD, FORWARD, register_value

register_value(
    "loss-game",
    "rise of the loss without the head, from its slopes along random coalitions of heads",
    cost=BACKWARD,
    channels=True,
    in_loss=True,
)
register_value(
    "taylor",
    "|slope of the loss| at the head's gate (arXiv 1905.10650)",
    cost=BACKWARD,
    channels=True,
    in_loss=True,
)
register_value(
    "fisher", "mean square of the loss's slope at the head's gate", cost=BACKWARD, channels=True, in_loss=True
)
register_value("loo", "rise of the loss without the head alone", cost="a forward pass for each head", in_loss=True)
register_value(
    "activation", "root mean square of what the head adds to its layer's output", cost=FORWARD, channels=True
)
register_value(
    "fluctuation",
    "variance of the head's outputs, times squared weights (FLAP, arXiv 2312.11983)",
    cost=FORWARD,
    channels=True,
)

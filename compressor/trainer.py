"""Lightning's Trainer, as quiet as a library should be."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from compressor.callbacks import HeadScoring, Progress
from compressor.data import TextDataModule
from compressor.errors import ModelError
from compressor.module import LanguageModel

_ADVICE = (
    ".*does not have many workers.*",  # the windows are in memory already
    ".*predict returned None.*",  # the scoring callback takes what it needs during the pass
    ".*isinstance.treespec, LeafSpec.*",  # between Lightning and PyTorch
)


def run_scoring(module: LanguageModel, data: TextDataModule, scoring: HeadScoring, device: torch.device) -> None:
    """One epoch over the calibration windows; the outcome is in `scoring.layers_scored`."""
    with _quiet_lightning():
        _trainer(device, [Progress("scoring"), scoring]).predict(module, datamodule=data, return_predictions=False)


def run_perplexity(module: LanguageModel, data: TextDataModule, device: torch.device, description: str) -> float:
    """Perplexity over the evaluation windows, token-weighted.

    Raises:
        ModelError: it is not a finite number.
    """
    module.perplexity.reset()
    with _quiet_lightning():
        _trainer(device, [Progress(description)]).test(module, datamodule=data, verbose=False)
    value = float(module.perplexity.compute())
    if not math.isfinite(value):
        raise ModelError(f"the {description} is {value}; its weights are broken, or too large for {module.model.dtype}")
    return value


def _trainer(device: torch.device, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hold back Lightning's banners and advice, and turn its own way of taking Ctrl-C back into Python's."""
    logger = logging.getLogger("lightning.pytorch")
    level, handler = logger.level, signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for advice in _ADVICE:
                warnings.filterwarnings("ignore", message=advice)
            yield
    except SystemExit as exit_of_lightning:
        signal.signal(signal.SIGINT, handler)  # the Trainer left it ignored
        raise KeyboardInterrupt from exit_of_lightning
    finally:
        logger.setLevel(level)

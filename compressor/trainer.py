"""Lightning's Trainer, as quiet as a library should be."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from compressor.callbacks import HeadScoring, Progress, Recovering
from compressor.data import TextDataModule
from compressor.errors import ModelError
from compressor.measure import DocumentLosses
from compressor.module import LanguageModel
from compressor.training import Recovery

_ADVICE = (
    ".*does not have many workers.*",  # the windows are in memory already
    ".*predict returned None.*",  # the scoring callback takes what it needs during the pass
    ".*isinstance.treespec, LeafSpec.*",  # between Lightning and PyTorch
    ".*in eval mode at the start of training.*",  # dropout stays off
)
CLIP = 1.0  # largest norm of a gradient


def run_scoring(module: LanguageModel, data: TextDataModule, scoring: HeadScoring, device: torch.device) -> None:
    """One epoch over the calibration windows; the outcome is in `scoring.layers_scored`."""
    with _quiet_lightning():
        _trainer(device, [Progress("scoring"), scoring]).predict(module, datamodule=data, return_predictions=False)


def run_perplexity(
    module: LanguageModel, data: TextDataModule, device: torch.device, description: str
) -> DocumentLosses:
    """What each evaluation document adds to the perplexity over all of them, which is token-weighted.

    Raises:
        ModelError: the perplexity is not a finite number.
    """
    module.perplexity.reset()
    with _quiet_lightning():
        _trainer(device, [Progress(description)]).test(module, datamodule=data, verbose=False)
    losses = module.perplexity.by_document()
    if not math.isfinite(value := losses.perplexity):
        raise ModelError(f"the {description} is {value}; its weights are broken, or too large for {module.model.dtype}")
    return losses


def run_recovery(module: Recovery, batches: DataLoader[Any], recovering: Recovering, device: torch.device) -> None:
    """Train over the batches as far as the budget of `recovering` goes; in bfloat16 where the device computes in it."""
    mixed = device.type == "cuda" and torch.cuda.is_bf16_supported()
    settings = {"max_epochs": 1, "gradient_clip_val": CLIP, "precision": "bf16-mixed" if mixed else "32-true"}
    with _quiet_lightning():
        _trainer(device, [recovering], **settings).fit(module, train_dataloaders=batches)
    module.to(device)  # the Trainer leaves its model on the CPU


def _trainer(device: torch.device, callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
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

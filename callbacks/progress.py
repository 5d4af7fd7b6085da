"""Progress with an ETA for Lightning's loops, drawn on stderr."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L

from compressor.console import track


class Progress(L.Callback):
    """One bar per predict or test run, advanced batch by batch."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._stack = ExitStack()
        self._advance: Callable[[], None] = lambda: None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar."""
        self._start(sum(int(count) for count in trainer.num_predict_batches))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar."""
        self._start(sum(int(count) for count in trainer.num_test_batches))

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        self._advance()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        self._advance()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar away, however the run ended."""
        self._stack.close()

    def _start(self, total: int) -> None:
        self._advance = self._stack.enter_context(track(self.description, total))

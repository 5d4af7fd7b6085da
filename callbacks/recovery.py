"""A training that keeps to its budget, keeps the best weights it has seen, and can be gone on with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning as L

from compressor.console import log, track
from compressor.training import Budget, Recovery, StateFiles, learning_rate_factor

PATIENCE = 10  # evaluations without a new best that end a training


class Recovering(L.Callback):
    """Sets the learning rate before every step, and evaluates before the first, after every `every`th and the last.

    Every evaluation is written to `files` together with all that the training needs to go on from there; where
    `files` has a state already, the training does. The model is not left with the best weights: those are in `files`.

    Args:
        budget: what may be spent.
        every: steps between evaluations.
        evaluate: held-out perplexity of the model as it is, infinite where it is not finite.
        files: where the state is kept.
        clock: seconds from any moment on.
    """

    def __init__(
        self,
        budget: Budget,
        every: int,
        evaluate: Callable[[], float],
        files: StateFiles,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self.every = every
        self.evaluate = evaluate
        self.files = files
        self.standing = files.standing()
        self._clock = clock
        self._started = 0.0
        self._reserve = 0.0  # seconds that the last evaluation will take
        self._shown = 0
        self._stack = ExitStack()
        self._advance: Callable[[], None] = lambda: None

    @property
    def elapsed(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self._clock() - self._started

    @property
    def progress(self) -> float:
        """Share of the budget spent, 0 to 1."""
        return self.budget.progress(self.standing.step, self.elapsed + self._reserve)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate, or go on from where the state was written."""
        assert isinstance(pl_module, Recovery)
        self._started = self._clock() - self.standing.seconds
        self._advance = self._stack.enter_context(track("recovery, %", 100))
        if self.standing.history:
            self.files.restore(pl_module.trained, trainer.optimizers[0])
        else:
            self._take_stock(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Set the learning rate of the step; half a step ahead, or the first would be lost."""
        module = trainer.lightning_module
        assert isinstance(module, Recovery)
        rate = module.learning_rate * learning_rate_factor(min(1.0, self.progress + 0.5 / self.budget.steps))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count the step; evaluate where it is time to."""
        assert isinstance(pl_module, Recovery)
        step = self.standing.step + 1
        self.standing = replace(self.standing, step=step)
        if self.progress >= 1 or step % self.every == 0:
            self._take_stock(trainer, pl_module)
        if self.standing.ended:
            trainer.should_stop = True
        percent = int(100 * self.progress)
        for _ in range(self._shown, percent):
            self._advance()
        self._shown = percent

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where an interrupted training can be gone on from."""
        self._stack.close()
        written = self.files.standing()
        if written.history:
            log.info(f"--resume goes on from step {written.step:,}, kept in {self.files.directory}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar away, however the run ended."""
        self._stack.close()

    def _take_stock(self, trainer: L.Trainer, module: Recovery) -> None:
        """Evaluate the model as it is, and write down where the training stands."""
        spent = self.progress >= 1  # before the evaluation, which is in the reserve
        start = self._clock()
        found = self.evaluate()
        self._reserve = self._clock() - start
        step, finite = self.standing.step, math.isfinite(found)
        if step == 0 and not finite:
            trainer.should_stop = True  # there is nothing to recover; the caller says so
            return
        history = (*self.standing.history, (step, found if finite else None))
        self.standing = replace(self.standing, history=history)
        best, lowest = self.standing.best
        ended = ""
        if spent:
            ended = "epochs" if step >= self.budget.steps else "max_minutes"
        elif not finite:
            ended = "not finite"
        elif sum(place > best for place, _ in history) >= PATIENCE:
            ended = "no improvement"
        self.standing = replace(self.standing, seconds=self.elapsed, ended=ended)
        log.info(f"step {step:,} of {self.budget.steps:,}: held-out perplexity {found:.4g}, lowest {lowest:.4g}")
        self.files.save(self.standing, module.trained, trainer.optimizers[0])

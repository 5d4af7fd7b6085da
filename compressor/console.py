"""What a person watching sees on stderr: log lines, and progress with an ETA. Results never come this way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("compressor")
stderr = Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Log lines on the console that also draws the progress bars, so that neither breaks the other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; warnings say that they are."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stderr.print(f"{prefix}{self.format(record)}", markup=False, highlight=False, soft_wrap=True)


def show_logs(quiet: bool) -> None:
    """Send this package's log lines to stderr; `quiet` leaves warnings only."""
    log.handlers = [ConsoleHandler()]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    from transformers.utils import logging as transformers_logging  # not needed for --help

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def track(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Draw a progress bar with an ETA; the block calls what it is given once per step.

    Nothing is drawn when stderr is no terminal, or when the log is quiet.
    """
    if not stderr.is_terminal or not log.isEnabledFor(logging.INFO):
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bars:
        task = bars.add_task(description, total=total)
        yield lambda: bars.advance(task)

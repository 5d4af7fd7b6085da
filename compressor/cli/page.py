"""How things look on stdout: tables, lines and JSON."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from compressor.files import to_json


def new_table(*columns: str) -> Table:
    """A plain table; all columns but the first hold numbers, which stay on one line where room is short."""
    made = Table(*columns, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in made.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    return made


def say(console: Console, text: str) -> None:
    """Print a line as it is; paths and commands must survive being copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    print(to_json(document), end="")


def count(value: float) -> str:
    """A number of things, in thousands, millions or billions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """A number of bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"

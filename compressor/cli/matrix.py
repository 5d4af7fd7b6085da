"""The support matrix on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.cli.page import print_json, say
from compressor.support import lines, summary

WIDE = 120  # characters where stdout is no terminal


def listed(document: dict[str, Any], as_json: bool) -> None:
    """Print the matrix or a part of it: what was found and reached, then why not."""
    if as_json:
        print_json(document)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    rows = lines(document["rows"])
    *found, reason = rows[0]
    for columns, shown in (
        (found, [row for row in rows if row["units"] or row["channels"]]),
        ([*found[:2], reason], [row for row in rows if row[reason]]),
    ):
        if shown:
            console.print(_table(columns, shown))
            console.print()
    say(console, summary(document["rows"]))
    version = document["versions"]["transformers"]
    say(console, "heads: layers × heads over groups; channels: MLPs × channels; both of a tiny random instance")
    say(console, f"transformers {version}")


def _table(columns: list[str], rows: list[dict[str, str]]) -> Table:
    table = Table(*columns, box=None, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table

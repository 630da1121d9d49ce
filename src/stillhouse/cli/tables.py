"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stillhouse.report.formatting import number


def result_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console | None = None
) -> None:
    """Print a table of a run's result."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for place, column in enumerate(columns):
        # Names are kept whole; numbers stand at the right, whatever is told of them at the left.
        words = any(isinstance(row[place], str) and " " in row[place].strip() for row in rows)
        justify: Literal["left", "right"] = "left" if place == 0 or words else "right"
        table.add_column(escape(column), overflow="fold", no_wrap=place == 0, justify=justify)
    for row in rows:
        table.add_row(*(escape(number(cell)) for cell in row))
    (console or Console()).print(table)

"""The list of methods as plain text: fast enough to be typed for every name that one has forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from textwrap import wrap

from stillhouse.registry import Entry

HEADINGS = ("name", "family", "year", "arXiv", "what it is for")


def show(found: Sequence[Entry]) -> None:
    """Print one row per method, the last column wrapped to the terminal's width."""
    rows = [
        (
            entry["name"],
            entry["family"] + (" (classic)" if entry["classic"] else ""),
            str(entry["year"] or ""),
            entry["arxiv"],
            entry["summary"],
        )
        for entry in found
    ]
    widths = [max(len(row[column]) for row in [HEADINGS, *rows]) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    room = max(30, shutil.get_terminal_size().columns - indent)
    for row in [HEADINGS, *rows]:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
        first, *more = wrap(row[4], room) or [""]
        print(f"{head}  {first}".rstrip())
        for line in more:
            print(" " * indent + line)

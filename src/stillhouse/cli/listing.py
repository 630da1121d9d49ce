"""The list of methods as plain text: fast enough to be typed for every name that one has forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from textwrap import wrap

from stillhouse.registry import Entry

HEADINGS = ("name", "family", "year", "arXiv", "what it is for")


def show(found: Sequence[Entry]) -> None:
    """Print one row per method: systems, then the classics; the last column wrapped to the terminal's width."""
    groups = {classic: [_row(entry) for entry in found if entry["classic"] == classic] for classic in (False, True)}
    rows = [HEADINGS, *groups[False], *groups[True]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    room = max(30, shutil.get_terminal_size().columns - indent)
    _print([HEADINGS, *groups[False]], widths, room)
    if groups[True]:
        print("\nclassics, to compare with\n")
        _print(groups[True], widths, room)


def _row(entry: Entry) -> tuple[str, ...]:
    return entry["name"], entry["family"], str(entry["year"] or ""), entry["arxiv"], entry["summary"]


def _print(rows: Sequence[tuple[str, ...]], widths: Sequence[int], room: int) -> None:
    indent = sum(widths) + 2 * len(widths)
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
        first, *more = wrap(row[4], room) or [""]
        print(f"{head}  {first}".rstrip())
        for line in more:
            print(" " * indent + line)

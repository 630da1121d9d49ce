"""``search``: say what is searched, make the trials, print them, name the best recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stillhouse.bench.searching import (
    Search,
    Searching,
    default_out,
    read_base,
    read_ranges,
    search_ranges,
    split_arguments,
)
from stillhouse.cli.bars import Bars, continuable
from stillhouse.cli.comparing import command
from stillhouse.cli.tables import result_table
from stillhouse.report.formatting import number
from stillhouse.report.search import trials_table

SHOWN = 12
"""Trials in the terminal's table; the page has all."""


def search(
    source: str,
    arguments: Sequence[str],
    *,
    trials: int,
    seed: int | None,
    out: Path | None,
    jobs: int,
    storage: str | None,
    as_json: bool,
) -> None:
    """Search around a recipe; the arguments are ranges and fixed values."""
    texts, overrides = split_arguments(arguments)
    console = Console(stderr=as_json)
    recipe = read_base(source, overrides, seed=seed)
    ranges = read_ranges(recipe, texts)
    home = out or default_out(recipe, ranges)
    told = f"[bold]{escape(recipe.method.name)}[/bold]: {trials} trials (seed {recipe.seed}), in {escape(str(home))}"
    console.print(told, highlight=False)
    origin = "" if texts else " (no range was given: the method's weights and temperatures)"
    console.print(f"searched{origin}:", highlight=False)
    for one in ranges:
        console.print(f"  {one.told()}", highlight=False, markup=False)
    with continuable(console) as signals, Bars(console, Searching.noun, over=0, total=trials) as bars:
        found = search_ranges(
            recipe,
            ranges,
            trials=trials,
            out=home,
            jobs=jobs,
            storage=storage,
            cache=True,
            command=command(storage),
            signals=signals,
            watch=bars.watch,
        )
    show(found, console)
    if as_json:
        print(json.dumps(found.dump(), indent=1, allow_nan=False))


def show(found: Search, console: Console) -> None:
    """Print the trials, the best recipe, and where the page is."""
    columns, rows = trials_table(found.dump())
    result_table("Trials, best first", columns, rows[:SHOWN], console)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more.", style="dim", highlight=False)
    best = found.best
    values = ", ".join(f"{key} {number(value)}" for key, value in best["values"].items())
    console.print(f"best: {best['run']} with {escape(values)}: {found.metric} {best['value']:.4g}", highlight=False)
    console.print(
        "no trial has seen the test split; the test number of the best recipe, and of no other, comes from:",
        highlight=False,
    )
    home = Path(found.directory)
    console.print(f"  stillhouse run {escape(str(home / 'best.yaml'))}", highlight=False, soft_wrap=True)
    console.print(f"page: {escape(str(home / 'search.html'))}", highlight=False, soft_wrap=True)

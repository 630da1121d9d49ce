"""``compare``: arrange the arms, say what is equal, make the runs, print the table, name the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stillhouse.bench.arms import Arm, arrange, baseline_of
from stillhouse.bench.comparison import Comparing, Comparison, compare_arms, default_out, gave_way
from stillhouse.bench.work import without_password
from stillhouse.cli.bars import Bars, continuable
from stillhouse.cli.tables import result_table
from stillhouse.errors import RunError, UserError
from stillhouse.report.comparison import tables


def compare(
    arguments: Sequence[str],
    *,
    seeds: int,
    baseline: str | None,
    metric: str | None,
    own: Sequence[str],
    out: Path | None,
    jobs: int,
    storage: str | None,
    as_json: bool,
) -> None:
    """Compare the methods among the arguments with the fields among them."""
    sources = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if not sources:
        raise UserError("compare needs a method's name or a recipe file; 'stillhouse list' has the names.")
    console = Console(stderr=as_json)
    arms = arrange(sources, overrides, own=own)
    line = baseline_of(arms, baseline)
    home = out or default_out(arms)
    _say_terms(arms, line, seeds, home, console)
    over = Comparing(home, {arm.name: arm.recipe for arm in arms}, range(seeds)).ended() if home.exists() else 0
    with continuable(console) as signals, Bars(console, "comparison", over=over, total=seeds * len(arms)) as bars:
        comparison = compare_arms(
            arms,
            seeds=seeds,
            baseline=line,
            metric=metric,
            out=home,
            jobs=jobs,
            storage=storage,
            cache=True,
            command=command(storage),
            signals=signals,
            watch=bars.watch,
        )
    show(comparison, console)
    if as_json:
        print(json.dumps(comparison.dump(), indent=1, allow_nan=False))
    if any(run["failure"] for arm in comparison.arms for run in arm.runs):
        raise SystemExit(RunError.exit_code)


def command(storage: str | None) -> list[str]:
    """What was typed, without a database's password."""
    arguments = sys.argv[1:]
    if storage is not None:
        arguments = [text.replace(storage, without_password(storage)) for text in arguments]
    return ["stillhouse", *arguments]


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what it comes to, and where the page is."""
    for title, columns, cells in tables(comparison.dump()):
        result_table(title, columns, cells, console)
    for sentence in comparison.findings:
        console.print(escape(sentence), highlight=False)
    for note in comparison.notes:
        console.print(escape(note), style="yellow", highlight=False)
    page = Path(comparison.directory) / "comparison.html"
    console.print(f"page: {escape(str(page))}", highlight=False, soft_wrap=True)


def _say_terms(arms: Sequence[Arm], line: str, seeds: int, home: Path, console: Console) -> None:
    names = [arm.name + (" (baseline)" if arm.name == line else "") for arm in arms]
    told = (
        f"[bold]{escape(', '.join(names))}[/bold]: {seeds} seed{'s' if seeds > 1 else ''} each, in {escape(str(home))}"
    )
    console.print(told, highlight=False)
    origins: dict[str, dict[str, None]] = {}
    for arm in arms:
        for field, origin in arm.taken.items():
            if field not in ("compare_alone", "model"):
                origins.setdefault(origin, {})[field] = None
    for origin, fields in origins.items():
        told = f"equal in all that have it, from {origin}: {', '.join(fields)}."
        console.print(told, style="dim", highlight=False, markup=False)
    for arm in arms:
        if arm.set_aside:
            console.print(gave_way(arm), style="yellow", highlight=False, markup=False)

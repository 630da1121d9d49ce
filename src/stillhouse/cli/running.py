"""``run`` and ``resume``: a recipe, a directory, a live bar, and what people read at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from stillhouse.cli.progress import ProgressBar
from stillhouse.cli.tables import result_table
from stillhouse.engine import Interrupted, Result, Signals, World
from stillhouse.engine.rundir import refuse_foreign
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.recipe import Recipe, load_recipe
from stillhouse.report import build, environment


def start(source: str, overrides: Sequence[str], *, out: Path | None, seed: int | None, cache: bool) -> None:
    """Start a run in a new directory."""
    recipe = load_recipe(source, overrides, seed=seed)
    world = World.start(recipe.settings.device)
    directory = world.from_main(out or _free(Path("runs") / recipe.method.name))
    if world.is_main and (directory / "recipe.yaml").exists() and directory != Path(source).parent:
        raise UserError(
            f"{directory} already holds a run; continue it with 'stillhouse resume {directory}', or choose another --out."
        )
    if world.is_main:
        refuse_foreign(directory)
    fresh = not directory.exists()
    try:
        _go(recipe, directory, world, cache=cache)
    except UserError:
        # What was wrong from the start leaves nothing behind that could be taken for a run.
        if fresh and world.is_main and not any(directory.rglob("*.safetensors")):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def go_on(directory: Path) -> None:
    """Continue the run in a directory."""
    if not (directory / "recipe.yaml").exists():
        raise UserError(f"{directory} holds no run: there is no recipe.yaml in it.")
    recipe = load_recipe(directory / "recipe.yaml")
    known = json.loads((directory / "run.json").read_text()) if (directory / "run.json").exists() else {}
    _go(recipe, directory, World.start(recipe.settings.device), cache=known.get("cache", True))


def _go(recipe: Recipe, directory: Path, world: World, *, cache: bool) -> None:
    console = Console(quiet=not world.is_main)
    signals = Signals()
    stop_on_signals(signals)
    where = f"{escape(str(directory))} (seed {recipe.seed}, {world.device})"
    console.print(f"[bold]{recipe.method.name}[/bold] in {where}", highlight=False)
    about = about_run(recipe, cache)
    again = f"stillhouse resume {directory}"
    if world.size > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", world.size)
        again = f"torchrun --nproc_per_node {here} -m {again}"
    try:
        with ProgressBar(console) as bar:
            result = run_recipe(recipe, directory, cache=cache, listener=bar, world=world, signals=signals, about=about)
    except Interrupted as stopped:
        console.print(f"{stopped} Continue with:\n  {again}", highlight=False, markup=False)
        raise SystemExit(Interrupted.exit_code) from None
    except KeyboardInterrupt:
        console.print(f"stopped; continue with:\n  {again}", highlight=False, markup=False)
        raise SystemExit(Interrupted.exit_code) from None
    if world.is_main:
        conclude(result, directory, console)


def conclude(result: Result, directory: Path, console: Console) -> None:
    """Print a result's tables and notes, write the report page and say where it is."""
    for table in result.tables:
        result_table(table.title, table.columns, table.rows, console)
    for note in result.notes:
        console.print(escape(note), style="dim", highlight=False)
    page = build(directory)
    console.print(f"report: {escape(str(page))}", highlight=False, soft_wrap=True)


def about_run(recipe: Recipe, cache: bool) -> dict[str, Any]:
    """What is written down of a run that starts: the command, versions, the method."""
    method = recipe.method
    return {
        "command": ["stillhouse", *sys.argv[1:]],
        "cache": cache,
        "seed": recipe.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "method": {
            "name": method.name,
            "title": method.paper.title,
            "arxiv": method.paper.arxiv,
            "year": method.paper.year,
            "family": method.family,
            "summary": method.summary,
            "verified": method.verified,
        },
    }


def _free(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def stop_on_signals(signals: Signals) -> None:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint and a stop; the second stops at once."""

    def ask(number: int, frame: Any) -> None:
        if signals.stop:
            raise KeyboardInterrupt
        signals.stop = True

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)

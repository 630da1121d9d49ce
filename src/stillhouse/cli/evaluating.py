"""``evaluate-dataset``: a distilled set in a directory, scored by the fair protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stillhouse.bench.evaluating import default_out, evaluation_recipe
from stillhouse.cli.progress import ProgressBar
from stillhouse.cli.running import about_run, conclude, stop_on_signals
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import UserError
from stillhouse.front import run_recipe


def evaluate(
    directory: Path,
    overrides: Sequence[str],
    *,
    data: str | None,
    models: str | None,
    seeds: int | None,
    seed: int,
    out: Path | None,
    cache: bool,
    as_json: bool,
) -> None:
    """Score the set and print the tables."""
    named = [name.strip() for name in models.split(",")] if models is not None else []
    if not all(named):
        raise UserError(f"--models: {models!r} names nothing between two commas; write them as in convnet,resnet,vit.")
    recipe = evaluation_recipe(directory, data=data, models=named, seeds=seeds, overrides=overrides, seed=seed)
    home = out if out is not None else default_out(recipe)
    console = Console(stderr=as_json)
    signals = Signals()
    stop_on_signals(signals)
    fresh = not home.exists()
    console.print(f"evaluate-dataset {directory}, in {home}", highlight=False, markup=False, soft_wrap=True)
    try:
        with ProgressBar(console) as bar:
            about = about_run(recipe, cache)
            result = run_recipe(recipe, home, cache=cache, listener=bar, signals=signals, about=about)
    except (Interrupted, KeyboardInterrupt):
        console.print("stopped; the same command continues.", highlight=False)
        raise SystemExit(Interrupted.exit_code) from None
    except UserError:
        # What was wrong from the start leaves nothing behind that could be taken for a run.
        if fresh and not any(home.rglob("*.safetensors")):
            shutil.rmtree(home, ignore_errors=True)
        raise
    conclude(result, home, console)
    if as_json:
        print(json.dumps(result.metrics, indent=1, allow_nan=False))

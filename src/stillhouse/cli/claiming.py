"""``claims``: run a comparison, show the arms, say whether it held."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stillhouse.claims import find_claim, run_claim
from stillhouse.cli.progress import ProgressBar
from stillhouse.cli.tables import result_table


def judge(name: str, *, seeds: int | None, out: Path | None) -> None:
    """Run a claim and print its outcome; exit code 1 when it failed."""
    claim = find_claim(name)
    console = Console()
    console.print(escape(claim.statement), highlight=False)
    with ProgressBar(console) as bar:

        def listener(arm: str, seed: int) -> ProgressBar:
            bar.say(f"arm {arm}, seed {seed}")
            return bar

        outcome = run_claim(claim, seeds=seeds, home=Path("runs") / "claims" / name, listener=listener)
    columns = ["arm", *claim.recorded()]
    rows = [
        [arm, *(f"{statistics.fmean(v):.4g} ({' '.join(f'{x:.4g}' for x in v)})" for v in numbers.values())]
        for arm, numbers in outcome.arms.items()
    ]
    result_table("Mean (each seed)", columns, rows, console)
    for margin in outcome.margins:
        console.print(escape(margin["finding"]), highlight=False)
    console.print(f"the claim [bold]{outcome.verdict}[/bold].")
    if claim.remark:
        console.print(escape(claim.remark), style="dim", highlight=False)
    if out is not None:
        outcome.save(out)
    if outcome.verdict != "held":
        raise SystemExit(1)

"""``claims``: run comparisons, show the arms, say whether they hold, keep the record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stillhouse.claims import RECORDS, Outcome, all_claims, find_claim, run_claim
from stillhouse.cli.progress import ProgressBar
from stillhouse.cli.running import stop_on_signals
from stillhouse.cli.tables import result_table
from stillhouse.engine import Interrupted, Signals


def judge(names: Sequence[str], *, seeds: int | None, out: Path | None, as_json: bool) -> None:
    """Run claims (all without names), record and print their outcomes; exit code 1 when one fails."""
    claims = [find_claim(name) for name in names] or all_claims()
    console = Console(stderr=as_json)
    signals = Signals()
    stop_on_signals(signals)
    outcomes: list[Outcome] = []
    for claim in claims:
        console.print(f"[bold]{claim.name}[/bold] {escape(claim.statement)}", highlight=False)
        try:
            with ProgressBar(console) as bar:

                def listener(arm: str, seed: int, bar: ProgressBar = bar) -> ProgressBar:
                    bar.say(f"arm {arm}, seed {seed}")
                    return bar

                home = Path("runs") / "claims" / claim.name
                outcome = run_claim(claim, seeds=seeds, home=home, listener=listener, signals=signals)
        except (Interrupted, KeyboardInterrupt):
            console.print("stopped; the same command continues.", highlight=False)
            raise SystemExit(Interrupted.exit_code) from None
        outcomes.append(outcome)
        _show(outcome, console)
        console.print(f"recorded: {escape(str(outcome.save(out or RECORDS)))}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1, allow_nan=False))
    if not all(outcome.holds for outcome in outcomes):
        raise SystemExit(1)


def _show(outcome: Outcome, console: Console) -> None:
    metrics = list(next(iter(outcome.arms.values())))
    rows = [[arm, *(_spread(values) for values in numbers.values())] for arm, numbers in outcome.arms.items()]
    count = len(outcome.seeds)
    title = f"Mean and standard deviation over {count} seeds" if count > 1 else f"Seed {outcome.seeds[0]}"
    result_table(title, ["arm", *metrics], rows, console)
    if len(outcome.sources) > 1:
        console.print(f"the runs were made with {len(outcome.sources)} versions of the source.", style="yellow")
    for margin in outcome.margins:
        console.print(escape(margin["finding"]), highlight=False)
    console.print(f"the claim [bold]{'holds' if outcome.holds else 'fails'}[/bold].")
    if outcome.remark:
        console.print(escape(outcome.remark), style="dim", highlight=False)


def _spread(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return f"not finite in {len(values) - len(finite)} of {len(values)}"
    values = finite
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"

"""How good the forecast of a dry run is: forecast and real run of each small recipe, each in a process of its own.

Both begin with an empty cache, so a run trains its teachers too. The time is that of the run, from the first look at the
data to the stored result: of the processor by default, so that a busy machine disturbs it less, which is the same on a quiet
one where recipes use one thread. The memory is the peak of the process's resident memory (on CUDA: what torch allocates).

Usage: ``OMP_NUM_THREADS=1 python benchmarks/forecast.py [--wall] [NAME ...] [KEY=VALUE ...]``: all small recipes by default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WITHIN = 0.25


Clock = Callable[[], float]


def forecast(source: str, overrides: list[str], clock: Clock) -> dict[str, float]:
    """What a dry run says, in this process."""
    from stillhouse.engine.rehearsal import rehearse
    from stillhouse.recipe import load_recipe

    recipe = load_recipe(source, overrides)
    started = clock()
    found = rehearse(recipe.method, seed=recipe.seed, settings=recipe.settings, clock=clock)
    took = clock() - started
    return {"seconds": found.seconds, "memory": found.memory, "complete": found.complete, "took": took}


def real(source: str, overrides: list[str], clock: Clock) -> dict[str, float]:
    """What a run takes, in this process."""
    from stillhouse.front import run_recipe
    from stillhouse.recipe import load_recipe

    recipe = load_recipe(source, overrides)
    with tempfile.TemporaryDirectory() as place:
        started = clock()
        run_recipe(recipe, Path(place))
        seconds = clock() - started
        peaks = json.loads((Path(place) / "memory.json").read_text())
    return {"seconds": seconds, "memory": max(peaks.values())}


def apart(what: str, source: str, overrides: list[str], *, wall: bool) -> dict[str, float]:
    """Call one of the two in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", what, *(["--wall"] if wall else []), source, *overrides]
        environment = {**os.environ, "STILLHOUSE_CACHE": cache}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME|KEY=VALUE")
    parser.add_argument("--wall", action="store_true", help="time by the wall")
    parser.add_argument("--one", choices=("forecast", "real"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    overrides = [name for name in asked.names if "=" in name]
    names = [name for name in asked.names if "=" not in name]
    if asked.one:
        clock = time.perf_counter if asked.wall else time.process_time
        print(json.dumps({"forecast": forecast, "real": real}[asked.one](names[0], overrides, clock)))
        return
    if not names:
        from stillhouse.registry import entries, recipes

        names = sorted(entry["name"] for entry in entries() if "small" in recipes(entry["name"]))
    print("| recipe | forecast | run | ratio | forecast | run | ratio | dry run |")
    print("|---|---|---|---|---|---|---|---|")
    beyond = []
    for name in names:
        said, was = (apart(what, name, overrides, wall=asked.wall) for what in ("forecast", "real"))
        ratios = said["seconds"] / was["seconds"], said["memory"] / was["memory"]
        print(
            f"| {name} | {said['seconds']:.1f} s | {was['seconds']:.1f} s | {ratios[0]:.2f} | {said['memory'] / 2**20:.0f} MiB | "
            f"{was['memory'] / 2**20:.0f} MiB | {ratios[1]:.2f} | {said['took']:.1f} s |",
            flush=True,
        )
        if not said["complete"] or any(abs(ratio - 1) > WITHIN for ratio in ratios):
            beyond.append(name)
    print(
        f"within {WITHIN:.0%}: {len(names) - len(beyond)} of {len(names)}"
        + (f"; not {', '.join(beyond)}" if beyond else "")
    )
    raise SystemExit(bool(beyond))


if __name__ == "__main__":
    main()

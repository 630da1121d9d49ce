"""Time of ``stillhouse --help`` and ``stillhouse list`` against ``python -c "import typer, rich"``: medians, alternating.

python benchmarks/start_up.py [--repeats 11]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = str(Path(sys.executable).parent / "stillhouse")
COMMANDS = {
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
    "stillhouse --help": [SCRIPT, "--help"],
    "stillhouse list": [SCRIPT, "list"],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(options.repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repeat:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["import typer, rich"]
    for name, median in medians.items():
        print(f"{name:20} {1e3 * median:7.1f} ms   {median / base:.2f}x")


if __name__ == "__main__":
    main()

"""Runs a method's tiny recipe straight, and again in processes that are killed. Usage: python killed.py HOME NAME.

Every run is a fork of this process, which itself never trains; what the first one imported on its way is imported here then,
once for all others.
"""

import contextlib
import importlib
import os
import random
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]
from test_every_method import tiny
from torture import arm

from stillhouse.front import run_recipe

POINTS = 5
LARGE = {"diffusers", "kornia", "scipy", "sklearn", "sympy", "torch", "transformers"}


def forked(work) -> int:
    """How a fork that does ``work`` ended."""
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    home, name = Path(sys.argv[1]), sys.argv[2]
    recipe = tiny(name, "run.checkpoint_every=6")

    def straight() -> None:
        steps = 0

        class Counter:
            def stage(self, name, total, done): ...
            def row(self, row): ...
            def say(self, sentence): ...
            def step(self, step):
                nonlocal steps
                steps += 1

        run_recipe(recipe, home / "straight", cache=False, listener=Counter())
        (home / "steps").write_text(str(steps))
        (home / "modules").write_text("\n".join(name for name in sys.modules if name.partition(".")[0] in LARGE))

    assert forked(straight) == 0
    steps = int((home / "steps").read_text())
    for module in (home / "modules").read_text().splitlines():
        if module not in sys.modules:
            with contextlib.suppress(ImportError):  # Some names are aliases that only their package can make.
                importlib.import_module(module)
    drawn = random.Random(name)
    # Each life dies a fifth of the way or less from where the one before did, and one of them within a write.
    for life in range(POINTS):
        kind = "write" if life == 2 else "step"
        count = drawn.randint(1, 3) if kind == "write" else drawn.randint(1, max(2, steps // POINTS))

        def dying(kind=kind, count=count) -> None:
            arm(kind, count)
            run_recipe(recipe, home / "killed", cache=False)

        print(kind, count, forked(dying))
    assert forked(lambda: run_recipe(recipe, home / "killed", cache=False)) == 0


if __name__ == "__main__":
    main()

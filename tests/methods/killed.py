"""Runs a method's tiny recipe straight, and again in processes that are killed. Usage: python killed.py HOME NAME.

Every run is a fork of this process, which itself never trains; what the first one imported on its way is imported here then,
once for all others. One line of JSON is printed for each life: where it was killed, what it left of the main stage's
checkpoints, and the step that it began with.
"""

import contextlib
import importlib
import json
import os
import random
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]
from test_every_method import MAIN, tiny
from torture import arm, die

from stillhouse.engine.fit import Fit
from stillhouse.front import run_recipe

EVERY = 2
LARGE = {"diffusers", "kornia", "scipy", "sklearn", "sympy", "torch", "transformers"}

Place = tuple[str, str, int]
"""The directory of a run, relative to that of the whole; its stage; the step."""


def forked(work) -> int:
    """How a fork that does ``work`` ended."""
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(directory: Path, seen) -> None:
    """Call ``seen(place)`` before each step of this process."""
    original = Fit._step

    def step(self, number):
        seen((str(self.run.directory.path.relative_to(directory)), self.stage.name, number))
        original(self, number)

    Fit._step = step


def ends(name: str, steps: list[Place]) -> list[tuple[str, Place]]:
    """Five ends in the order of the run: two within the main stage when it has checkpoints, and three anywhere else.

    The second of the two comes within a write: that of the checkpoint, or of the stage's end, that follows the step.
    """
    chance = random.Random(name)
    late = [at for at, place in enumerate(steps) if place[:2] == (".", MAIN[name]) and place[2] > EVERY]
    inside = sorted(chance.sample(late, 2))
    order = sorted([*inside, *chance.sample(sorted(set(range(len(steps))) - set(inside)), 3)])
    return [("write" if at == inside[1] else "step", steps[at]) for at in order]


def main() -> None:
    torch.set_num_threads(1)
    home, name = Path(sys.argv[1]), sys.argv[2]
    recipe = tiny(name, f"run.checkpoint_every={EVERY}")

    def straight() -> None:
        steps: list[Place] = []
        watch(home / "straight", steps.append)
        run_recipe(recipe, home / "straight", cache=False)
        (home / "steps").write_text(json.dumps(steps))
        (home / "modules").write_text("\n".join(name for name in sys.modules if name.partition(".")[0] in LARGE))

    assert forked(straight) == 0
    steps = [(where, stage, number) for where, stage, number in json.loads((home / "steps").read_text())]
    assert len(set(steps)) == len(steps), "a step is known by its place"
    for module in (home / "modules").read_text().splitlines():
        if module not in sys.modules:
            with contextlib.suppress(ImportError):  # Some names are aliases that only their package can make.
                importlib.import_module(module)

    for kind, end in [*ends(name, steps), ("end", None)]:

        def living(kind=kind, end=end) -> None:
            def seen(place: Place) -> None:
                if not (home / "begun").exists():
                    (home / "begun").write_text(json.dumps(place))
                if place == end and kind == "write":
                    arm("write", 1)
                elif place == end:
                    die()

            watch(home / "killed", seen)
            run_recipe(recipe, home / "killed", cache=False)

        code = forked(living)
        begun = json.loads((home / "begun").read_text())
        (home / "begun").unlink()
        left = sorted(int(path.name[5:]) for path in (home / "killed" / "checkpoints" / MAIN[name]).glob("step-*"))
        print(json.dumps({"kind": kind, "at": end, "code": code, "begun": begun, "left": left}))


if __name__ == "__main__":
    main()

"""What a run took is counted over all its attempts, up to the last checkpoint of one that was killed."""

import json
import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from stillhouse.data import ObjectData
from stillhouse.engine import (
    Evaluation,
    Interrupted,
    Method,
    Paper,
    Result,
    Run,
    RunDirectory,
    Settings,
    Signals,
    Stage,
    SubRun,
    Update,
    sgd,
)

STEPS, EACH = 12, 0.01
DATA = ObjectData.from_object({"train": (torch.zeros(32, 4), torch.zeros(32, dtype=torch.long))}).load()
SEEN = {}


class Slow(Method):
    """A stage whose steps take a hundredth of a second."""

    name: ClassVar[str] = "slow"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "made by a test"

    def stages(self, run):
        def loss(m, batch, run):
            time.sleep(EACH)
            SEEN[run.step] = run.directory.read("cost.json")
            if run.step in SEEN.get("stops", ()):
                SEEN["signals"].stop = True
            if run.step in SEEN.get("raises", ()):
                raise RuntimeError("killed")
            return {"l": m.net(batch["features"]).square().mean()}

        net = nn.Linear(4, 1)
        yield Stage(
            "one", {"net": net}, [Update(loss, {"net": sgd(0.1)})], STEPS, batches=DATA.split("train").batches(8)
        )
        return Result(artefacts={"net": net})


class Outer(Method):
    """A run of the slow one within another."""

    name: ClassVar[str] = "outer"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "made by a test"

    def stages(self, run):
        yield SubRun("within", Slow(), data=DATA)
        return Result()


def attempt(made, place, **seen):
    SEEN.clear()
    SEEN.update(seen, signals=Signals())
    directory = RunDirectory(place)
    directory.lock()
    settings = Settings(device="cpu", checkpoint_every=3, gradient_shares=False)
    try:
        return Run(made, directory, settings=settings, data=DATA, signals=SEEN["signals"], cache=False).execute()
    finally:
        directory.release()


def cost(place):
    return json.loads((place / "cost.json").read_text())


@pytest.mark.parametrize(("made", "label"), [(Slow(), "one"), (Outer(), "within")])
def test_an_interrupted_attempt_counts(made, label, tmp_path):
    with pytest.raises(Interrupted):
        attempt(made, tmp_path, stops=(5,))
    first = cost(tmp_path)[label]
    assert first >= 6 * EACH
    began = time.monotonic()
    attempt(made, tmp_path)
    took = time.monotonic() - began
    whole = cost(tmp_path)[label]
    assert first + 6 * EACH <= whole <= first + took


def test_what_a_killed_attempt_took_is_known_up_to_its_last_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        attempt(Slow(), tmp_path, raises=(8,))
    # Written with the checkpoint, not only at the end.
    assert SEEN[5]["one"] >= 3 * EACH
    assert SEEN[8]["one"] >= 6 * EACH
    assert json.loads((tmp_path / "memory.json").read_text())["one"] > 0


def test_the_kept_measurement_is_that_of_the_weights_that_are_kept(tmp_path):
    numbers = iter([5.0, 9.0, 4.0, 7.0] * 2)
    found = {}

    class Kept(Slow):
        keep: str = "last"

        def stages(self, run):
            evaluation = Evaluation(lambda m: {"score": next(numbers)}, every=1, monitor="score", mode="max")

            def loss(m, batch, run):
                return {"l": m.net(batch["features"]).square().mean()}

            update = Update(loss, {"net": sgd(0.1)})
            batches = DATA.split("train").batches(8)
            found[self.keep] = yield Stage(
                "one", {"net": nn.Linear(4, 1)}, [update], 4, batches=batches, evaluate=evaluation, keep=self.keep
            )
            return Result()

    attempt(Kept(), tmp_path / "last")
    attempt(Kept(keep="best"), tmp_path / "best")
    assert found["last"].kept == {"score": 7.0}
    assert found["best"].kept == found["best"].best == found["last"].best == {"score": 9.0}

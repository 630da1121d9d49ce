"""A run: drives a method's generator, hands each yield to the engine, and survives being killed at any point."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock
from pydantic import Field
from torch import Tensor

from stillhouse.data import Data
from stillhouse.engine.cache import cache_directory
from stillhouse.engine.checkpoint import LAYOUT, Checkpoints
from stillhouse.engine.distributed import World
from stillhouse.engine.fit import Fit
from stillhouse.engine.memory import PeakMemory
from stillhouse.engine.method import Method
from stillhouse.engine.result import Result
from stillhouse.engine.rundir import RunDirectory
from stillhouse.engine.seeding import derive, seed_generators
from stillhouse.engine.stage import Compute, Later, Stage, SubRun, Trained, Yield
from stillhouse.engine.storage import CorruptError, read_tree, told_when_full, write_text, write_tree
from stillhouse.engine.tracking import Trackers
from stillhouse.errors import RunError, UserError
from stillhouse.spec import Spec


class Settings(Spec):
    """How a run is carried out; nothing here is part of a method."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train")
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="autocast precision around losses")
    log_every: int = Field(50, ge=1, description="steps between rows of metrics.jsonl")
    gradient_shares: bool = Field(True, description="sample each loss term's share of the gradient, to tell dead terms")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints, besides those by time")
    checkpoint_minutes: float = Field(2.0, gt=0, description="minutes between checkpoints")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; torch's choice when not given (small networks run best on one)"
    )
    trackers: tuple[str, ...] = Field(
        (), description="experiment trackers by accelerate's names: tensorboard, wandb, ..."
    )


class Listener(Protocol):
    """Somebody who watches a run, such as a progress bar."""

    def stage(self, name: str, steps: int, done: int) -> None:
        """A stage starts, or continues after ``done`` steps."""

    def step(self, step: int) -> None:
        """A step is done. Called at every step: be quick."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Numbers were logged."""

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """A stage was evaluated: its monitored number, and whether it should be large or small. Told after its row.

        May stop the run from outside, through :class:`Signals` or by raising.
        """

    def say(self, sentence: str) -> None:
        """Something worth telling."""


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str, steps: int, done: int) -> None:
        """Ignore."""

    def step(self, step: int) -> None:
        """Ignore."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore."""

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """Ignore."""

    def say(self, sentence: str) -> None:
        """Ignore."""


@dataclass
class Signals:
    """What the outside asks of a run and of the runs within it.

    Attributes:
        stop: write a checkpoint and stop.
    """

    stop: bool = False


class Run:
    """One run of one method; what stages, losses and measurements are given.

    Attributes:
        method: the method.
        seed: the run's seed, from which every draw derives.
        world: the processes.
        settings: how it is carried out.
        stage: name of the stage being trained.
        step: its step, from 0.
        steps: its number of steps.
        per_epoch: its steps per pass over its data.
    """

    def __init__(
        self,
        method: Method,
        directory: RunDirectory,
        *,
        seed: int = 0,
        settings: Settings | None = None,
        world: World | None = None,
        cache: bool = True,
        data: Data | None = None,
        listener: Listener | None = None,
        signals: Signals | None = None,
        memory: PeakMemory | None = None,
        within: str = "",
    ) -> None:
        self.method, self.directory, self.seed, self.within = method, directory, seed, within
        self.settings = settings or Settings()
        self.world = world or World.start(self.settings.device)
        self.cache = cache
        self.listener: Listener = listener or Silent()
        self.signals = signals or Signals()
        self.memory = memory or PeakMemory(self.world.device)
        self.stage, self.step, self.steps, self.per_epoch, self.offset = "", 0, 1, 1, 0
        self._place: tuple[Any, ...] = ()
        self._draws = 0
        self._yields: list[list[dict[str, Any]]] = []
        self._at = (0, 0)
        self._alone = False
        self._given_data = data
        self._trackers: Trackers | None = None
        self._outer: Run | None = None
        self._names: dict[str, int] = {}
        self._cost: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._since: float | None = None

    @cached_property
    def data(self) -> Data:
        """The method's data set."""
        return self._given_data if self._given_data is not None else self.method.data.load()

    @property
    def progress(self) -> float:
        """How far the stage is, in [0, 1)."""
        return self.step / self.steps

    @property
    def epoch_progress(self) -> float:
        """Epoch e of E as e / (E - 1): 0 in the first pass over the data, 1 in the last."""
        epochs = -(-self.steps // self.per_epoch)
        return (self.step // self.per_epoch) / max(1, epochs - 1)

    # What losses use -----------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate over processes, with gradient; see :meth:`World.gather`."""
        return self.world.gather(x)

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over all processes' selected elements, with gradient; see :meth:`World.mean`."""
        return self.world.mean(x, mask)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal noise for this process's samples (the first dimension).

        Drawn for the global batch and sliced by sample, so that more processes see the same noise as one.
        """
        return self._draw(torch.randn, shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform noise in [0, 1), drawn like :meth:`randn`."""
        return self._draw(torch.rand, shape)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), drawn like :meth:`randn`."""
        return self._draw(lambda *size, **kwargs: torch.randint(high, size, **kwargs), shape)

    def generator(self) -> torch.Generator:
        """A generator that is alike in all processes, seeded by where the run is and how often it was asked."""
        self._draws += 1
        generator = torch.Generator(self.world.device)
        generator.manual_seed(derive(self.seed, self.stage, self.step, *self._place, "draw", self._draws))
        return generator

    def _draw(self, function: Any, shape: tuple[int, ...]) -> Tensor:
        rank, size = self.world.rank, self.world.size
        drawn: Tensor = function(shape[0] * size, *shape[1:], generator=self.generator(), device=self.world.device)
        return drawn[rank * shape[0] : (rank + 1) * shape[0]]

    def reset(self, module: torch.nn.Module) -> None:
        """Clear what the stage's optimisers remember of a module's parameters (after it was drawn afresh)."""
        for turn in self._fit.turns:
            turn.reset(list(module.parameters()))

    # What the engine uses ------------------------------------------------------------------------------------------

    def enter(self, stage: str, step: int, steps: int, per_epoch: int = 1) -> None:
        """Move to a step."""
        self.stage, self.step, self.steps, self.per_epoch = stage, step, steps, per_epoch

    def place(self, *place: int | str) -> None:
        """Move to a place within the step and seed the generators for it.

        Losses draw differently in each process (dropout); fetching and preparing draw alike in all.
        """
        self._place, self._draws = place, 0
        rank = self.world.rank if place[0] == "loss" else 0
        seed_generators(derive(self.seed, self.stage, self.step, rank, *place), self.world.device)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row to the log, the trackers and whoever listens."""
        self.directory.log(row)
        self.listener.row(row)
        if self._trackers is not None:
            self._trackers.log(row, self.directory.rows)

    def charge(self) -> None:
        """Count the time since it was last called to the yield at hand, and write down what each has taken in all attempts.

        Called whenever a checkpoint is written, so that what a killed attempt took is known up to there.
        """
        self._count()
        # Timings are worth less than what stopped the run: a full disk is said where something is lost.
        with contextlib.suppress(RunError):
            self.directory.write("cost.json", self._cost)
            self.directory.write("memory.json", self._peaks)
        if self._outer is not None:
            self._outer.charge()

    def _count(self) -> None:
        if self._since is None:
            return
        now, label = time.monotonic(), self._label
        self._cost[label] = self._cost.get(label, 0.0) + now - self._since
        self._since = now

    @property
    def _label(self) -> str:
        """What the yield at hand is called: by the names of all that was yielded at once."""
        return "+".join(name for name, at in self._names.items() if at == self._at[0])

    def execute(self) -> Result:
        """Run, or continue, to the end; the result is saved in the directory.

        Raises:
            UserError: something in the recipe, the data or the method's description is wrong.
            NonFiniteError: a loss or gradient became NaN or infinite.
            Interrupted: :attr:`Signals.stop` was set; a checkpoint was written.
            RunError: the disk is full, ...
        """
        with told_when_full(self.directory.path):
            return self._execute()

    def _execute(self) -> Result:
        names = self._names = {}
        self._yields = self._recorded()
        ambient = Ambient()
        self._cost = self.directory.read("cost.json") or {}
        self._peaks = self.directory.read("memory.json") or {}
        if self.world.is_main:
            self._trackers = Trackers.start(self.settings.trackers, self.directory.path, self.method.dump())
        generator = self.method.stages(self)
        reply: Any = None
        index = 0
        try:
            while True:
                self.enter("", 0, 1)
                self.place("yield", index)
                try:
                    item: Yield = generator.send(reply)
                except StopIteration as stop:
                    result = stop.value
                    break
                ambient.check()
                self._at, self._since = (index, 0), time.monotonic()
                self.memory.enter()
                try:
                    reply = self._handle(item, index, names)
                finally:
                    self._count()
                    self._peaks[self._label] = max(self._peaks.get(self._label, 0), self.memory.leave())
                    self._since = None
                index += 1
        finally:
            generator.close()
            if self._trackers is not None:
                self._trackers.finish()
            self.charge()
        if not isinstance(result, Result):
            raise UserError(f"{type(self.method).__name__}.stages returns {result!r}; it must return a Result.")
        result.directory = self.directory.path
        if self.world.is_main:
            # Only where something asked for the data: a run may have none.
            if "data" in self.__dict__:
                self.directory.write("result/inputs.json", self.data.described())
            result.save(self.directory.path)
        self.world.barrier()
        return result

    def _recorded(self) -> list[list[dict[str, Any]]]:
        """The yields that were recorded so far.

        Raises:
            UserError: they were recorded by a version that stores another layout.
        """
        yields, layout = self.world.from_main(
            (self.directory.read("checkpoints/yields.json"), self.directory.read("checkpoints/layout.json"))
        )
        if yields and layout != LAYOUT:
            raise UserError(
                f"{self.directory.path}: this run was started by a version of stillhouse that stores its state in another "
                f"form (layout {layout or 1}, here {LAYOUT}); continue it with that version, or start a new run."
            )
        self.directory.write("checkpoints/layout.json", LAYOUT)
        return yields or []

    def _handle(self, item: Yield, index: int, names: dict[str, int]) -> Any:
        items: list[Any] = list(item) if isinstance(item, Iterable) else [item]
        for one in items:
            if not isinstance(one, Stage | Later | Compute | SubRun):
                raise UserError(f"{type(self.method).__name__}.stages yielded {one!r}, which the engine does not know.")
            if one.name in names:
                raise UserError(f"two yields are named {one.name!r}; names must be unique in a run.")
            names[one.name] = index
        signature = [one.signature() for one in items]
        if index < len(self._yields):
            self._compare(self._yields[index], signature, f"yield {index}")
        else:
            self._yields.append(signature)
            self._record_yields()
        replies = []
        for place, one in enumerate(items):
            self._at = index, place
            replies.append(self._one(one))
        return replies if isinstance(item, Iterable) else replies[0]

    def _record_yields(self) -> None:
        if self.world.is_main:
            write_text(self.directory.path / "checkpoints" / "yields.json", json.dumps(self._yields))

    def _forget_later(self) -> None:
        """Forget what came after the stage at hand, which has no end state (any more).

        So a run whose earlier stage was damaged goes on as if it had been interrupted there: the log is cut back to that
        stage and every later row is written again. Killed on the way, it finds no end state and comes here again.
        """
        if self._alone:
            return
        index, place = self._at
        names = [[one["name"] for one in signature] for signature in self._yields]
        before = [name for group in names[:index] for name in group] + names[index][: place + 1]
        after = names[index][place + 1 :] + [name for group in names[index + 1 :] for name in group]
        self.directory.forget(after, keep=before)
        if len(self._yields) > index + 1:
            del self._yields[index + 1 :]
            self._record_yields()
        # From here on this process writes all there is.
        self._alone = True

    def _compare(self, was: list[Any], now: list[Any], what: str) -> None:
        if was != now:
            before, after = _first_difference(was, now)
            raise UserError(
                f"{self.directory.path}: {what} was {before} when this run was started and is {after} now; "
                "resume with the code and recipe it was started with, or start a new run."
            )

    def _one(self, item: Stage | Later | Compute | SubRun) -> Any:
        match item:
            case Later():
                self.enter(item.name, 0, 1)
                self.place("build")
                stage = item.build()
                if stage.name != item.name:
                    raise UserError(f"the builder {item.name!r} made a stage named {stage.name!r}; they must be equal.")
                record, signature = f"checkpoints/{stage.name}/stage.json", stage.signature()
                self._compare([self.directory.read(record) or signature], [signature], f"the stage {stage.name!r}")
                self.directory.write(record, signature)
                return self._train(stage)
            case Stage():
                return self._train(item)
            case Compute():
                return self._compute(item)
            case SubRun():
                return self._sub_run(item)

    def _train(self, stage: Stage) -> Trained:
        checkpoints = Checkpoints(self.directory.path / "checkpoints" / stage.name, self.world, self.listener.say)
        end = checkpoints.finished()
        if end is None:
            self._forget_later()
            checkpoints.reopen()
        self._fit = Fit(stage, self, checkpoints)
        return self._fit.train(end)

    def _compute(self, item: Compute) -> Any:
        home = self._home_of_computation(item)
        # A key may name what differs between processes, such as data that each of them loaded.
        home = self.world.from_main(home)
        home.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            with FileLock(home / ".lock"):
                if not self._stored(home):
                    self.enter(item.name, 0, 1)
                    self.place("compute")
                    files = home / "files"
                    shutil.rmtree(files, ignore_errors=True)
                    files.mkdir()
                    self.listener.stage(f"{self.within}{item.name}", 1, 0)
                    write_tree(home / "value", {"value": item.fn(files)}, base=home)
        self.world.barrier()
        # Also the run that computed it reads it back, so that a resumed run cannot see another value.
        return read_tree(home / "value", base=home)["value"]

    def _home_of_computation(self, item: Compute) -> Path:
        if item.key is not None and self.cache:
            return cache_directory() / "computes" / hashlib.sha256(f"{LAYOUT} {item.key}".encode()).hexdigest()[:24]
        return self.directory.path / "checkpoints" / item.name

    def _stored(self, home: Path) -> bool:
        if not (home / "value").exists():
            return False
        try:
            read_tree(home / "value", base=home)
        except CorruptError as error:
            self.listener.say(f"{home} is damaged and is computed again: {error}")
            return False
        return True

    def _sub_run(self, item: SubRun) -> Result:
        data = item.data if item.data is not None else item.method.data.load()
        home = self.world.from_main(self._home_of_run(item, data) if self.world.is_main else Path())
        directory = RunDirectory(home, writes=self.world.is_main)
        directory.lock(wait=True)
        # The others look into the directory as well: not before it is this run's turn.
        self.world.barrier()
        try:
            nested = Run(
                item.method,
                directory,
                seed=item.seed,
                settings=self.settings.model_copy(update={"trackers": ()}),
                world=self.world,
                cache=self.cache,
                data=data,
                listener=self.listener,
                signals=self.signals,
                memory=self.memory,
                within=f"{self.within}{item.name} / ",
            )
            nested._outer = self
            return nested.execute()
        finally:
            directory.release()

    def _home_of_run(self, item: SubRun, data: Data) -> Path:
        if self.cache:
            return cache_directory() / "runs" / f"{item.method.name}-{self._key(item, data)}"
        return self.directory.path / "subruns" / item.name

    def _key(self, item: SubRun, data: Data) -> str:
        parts = {
            "layout": LAYOUT,
            "method": item.method.name,
            "fields": item.method.digest(),
            "data": data.fingerprint,
            "seed": item.seed,
            "torch": torch.__version__,
            "device": self.world.device.type,
            "world": self.world.size,
            "precision": self.settings.precision,
            # Sums over threads are rounded in another order.
            "threads": torch.get_num_threads(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Ambient:
    """The modes that hold when a method is started; a yield inside a ``with`` would carry others into the training."""

    def __init__(self) -> None:
        self.modes = self._read()

    @staticmethod
    def _read() -> dict[str, Any]:
        return {
            "gradients": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
        }

    def check(self) -> None:
        """Raise when a mode has changed.

        Raises:
            UserError: names the mode.
        """
        for name, value in self._read().items():
            if value != self.modes[name]:
                raise UserError(
                    f"the method yielded with {name} = {value} (it was {self.modes[name]}): a yield stands inside a 'with'; "
                    "leave the block before yielding."
                )


def _first_difference(was: list[Any], now: list[Any]) -> tuple[str, str]:
    for one, other in zip(was, now, strict=False):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return f"{key} {one.get(key)!r}", f"{key} {other.get(key)!r}"
    return f"{len(was)} items", f"{len(now)} items"

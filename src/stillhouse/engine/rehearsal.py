"""A rehearsal: a method's generator walked without training, to say beforehand what a run does and what it costs.

Each stage is set up by the real :class:`~stillhouse.engine.fit.Fit` and takes a few real, timed steps, after which its
weights, buffers and generators are as before. Runs within the run are rehearsed in the same way, or loaded where they
are in the cache. Nothing is written but to a temporary directory, and nothing is downloaded.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Data
from stillhouse.data.looks import Look, looking
from stillhouse.engine.checkpoint import Checkpoints
from stillhouse.engine.distributed import World
from stillhouse.engine.fit import Fit
from stillhouse.engine.method import Method
from stillhouse.engine.optim import Optimizer
from stillhouse.engine.result import Result, save_png
from stillhouse.engine.run import Ambient, Run, Settings, Silent
from stillhouse.engine.rundir import RunDirectory
from stillhouse.engine.seeding import forked_generators
from stillhouse.engine.stage import Compute, Held, Modules, Stage, SubRun, Trained, Update, resolve
from stillhouse.engine.storage import read_tree, write_tree
from stillhouse.errors import NonFiniteError, UnreachableError, UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import ModelSpec, built_by
from stillhouse.offline import offline

LARGEST = 2**30
"""Bytes of weights above which a model is built on the meta device, without memory, and nothing of it is timed."""

SECONDS = 2.0
"""For so long the steps of a stage are timed (but three of each kind, and at most :data:`STEPS`)."""

STEPS = 100
"""Timed steps of each kind."""

SLOW = 5.0
"""Seconds of a step, or of an evaluation, above which its first time is the only one."""

SHARES = (1 / 512, 1 / 256, 1 / 32, 1 / 8)
"""Shares of a computation that are timed in turn where it can do a part of its work."""

LONGEST = 10.0
"""Seconds of a share, as the smaller ones foretell, above which it is not taken."""

LOOK = 4.0
"""Seconds that measuring on one split may take; of a split that would take longer evenly spaced samples are looked at."""

FEWEST, UNTIMED = 64, 10_000
"""Samples that are looked at, however long they take, and where no step has told yet how long one takes."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, fill [0, 1] evenly, however many there are."""

PERIOD = 10**6
"""Steps among which those are counted in which the same updates fire."""


@dataclass
class UpdateForecast:
    """What an update does in its stage.

    Attributes:
        name: its name.
        every: steps from one firing to the next; None where a function decides.
        times: firings in a row.
        firings: in the whole stage; None where a function decides.
        parameters: numbers that it trains.
        optimizers: algorithm and learning rate of each group.
    """

    name: str
    every: int | None
    times: int
    firings: int | None
    parameters: int
    optimizers: list[str]


@dataclass
class Step:
    """One yield of a method, and what it is expected to cost.

    Attributes:
        name: its name.
        kind: ``stage``, ``computation`` or ``run``.
        seconds: expected time; None where it is not known, 0 where it was done before.
        memory: expected peak in bytes; None where it is not known.
        at_least: ``memory`` is a lower bound: weights, gradients and optimiser states, without activations.
        done: it is in the cache, or in the run directory.
        note: what else is to be said.
        steps: of a stage.
        batch_size: samples per process and step; None where a stage has no batches.
        accumulate: micro-batches per step.
        step_seconds: mean time of a step.
        evaluations: measurements during the stage, and what one takes.
        monitor: the number by which weights are kept and trials are judged; empty where nothing is measured.
        modules: by name: class, parameters, and ``trained``, ``frozen``, ``frozen_through`` or ``scratch``.
        updates: in their order.
        within: of a run, its own yields.
    """

    name: str
    kind: str
    seconds: float | None = None
    memory: int | None = None
    at_least: bool = False
    done: bool = False
    note: str = ""
    steps: int = 0
    batch_size: int | None = None
    accumulate: int = 1
    step_seconds: float | None = None
    evaluations: int = 0
    monitor: str = ""
    evaluation_seconds: float | None = None
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    updates: list[UpdateForecast] = field(default_factory=list)
    within: list[Step] = field(default_factory=list)


@dataclass
class Forecast:
    """What a run would do and cost.

    Attributes:
        steps: the method's yields in order, as far as they are known.
        seconds: expected time of the run, without the start of Python and the report page.
        memory: expected peak in bytes: of the process, libraries included; on CUDA what torch allocates there.
        complete: every yield is known and has a time; else ``seconds`` and ``memory`` are at least those.
        missing: one sentence for each thing that is not here, or keeps the rest from being known.
        said: what the method would say.
        device: where it would run.
        data: samples by split, inputs and classes; None where neither the data nor their form is known.
        models: the recipe's models by key path: class and parameters, or a sentence why that is not known.
        metrics: names of the numbers that the run would end with; None where the walk ended early.
    """

    steps: list[Step]
    seconds: float
    memory: int
    complete: bool
    missing: list[str]
    said: list[str]
    device: str
    data: dict[str, Any] | None
    models: dict[str, dict[str, Any] | str]
    metrics: list[str] | None = None


class Unknown(Exception):
    """What comes next cannot be known without doing what cannot be done here."""


@dataclass
class Timing:
    """What one stage was measured to cost, in seconds."""

    once: float = 0.0
    by_pattern: dict[frozenset[int] | None, float] = field(default_factory=dict)
    evaluation: float = 0.0
    showing: float = 0.0
    recording: dict[str, float] = field(default_factory=dict)
    saving: float = 0.0
    memory: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Told(Silent):
    """What is known of the whole tree of rehearsed runs.

    Attributes:
        clock: what time is read from.
        said: what methods said.
        missing: sentences on what is not here.
        untrained: a stage was rehearsed, so a computation may find what it would not find on trained weights.
        hypothetical: blank data or a model without memory takes part, so that nothing can be computed.
        timings: of stages by their description: equal ones are timed once.
        timed: whether time is forecast; else each thing is done once, on little, to find what is wrong.
        sample_seconds: of a step, for each of its samples, in the slowest stage so far; None before the first.
    """

    def __init__(self, clock: Callable[[], float], *, timed: bool = True) -> None:
        self.clock, self.timed = clock, timed
        self.said: list[str] = []
        self.missing: list[str] = []
        self.untrained = False
        self.hypothetical = False
        self.timings: dict[str, Timing] = {}
        self.sample_seconds: float | None = None

    def say(self, sentence: str) -> None:
        """Keep it."""
        self.said.append(sentence)


def rehearse(
    method: Method,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    cache: bool = True,
    data: Data | None = None,
    world: World | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timed: bool = True,
) -> Forecast:
    """Walk a method without training it, and forecast what a run takes.

    Of large splits evenly spaced samples are looked at, and of computations that can do a part of their work a small one, so
    that the walk takes seconds whatever the data's size.

    Args:
        method: the method.
        seed: the run's seed.
        settings: how it would be carried out.
        cache: whether runs and computations that are in the cache count as done.
        data: its data; loaded when not given.
        world: the processes.
        clock: what time is read from, in seconds; the processor's, on a machine with other work.
        timed: False only finds what is wrong, and what would be measured: a step of each kind, a look at few samples; the
            times are not to be used then, and data or models that are not here are an error.

    Raises:
        UserError: the run would stop with it: a field, the data or the description of a stage is wrong.
    """
    settings = settings or Settings()
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    told = Told(clock, timed=timed)
    world = world or World.start(settings.device)
    with (
        tempfile.TemporaryDirectory(prefix="stillhouse-") as place,
        forked_generators(seed, world.device),
        offline(),
        built_by(told_builder(told)),
    ):
        try:
            run = Rehearsal(
                method,
                None,
                Path(place),
                told,
                seed=seed,
                settings=settings.model_copy(update={"trackers": ()}),
                world=world,
                cache=cache,
                data=data,
            )
            steps, result, around = run.walk()
            data_, facts = _described_data(run)
            models = {path: _described_model(spec, facts) for path, spec in models_of(method)}
        finally:
            torch.set_num_threads(threads)
    known = [step for step in steps if step.seconds is not None]
    memory = max([step.memory or 0 for step in steps], default=0)
    return Forecast(
        steps,
        around + sum(step.seconds or 0.0 for step in known),
        memory,
        result is not None and len(known) == len(steps) and not any(step.at_least for step in steps),
        list(dict.fromkeys(told.missing)),
        list(dict.fromkeys(told.said)),
        str(run.world.device),
        data_,
        models,
        sorted(result.metrics) if result is not None else None,
    )


def models_of(spec: Any, path: str = "") -> list[tuple[str, ModelSpec]]:
    """All model specs within a spec, with their key paths."""
    found: list[tuple[str, ModelSpec]] = []
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        items = value if isinstance(value, tuple) else (value,)
        for number, item in enumerate(items):
            here = f"{path}{name}" + (f".{number}" if len(items) > 1 else "")
            if isinstance(item, ModelSpec):
                found.append((here, item))
            elif hasattr(type(item), "model_fields"):
                found += models_of(item, here + ".")
    return found


def _described_model(spec: ModelSpec, facts: Facts | None) -> dict[str, Any] | str:
    if facts is None and spec.kind not in ("hf", "diffusers", "import", "file", "object"):
        return f"{spec.kind}: its size follows from the data, which are not here."
    try:
        made = outlined(lambda: spec.build(facts or Facts({})))
    except (UserError, StopIteration, LookupError) as error:
        return str(error) if isinstance(error, UserError) else f"{spec.kind}: its size follows from the data."
    if made is None:
        return f"{spec.kind}: it cannot be built without memory, so its parameters were not counted."
    return {"class": type(made).__name__, "parameters": sum(p.numel() for p in made.parameters())}


def _described_data(run: Rehearsal) -> tuple[dict[str, Any] | None, Facts | None]:
    """The data in plain values, where something asked for them, and their facts."""
    data = run.__dict__.get("data")
    if data is None:
        return None, None
    counts = {name: len(split) for name, split in data.splits.items()}
    return {"name": data.name, "samples": counts, "classes": data.facts.num_classes, **data.described()}, data.facts


def told_builder(told: Told) -> Callable[[ModelSpec, Callable[[], nn.Module]], nn.Module]:
    """Builds models; those with more than :data:`LARGEST` bytes of weights on the meta device."""

    def build(spec: ModelSpec, make: Callable[[], nn.Module]) -> nn.Module:
        if spec.kind == "object":
            return make()
        outline = outlined(make)
        if outline is None or weight_bytes(outline) <= LARGEST:
            return make()
        told.hypothetical = True
        told.missing.append(
            f"the model {type(outline).__name__} takes {weight_bytes(outline) / 2**30:.1f} GiB, so it was built without "
            "memory and nothing was timed from there on."
        )
        return outline

    return build


def outlined(make: Callable[[], nn.Module]) -> nn.Module | None:
    """A model on the meta device, where it takes no memory; None where its code cannot be run there."""
    with forked_generators(0):
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):
            return None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


class Rehearsal(Run):
    """A run whose yields are answered without training.

    Args:
        method: the method.
        home: where the run was done before, or begun; only read.
        scratch: a directory that is removed afterwards.
        told: what the whole tree of runs shares.
        options: see :class:`Run`.
    """

    def __init__(self, method: Method, home: Path | None, scratch: Path, told: Told, **options: Any) -> None:
        super().__init__(method, RunDirectory(home or scratch, writes=False), listener=told, **options)
        self.home, self.scratch, self.told = home, scratch, told
        self.steps_found: list[Step] = []

    @cached_property
    def data(self) -> Data:
        """The method's data set; blank data of the same form where it is not here and its form is known."""
        if self._given_data is not None:
            return self._given_data
        try:
            return self.method.data.load()
        except UnreachableError as error:
            blank = self.method.data.foreseen()
            if blank is None or not self.told.timed:
                raise
            self.told.missing.append(
                f"{str(error).rstrip('.')}; its form is known, so stages are listed, and not timed."
            )
            self.told.hypothetical = True
            return blank

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing is logged."""

    def _record_yields(self) -> None:
        """Nothing is recorded."""

    def walk(self) -> tuple[list[Step], Result | None, float]:
        """All yields, the result (None where the walk ends early), and the seconds between the yields."""
        names: dict[str, int] = {}
        ambient = Ambient()
        generator = self.method.stages(self)
        reply: Any = None
        result: Result | None = None
        index, around = 0, 0.0
        try:
            while True:
                self.enter("", 0, 1)
                self.place("yield", index)
                began = self._clock()
                try:
                    item = generator.send(reply)
                except StopIteration as stop:
                    result = stop.value
                    if isinstance(result, Result) and self.home is not None and self.directory.finished():
                        result.directory = self.home
                    if isinstance(result, Result) and self.home is None and not self.told.hypothetical:
                        result.save(self._room("result"))
                    break
                finally:
                    around += self._clock() - began
                ambient.check()
                reply = self._handle(item, index, names)
                index += 1
        except UnreachableError as error:
            if not self.told.timed:
                raise
            self.told.missing.append(str(error))
        except Unknown as unknown:
            self.told.missing.append(str(unknown))
        except (UserError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            # On blank data and models without memory a method may stumble where a run would not.
            if not self.told.hypothetical:
                raise
            self.told.missing.append(
                f"{self.method.name}: what comes next is not known without computing ({_first_line(error)})."
            )
        finally:
            generator.close()
        if result is not None and not isinstance(result, Result):
            raise UserError(f"{type(self.method).__name__}.stages returns {result!r}; it must return a Result.")
        return self.steps_found, result, around

    def _room(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))

    def _clock(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return self.told.clock()

    # Runs within the run -------------------------------------------------------------------------------------------

    def _sub_run(self, item: SubRun) -> Result:
        step = Step(item.name, "run")
        self.steps_found.append(step)
        began = self._clock()
        self.memory.enter()
        nested = Rehearsal(
            item.method,
            self._found(item),
            self._room("run"),
            self.told,
            seed=item.seed,
            settings=self.settings,
            world=self.world,
            cache=self.cache,
            data=item.data,
            memory=self.memory,
        )
        step.within, result, around = nested.walk()
        step.memory, step.at_least = self.memory.leave(), any(inner.at_least for inner in step.within)
        if step.within:
            # The copies of a rehearsal are left out of what its stages take.
            step.memory = max((inner.memory or 0 for inner in step.within), default=0)
        step.done = nested.directory.finished() if nested.home is not None else False
        if step.done:
            step.seconds, step.note = self._clock() - began, "found in the cache"
            step.within = []
        elif all(inner.seconds is not None for inner in step.within):
            step.seconds = around + sum(inner.seconds or 0.0 for inner in step.within)
        if result is None:
            raise Unknown(f"what follows the run {item.name!r} is not known without its result.")
        return result

    def _found(self, item: SubRun) -> Path | None:
        """Where the run was done before, or begun."""
        if not self.cache:
            home = self.home / "subruns" / item.name if self.home is not None else None
        else:
            try:
                data = item.data if item.data is not None else item.method.data.load()
            except UnreachableError:
                return None
            home = self._home_of_run(item, data)
        return home if home is not None and home.is_dir() else None

    # Computations --------------------------------------------------------------------------------------------------

    def _compute(self, item: Compute) -> Any:
        step = Step(item.name, "computation")
        self.steps_found.append(step)
        home = self._home_of_computation(item)
        if (home / "value").is_dir():
            step.seconds, step.done = 0.0, True
            return read_tree(home / "value", base=home)["value"]
        if self.told.hypothetical:
            if item.form is None:
                raise Unknown(f"what follows the computation {item.name!r} is not known without its value.")
            return item.form()
        place = self._room("compute")
        self.enter(item.name, 0, 1)
        self.place("compute")
        self.memory.enter()
        try:
            step.seconds = self._timed_part(item, item.part, place) if item.part else self._timed_whole(item, place)
            return read_tree(place / "value", base=place)["value"]
        except (UserError, RuntimeError, ValueError, ArithmeticError) as error:
            if isinstance(error, UserError) and not self.told.untrained:
                raise
            raise Unknown(
                f"the computation {item.name!r} fails on what is not trained yet ({_first_line(error)})."
            ) from error
        finally:
            step.memory = self.memory.leave()

    def _timed_whole(self, item: Compute, place: Path) -> float:
        return self._looked(lambda: self._store(item.fn, place))

    def _looked(self, act: Callable[[], None]) -> float:
        """What an act takes that may look at splits; of large ones it is given evenly spaced samples."""
        most, each = UNTIMED, self.told.sample_seconds
        if not self.told.timed:
            most = FEWEST
        elif each is not None:
            most = max(FEWEST, int(self.world.from_main(LOOK / max(each, 1e-9))))
        with looking(Look(most, self._clock)) as taken:
            began = self._clock()
            act()
            return self._clock() - began + taken.left_out

    def _timed_part(self, item: Compute, part: Callable[[Path, float], Any], place: Path) -> float:
        def timed(share: float) -> float:
            self.place("compute")
            began = self._clock()
            self._store(lambda files: part(files, share), place)
            return self._clock() - began

        first = timed(SHARES[0])
        if not self.told.timed:
            return first
        (small, least), (large, more) = [(share, timed(share)) for share in SHARES[:2]]
        # What only the first time takes, such as imports, is taken once.
        once = max(0.0, first - least)
        for share in SHARES[2:]:
            foretold = more + max(0.0, more - least) / (large - small) * (share - large)
            if self.world.from_main(foretold > LONGEST):
                break
            (small, least), (large, more) = (large, more), (share, timed(share))
        return once + more + max(0.0, more - least) / (large - small) * (1 - large)

    @staticmethod
    def _store(fn: Callable[[Path], Any], place: Path) -> None:
        files = place / "files"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        write_tree(place / "value", {"value": fn(files)}, base=place)

    # Stages --------------------------------------------------------------------------------------------------------

    def _train(self, stage: Stage) -> Trained:
        step = described(stage, self)
        self.steps_found.append(step)
        checkpoints = Checkpoints(self.directory.path / "checkpoints" / stage.name, self.world, self.told.say)
        end = checkpoints.finished() if self.home is not None else None
        if end is not None:
            step.seconds, step.done = 0.0, True
            return Fit(stage, self, checkpoints).train(end)
        nets = [held.module if isinstance(held, Held) else held for held in stage.modules.values()]
        if self.told.hypothetical:
            if not any(parameter.is_meta for net in nets for parameter in net.parameters()):
                Fit(stage, self, checkpoints).streams.close()
            step.memory, step.at_least = least_memory(stage, self), True
            return self._untrained(stage, {})
        looks = [stage.evaluate is not None, stage.show is not None, stage.keep, sorted(stage.ema), stage.accumulate]
        updates = [_spelt(update) for update in stage.updates]
        key = f"{step.batch_size} {updates} {looks} {stage.signature() | {'name': ''}}"
        timing = self.told.timings.get(key)
        if timing is None:
            self.memory.enter()
            with forked_generators(0, self.world.device):
                timing = self._timed(stage, checkpoints)
            timing.memory += self.memory.leave()
            self.told.timings[key] = timing
        else:
            timing.once = 0.0
        self._sum_up(stage, step, timing)
        return self._untrained(stage, timing.metrics)

    def _timed(self, stage: Stage, checkpoints: Checkpoints) -> Timing:
        """Set the stage up, take a few steps, look and save once; everything is put back."""
        timing = Timing()
        began = self._clock()
        self._fit = fit = Fit(stage, self, checkpoints)
        with fit._held():
            fit.prints = fit._fingerprints()
            timing.once = self._clock() - began
            with restored(fit) as copied:
                # The copy is the rehearsal's own.
                timing.memory -= copied if self.world.device.type == "cpu" else 0
                try:
                    self._time_steps(fit, timing)
                except NonFiniteError as error:
                    timing.note = f"its loss is not finite on what is not trained yet: {error}"
                self._time_looking(fit, timing)
        fit.streams.close()
        return timing

    def _time_steps(self, fit: Fit, timing: Timing) -> None:
        stage = fit.stage
        for turn in fit.turns:
            turn.shares = None  # Its samples are rare, and would not be so here.
        kinds = patterns(stage)
        places = {kind: spread(stage, kind, STEPS + 1) for kind in kinds}
        first: dict[frozenset[int] | None, float] = {}
        taken: dict[frozenset[int] | None, list[float]] = {kind: [] for kind in kinds}
        # On an accelerator steps are only queued, so several are timed together.
        at_once = 4 if self.world.device.type != "cpu" else 1
        for kind in kinds:
            first[kind] = self._time_step(fit, places[kind][0], 1)
        began = self._clock()
        for number in range(1, STEPS + 1) if self.told.timed else ():
            for kind in kinds:
                if first[kind] < SLOW and number < len(places[kind]):
                    taken[kind].append(self._time_step(fit, places[kind][number], at_once))
            # Where a function decides, only many steps say how often an update fires.
            over = number >= (10 if None in kinds else 3) and self._clock() - began > SECONDS
            if self.world.from_main(over):
                break
        fit._check_late()
        for kind in kinds:
            called = kind is None
            usual = (fmean if called else median)(taken[kind] or [first[kind]])
            timing.by_pattern[kind] = usual
            timing.once += max(0.0, first[kind] - usual)
        if stage.batches is not None:
            slowest = max(timing.by_pattern.values()) / stage.batches.global_size(1)
            self.told.sample_seconds = max(slowest, self.told.sample_seconds or 0.0)

    def _time_step(self, fit: Fit, step: int, times: int) -> float:
        began = self._clock()
        for _ in range(times):
            fit._step(step)
        return (self._clock() - began) / times

    def _time_looking(self, fit: Fit, timing: Timing) -> None:
        stage = fit.stage
        if stage.evaluate is not None:
            evaluation = stage.evaluate

            def measure() -> None:
                fit.metrics = fit._measure(evaluation, 1)

            first, timing.evaluation = self._twice(measure)
            timing.metrics = fit.metrics
            if evaluation.monitor not in fit.metrics:
                raise UserError(
                    f"stage {stage.name!r}: the evaluation gives {sorted(fit.metrics)}, not the monitored "
                    f"{evaluation.monitor!r}."
                )
            timing.once += first
        if stage.show is not None:
            room = self._room("samples")

            def show() -> None:
                for name, picture in fit._pictures().items():
                    save_png(picture, room / f"{name}.png")

            first, timing.showing = self._twice(show)
            timing.once += first
        for name, record in stage.records.items():
            began = self._clock()
            with torch.no_grad():
                for tensor in record.take(fit.modules).values():
                    tensor.detach().cpu().clone()
            timing.recording[name] = self._clock() - began
        state = fit._state()
        size = sum(t.numel() * t.element_size() for t in tensors_of(state))
        if not self.told.timed:
            return
        if shutil.disk_usage(self.scratch).free > 4 * size:
            began = self._clock()
            place = self._room("checkpoint") / "end"
            write_tree(place, state)
            timing.saving = self._clock() - began
            shutil.rmtree(place)
        else:
            timing.note = "there is no room to time a checkpoint, which is left out"
        began = self._clock()
        fit._fingerprints()
        timing.once += self._clock() - began

    def _twice(self, act: Callable[[], None]) -> tuple[float, float]:
        """What only the first time takes, and the usual time."""
        times = []
        for _ in range(2):
            began = self._clock()
            times.append(self._looked(act))
            if self.world.from_main(self._clock() - began > SLOW or not self.told.timed):
                break
        return max(0.0, times[0] - times[-1]), times[-1]

    def _sum_up(self, stage: Stage, step: Step, timing: Timing) -> None:
        """What the whole stage takes, from what its parts take."""
        counts = patterns(stage)
        total = sum(counts.values())
        if timing.by_pattern:
            step.step_seconds = sum(timing.by_pattern[kind] * count for kind, count in counts.items()) / total
            seconds = timing.once + stage.steps * step.step_seconds
            if stage.evaluate is not None:
                step.evaluations, step.evaluation_seconds = -(-stage.steps // stage.evaluate.every), timing.evaluation
                seconds += step.evaluations * timing.evaluation
            if stage.show is not None:
                seconds += -(-stage.steps // stage.shown_every) * timing.showing
            for name, record in stage.records.items():
                seconds += (stage.steps // record.every + 1) * timing.recording[name]
            saves = 1 + int(seconds // (60 * self.settings.checkpoint_minutes))
            if self.settings.checkpoint_every:
                saves += (stage.steps - 1) // self.settings.checkpoint_every
            step.seconds = seconds + saves * timing.saving
        step.memory, step.note = timing.memory, timing.note

    def _untrained(self, stage: Stage, metrics: dict[str, float]) -> Trained:
        """What a stage gives back, with the weights that it began with."""
        self.told.untrained = True
        modules = Modules({n: m.module if isinstance(m, Held) else m for n, m in stage.modules.items()})
        records: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        for name, record in stage.records.items():
            with torch.no_grad():
                tensors = record.take(modules)
            count = stage.steps // record.every + 1
            records[name] = {k: np.broadcast_to(np.float32(0), (count, *t.shape)) for k, t in tensors.items()}
        averages = {name: dict(modules[name].state_dict()) for name in stage.ema}
        return Trained(stage.name, stage.steps, metrics, metrics, metrics, averages, records, stopped_early=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def described(stage: Stage, run: Run) -> Step:
    """A stage in words and numbers.

    Raises:
        UserError: an update trains what is not there.
    """
    counts = patterns(stage)
    modules = {}
    for name, module in stage.modules.items():
        net, mode = (module.module, module.mode) if isinstance(module, Held) else (module, "trained")
        modules[name] = {
            "class": type(net).__name__,
            "parameters": sum(p.numel() for p in net.parameters()),
            "mode": mode,
        }
    updates = []
    for place, update in enumerate(stage.updates):
        called = any(not isinstance(other.every, int) for other in stage.updates)
        firings = None if called else update.times * sum(n for kind, n in counts.items() if place in (kind or ()))
        if called and isinstance(update.every, int):
            firings = update.times * -(-stage.steps // update.every)
        try:
            trained = [p for pattern in update.trains for _, p in resolve(pattern, stage.modules)]
        except UserError as error:
            raise UserError(f"stage {stage.name!r}, update {update.name!r}: {error}") from None
        updates.append(
            UpdateForecast(
                update.name,
                update.every if isinstance(update.every, int) else None,
                update.times,
                firings,
                sum(p.numel() for p in trained),
                list(dict.fromkeys(f"{spec.name} at {spec.lr:g}" for spec in update.trains.values())),
            )
        )
    return Step(
        stage.name,
        "stage",
        steps=stage.steps,
        batch_size=stage.batches.global_size(1) if stage.batches is not None else None,
        accumulate=stage.accumulate,
        monitor=stage.evaluate.monitor if stage.evaluate is not None else "",
        modules=modules,
        updates=updates,
    )


def patterns(stage: Stage) -> dict[frozenset[int] | None, int]:
    """How many steps there are of each kind, by the places of the updates that fire in them.

    Where a function says whether an update fires, there is one kind, None: all steps.
    """
    every = [update.every for update in stage.updates]
    if not all(isinstance(one, int) for one in every):
        return {None: stage.steps}
    period = min(stage.steps, math.lcm(*every), PERIOD)  # type: ignore[arg-type]
    whole, rest = divmod(stage.steps, period)
    counts: Counter[frozenset[int] | None] = Counter()
    for step in range(period):
        kind = frozenset(place for place, one in enumerate(every) if step % one == 0)  # type: ignore[operator]
        counts[kind] += whole + (step < rest)
    return dict(counts)


def spread(stage: Stage, kind: frozenset[int] | None, count: int) -> list[int]:
    """Steps of one kind from all over a stage, the first few as well as all of them.

    So what moves with the progress of the stage is met at all its values.
    """
    targets = [int((number + 0.5) * GOLDEN % 1 * stage.steps) for number in range(count)]
    if kind is None:
        return targets
    every = [update.every for update in stage.updates]
    period = min(stage.steps, math.lcm(*every), PERIOD)  # type: ignore[arg-type]
    own = [s for s in range(period) if frozenset(p for p, one in enumerate(every) if s % one == 0) == kind]  # type: ignore[operator]
    found = []
    for target in targets:
        base = target // period * period
        near = min(own, key=lambda step: abs(base + step - target))
        found.append(base + near if base + near < stage.steps else near)
    return found


def least_memory(stage: Stage, run: Run) -> int:
    """Bytes that a stage holds at least: weights, gradients, optimiser states, averages and the best weights."""
    nets = {name: held.module if isinstance(held, Held) else held for name, held in stage.modules.items()}
    tensors = {id(t): t for net in nets.values() for t in (*net.parameters(), *net.buffers())}
    total = sum(_bytes(t) for t in tensors.values())
    seen: dict[int, int] = {}
    for update in stage.updates:
        for pattern, spec in update.trains.items():
            for _, parameter in resolve(pattern, stage.modules):
                seen[id(parameter)] = _bytes(parameter)
                total += _states(spec) * _bytes(parameter)
    total += sum(seen.values())
    total += sum(weight_bytes(nets[name]) for name in stage.ema)
    if stage.keep == "best":
        total += sum(weight_bytes(nets[name]) for name, held in stage.modules.items() if not isinstance(held, Held))
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _states(spec: Optimizer) -> int:
    """Numbers that an optimiser keeps for each parameter."""
    return 2 if spec.name in ("adam", "adamw") else int(spec.momentum > 0)


@contextmanager
def restored(fit: Fit) -> Iterator[int]:
    """Put weights and buffers of all modules of a stage back after the block; gives the bytes of the copy."""
    subs = {id(sub): sub for module in fit.modules.values() for sub in module.modules()}.values()
    held = [(sub._buffers, name, buffer) for sub in subs for name, buffer in sub._buffers.items()]
    every = [*(b for *_, b in held if b is not None), *(p for m in fit.modules.values() for p in m.parameters())]
    tensors = list({id(t): t for t in every}.values())
    copies = [t.detach().to("cpu", copy=True) for t in tensors]
    try:
        yield sum(map(_bytes, copies))
    finally:
        for owner, name, buffer in held:
            owner[name] = buffer
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


def tensors_of(tree: Any) -> Iterable[Tensor]:
    """All tensors in a tree of dicts and lists."""
    match tree:
        case Tensor():
            yield tree
        case dict():
            for value in tree.values():
                yield from tensors_of(value)
        case list() | tuple():
            for value in tree:
                yield from tensors_of(value)


def _spelt(update: Update) -> str:
    """What makes an update take as long as another one."""
    loss: Any = update.loss
    loss = getattr(loss, "func", loss)
    own = update.batches.global_size() if update.batches is not None else None
    trains = [(str(pattern), spec.dump()) for pattern, spec in update.trains.items()]
    return f"{getattr(loss, '__qualname__', type(loss).__qualname__)} {own} {update.eval} {trains}"

"""What a method yields: stages, their updates, computations and whole runs of other methods."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from stillhouse.engine.health import Line
from stillhouse.engine.optim import Optimizer, Ramp
from stillhouse.engine.projection import Projection
from stillhouse.errors import UserError, nearest

if TYPE_CHECKING:
    from stillhouse.data import Batch, Batches, Data
    from stillhouse.engine.method import Method
    from stillhouse.engine.run import Run

Term = Tensor | Callable[[], Tensor]
"""A loss term: its value, or a function that computes it (called only when its weight is not 0)."""

Losses = Mapping[str, Term]
"""Named, unweighted loss terms of one batch."""


class Skip:
    """What a loss returns when nothing of its update shall move; the step still counts."""


SKIP = Skip()

Loss = Callable[["Modules", "Batch", "Run"], "Losses | Iterator[Losses] | Skip"]
"""A loss: (modules, batch, run) to named terms; to :data:`SKIP`; or a generator of term mappings, each of which is
differentiated as soon as it is yielded, so that memory holds one piece at a time (their sum is the loss)."""


class Modules(dict[str, nn.Module]):
    """The modules of a stage by name, as the user made them: ``m.student``, ``m["student"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this stage has no module {name!r}; {nearest(name, self)}") from None


@dataclass(frozen=True)
class Held:
    """A module that a stage uses without training it; see :func:`frozen`, :func:`frozen_through`, :func:`scratch`."""

    module: nn.Module
    mode: Literal["frozen", "frozen_through", "scratch"]


def frozen(module: nn.Module) -> Held:
    """A teacher: in eval mode, its parameters without gradients, its outputs without a graph."""
    return Held(module, "frozen")


def frozen_through(module: nn.Module) -> Held:
    """A teacher through which gradients flow to its input; its parameters never get any."""
    return Held(module, "frozen_through")


def scratch(module: nn.Module) -> Held:
    """A module without memory, drawn afresh in every step by ``prepare``: in no checkpoint, never trained."""
    return Held(module, "scratch")


@dataclass(frozen=True)
class Update:
    """A loss, what it trains, and how often.

    Attributes:
        loss: the loss function.
        trains: patterns over parameter paths, each with its optimiser. ``student`` is a module, ``set.images`` a
            parameter or sub-module in it, ``student:*.experts.*`` a glob over the paths in it; a tuple of these shares one
            optimiser. A pattern that matches nothing is an error, and so is a parameter matched twice.
        every: fires at steps 0, ``every``, 2 ``every``, ...; or a function of the run that says whether it fires.
        times: firings in a row, each on a fresh batch.
        name: name in logs and errors; the loss function's by default.
        weights: term name to weight; the method's fields ``weight_<term>`` by default, else 1.
        eval: modules in eval mode while it runs.
        batches: a stream of its own in place of the stage's batches.
        couples: the loss couples the samples of a batch (so gradients cannot be accumulated over micro-batches).
        sparse: its loss need not reach every parameter it trains.
        projection: terms whose gradient may not oppose that of others; None adds all of them up.
    """

    loss: Loss
    trains: Mapping[str | tuple[str, ...], Optimizer]
    every: int | Callable[[Run], bool] = 1
    times: int = 1
    name: str = ""
    weights: Mapping[str, float | Ramp] | None = None
    eval: tuple[str, ...] = ()
    batches: Batches | None = None
    couples: bool = False
    sparse: bool = False
    projection: Projection | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.loss, "__name__", type(self.loss).__name__))
        if isinstance(self.every, int) and self.every < 1:
            raise UserError(f"update {self.name!r}: every is {self.every}, but an update fires at most every 1 step.")
        if self.times < 1:
            raise UserError(f"update {self.name!r}: times is {self.times}, but an update fires at least 1 time.")


@dataclass(frozen=True)
class Evaluation:
    """Measurements during a stage, on validation data.

    Attributes:
        measure: modules to named numbers. Runs in eval mode without gradients and leaves no trace in the training.
        every: steps between measurements; the last step is always measured.
        monitor: the number that ``keep="best"`` and ``patience`` watch.
        mode: whether the monitored number should be large or small.
        patience: measurements without improvement after which the stage ends early; None never ends early.
        lines: references for the monitored number by name, such as the teacher's; the stage says once in words when it
            lies on the wrong side of one.
    """

    measure: Callable[[Modules], Mapping[str, float]]
    every: int
    monitor: str
    mode: Literal["max", "min"] = "max"
    patience: int | None = None
    lines: Mapping[str, Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"evaluation: every is {self.every}, but it measures at most every 1 step.")


@dataclass(frozen=True)
class Record:
    """What to keep along the way: ``take(modules)`` gives named tensors, written to memory-mapped files by index.

    Attributes:
        take: modules to named tensors of constant shape.
        every: records at steps 0 (before training), ``every``, 2 ``every``, ...
    """

    take: Callable[[Modules], Mapping[str, Tensor]]
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"record: every is {self.every}, but it records at most every 1 step.")


@dataclass
class Stage:
    """One training phase.

    Attributes:
        name: unique in the run; seeds derive from it.
        modules: what the stage holds, by name. Those not held by :func:`frozen`, :func:`frozen_through` or :func:`scratch`
            are its state. One with an ``after_step(run)`` method is a stateful part: called after each training step.
        updates: in the order in which they run within a step; a later one sees the earlier one's new weights.
        steps: number of steps.
        batches: where batches come from; None gives empty batches (a stage that needs no data).
        prepare: runs once per batch, before the updates that share it; what it returns replaces the batch.
        evaluate: measurements, or None.
        keep: which weights the modules hold afterwards.
        ema: decay of the exponential moving average per module name.
        records: what to keep along the way.
        accumulate: micro-batches per step.
        show: gives pictures of how far the training is, by name: (channels, height, width) in [0, 1]. Runs like an
            evaluation, in eval mode and without a trace; torch's global generator is seeded alike at each step, so that
            noise drawn from it stays the same. Saved as ``samples/<stage>/<step>-<name>.png`` in the run directory, the
            step in nine digits, where the report finds them.
        show_every: steps between pictures; the last step is always shown. As often as it is measured when not given, or
            ten times in all.
    """

    name: str
    modules: Mapping[str, nn.Module | Held]
    updates: Sequence[Update]
    steps: int
    batches: Batches | None = None
    prepare: Callable[[Modules, Batch, Run], Batch | None] | None = None
    evaluate: Evaluation | None = None
    keep: Literal["last", "best", "ema"] = "last"
    ema: Mapping[str, float] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict)
    accumulate: int = 1
    show: Callable[[Modules, Run], Mapping[str, Tensor]] | None = None
    show_every: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        where = f"stage {self.name!r}"
        names = [update.name for update in self.updates]
        if len(set(names)) < len(names):
            raise UserError(f"{where}: two updates share a name in {names}; give each its own.")
        if self.steps < 1:
            raise UserError(f"{where}: steps is {self.steps}, but a stage takes at least 1 step.")
        if self.accumulate < 1:
            raise UserError(f"{where}: accumulate is {self.accumulate}, but a step takes at least 1 micro-batch.")
        if self.show_every is not None and self.show_every < 1:
            raise UserError(f"{where}: show_every is {self.show_every}, but it shows at most every 1 step.")
        if self.keep == "best" and self.evaluate is None:
            raise UserError(f"{where}: keep='best' needs an evaluation to say which weights are best.")
        if self.keep == "ema" and not self.ema:
            raise UserError(f"{where}: keep='ema' needs the decay of an average in 'ema'.")
        for name in self.ema:
            if name not in self.modules or isinstance(self.modules[name], Held):
                raise UserError(
                    f"{where}: ema names {name!r}, which is no trained module; {nearest(name, self.modules)}."
                )
        projected = next((update.name for update in self.updates if update.projection is not None), None)
        if self.accumulate > 1 and projected is not None:
            raise UserError(
                f"{where}: accumulate is {self.accumulate}, but {projected!r} projects the gradients of its terms, which are "
                "those of whole steps; use 1, or more processes."
            )
        if self.accumulate > 1 and any(update.couples for update in self.updates):
            coupled = next(update.name for update in self.updates if update.couples)
            raise UserError(
                f"{where}: accumulate is {self.accumulate}, but the loss {coupled!r} couples the samples of a batch, "
                "so micro-batches would change it; use 1, or more processes."
            )

    @property
    def shown_every(self) -> int:
        """Steps between pictures."""
        if self.show_every is not None:
            return self.show_every
        return self.evaluate.every if self.evaluate else max(1, self.steps // 10)

    def signature(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        modules = {}
        for name, module in self.modules.items():
            held = module if isinstance(module, Held) else None
            net = held.module if held else module
            shapes = [tuple(p.shape) for p in net.parameters()]  # type: ignore[union-attr]
            modules[name] = f"{held.mode if held else 'trained'} {type(net).__name__} {shapes}"
        updates = [
            f"{u.name} trains {sorted(map(str, u.trains))} every {u.every if isinstance(u.every, int) else 'called'}"
            f" times {u.times}"
            for u in self.updates
        ]
        return {"kind": "stage", "name": self.name, "steps": self.steps, "modules": modules, "updates": updates}


@dataclass(frozen=True)
class Later:
    """A stage that is built when its turn comes, for lists of many independent stages.

    Attributes:
        name: the stage's name.
        build: makes the stage; runs under a seed derived from the name alone.
    """

    name: str
    build: Callable[[], Stage]

    def signature(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {"kind": "stage built later", "name": self.name}


@dataclass(frozen=True)
class Compute:
    """Work without training: mining, selection, caching outputs, measuring. Run once, stored, loaded on resume.

    Attributes:
        name: unique in the run.
        fn: gets a directory to write into; returns tensors, numbers, strings, lists, string-keyed dicts, or paths below
            the directory. The value always comes back through its stored form.
        key: when given, the value is stored in the cache shared by all runs under this key, which must name everything
            the value depends on.
        part: does a share of the work, ``0 < share <= 1``, and returns a value of the same form. A forecast calls it at
            two small shares in place of ``fn`` and takes the time to grow evenly; without it, ``fn`` is run and timed.
        form: returns a value of the same form without the work, in a forecast that cannot do any of it (a model too
            large to be built, data that are not here); without it such a forecast ends here.
    """

    name: str
    fn: Callable[[Path], Any]
    key: str | None = None
    part: Callable[[Path, float], Any] | None = None
    form: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)

    def signature(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {"kind": "computation", "name": self.name}


@dataclass(frozen=True)
class SubRun:
    """A whole run of another method, such as the training of a teacher; gives back its :class:`Result`.

    It has a seed of its own and is kept in the cache shared by all runs: trained once, then found. Runs that train it and
    runs that find it are equal.

    Attributes:
        name: unique in the run.
        method: the method, with all its fields.
        seed: its seed.
        data: the loaded data, when it is the parent's own.
    """

    name: str
    method: Method
    seed: int = 0
    data: Data | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)

    def signature(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {"kind": "run", "name": self.name, "of": f"{self.method.name} {self.method.digest()} seed {self.seed}"}


@dataclass
class Trained:
    """What a stage gives back. The stage's modules hold the weights named by its ``keep``.

    Attributes:
        name: the stage's name.
        steps: steps taken (fewer than asked after an early stop).
        metrics: the last measurement.
        best: the measurement of the best weights (of the last ones when nothing is monitored).
        kept: the measurement of the weights that ``keep`` names, which the modules hold.
        ema: averaged weights by module name.
        records: recorded arrays by record name and tensor name, with a first dimension of records; memory-mapped.
        stopped_early: patience ran out.
    """

    name: str
    steps: int
    metrics: dict[str, float]
    best: dict[str, float]
    kept: dict[str, float]
    ema: dict[str, dict[str, Tensor]]
    records: dict[str, dict[str, np.ndarray[Any, Any]]]
    stopped_early: bool


def resolve(pattern: str | tuple[str, ...], modules: Mapping[str, nn.Module | Held]) -> list[tuple[str, nn.Parameter]]:
    """The (path, parameter) pairs that a pattern of :class:`Update` names; ``!pattern`` in a tuple takes some away.

    Raises:
        UserError: it names no module, a held one, or no parameter.
    """
    found: dict[str, nn.Parameter] = {}
    for part in (pattern,) if isinstance(pattern, str) else pattern:
        matched = _matched(part.removeprefix("!"), modules)
        if part.startswith("!"):
            found = {path: parameter for path, parameter in found.items() if path not in matched}
        else:
            found |= matched
    if not found:
        raise UserError(f"trains: the patterns {pattern!r} take away every parameter that they match.")
    return list(found.items())


def _matched(pattern: str, modules: Mapping[str, nn.Module | Held]) -> dict[str, nn.Parameter]:
    name, glob, prefix = pattern, None, None
    if ":" in pattern:
        name, glob = pattern.split(":", 1)
    elif "." in pattern:
        name, prefix = pattern.split(".", 1)
    if name not in modules:
        raise UserError(f"trains: {pattern!r} names the module {name!r}, which is not there; {nearest(name, modules)}.")
    module = modules[name]
    if isinstance(module, Held):
        raise UserError(f"trains: {pattern!r} names the module {name!r}, which is {module.mode} in this stage.")
    matched = {
        f"{name}.{path}": parameter
        for path, parameter in module.named_parameters()
        if parameter.requires_grad
        and (glob is None or fnmatch.fnmatchcase(path, glob))
        and (prefix is None or path == prefix or path.startswith(prefix + "."))
    }
    if not matched:
        paths = [path for path, _ in module.named_parameters()][:12]
        if not paths:
            raise UserError(f"trains: {name!r} has no parameters, so there is nothing to train in it.")
        raise UserError(
            f"trains: the pattern {pattern!r} matches no trainable parameter of {name!r}; {nearest(pattern, paths)}."
        )
    return matched


def _check_name(name: str) -> None:
    if not name or not all(part and part.replace("-", "").replace("_", "").isalnum() for part in name.split("/")):
        raise UserError(f"{name!r} is no name for a yield: use letters, digits, '-', '_' and '/'.")


Yield = Stage | Compute | SubRun | Iterable[Stage | Later]

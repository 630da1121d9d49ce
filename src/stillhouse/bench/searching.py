"""Searching for the recipe that is best on the validation split; the test split is not there to be looked at."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from stillhouse.bench.checking import MISTAKES, reason
from stillhouse.bench.ranges import Range, default_ranges, is_range, override, read_range
from stillhouse.bench.watching import Unwatched, Watcher
from stillhouse.bench.work import Watch, Work, digest, make_all
from stillhouse.data import Data
from stillhouse.engine import Signals
from stillhouse.engine.rehearsal import rehearse
from stillhouse.engine.seeding import derive
from stillhouse.engine.storage import as_json, write_text
from stillhouse.errors import NonFiniteError, RunError, UserError
from stillhouse.front import given_data, run_recipe
from stillhouse.methods.datasets.condensation import Condensation
from stillhouse.recipe import Recipe, build_recipe, find_recipe, load_recipe
from stillhouse.report import environment

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from stillhouse.bench.queue import Queue, Taken

UNMEASURED = "measures nothing on the validation split while it trains, so there is nothing to choose a recipe by."

FIRST = 8
"""Trials that are drawn at random before the sampler learns from them."""

UNPRUNED = 5
"""Trials that end before others are held against them."""

TRUSTED = 0.5
"""The part of a stage after which its numbers say enough to give a trial up: before it they mostly say how fast it began."""


@dataclass
class Search:
    """What a search found; as JSON it is ``search.json``.

    Attributes:
        recipe: the recipe that was searched around.
        ranges: what was tried.
        metric: the number on the validation split that decided.
        mode: whether it should be large or small.
        trials: per trial its ``run`` (a directory below ``runs``), ``state`` (finished, pruned or failed), ``value``, ``values``
            of the fields, ``seconds``, ``measured`` (the numbers along the way), ``reason`` where it failed.
        best: the best trial.
        command: what repeats the search.
        environment: versions and machine.
        version: of stillhouse.
        directory: where the runs are.
    """

    recipe: dict[str, Any]
    ranges: list[dict[str, Any]]
    metric: str
    mode: Literal["max", "min"]
    trials: list[dict[str, Any]]
    best: dict[str, Any]
    command: list[str]
    environment: dict[str, Any]
    version: str
    directory: str

    @property
    def best_recipe(self) -> Recipe:
        """The recipe of the best trial, whose number on the test split is the only one that counts."""
        return load_recipe(Path(self.directory) / "best.yaml")

    def dump(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def save(self) -> Path:
        """Write ``search.json`` and ``search.html``; returns the page."""
        from stillhouse.report.search import build_search

        home = Path(self.directory)
        write_text(home / "search.json", json.dumps(self.dump(), indent=1, allow_nan=False) + "\n")
        return build_search(home)


class Searching(Work):
    """The trials of a search.

    Args:
        home: the directory.
        recipe: what is searched around; its seed is every trial's, and that of the draws.
        ranges: what is tried.
        trials: how many.
        cache: reuse trained teachers and outputs across runs.
    """

    noun: ClassVar[str] = "search"

    def __init__(self, home: Path, recipe: Recipe, ranges: Sequence[Range], trials: int, *, cache: bool = True) -> None:
        super().__init__(home, {"recipe": recipe.dump(), "ranges": [one.dump() for one in ranges]})
        self.base, self.ranges, self.trials, self.cache = recipe, list(ranges), trials, cache

    @classmethod
    def joined(cls, home: Path, plan: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :class:`Work`."""
        ranges = [Range.load(values) for values in plan["ranges"]]
        return cls(home, build_recipe(plan["recipe"]), ranges, config["trials"], cache=config["cache"])

    def config(self) -> dict[str, Any]:
        """See :class:`Work`."""
        return {"trials": self.trials, "cache": self.cache}

    @property
    def runs(self) -> list[str]:
        """See :class:`Work`."""
        return [f"trial-{number:03}" for number in range(self.trials)]

    def over(self, run: str, trials: Sequence[FrozenTrial]) -> bool:
        """Whether a trial of the run has ended; the sampler learns from the queue, so files alone do not do."""
        return any(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials)

    def prepare(self, queue: Queue) -> None:
        """Compare trials with the median of those before."""
        from optuna.pruners import MedianPruner

        queue.study.pruner = MedianPruner(n_startup_trials=UNPRUNED)

    def recipe(self, values: Mapping[str, Any], *, alone: bool = False) -> Recipe:
        """The recipe with drawn values; ``alone`` leaves the student without a teacher out, which no trial needs."""
        method = self.base.method
        given: dict[str, Any] = {name: getattr(method, name) for name in type(method).model_fields}
        if alone and "compare_alone" in given:
            given["compare_alone"] = False
        given |= {"method": method.name, "seed": self.base.seed, "run": self.base.settings}
        overrides = [override(key, value) for key, value in values.items()]
        return replace(build_recipe(given, overrides), source=self.base.source)

    @cached_property
    def data(self) -> Data:
        """The data without its test split.

        Raises:
            UserError: it has no validation split.
        """
        data: Data = self.base.method.data.load()
        if "validation" not in data.splits:
            raise UserError(
                f"data: {data.name!r} has no validation split, and a search never looks at the test split; "
                "choose data with one."
            )
        splits = {name: split for name, split in data.splits.items() if name != "test"}
        # What is cached of it must not be found by runs that have the test split.
        return replace(data, splits=splits, fingerprint=f"{data.fingerprint}-without-test")

    def check(self) -> None:
        """Walk the recipe that is searched around without training it, on the data that the trials get.

        Raises:
            UserError: it could not be run, or measures nothing on the validation split by which a trial could be judged.
        """
        if self.ended():
            return
        data, method = self.data, self.base.method
        recipe = self.recipe({}, alone=True)
        try:
            walked = rehearse(recipe.method, settings=recipe.settings, cache=self.cache, data=data, timed=False)
        except UserError as error:
            raise UserError(f"{method.name}: {error} (a search leaves the test split out)") from None
        except MISTAKES as error:
            raise UserError(f"{method.name} cannot be run: {reason(error)}") from error
        if walked.metrics is not None and not any(step.monitor.startswith("validation/") for step in walked.steps):
            raise UserError(f"{method.name} {UNMEASURED}")

    def make(self, taken: Taken, watcher: Watcher) -> str:
        """Draw values and make the run, or go on with it."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import TPESampler

        place = self.place(taken.run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # A function of seed and trial, so that a search that was interrupted draws what it would have drawn.
            seed = derive(self.base.seed, "search", taken.run) % 2**32
            taken.queue.study.sampler = TPESampler(seed=seed, n_startup_trials=FIRST, constant_liar=True)
        trial = taken.trial()
        values = {one.key: one.draw(trial) for one in self.ranges}
        judge, ended = Judge(place, trial, watcher), dict[str, float]()
        pruned, failed = place / "pruned.json", place / "failed.json"
        try:
            if not (pruned.exists() or failed.exists()):
                recipe = self.recipe(values, alone=True)
                about = self.told(taken.run)
                options: dict[str, Any] = {"data": self.data, "signals": taken.signals, "about": about}
                ended = run_recipe(recipe, place, cache=self.cache, listener=judge, **options).metrics
        except Pruned as stopped:
            write_text(pruned, json.dumps({"at": stopped.step}) + "\n")
        except NonFiniteError as error:
            write_text(failed, json.dumps({"error": str(error)}) + "\n")
        except UserError as error:
            raise UserError(f"{taken.run} ({', '.join(override(k, v) for k, v in values.items())}): {error}") from None
        seconds = spent(place)
        if failed.exists():
            taken.finish(None, seconds=seconds, reason=json.loads(failed.read_text())["error"][:1000])
            return "failed"
        if pruned.exists():
            # A trial that was given up is not gone on with.
            for checkpoint in place.glob("checkpoints/**/step-*"):
                shutil.rmtree(checkpoint)
            taken.finish(None, seconds=seconds)
            return "pruned"
        score = judge.score(ended, best=getattr(self.base.method, "keep", "last") == "best")
        if score is None:
            raise UserError(f"{self.base.method.name} {UNMEASURED}")
        taken.finish(judge.sign * score, seconds=seconds)
        return f"finished: {judge.metric} {score:.4g}"


def spent(place: Path) -> float:
    """Seconds that a run took, in all attempts."""
    path = place / "cost.json"
    return math.fsum(json.loads(path.read_text()).values()) if path.exists() else 0.0


class Pruned(RunError):
    """A trial is given up: at this point it is worse than half of the others were."""

    def __init__(self, step: int) -> None:
        super().__init__(f"pruned at step {step}.")
        self.step = step


class Judge:
    """Listens to a trial: keeps what its own stages measure on the validation split, and gives it up where it is hopeless.

    Args:
        place: the run's directory, where ``measured.json`` keeps the numbers for whoever goes on with the run.
        trial: is told each number.
        watcher: is told everything else.

    Attributes:
        measured: (stage, step, metric, mode, value) in order.
    """

    def __init__(self, place: Path, trial: Trial, watcher: Watcher) -> None:
        self.place, self.trial, self.watcher = place, trial, watcher
        path = place / "measured.json"
        self.measured_so_far: list[list[Any]] = json.loads(path.read_text()) if path.exists() else []
        self.reported = 0
        self.steps = 0

    @property
    def metric(self) -> str:
        """What the last stage that was measured is judged by."""
        return str(self.measured_so_far[-1][2])

    @property
    def sign(self) -> int:
        """1 where it should be large, -1 where small."""
        return 1 if self.measured_so_far[-1][3] == "max" else -1

    def score(self, ended: Mapping[str, float], *, best: bool) -> float | None:
        """The number of what the run ends with; None where nothing was measured.

        Args:
            ended: the numbers of the run's result, whose own one decides.
            best: where the result has none: whether the best weights were kept, else the last ones.
        """
        if not self.measured_so_far:
            return None
        if math.isfinite(own := ended.get(self.metric, math.nan)):
            return own
        stage = self.measured_so_far[-1][0]
        values = [math.nan if row[4] is None else float(row[4]) for row in self.measured_so_far if row[0] == stage]
        chosen = max((self.sign * value for value in values), default=math.nan) * self.sign if best else values[-1]
        return chosen if math.isfinite(chosen) else None

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """Keep a number and hold it against other trials.

        Raises:
            Pruned: it is worse than their median.
        """
        if not metric.startswith("validation/") or not self._own(stage, step, metric):
            return
        if [stage, step] not in [row[:2] for row in self.measured_so_far]:
            self.measured_so_far.append([stage, step, metric, mode, as_json(value)])
            write_text(self.place / "measured.json", json.dumps(self.measured_so_far) + "\n")
        for number, row in enumerate(self.measured_so_far[self.reported :], self.reported):
            self.trial.report(self.sign * (math.nan if row[4] is None else row[4]), number)
        self.reported = len(self.measured_so_far)
        if TRUSTED * self.steps <= step < self.steps and self.trial.should_prune():
            raise Pruned(step)

    def _own(self, stage: str, step: int, metric: str) -> bool:
        """Whether the run's own log ends with this measurement; a run within it has another log."""
        rows = [json.loads(line) for line in _tail(self.place / "metrics.jsonl")]
        return any(row.get("stage") == stage and row.get("step") == step and metric in row for row in rows)

    def stage(self, name: str, steps: int, done: int) -> None:
        """Pass on."""
        self.steps = steps
        self.watcher.stage(name, steps, done)

    def step(self, step: int) -> None:
        """Pass on."""
        self.watcher.step(step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Pass on."""
        self.watcher.row(row)

    def say(self, sentence: str) -> None:
        """Pass on."""
        self.watcher.say(sentence)


def search(
    source: str,
    ranges: Sequence[str] = (),
    *,
    trials: int = 20,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    storage: str | None = None,
    cache: bool = True,
    data: Any = None,
    validation: Any = None,
    command: Sequence[str] | None = None,
    signals: Signals | None = None,
    watch: Watch = lambda worker: Unwatched(),
    **fields: Any,
) -> Search:
    """Search for the values of a recipe's fields that are best on the validation split.

    Values are drawn by a tree-structured Parzen estimator; trials that fall behind the median of those before are given up.
    The runs get the data without its test split. The best recipe is written to ``best.yaml`` in ``out``.

    Args:
        source: a method's name, ``name/scale``, or a recipe file.
        ranges: what is tried: ``key=LOW..HIGH`` (logarithmic when it spans more than a decade, or as ``log:`` and ``lin:`` say)
            or ``key=A|B``; the method's weights and temperatures by default.
        trials: how many.
        overrides: ``key=value`` for all trials.
        seed: of all runs and of the draws; the recipe's by default.
        out: directory; by default one below ``runs/search`` that is the same for equal arguments.
        jobs: worker processes on this machine.
        storage: of the queue that workers share: a database URL or a journal file; a file in ``out`` by default.
        cache: reuse trained teachers and outputs across runs.
        data: training data as :func:`stillhouse.distil` takes it.
        validation: validation data, likewise.
        command: what repeats the search, to be written down.
        signals: ask for a checkpoint and a stop.
        watch: makes who watches a worker, by its number.
        **fields: fields of the method as Python values.

    Raises:
        UserError: something is wrong, there is nothing to choose by, or ``out`` holds another search.
        Interrupted: ``signals`` asked to stop; the same call continues.
    """
    if (given := given_data(data, validation)) is not None:
        fields["data"] = given
    recipe = read_base(source, overrides, seed=seed, fields=fields)
    return search_ranges(
        recipe,
        read_ranges(recipe, ranges),
        trials=trials,
        out=None if out is None else Path(out),
        jobs=jobs,
        storage=storage,
        cache=cache,
        command=command,
        signals=signals,
        watch=watch,
    )


def read_base(
    source: str, overrides: Sequence[str], *, seed: int | None, fields: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe that is searched around."""
    find_recipe(source)
    recipe = load_recipe(source, overrides, seed=seed)
    if fields:
        method = recipe.method
        values = {name: getattr(method, name) for name in type(method).model_fields} | dict(fields)
        made = build_recipe(
            {"method": method.name, "seed": recipe.seed, "run": recipe.settings, **values}, where=source
        )
        recipe = replace(made, source=source)
    if isinstance(recipe.method, Condensation):
        raise UserError(
            f"{recipe.method.name} scores its set on the test split alone, so a search could only choose by that; "
            "a search chooses by the validation split."
        )
    return recipe


def read_ranges(recipe: Recipe, texts: Sequence[str]) -> list[Range]:
    """The ranges, each checked at its ends.

    Raises:
        UserError: one is wrong, or two are of one field.
    """
    ranges = [read_range(text, recipe) for text in texts] or default_ranges(recipe)
    keys = [one.key for one in ranges]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} has two ranges; give one.")
    bench = Searching(Path(), recipe, ranges, 0)
    for one in ranges:
        for value in one.ends():
            bench.recipe({one.key: value})
    return ranges


def search_ranges(
    recipe: Recipe,
    ranges: Sequence[Range],
    *,
    trials: int,
    out: Path | None,
    jobs: int,
    storage: str | None,
    cache: bool,
    command: Sequence[str] | None,
    signals: Signals | None,
    watch: Watch,
) -> Search:
    """Make the trials of a search that was read; see :func:`search`."""
    from stillhouse.report.reading import needs_objects

    home = default_out(recipe, ranges) if out is None else out
    bench = Searching(home, recipe, ranges, trials, cache=cache)
    if jobs > 1 and needs_objects(bench.plan):
        raise UserError(
            "jobs: a recipe with Python objects runs in this process alone; use jobs=1, or import paths (pkg.mod:Name)."
        )
    bench.refuse_others()
    bench.check()
    make_all(bench, jobs=jobs, storage=storage, signals=signals or Signals(), watch=watch)
    found = concluded(bench, storage, command)
    found.save()
    return found


def default_out(recipe: Recipe, ranges: Sequence[Range]) -> Path:
    """Where a search goes: equal for equal arguments, so that the same command continues it."""
    return Path("runs") / "search" / f"{recipe.method.name}-{digest([recipe.dump(), [r.dump() for r in ranges]])[:6]}"


def concluded(bench: Searching, storage: str | None, command: Sequence[str] | None) -> Search:
    """Read the trials of a search and write the best recipe."""
    from stillhouse.bench.queue import Queue

    queue = Queue(bench.home, bench.settle(), bench.runs, over=bench.over, storage=storage, signals=Signals())
    ended: dict[str, FrozenTrial] = {}
    for trial in queue.study.get_trials(deepcopy=False):
        if trial.state.name in ("COMPLETE", "PRUNED") and trial.user_attrs.get("run") in bench.runs:
            ended.setdefault(trial.user_attrs["run"], trial)
    told = [_told(bench, run, ended[run]) for run in bench.runs if run in ended]
    finished = [one for one in told if one["state"] == "finished"]
    if not finished:
        raise UserError(f"no trial of {len(told)} ended with a number; search other ranges.")
    metric, mode = finished[0]["metric"], finished[0]["mode"]
    sign = 1 if mode == "max" else -1
    best = max(finished, key=lambda one: sign * one["value"])
    bench.recipe(best["values"]).write(bench.home / "best.yaml")
    return Search(
        recipe=bench.base.dump(),
        ranges=[one.dump() for one in bench.ranges],
        metric=metric,
        mode=mode,
        trials=[{name: value for name, value in one.items() if name not in ("metric", "mode")} for one in told],
        best={name: value for name, value in best.items() if name not in ("metric", "mode", "measured")},
        command=list(command or []),
        environment=environment(),
        version=version("stillhouse"),
        directory=str(bench.home),
    )


def _told(bench: Searching, run: str, trial: FrozenTrial) -> dict[str, Any]:
    place = bench.place(run)
    path = place / "measured.json"
    rows: list[list[Any]] = json.loads(path.read_text()) if path.exists() else []
    state = "finished" if trial.state.name == "COMPLETE" else "failed" if (place / "failed.json").exists() else "pruned"
    mode = rows[-1][3] if rows else "max"
    value = trial.value if state == "finished" else None
    return {
        "run": run,
        "state": state,
        "value": None if value is None else (value if mode == "max" else -value),
        "values": dict(trial.params),
        "seconds": trial.user_attrs["seconds"],
        "measured": [[row[0], row[1], row[4]] for row in rows],
        "reason": trial.user_attrs.get("reason"),
        "metric": rows[-1][2] if rows else "",
        "mode": mode,
    }


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What was typed as (ranges, fixed values)."""
    return [text for text in arguments if is_range(text)], [text for text in arguments if not is_range(text)]


def _tail(path: Path, size: int = 1 << 14) -> list[bytes]:
    """The last whole lines of a file."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - size))
        lines = file.read().splitlines()
    return lines if end <= size else lines[1:]

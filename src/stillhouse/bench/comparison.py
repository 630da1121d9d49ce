"""Comparing methods on one's own teacher, student and data: equal budgets, the same seeds, differences told from noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from stillhouse.bench.arms import Arm, arrange, baseline_of
from stillhouse.bench.checking import MISTAKES, check, reason
from stillhouse.bench.watching import Unwatched, Watcher
from stillhouse.bench.work import Watch, Work, digest, make_all
from stillhouse.engine import Signals, measuring
from stillhouse.engine.storage import as_json, write_text
from stillhouse.errors import NonFiniteError, UserError, nearest
from stillhouse.front import finished, given_data, run_recipe
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.methods.supervised import Supervised
from stillhouse.metrics import latency, paired_difference
from stillhouse.models import logits
from stillhouse.recipe import Recipe, build_recipe
from stillhouse.report.formatting import GAVE_WAY, signed
from stillhouse.report.reading import RunFiles, direction, needs_objects, read_run

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from stillhouse.bench.queue import Queue, Taken

COSTS = ("seconds", "peak_memory", "latency", "parameters")
"""What quality is weighed against: training time, bytes of memory, seconds for one sample, parameters."""

ALIKE = 0.02
"""Where all arms differ in a cost by less than this share, none is on a front: it is the same, or noise."""

NOISE, ONE_SEED = "within noise", "one seed"
UNVARIED, EQUAL = "no variation over seeds", "equal in every seed"
SATURATED = "both at the limit"
"""Verdicts on differences that say nothing of which is better."""

ROUNDS = 5
"""Rounds over all arms in which latencies are taken."""


@dataclass
class ArmResult:
    """What was measured of one arm.

    Attributes:
        name: the arm.
        method: its method.
        source: what the user wrote; empty for an arm that was added.
        digest: of its recipe without the seed.
        recipe: its recipe without the seed.
        taken: fields that come from another arm: field to that arm.
        set_aside: those of them whose value in its own recipe was another one.
        runs: per seed: ``seed``, ``directory`` (below the comparison's), ``failure`` (why there are no numbers, or None),
            ``seconds`` of training, ``peak_memory`` in bytes.
        budget: ``steps`` that were taken, ``epochs`` and ``batch_size`` where the method has them.
        unequal: how its budget differs from the baseline's, in words; None where it is equal.
        metrics: per metric its ``values`` (one per seed, None where there is none), ``mean`` and ``std`` of those there are.
        differences: per metric the paired difference to the baseline: ``mean``, ``std``, ``interval`` (95 %, Student's t),
            ``pairs`` (their number), and ``verdict``: better, worse, within noise, or why there is none. Empty for the baseline.
        cost: numbers by name, see :data:`COSTS`; None where it is not known. Time is the median over seeds, memory the most.
        front: the costs against which no other arm is at least as good in both and better in one.
    """

    name: str
    method: str
    source: str
    digest: str
    recipe: dict[str, Any]
    taken: dict[str, str]
    set_aside: list[str]
    runs: list[dict[str, Any]]
    budget: dict[str, Any]
    unequal: str | None
    metrics: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    cost: dict[str, float | None]
    front: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """What a comparison found; as JSON it is ``comparison.json``.

    Attributes:
        arms: the arms, those of the user first.
        baseline: the arm that the others are compared with.
        metric: what counts as quality.
        mode: whether it should be large or small.
        seeds: the seeds of every arm.
        teachers: the same metric of each teacher.
        shared: fields that are equal in all arms that have them.
        findings: what it comes to, in sentences.
        notes: what a reader must know.
        command: what repeats it.
        date: when the last run ended (UTC).
        environment: versions and machine of the first run.
        sources: digests of the package's source that the runs were made with.
        version: of stillhouse.
        directory: where the runs are.
    """

    arms: list[ArmResult]
    baseline: str
    metric: str
    mode: Literal["max", "min"]
    seeds: list[int]
    teachers: dict[str, float]
    shared: dict[str, Any]
    findings: list[str]
    notes: list[str]
    command: list[str]
    date: str
    environment: dict[str, Any]
    sources: list[str]
    version: str
    directory: str

    def arm(self, name: str) -> ArmResult:
        """The arm of that name.

        Raises:
            UserError: there is none.
        """
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise UserError(f"there is no arm {name!r}; {nearest(name, found)}")
        return found[name]

    def dump(self) -> dict[str, Any]:
        """Plain values as JSON has them: numbers that are not finite are None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    def save(self) -> Path:
        """Write ``comparison.json`` and ``comparison.html`` into the directory; returns the page."""
        from stillhouse.report.comparison import build_comparison

        home = Path(self.directory)
        write_text(home / "comparison.json", json.dumps(self.dump(), indent=1, allow_nan=False) + "\n")
        return build_comparison(home)


class Comparing(Work):
    """The runs of a comparison: every arm with every seed.

    Args:
        home: the directory.
        recipes: the arms' recipes by name.
        seeds: the seeds.
        cache: reuse trained teachers and outputs across runs.
    """

    noun: ClassVar[str] = "comparison"

    def __init__(self, home: Path, recipes: Mapping[str, Recipe], seeds: Sequence[int], *, cache: bool = True) -> None:
        super().__init__(home, {"arms": {name: without_seed(recipe) for name, recipe in recipes.items()}})
        self.recipes, self.seeds, self.cache = dict(recipes), list(seeds), cache

    @classmethod
    def joined(cls, home: Path, plan: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :class:`Work`."""
        recipes = {name: build_recipe(values, where=f"arm {name}") for name, values in plan["arms"].items()}
        return cls(home, recipes, config["seeds"], cache=config["cache"])

    def config(self) -> dict[str, Any]:
        """See :class:`Work`."""
        return {"seeds": self.seeds, "cache": self.cache}

    @property
    def parts(self) -> dict[str, tuple[str, int]]:
        """The arm and the seed of each run; a seed of all arms before the next, so that every part of it is a comparison."""
        return {f"{arm}-{seed}": (arm, seed) for seed in self.seeds for arm in self.recipes}

    @property
    def runs(self) -> list[str]:
        """See :class:`Work`."""
        return list(self.parts)

    def over(self, run: str, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the run has ended in its directory; the queue only says who makes it."""
        return (self.place(run) / "failed.json").exists() or finished(self.recipe(run), self.place(run)) is not None

    def prepare(self, queue: Queue) -> None:
        """Nothing: every run is fixed beforehand."""

    def recipe(self, run: str) -> Recipe:
        """The recipe of a run."""
        arm, seed = self.parts[run]
        return replace(self.recipes[arm], seed=seed)

    def make(self, taken: Taken, watcher: Watcher) -> str:
        """Make a run; one that fails is written down as failed, and the comparison goes on without it."""
        place = self.place(taken.run)
        about = self.told(taken.run)
        try:
            result = run_recipe(
                self.recipe(taken.run), place, cache=self.cache, listener=watcher, signals=taken.signals, about=about
            )
        except (NonFiniteError, UserError, *MISTAKES) as error:
            return self._failed(taken, place, error)
        numbers = {name: value for name, value in measured(result.metrics).items() if name.count("/") == 1}
        metric = next((name for name in numbers if name.startswith("test/") and direction(name)), None)
        value = direction(metric) * numbers[metric] if metric is not None else 0.0
        taken.finish(value if math.isfinite(value) else 0.0, metrics=_finite(numbers))
        return "finished" + (f": {metric} {numbers[metric]:.4g}" if metric is not None else "")

    def _failed(self, taken: Taken, place: Path, error: Exception) -> str:
        told = str(error) if isinstance(error, NonFiniteError) else reason(error)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "recipe.yaml").exists():
            self.recipe(taken.run).write(place / "recipe.yaml")
        # Another attempt at what diverged would diverge.
        again = not isinstance(error, NonFiniteError)
        write_text(place / "failed.json", json.dumps({"error": told, "again": again}) + "\n")
        taken.finish(None, error=told[:1000])
        return f"failed: {told}"

    def try_again(self) -> None:
        """Let runs that failed, but for those that diverged, be made again."""
        for run in self.runs:
            path = self.place(run) / "failed.json"
            if path.exists() and json.loads(path.read_text()).get("again", False):
                path.unlink()


def compare(
    *methods: str,
    seeds: int = 3,
    baseline: str | None = None,
    metric: str | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    storage: str | None = None,
    own: Sequence[str] = (),
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    cache: bool = True,
    data: Any = None,
    validation: Any = None,
    test: Any = None,
    command: Sequence[str] | None = None,
    signals: Signals | None = None,
    watch: Watch = lambda worker: Unwatched(),
    **fields: Any,
) -> Comparison:
    """Run every method with every seed on equal terms, and say how they differ and what they cost.

    What the methods have in common (data, teacher, student, epochs, batch size, optimiser, ...) is taken from the first one's
    recipe; see :func:`stillhouse.bench.arms.arrange`. The student trained without a teacher (random real images where training
    sets are made) is always an arm. What finished in ``out`` is not repeated, and what was interrupted goes on.

    Args:
        methods: names of methods, ``name/scale``, or recipe files; at least one besides the baseline.
        seeds: how many: 0, 1, 2, ...
        baseline: the arm that the others are compared with; the one that is always there by default.
        metric: what counts as quality; the first test measurement that all arms have by default. ``name:max`` or
            ``name:min`` says what is better where the name does not.
        out: directory; by default one below ``runs/compare`` that is the same for equal arguments.
        jobs: worker processes on this machine.
        storage: of the queue that workers share: a database URL or a journal file; a file in ``out`` by default.
        own: shared fields that each method keeps from its own recipe.
        overrides: ``key=value`` for every method that has the field, as on the command line.
        settings: the recipes' ``run`` block: device, precision, threads, ...
        cache: reuse trained teachers and outputs across runs.
        data: training data as :func:`stillhouse.distil` takes it.
        validation: validation data, likewise.
        test: test data, likewise.
        command: what repeats the comparison, to be written down.
        signals: ask for a checkpoint and a stop.
        watch: makes who watches a worker, by its number.
        **fields: fields of the methods, for every one that has them: ``teacher=module``, ``epochs=10``.

    Raises:
        UserError: something in the arguments, the recipes or the data is wrong, or ``out`` holds another comparison.
        Interrupted: ``signals`` asked to stop; the same call continues.
    """
    # A recipe file brings data of its own.
    named = not any(str(method).endswith((".yaml", ".yml")) for method in methods)
    if (given := given_data(data, validation, test, models=fields if named else None)) is not None:
        fields["data"] = given
    arms = arrange(methods, overrides, fields=fields, settings=settings, own=own)
    return compare_arms(
        arms,
        seeds=seeds,
        baseline=baseline_of(arms, baseline),
        metric=metric,
        out=default_out(arms) if out is None else Path(out),
        jobs=jobs,
        storage=storage,
        cache=cache,
        command=command,
        signals=signals,
        watch=watch,
    )


def compare_arms(
    arms: Sequence[Arm],
    *,
    seeds: int,
    baseline: str,
    metric: str | None,
    out: Path,
    jobs: int,
    storage: str | None,
    cache: bool,
    command: Sequence[str] | None,
    signals: Signals | None,
    watch: Watch,
) -> Comparison:
    """Run arms that were arranged; see :func:`compare`."""
    if len(arms) < 2:
        raise UserError(f"there is only {arms[0].name} to compare; name another method or recipe.")
    bench = Comparing(out, {arm.name: arm.recipe for arm in arms}, list(range(seeds)), cache=cache)
    if jobs > 1 and needs_objects(bench.plan):
        raise UserError(
            "jobs: recipes with Python objects run in this process alone; use jobs=1, or import paths (pkg.mod:Name)."
        )
    bench.refuse_others()
    bench.try_again()
    begun = {bench.parts[run][0] for run in bench.runs if (bench.place(run) / "recipe.yaml").exists()}
    known = check([arm for arm in arms if arm.name not in begun], cache=cache)
    _check_metric(metric, known)
    make_all(bench, jobs=jobs, storage=storage, signals=signals or Signals(), watch=watch)
    comparison = concluded(bench, arms, baseline, metric, command)
    comparison.save()
    return comparison


def _check_metric(metric: str | None, known: Mapping[str, Sequence[str] | None]) -> None:
    """Refuse a measurement that an arm will not have, before anything is run."""
    names = {arm: [measured(dict.fromkeys(found, 0.0))] for arm, found in known.items() if found is not None}
    if metric is not None and names:
        chosen(common(names), metric, names)


def default_out(arms: Sequence[Arm]) -> Path:
    """Where a comparison goes: equal for equal arms, so that the same command continues it."""
    names = "-".join(arm.name for arm in arms if arm.source)
    return Path("runs") / "compare" / f"{names}-{digest([without_seed(arm.recipe) for arm in arms])[:6]}"


def without_seed(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that are equal for all its seeds."""
    return {name: value for name, value in recipe.dump().items() if name != "seed"}


def measured(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """A run's numbers under names that runs of different methods share: those of the student are those of the run."""
    numbers = {name: math.nan if value is None else value for name, value in metrics.items()}
    for name, value in list(numbers.items()):
        split, student, rest = (*name.split("/", 2), "", "")[:3]
        if student == "student" and rest and "/" not in rest:
            numbers.setdefault(f"{split}/{rest}", value)
    return numbers


def concluded(
    bench: Comparing, arms: Sequence[Arm], baseline: str, metric: str | None, command: Sequence[str] | None
) -> Comparison:
    """Read the runs of a comparison and judge."""
    results = {arm.name: _read(bench, arm) for arm in arms}
    found = {name: [run.numbers for run in runs if run.numbers is not None] for name, runs in results.items()}
    if not any(found.values()):
        why = next(run.failure for runs in results.values() for run in runs if run.failure)
        raise UserError(f"every run failed, so there is nothing to compare; the first one: {why}")
    metrics = common(found)
    quality, mode = chosen(metrics, metric, found)
    before = _before(bench.home)
    delays = latencies({arm.name: arm.recipe for arm in arms if found[arm.name]}, before)
    # Which way each metric is better, as its name says; for quality, as it was chosen.
    signs = {name: direction(name) for name in metrics} | {quality: 1 if mode == "max" else -1}
    lines = {arm.name: None if arm.name == baseline else results[baseline] for arm in arms}
    judged = [_judge(arm, results[arm.name], lines[arm.name], signs) for arm in arms]
    for arm, result in zip(arms, judged, strict=True):
        result.cost = _cost(results[arm.name], delays.get(arm.name))
        result.unequal = _unequal(result, judged[[arm.name for arm in arms].index(baseline)])
    _fronts(judged, quality, mode)
    first = [run.files for runs in results.values() for run in runs]
    environments = [dict(files.about.get("environment") or {}) for files in first]
    ended = max((files.path / "recipe.yaml").stat().st_mtime for files in first)
    ended = max([ended, *(p.stat().st_mtime for f in first if (p := f.path / "metrics.json").exists())])
    return Comparison(
        arms=judged,
        baseline=baseline,
        metric=quality,
        mode=mode,
        seeds=bench.seeds,
        teachers=_teachers(first, quality),
        shared=_shared(arms),
        findings=[_finding(arm, baseline, quality, mode) for arm in judged if arm.name != baseline],
        notes=_notes(judged, len(bench.seeds), baseline, quality),
        command=list(command or []),
        date=datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds"),
        environment={key: value for key, value in environments[0].items() if key != "source"},
        sources=sorted({str(one.get("source", "unknown")) for one in environments}),
        version=version("stillhouse"),
        directory=str(bench.home),
    )


def common(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Metrics that every finished run has, in the order of the first arm; an arm without any run that finished asks for none."""
    runs = [numbers for numbers_of in found.values() for numbers in numbers_of]
    names = [name for name in runs[0] if all(name in numbers for numbers in runs)]
    return [name for name in names if not name.startswith("parameters")]


def chosen(
    metrics: Sequence[str], named: str | None, found: Mapping[str, Sequence[Mapping[str, float]]]
) -> tuple[str, Literal["max", "min"]]:
    """What counts as quality: what was asked for, else the first test measurement whose name says what is better.

    Raises:
        UserError: not every arm measures it, nothing is measured by all, or its name does not say what is better.
    """
    if named is not None:
        name, _, mode = named.partition(":")
        if name not in metrics:
            raise UserError(f"--metric: not every arm measures {name!r}; {nearest(name, metrics)}")
        if mode not in ("", "max", "min"):
            raise UserError(f"--metric: {mode!r} says not whether it should be large or small; write :max or :min.")
        if not mode and not direction(name):
            raise UserError(f"--metric: the name {name!r} does not say what is better; write {name}:max or {name}:min.")
        return name, mode or ("max" if direction(name) > 0 else "min")  # type: ignore[return-value]
    known = [name for name in metrics if direction(name)]
    ranked = [name for name in known if name.startswith("test/") and name.count("/") == 1]
    ranked += [name for name in known if not name.startswith(("test/", "validation/"))] + known
    if not ranked:
        arms = " and ".join(found)
        raise UserError(f"{arms} measure no number in common whose name says what is better; name one with --metric.")
    return ranked[0], "max" if direction(ranked[0]) > 0 else "min"


def latencies(
    recipes: Mapping[str, Recipe], known: Mapping[str, float | None] | None = None
) -> dict[str, float | None]:
    """Median seconds in which each arm's student handles one sample on the CPU, taken in turns; None where there is none.

    The weights do not matter, so the networks are built anew. ``known`` has those that were measured before, by digest.
    """
    found: dict[str, float | None] = {}
    calls: dict[str, list[float]] = {}
    networks: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {}
    for name, recipe in recipes.items():
        key = digest(without_seed(recipe))
        if known and key in known:
            found[name] = known[key]
            continue
        method: Any = recipe.method
        if not isinstance(method, KnowledgeDistillation | Supervised):
            found[name] = None
            continue
        data = method.data.load()
        model = (method.student if isinstance(method, KnowledgeDistillation) else method.model).build(data.facts).cpu()
        networks[name] = partial(logits, model), data.split("train").batch([0]), model
    threads = torch.get_num_threads()
    try:
        for _ in range(ROUNDS if networks else 0):
            for name, (call, example, model) in networks.items():
                torch.set_num_threads(recipes[name].settings.threads or threads)
                with measuring(model):
                    calls.setdefault(name, []).append(latency(call, example))
    finally:
        torch.set_num_threads(threads)
    return found | {name: statistics.median(seconds) for name, seconds in calls.items()}


@dataclass(frozen=True)
class RunResult:
    """One run: its directory read, and its numbers (None where it failed)."""

    seed: int
    files: RunFiles
    numbers: dict[str, float] | None
    failure: str | None

    @property
    def spent(self) -> list[str]:
        """Names of what the method yielded up to the end of its last stage, teachers and other runs left out."""
        kinds = {str(item.get("name")): str(item.get("kind")) for item in self.files.yields}
        parts = [(label, kinds.get(label.split("+")[0], "")) for label in self.files.cost]
        last = max(
            (number for number, (_, kind) in enumerate(parts) if kind.startswith("stage")), default=len(parts) - 1
        )
        return [label for label, kind in parts[: last + 1] if kind != "run"]

    @property
    def seconds(self) -> float:
        """Seconds of training, and of what had to be computed before it."""
        return math.fsum(self.files.cost[label] for label in self.spent)

    @property
    def peak_memory(self) -> float | None:
        """The most bytes that were held meanwhile; None where the run did not write them down."""
        path = self.files.path / "memory.json"
        peaks = json.loads(path.read_text()) if path.exists() else {}
        return max((float(peaks[label]) for label in self.spent if peaks.get(label)), default=None)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.reached for stage in self.files.stages if " / " not in stage.name)

    @property
    def parameters(self) -> float | None:
        """Parameters of the network that ships; None where a run ships none."""
        ships = self.files.path / "result"
        return next((float(count) for name, count in self.files.parameters.items() if (ships / name).is_dir()), None)


def _read(bench: Comparing, arm: Arm) -> list[RunResult]:
    found = []
    for run, (name, seed) in bench.parts.items():
        if name != arm.name:
            continue
        place = bench.place(run)
        failed = place / "failed.json"
        failure = json.loads(failed.read_text())["error"] if failed.exists() else None
        metrics = None if failure is not None else finished(bench.recipe(run), place)
        numbers = measured(metrics) if metrics is not None else None
        found.append(RunResult(seed, read_run(place), numbers, failure))
    return found


def _judge(
    arm: Arm, runs: Sequence[RunResult], line: Sequence[RunResult] | None, signs: Mapping[str, int]
) -> ArmResult:
    method: Any = arm.recipe.method
    numbers: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for metric, sign in signs.items():
        values = [run.numbers[metric] if run.numbers is not None else math.nan for run in runs]
        finite = [value for value in values if math.isfinite(value)]
        numbers[metric] = {
            "values": [as_json(value) for value in values],
            "mean": statistics.fmean(finite) if finite else None,
            "std": statistics.stdev(finite) if len(finite) > 1 else None,
        }
        others = [run.numbers[metric] if run.numbers is not None else math.nan for run in line or ()]
        pairs = [a - b for a, b in zip(values, others, strict=bool(line)) if math.isfinite(a) and math.isfinite(b)]
        if pairs:
            differences[metric] = _difference(pairs, [*finite, *filter(math.isfinite, others)], metric, sign)
    return ArmResult(
        name=arm.name,
        method=method.name,
        source=arm.source,
        digest=digest(without_seed(arm.recipe)),
        recipe=without_seed(arm.recipe),
        taken=dict(arm.taken),
        set_aside=list(arm.set_aside),
        runs=[
            {
                "seed": run.seed,
                "directory": f"runs/{run.files.path.name}",
                "failure": run.failure,
                "seconds": run.seconds,
                "peak_memory": run.peak_memory,
            }
            for run in runs
        ],
        budget={
            "steps": statistics.median_low([run.steps for run in runs if run.failure is None] or [0]),
            "epochs": getattr(method, "epochs", None),
            "batch_size": getattr(method, "batch_size", None),
        },
        unequal=None,
        metrics=numbers,
        differences=differences,
        cost={},
    )


def _difference(pairs: Sequence[float], values: Sequence[float], metric: str, sign: int) -> dict[str, Any]:
    """A paired difference as plain values, with its verdict; ``values`` are those that it comes from."""
    found = paired_difference(pairs)
    told = asdict(found) | {"pairs": len(pairs)}
    if len(pairs) == 1:
        return told | {"verdict": ONE_SEED}
    if max(pairs) - min(pairs) <= 1e-12 * max(1.0, *map(abs, values)):
        # An interval of no width is no evidence: where nothing varies, nothing is known of how it would vary.
        limit = {1: 1.0, -1: 0.0}.get(sign)
        full = limit is not None and all(value == limit for value in values) and direction(metric) == sign
        verdict = SATURATED if full else EQUAL if abs(found.mean) <= 1e-12 else UNVARIED
        return told | {"interval": None, "verdict": verdict}
    words = {1: "better", -1: "worse", 0: "different"}
    return told | {"verdict": words[sign * (1 if found.mean > 0 else -1)] if found.clear else NOISE}


def _cost(runs: Sequence[RunResult], delay: float | None) -> dict[str, float | None]:
    ended = [run for run in runs if run.failure is None]
    if not ended:
        return dict.fromkeys(COSTS)
    peaks = [run.peak_memory for run in ended if run.peak_memory is not None]
    return {
        "seconds": statistics.median(run.seconds for run in ended),
        "peak_memory": max(peaks, default=None),
        "latency": delay,
        "parameters": ended[0].parameters,
    }


def _unequal(arm: ArmResult, line: ArmResult) -> str | None:
    if any(all(run["failure"] for run in one.runs) for one in (arm, line)):
        return None
    told = [
        f"{arm.budget[key]:g} {name} where {line.name} has {line.budget[key]:g}"
        for key, name in (("steps", "steps"), ("epochs", "epochs"), ("batch_size", "samples per step"))
        if None not in (arm.budget[key], line.budget[key]) and arm.budget[key] != line.budget[key]
    ]
    return ", ".join(told) or None


def _fronts(arms: Sequence[ArmResult], quality: str, mode: Literal["max", "min"]) -> None:
    sign = 1 if mode == "max" else -1
    for cost in COSTS:
        places = {
            arm.name: (sign * mean, -value)
            for arm in arms
            if (mean := arm.metrics[quality]["mean"]) is not None and (value := arm.cost[cost]) is not None
        }
        values = [-place[1] for place in places.values()]
        if not values or max(values) - min(values) <= ALIKE * max(values):
            continue
        for arm in arms:
            mine = places.get(arm.name)
            if mine is not None and not any(
                other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in places.values()
            ):
                arm.front.append(cost)


def _teachers(runs: Sequence[RunFiles], quality: str) -> dict[str, float]:
    """The teachers' own numbers, from the first run that measured them."""
    split, _, rest = quality.partition("/")
    for files in runs:
        metrics = files.metrics or {}
        found = {
            name.split("/")[1]: float(value)
            for name, value in metrics.items()
            if name.startswith(f"{split}/teacher")
            and name.endswith(f"/{rest}")
            and name.count("/") == 2
            and value is not None
        }
        if found:
            return found
    return {}


def _shared(arms: Sequence[Arm]) -> dict[str, Any]:
    """Fields that several arms have and that are equal in all of those."""
    values: dict[str, list[Any]] = {}
    for arm in arms:
        for name, value in without_seed(arm.recipe).items():
            values.setdefault(name, []).append(value)
    # Whether the student alone is trained beside each arm is no part of the comparison.
    return {
        name: found[0]
        for name, found in values.items()
        if name not in ("method", "compare_alone") and len(found) > 1 and all(value == found[0] for value in found)
    }


def _finding(arm: ArmResult, baseline: str, quality: str, mode: Literal["max", "min"]) -> str:
    found = arm.differences.get(quality)
    if all(run["failure"] for run in arm.runs):
        return f"{arm.name} failed with every seed: {arm.runs[0]['failure']}"
    if found is None:
        return f"{arm.name}: there is no pair of finished runs to compare."
    size, verdict = f"{abs(found['mean']):.3g}", found["verdict"]
    if verdict == ONE_SEED:
        return f"{arm.name} differs from {baseline} by {signed(found['mean'])} in {quality}; one seed tells nothing from noise."
    if verdict == SATURATED:
        best = "100 %" if mode == "max" else "0"
        return f"{arm.name} and {baseline} both have {best} in {quality} with every seed: this data cannot tell them apart."
    if verdict == EQUAL:
        return f"{arm.name} and {baseline} are equal in {quality} with every seed: there is nothing to judge by."
    if verdict == UNVARIED:
        return (
            f"{arm.name} differs from {baseline} by {signed(found['mean'])} in {quality} with every seed: without variation over "
            "seeds there is no interval, and no verdict."
        )
    low, high = found["interval"]
    how = f"95 % interval {signed(low)} to {signed(high)}, {found['pairs']} seeds"
    if verdict == NOISE:
        return f"{arm.name} and {baseline} are not told apart in {quality}: {signed(found['mean'])} ({how})."
    word = "better" if (found["mean"] > 0) == (mode == "max") else "worse"
    return f"{arm.name} is {word} than {baseline} by {size} in {quality} ({how})."


def _notes(arms: Sequence[ArmResult], seeds: int, baseline: str, quality: str) -> list[str]:
    notes = []
    for arm in arms:
        failures = [run for run in arm.runs if run["failure"]]
        if 0 < len(failures) < len(arm.runs):
            notes.append(f"{arm.name} failed with {len(failures)} of {seeds} seeds: {failures[0]['failure']}")
        if arm.unequal:
            notes.append(f"the budget of {arm.name} differs: {arm.unequal}.")
        if arm.set_aside:
            notes.append(f"{GAVE_WAY} {gave_way(arm)}")
    if seeds == 1:
        notes.append("one seed gives no interval; three or more tell differences from noise.")
    told = [arm for arm in arms if arm.differences]
    if len(told) > 2 and seeds > 1:
        notes.append(
            f"each of the {len(told)} intervals stands alone: of twenty comparisons without any difference, "
            "one is expected to look like one."
        )
    return notes


def gave_way(arm: ArmResult | Arm) -> str:
    """Which of an arm's own fields are not those of its recipe, in a sentence."""
    origins: dict[str, list[str]] = {}
    for name in arm.set_aside:
        origins.setdefault(arm.taken[name], []).append(name)
    told = "; ".join(
        f"its {', '.join(names)} {'are those' if len(names) > 1 else 'is that'} of {origin}"
        for origin, names in origins.items()
    )
    keeping = " ".join(f"--own {name}" for name in arm.set_aside)
    return f"{arm.name} is not run as its recipe says: {told}; {keeping} would keep its own."


def _before(home: Path) -> dict[str, float | None]:
    """Latencies that an earlier end of the same comparison measured, by digest."""
    path = home / "comparison.json"
    if not path.exists():
        return {}
    return {arm["digest"]: arm["cost"]["latency"] for arm in json.loads(path.read_text())["arms"]}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return as_json(value)

"""What a run directory says: its log as stages, updates and terms, its files, how far it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.errors import UserError

Series = list[tuple[int, float]]
"""(step, value) pairs in order."""

SPLITS = ("validation", "test", "train", "val", "valid", "eval")
"""First parts of the names of measurements; no update is called so."""

SHARE = "/gradient_share"
"""Ends the name of a term's share of the gradient."""

LINE = "/line/"
"""Stands between the name of a measurement and that of a line that it is held against."""

# fmt: off
HIGHER = frozenset((
    "acc", "accuracy", "agreement", "alignment", "ap", "ari", "auc", "auroc", "bleu", "clip", "compactness",
    "completeness", "correlation", "coverage", "dci", "disentanglement", "em", "explicitness", "f1", "fidelity",
    "infomec", "infom", "infoc", "infoe", "informativeness", "map", "mig", "modularity", "mrr", "ndcg", "nmi", "pearson",
    "precision", "psnr", "purity", "quality", "r2", "recall", "rouge", "score", "similarity", "spearman", "ssim", "top1", "top5",
))
LOWER = frozenset((
    "bpc", "bpd", "brier", "bytes", "ce", "cer", "cost", "distance", "divergence", "ece", "eer", "energy", "error",
    "exposure", "fid", "frechet", "gap", "hter", "kid", "kl", "latency", "leakage", "loss", "lpips", "mae", "mcd",
    "memory", "mmd", "mse", "nll", "parameters", "perplexity", "ppl", "regret", "rmse", "seconds", "ter", "time",
    "variation", "wasserstein", "wer",
))
# fmt: on


@dataclass
class Term:
    """One loss term of an update.

    Attributes:
        name: its name.
        values: unweighted.
        weighted: what it adds to the loss: value times weight.
        shares: its share of the gradient's norm, where that was sampled.
    """

    name: str
    values: Series = field(default_factory=list)
    weighted: Series = field(default_factory=list)
    shares: Series = field(default_factory=list)

    @property
    def weight(self) -> float:
        """Its weight at the end, from the last value that is not 0 (1 where all are)."""
        pairs = zip(reversed(self.values), reversed(self.weighted), strict=True)
        ratios = (weighted / value for (_, value), (_, weighted) in pairs if value and math.isfinite(value))
        return next(ratios, 1.0)


@dataclass
class UpdateLog:
    """What was logged of one update: its terms and learning rates by name."""

    name: str
    terms: dict[str, Term] = field(default_factory=dict)
    rates: dict[str, Series] = field(default_factory=dict)

    def total(self) -> Series:
        """The loss with the weights of the end, at the steps where every one of its last terms was logged.

        A ramp of a weight would make the weighted sum rise or fall without anything being learnt.
        """
        if not self.terms:
            return []
        last = max(term.values[-1][0] for term in self.terms.values())
        terms = [term for term in self.terms.values() if term.values[-1][0] == last]
        found = [dict(term.values) for term in terms]
        steps = sorted(set.intersection(*(set(values) for values in found)))
        weights = [term.weight for term in terms]
        return [(s, sum(w * values[s] for w, values in zip(weights, found, strict=True))) for s in steps]


@dataclass
class StageLog:
    """What was logged of one stage.

    Attributes:
        name: its name; those of nested runs are ``run / stage``.
        planned: its number of steps, where the run directory says it.
        reached: the last logged step.
        ended: it ran to its end.
        updates: by name.
        measured: measurements by name.
        lines: what a measurement is held against, such as the teacher's value: series by name, by measurement.
        warnings: what was said during training: (step, sentence).
        monitor: the measurement that ``keep`` and ``patience`` watched.
        best_step: the step of its best value.
    """

    name: str
    planned: int | None = None
    reached: int = 0
    ended: bool = False
    updates: dict[str, UpdateLog] = field(default_factory=dict)
    measured: dict[str, Series] = field(default_factory=dict)
    lines: dict[str, dict[str, Series]] = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    monitor: str | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read.

    Attributes:
        path: the directory, as it was given.
        recipe_text: ``recipe.yaml``.
        recipe: the same as plain values; empty where it cannot be read.
        about: ``run.json``.
        metrics: ``metrics.json``; None while the run is unfinished.
        cost: seconds per yield.
        memory: peak bytes per yield, named as in ``cost``.
        tables: tables for people.
        notes: sentences for people.
        inputs: ``result/inputs.json``: what a model of the run is fed.
        exports: ``export/export.json``: format, file and load line of each exported model.
        yields: what the method yielded, in order, as the engine recorded it.
        stages: the log.
        damaged: number of lines of the log that are no JSON.
    """

    path: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    about: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    cost: Mapping[str, float]
    memory: Mapping[str, float]
    tables: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    inputs: Mapping[str, Any]
    exports: Sequence[Mapping[str, Any]]
    yields: Sequence[Mapping[str, Any]]
    stages: Sequence[StageLog]
    damaged: int

    @property
    def finished(self) -> bool:
        """True when its result was written."""
        return self.metrics is not None

    @property
    def seed(self) -> int | None:
        """The run's seed, where it was written down."""
        found = self.about.get("seed", self.recipe.get("seed"))
        return found if isinstance(found, int) else None

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by model: as the method measured it, else from the shapes the engine recorded."""
        prefix = "parameters/"
        told = {k.removeprefix(prefix): v for k, v in (self.metrics or {}).items() if k.startswith(prefix)}
        counts = {name: int(v) for name, v in told.items() if isinstance(v, int | float) and math.isfinite(v)}
        for item in self.yields:
            for name, signature in (item.get("modules") or {}).items():
                shapes = re.findall(r"\(([\d, ]*)\)", str(signature))
                count = sum(math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes)
                if count:
                    counts.setdefault(name, count)
        return counts


def read_run(path: Path) -> RunFiles:
    """Read a run directory, finished or not.

    Raises:
        UserError: it holds no run, or a file in it is damaged.
    """
    recipe = path / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{path} holds no run: there is no recipe.yaml in it.")
    text = recipe.read_text(encoding="utf-8", errors="replace")
    stages, damaged = _stages(path)
    told = _json(path / "result" / "tables.json", dict) or {}
    return RunFiles(
        path=path,
        recipe_text=text,
        recipe=yaml_mapping(text),
        about=_json(path / "run.json", dict) or {},
        metrics=_json(path / "metrics.json", dict),
        cost=_numbers(path / "cost.json"),
        memory=_numbers(path / "memory.json"),
        tables=told.get("tables") or [],
        notes=told.get("notes") or [],
        inputs=_json(path / "result" / "inputs.json", dict) or {},
        exports=[item for item in _json(path / "export" / "export.json", list) or [] if isinstance(item, dict)],
        yields=_yields(path),
        stages=stages,
        damaged=damaged,
    )


def direction(name: str) -> int:
    """1 where more of a measurement is better, -1 where less is, 0 where its name does not tell.

    >>> direction("validation/accuracy"), direction("test accuracy"), direction("test/student/nll"), direction("beta")
    (1, 1, -1, 0)
    """
    words = re.split(r"[^a-z0-9]+", name.rsplit("/", 1)[-1].lower())
    for word in reversed(words):
        if word in LOWER:
            return -1
        if word in HIGHER:
            return 1
    return 0


def needs_objects(value: Any) -> bool:
    """Whether a recipe names Python objects, which have to be passed again."""
    if isinstance(value, Mapping):
        return ("object" in value and "fingerprint" in value) or any(map(needs_objects, value.values()))
    return isinstance(value, list) and any(map(needs_objects, value))


def _stages(path: Path, prefix: str = "") -> tuple[list[StageLog], int]:
    rows, damaged = _rows(path / "metrics.jsonl")
    signatures = {str(item.get("name")): item for item in _yields(path)}
    over = (path / "metrics.json").exists()
    order = list(signatures)
    found: list[tuple[int, StageLog]] = []
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_stage.setdefault(str(row["stage"]), []).append(row)
    for name, own in by_stage.items():
        stage = _stage(path, name, own, signatures.get(name, {}), over=over)
        stage.name = prefix + name
        found.append((order.index(name) if name in signatures else len(order), stage))
    for nested in sorted((path / "subruns").glob("*/metrics.jsonl")):
        name = nested.parent.name
        inner, broken = _stages(nested.parent, f"{prefix}{name} / ")
        found += [(order.index(name) if name in signatures else -1, stage) for stage in inner]
        damaged += broken
    return [stage for _, stage in sorted(found, key=lambda pair: pair[0])], damaged


def _stage(path: Path, name: str, rows: list[dict[str, Any]], signature: Mapping[str, Any], *, over: bool) -> StageLog:
    home = path / "checkpoints" / name
    # A stage that was built when its turn came has its description beside its checkpoints.
    signature = _json(home / "stage.json", dict) or signature
    stage = StageLog(name, planned=signature.get("steps"), reached=max(row["step"] for row in rows))
    stage.ended = over or (home / "end").is_dir() or (stage.planned is not None and stage.reached >= stage.planned)
    known = [re.sub(r" trains .*", "", str(update)) for update in signature.get("updates") or []]
    plans: dict[tuple[str, ...], list[tuple[str, str, str, str]]] = {}
    for row in rows:
        keys = tuple(row)
        if keys not in plans:
            plans[keys] = _plan(keys, known or _updates(row))
        _take(stage, row, plans[keys])
    best = _best(home)
    for metric, series in stage.measured.items():
        if best is not None and best["value"] == (best.get("metrics") or {}).get(metric):
            stage.monitor, stage.best_step = metric, best["step"]
            return stage
        sign = direction(metric)
        finite = [(sign * value, -step) for step, value in series if math.isfinite(value)]
        if best is None and sign and finite:
            stage.monitor, stage.best_step = metric, -max(finite)[1]
            return stage
    return stage


def _take(stage: StageLog, row: Mapping[str, Any], plan: Sequence[tuple[str, str, str, str]]) -> None:
    """Sort the numbers of a row into terms, learning rates, measurements and lines."""
    step = row["step"]
    if isinstance(row.get("warning"), str):
        stage.warnings.append((step, row["warning"]))
    for kind, key, name, rest in plan:
        value = row[key]
        # The log writes numbers that are not finite as null.
        value = math.nan if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        point = (step, float(value))
        if kind == "measured":
            stage.measured.setdefault(name, []).append(point)
        elif kind == "line":
            stage.lines.setdefault(name, {}).setdefault(rest, []).append(point)
        elif kind == "rate":
            _update(stage, name).rates.setdefault(rest, []).append(point)
        elif kind == "share":
            _term(stage, name, rest).shares.append(point)
        else:
            term = _term(stage, name, rest)
            term.values.append(point)
            # The engine logs no scale where the weight is 1.
            weighted = row.get(f"{key}/scale", value)
            term.weighted.append((step, math.nan if weighted is None else float(weighted)))


def _update(stage: StageLog, name: str) -> UpdateLog:
    found = stage.updates.get(name)
    if found is None:
        found = stage.updates[name] = UpdateLog(name)
    return found


def _term(stage: StageLog, update: str, name: str) -> Term:
    terms = _update(stage, update).terms
    if name not in terms:
        terms[name] = Term(name)
    return terms[name]


def _plan(keys: Sequence[str], updates: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Where the numbers of a row with these keys belong: (kind, key, update or measurement, the rest of its name).

    Most rows of a log have the keys of one before: they are understood once.
    """
    plan = []
    for key in keys:
        update = max((u for u in updates if key.startswith(u + "/")), key=len, default=None)
        if key in ("stage", "step"):
            continue
        if update is None:
            metric, line, reference = key.partition(LINE)
            plan.append(("line" if line else "measured", key, metric if line else key, reference))
            continue
        rest = key[len(update) + 1 :]
        if rest.startswith("lr/"):
            plan.append(("rate", key, update, rest[3:]))
        elif rest.endswith(SHARE) and key.removesuffix(SHARE) in keys:
            plan.append(("share", key, update, rest.removesuffix(SHARE)))
        elif not (rest.endswith("/scale") and key.removesuffix("/scale") in keys):
            plan.append(("term", key, update, rest))
    return plan


def _updates(row: Mapping[str, Any]) -> list[str]:
    """Names of the updates in a row of a stage whose description was not kept: measurements have rows of their own."""
    keys = [key for key in row if key not in ("stage", "step")]
    heads = list(dict.fromkeys(key.split("/")[0] for key in keys))
    return heads if keys and all("/" in key for key in keys) and not set(heads) & set(SPLITS) else []


def _best(home: Path) -> dict[str, Any] | None:
    """What the stage's newest checkpoint says of its best measurement."""
    candidates = [home / "end", *sorted(home.glob("step-*"), reverse=True)]
    tree = next((place / "tree.json" for place in candidates if (place / "tree.json").is_file()), None)
    best = (_json(tree, dict) or {}).get("best") if tree is not None else None
    return best if isinstance(best, dict) and isinstance(best.get("step"), int) and "value" in best else None


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a log, and how many lines are no rows (a killed process may leave half a line)."""
    if not path.is_file():
        return [], 0
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "stage" in row and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _yields(path: Path) -> list[dict[str, Any]]:
    groups = _json(path / "checkpoints" / "yields.json", list) or []
    items = [item for group in groups for item in (group if isinstance(group, list) else [group])]
    return [item for item in items if isinstance(item, dict)]


def _numbers(path: Path) -> dict[str, float]:
    return {str(k): float(v) for k, v in (_json(path, dict) or {}).items() if isinstance(v, int | float)}


def _json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}).") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it holds a {type(value).__name__} where a {kind.__name__} belongs.")
    return value


def yaml_mapping(text: str) -> Mapping[str, Any]:
    """A YAML text as a mapping; an empty one where it is none."""
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return {}
    return values if isinstance(values, dict) else {}

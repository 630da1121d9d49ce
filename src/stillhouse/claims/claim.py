"""A claim, the runs that test it, the margin, the verdict."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from stillhouse.engine import Listener
from stillhouse.errors import UserError, nearest
from stillhouse.front import run_recipe
from stillhouse.recipe import build_recipe, load_recipe
from stillhouse.registry import entries
from stillhouse.report import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Margin:
    """One inequality between the means over seeds of two arms.

    Attributes:
        better: the arm that should be better.
        than: the arm it is compared with.
        metric: name of the number.
        by: the least difference of means, in the metric's unit (negative: it may be worse by so much).
        mode: whether larger or smaller numbers are better.
        ratio: ``by`` is relative to the other arm's mean.
    """

    better: str
    than: str
    metric: str
    by: float
    mode: Literal["max", "min"] = "max"
    ratio: bool = False


@dataclass(frozen=True)
class Claim:
    """A comparison that can fail.

    Attributes:
        name: the method's name.
        statement: what should hold, in a sentence.
        base: recipe values shared by all arms.
        arms: recipe values of each arm, laid over the base.
        margins: the inequalities that make the verdict.
        metrics: numbers to record besides those of the margins.
        seeds: the seeds of every arm.
        remark: what a reader must know: the scale, what differs from the paper, why it fails if it does.
    """

    name: str
    statement: str
    base: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    margins: Sequence[Margin]
    metrics: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    remark: str = ""

    def recorded(self) -> list[str]:
        """Names of all numbers that are recorded."""
        return list(dict.fromkeys([*(margin.metric for margin in self.margins), *self.metrics]))

    def values(self, arm: str) -> dict[str, Any]:
        """The recipe values of an arm; nested mappings are merged."""
        return _merged(self.base, self.arms[arm])


@dataclass
class Outcome:
    """What running a claim found.

    Attributes:
        claim: the method's name.
        statement: the claim's statement.
        verdict: ``held`` or ``failed``.
        finding: the measured differences, in a sentence.
        command: what repeats it.
        seeds: the seeds.
        arms: arm to metric to a number per seed.
        margins: each inequality with its measured difference, standard error and verdict.
        environment: versions and machine.
        remark: the claim's remark.
    """

    claim: str
    statement: str
    verdict: str
    finding: str
    command: str
    seeds: list[int]
    arms: dict[str, dict[str, list[float]]]
    margins: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    remark: str = ""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def find_claim(name: str) -> Claim:
    """The claim of a method.

    Raises:
        UserError: it has none.
    """
    known = [entry["name"] for entry in entries()]
    if name not in known:
        raise UserError(f"there is no method {name!r}; {nearest(name, known)}")
    module = f"stillhouse.claims.{name.replace('-', '_')}"
    if find_spec(module) is None:
        raise UserError(f"the method {name!r} states no claim; those with a claim are systems, not classics.")
    claim: Claim = import_module(module).claim
    return claim


def last_result(name: str) -> dict[str, Any] | None:
    """The last recorded result of a method's claim, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_claim(
    claim: Claim,
    *,
    seeds: int | None = None,
    home: Path,
    listener: Callable[[str, int], Listener | None] = lambda arm, seed: None,
) -> Outcome:
    """Run every arm with every seed and judge.

    Args:
        claim: the claim.
        seeds: only the first so many seeds.
        home: directory of the runs; runs that finished there are not repeated.
        listener: makes the listener of one run.
    """
    chosen = list(claim.seeds)[:seeds]
    arms: dict[str, dict[str, list[float]]] = {}
    for arm in claim.arms:
        numbers: dict[str, list[float]] = {metric: [] for metric in claim.recorded()}
        for seed in chosen:
            recipe = build_recipe({**claim.values(arm), "seed": seed}, where=f"claim {claim.name}, arm {arm}")
            out = home / f"{arm}-{seed}"
            measured = _finished(out, recipe.dump())
            if measured is None:
                measured = run_recipe(recipe, out, listener=listener(arm, seed)).metrics
            for metric in numbers:
                if metric not in measured:
                    raise UserError(f"claim {claim.name}, arm {arm}: the run measures no {metric!r}.")
                numbers[metric].append(measured[metric])
        arms[arm] = numbers
    margins = [judge(margin, arms) for margin in claim.margins]
    short = "" if seeds is None else f" --seeds {len(chosen)}"
    return Outcome(
        claim=claim.name,
        statement=claim.statement,
        verdict="held" if all(m["held"] for m in margins) else "failed",
        finding="; ".join(m["finding"] for m in margins) + ".",
        command=f"stillhouse claims {claim.name}{short}",
        seeds=chosen,
        arms=arms,
        margins=margins,
        environment=environment(),
        remark=claim.remark,
    )


def judge(margin: Margin, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The measured difference of a margin, with the standard error of the per-seed differences."""
    ours, theirs = arms[margin.better][margin.metric], arms[margin.than][margin.metric]
    sign = 1 if margin.mode == "max" else -1
    differences = [sign * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if margin.ratio:
        scale = abs(statistics.fmean(theirs))
        differences = [difference / scale for difference in differences]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    held = mean >= margin.by
    kind = "relative " if margin.ratio else ""
    finding = (
        f"{margin.better} over {margin.than} in {margin.metric}: {kind}{mean:+.4g} (standard error {error:.2g}), "
        f"asked {margin.by:+g}: {'held' if held else 'failed'}"
    )
    return {**asdict(margin), "difference": mean, "standard_error": error, "held": held, "finding": finding}


def _finished(out: Path, values: Mapping[str, Any]) -> dict[str, float] | None:
    if not (out / "metrics.json").exists() or not (out / "recipe.yaml").exists():
        return None
    if load_recipe(out / "recipe.yaml").dump() != values:
        raise UserError(f"{out} holds a run of another recipe; remove it or choose another directory.")
    measured: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return measured


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "kind" not in value
        merged[key] = _merged(merged[key], value) if both else value
    return merged

"""A claim, the runs that test it, the margin, the verdict."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from stillhouse.engine import Listener, Signals
from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError, nearest
from stillhouse.front import finished, run_recipe
from stillhouse.metrics import paired_difference
from stillhouse.recipe import build_recipe
from stillhouse.registry import entries
from stillhouse.report import environment

RESULTS = Path(__file__).parent / "results"
"""What the project recorded."""

RECORDS = Path("claims") / "results"
"""What is measured in the directory one works in."""


@dataclass(frozen=True)
class Margin:
    """One inequality between the means over seeds of two arms, or of one arm and a number.

    Attributes:
        better: the arm that should be better.
        than: the arm it is compared with; None compares with 0.
        metric: name of the number.
        by: the least difference of means, in the metric's unit (negative: it may be worse by so much).
        mode: whether larger or smaller numbers are better.
        ratio: ``by`` is relative to the other arm's mean.
    """

    better: str
    than: str | None
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

    def digests(self) -> dict[str, str]:
        """A digest of each arm's values."""
        texts = {arm: json.dumps(self.values(arm), sort_keys=True) for arm in self.arms}
        return {arm: hashlib.sha256(text.encode()).hexdigest()[:12] for arm, text in texts.items()}


@dataclass
class Outcome:
    """What running a claim found; as JSON it is what is recorded.

    Attributes:
        name: the method's name.
        claim: the claim's statement.
        holds: whether all margins hold.
        measured: the measured difference of the margin that decides: the first that fails, or the first.
        margin: what that one asks for.
        seeds: the seeds.
        seconds: what all runs took together, teachers that were trained on the way included.
        command: what repeats it.
        date: when the last of the runs ended (UTC).
        arms: arm to metric to a number per seed; None where it is not finite.
        margins: each inequality as :func:`judge` gives it.
        environment: versions and machine of the runs, as the first of them wrote them down.
        sources: digests of the package's source that the runs were made with; more than one says that it changed meanwhile.
        recipes: arm to the digest of its values, by which a later change of the claim is found.
        remark: the claim's remark.
    """

    name: str
    claim: str
    holds: bool
    measured: float | None
    margin: float
    seeds: list[int]
    seconds: float
    command: str
    date: str
    arms: dict[str, dict[str, list[float | None]]]
    margins: list[dict[str, Any]]
    environment: dict[str, Any]
    sources: list[str]
    recipes: dict[str, str]
    remark: str = ""

    def save(self, directory: Path) -> Path:
        """Write it as ``NAME.json`` below a directory; returns the file."""
        path = directory / f"{self.name}.json"
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        return path


def find_claim(name: str) -> Claim:
    """The claim of a method.

    Raises:
        UserError: it has none.
    """
    known = [entry["name"] for entry in entries()]
    if name not in known:
        raise UserError(f"there is no method {name!r}; {nearest(name, known)}")
    if find_spec(_module(name)) is None:
        raise UserError(f"the method {name!r} states no claim; those with a claim are systems, not classics.")
    claim: Claim = import_module(_module(name)).claim
    return claim


def all_claims() -> list[Claim]:
    """The claims of every method that states one, by name."""
    names = sorted(entry["name"] for entry in entries())
    return [find_claim(name) for name in names if find_spec(_module(name)) is not None]


def last_result(name: str) -> dict[str, Any] | None:
    """The last recorded result of a method's claim: one's own of this directory, else the project's, else None."""
    for path in (RECORDS / f"{name}.json", RESULTS / f"{name}.json"):
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text())
            return result
    return None


def run_claim(
    claim: Claim,
    *,
    seeds: int | None = None,
    home: Path,
    listener: Callable[[str, int], Listener | None] = lambda arm, seed: None,
    signals: Signals | None = None,
) -> Outcome:
    """Run every arm with every seed and judge.

    Args:
        claim: the claim.
        seeds: so many seeds in place of the claim's own number: its first ones, or all and those that follow.
        home: directory of the runs; what finished there is not repeated, what was interrupted is continued.
        listener: makes the listener of one run.
        signals: asks for a checkpoint and a stop.

    Raises:
        UserError: a run of another recipe lies in ``home``, or an arm does not measure what is compared.
        Interrupted: ``signals`` asked for it.
    """
    chosen = list(claim.seeds)[:seeds]
    while seeds is not None and len(chosen) < seeds:
        chosen.append(max(chosen) + 1)
    arms: dict[str, dict[str, list[float | None]]] = {}
    about = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}
    made: list[dict[str, Any]] = []
    seconds, ended = 0.0, 0.0
    for arm in claim.arms:
        numbers: dict[str, list[float | None]] = {metric: [] for metric in claim.recorded()}
        for seed in chosen:
            recipe = build_recipe({**claim.values(arm), "seed": seed}, where=f"claim {claim.name}, arm {arm}")
            out = home / f"{arm}-{seed}"
            measured = finished(recipe, out)
            if measured is None:
                told = {**about, "command": ["stillhouse", "claims", claim.name]}
                run_recipe(recipe, out, listener=listener(arm, seed), signals=signals, about=told)
                measured = json.loads((out / "metrics.json").read_text())
            for metric in numbers:
                if metric not in measured:
                    raise UserError(f"claim {claim.name}, arm {arm}: the run measures no {metric!r}.")
                numbers[metric].append(measured[metric])
            seconds += sum(json.loads((out / "cost.json").read_text()).values())
            ended = max(ended, (out / "metrics.json").stat().st_mtime)
            made.append(_environment(out))
        arms[arm] = numbers
    margins = [judge(margin, arms) for margin in claim.margins]
    deciding = next((margin for margin in margins if not margin["holds"]), margins[0])
    how_many = "" if len(chosen) == len(claim.seeds) else f" --seeds {len(chosen)}"
    return Outcome(
        name=claim.name,
        claim=claim.statement,
        holds=all(margin["holds"] for margin in margins),
        measured=deciding["measured"],
        margin=deciding["by"],
        seeds=chosen,
        seconds=round(seconds, 1),
        command=f"stillhouse claims {claim.name}{how_many}",
        date=datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds"),
        arms=arms,
        margins=margins,
        environment={key: value for key, value in made[0].items() if key != "source"},
        sources=sorted({str(one.get("source", "unknown")) for one in made}),
        recipes=claim.digests(),
        remark=claim.remark,
    )


def judge(margin: Margin, arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, Any]:
    """Compare two arms, seed by seed.

    Args:
        margin: what is asked.
        arms: arm to metric to a number per seed; None is one that is not finite.

    Returns:
        The margin's attributes and ``measured`` (mean over seeds of the differences, positive where ``better`` is
        better), ``std`` of the differences and ``interval`` (95 %, Student's t), both None for a single seed, ``holds``
        (the mean reaches ``by``), ``clear`` (the interval does not reach over ``by``) and ``finding``, a sentence. With a
        number that is not finite the margin fails, and ``measured`` is None.
    """
    against = "" if margin.than is None else f" over {margin.than}"
    where = f"{margin.better}{against} in {margin.metric}"
    compared = {arm: list(arms[arm][margin.metric]) for arm in (margin.better, margin.than) if arm is not None}
    broken = [arm for arm, values in compared.items() if None in values]
    ours = [value for value in compared[margin.better] if value is not None]
    theirs = [0.0] * len(ours)
    if margin.than is not None:
        theirs = [value for value in compared[margin.than] if value is not None]
    scale = abs(statistics.fmean(theirs)) if margin.ratio and theirs else 1.0
    if broken or scale == 0:
        why = f"{' and '.join(broken)} has a value that is not finite" if broken else "it is relative to a mean of 0"
        failed = {"measured": None, "std": None, "interval": None, "holds": False, "clear": True}
        return {**asdict(margin), **failed, "finding": f"{where}: {why}, asked {margin.by:+g}: fails"}
    sign = 1 if margin.mode == "max" else -1
    differences = [sign * (a - b) / scale for a, b in zip(ours, theirs, strict=True)]
    found = paired_difference(differences)
    holds, interval = found.mean >= margin.by, found.interval
    within = "one seed" if interval is None else f"95 % interval {interval[0]:+.3g} to {interval[1]:+.3g}"
    clear = interval is not None and (interval[0] >= margin.by if holds else interval[1] < margin.by)
    unit = " of its mean" if margin.ratio else ""
    verdict = ("holds" if holds else "fails") + ("" if clear else ", within noise")
    return {
        **asdict(margin),
        "measured": found.mean,
        "std": found.std,
        "interval": None if interval is None else list(interval),
        "holds": holds,
        "clear": clear,
        "finding": f"{where}: {found.mean:+.4g}{unit} ({within}), asked {margin.by:+g}: {verdict}",
    }


def _module(name: str) -> str:
    return f"stillhouse.claims.{name.replace('-', '_')}"


def _environment(out: Path) -> dict[str, Any]:
    """What a run wrote down of versions and machine; nothing where it was made in another way."""
    path = out / "run.json"
    found: dict[str, Any] = json.loads(path.read_text()).get("environment", {}) if path.exists() else {}
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "kind" not in value
        merged[key] = _merged(merged[key], value) if both else value
    return merged

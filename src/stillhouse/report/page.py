"""One self-contained page of a run: everything it says is in it, and it loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse.engine.storage import write_text
from stillhouse.registry import entries
from stillhouse.report.artefacts import shipped
from stillhouse.report.charts import Line, chart, spans_decades
from stillhouse.report.formatting import column, duration, number, size
from stillhouse.report.health import checks, shared, standings
from stillhouse.report.reading import RunFiles, Series, StageLog, UpdateLog, direction, read_run

VERIFIED = {
    "official": "its loss was checked against the official code",
    "reference": "its loss was checked against a reference library",
    "formula": "its loss was checked against the paper's formulas",
}

COLORS = 8
"""Colours of lines in the style sheet."""

OVERLAID = 2
"""More than so many stages that differ only in their numbers share one figure."""

SMALL = 320
"""Pictures are enlarged up to about so many pixels."""

PICTURE_BYTES = 8_000_000
"""Larger pictures are named and not shown, so that the page can still be sent to somebody."""


def build(directory: Path, *, version_info: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` of the run in ``directory``, finished or not; the same run gives the same page.

    Args:
        directory: a run directory. Commands and paths on the page name it as it is given here.
        version_info: versions and machine to show, as :func:`stillhouse.report.environment` tells them; those that the
            run wrote down by default.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no run in the directory, or a file of it is damaged.
    """
    directory = Path(directory)
    if directory.name in ("", ".."):
        directory = directory.resolve()
    run = read_run(directory)
    text = _template().render(_view(run, version_info))
    path = directory / "report.html"
    # ASCII alone, so that no reader can take it for another encoding.
    write_text(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return path


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("stillhouse.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "size": size}
    return environment.get_template("page.html.j2")


def _view(run: RunFiles, version_info: Mapping[str, Any] | None) -> dict[str, Any]:
    home = Path(__file__).parent
    script = (home / "page.js").read_text(encoding="ascii")
    method = _method(run)
    versions = version_info if version_info is not None else run.about.get("environment") or {}
    artefacts = shipped(run.path / "result")
    health = checks(run)
    return {
        "style": Markup((home / "page.css").read_text(encoding="ascii")),
        "script": Markup(script),
        # The page forbids itself whatever is not in it, and any script but its own.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": str(run.about.get("name") or method.get("name") or run.path.name),
        "method": method,
        "verified": VERIFIED.get(str(method.get("verified")), ""),
        "run": run,
        "facts": _facts(run, versions),
        "progress": None if run.finished else _progress(run),
        "resume": shlex.join(["stillhouse", "resume", str(run.path)]),
        "tables": [_table(table, {item.name for item in artefacts}) for table in run.tables],
        "lineup": _lineup(run.metrics or {}),
        "checks": health,
        "warnings": sum(check.state == "warn" for check in health),
        "curves": _curves(run),
        "pictures": _pictures(run.path / "result"),
        "artefacts": artefacts,
        "feeding": _feeding(run.inputs),
        "cost": _cost(run),
        "disk": _disk(run.path),
        "metrics": [(*_split(name), number(value), value) for name, value in (run.metrics or {}).items()],
        "recipe": _highlighted(run.recipe_text),
        "needs_objects": _needs_objects(run.recipe),
        "versions": {str(k): v for k, v in versions.items() if v is not None},
        "repeat": _repeat(run),
        "started_as": shlex.join(map(str, run.about.get("command") or [])),
    }


def _method(run: RunFiles) -> dict[str, Any]:
    """What is known of the method: as the run wrote it down, else as the index says it."""
    told = dict(run.about.get("method") or {})
    name = told.get("name") or run.recipe.get("method")
    known = next((dict(entry) for entry in entries() if entry["name"] == name), {})
    empty = dict.fromkeys(("title", "summary", "year", "arxiv", "verified"), "")
    return {"name": name, **empty, **known, **told}


def _facts(run: RunFiles, versions: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = _seconds(run)
    facts = [("status", "finished" if run.finished else "not finished")]
    if seconds:
        facts.append(("training and measuring" if run.finished else "so far", duration(math.fsum(seconds.values()))))
    if run.seed is not None:
        facts.append(("seed", str(run.seed)))
    if run.about.get("started"):
        facts.append(("started", str(run.about["started"]).replace("T", " ").replace("+00:00", " UTC")))
    machine = versions.get("accelerator") or versions.get("processor")
    if machine:
        facts.append(("machine", str(machine)))
    if "stillhouse" in versions:
        facts.append(("stillhouse", str(versions["stillhouse"])))
    return facts


@dataclass(frozen=True)
class Progress:
    """How far an unfinished run is: a sentence, and the fraction of its present stage where that is known."""

    sentence: str
    fraction: float | None = None


def _progress(run: RunFiles) -> Progress:
    logged = {stage.name: stage for stage in run.stages}
    for item in run.yields:
        name, steps = str(item.get("name")), item.get("steps")
        if not str(item.get("kind")).startswith("stage") or (run.path / "checkpoints" / name / "end").is_dir():
            continue
        reached = logged[name].reached if name in logged else 0
        steps = logged[name].planned if name in logged else steps
        if not steps:
            return Progress(f"in stage {name}" + (f", step {reached:,}" if reached else ""))
        return Progress(f"in stage {name}, step {reached:,} of {steps:,} as logged", min(1.0, reached / steps))
    if run.yields:
        last = run.yields[-1]
        done = "after" if str(last.get("kind")).startswith("stage") else "in"
        return Progress(f"{done} the {str(last.get('kind')).split()[0]} {last.get('name')}")
    if run.stages:
        return Progress(f"in stage {run.stages[-1].name}, step {run.stages[-1].reached:,}")
    return Progress("nothing was logged yet")


@dataclass(frozen=True)
class Cells:
    """A table ready to print: per row its label, whether it ships, and (text, exact value or None) per other cell."""

    title: str
    columns: list[str]
    rows: list[tuple[str, bool, list[tuple[str, Any]]]]
    numeric: list[bool]


def _table(table: Mapping[str, Any], ships: set[str]) -> Cells:
    rows = [list(row) for row in table.get("rows") or []]
    columns = [str(name) for name in table.get("columns") or []]
    width = max([len(columns), *map(len, rows)])
    rows = [row + [""] * (width - len(row)) for row in rows]
    columns += [""] * (width - len(columns))
    printed = [column([row[i] for row in rows]) for i in range(width)]
    is_number = [[isinstance(row[i], int | float) for row in rows] for i in range(width)]
    return Cells(
        title=str(table.get("title") or ""),
        columns=columns,
        rows=[
            (printed[0][r], str(row[0]) in ships, [(printed[i][r], row[i]) for i in range(1, width)])
            for r, row in enumerate(rows)
        ]
        if width
        else [],
        numeric=[any(flags) for flags in is_number],
    )


@dataclass(frozen=True)
class Lineup:
    """Models on one line by their main test measurement, and how much of the teacher's lead the student took over."""

    metric: str
    rows: list[tuple[str, str, float]]
    sentence: str


def _lineup(metrics: Mapping[str, Any]) -> Lineup | None:
    table = standings(metrics)
    # Models measured alike: those that have the first model's first measurement that says what is better.
    metric = next((found for name in table if (found := shared(table, name))), None)
    if metric is None:
        return None
    values = {name: numbers[metric] for name, numbers in table.items() if metric in numbers}
    low, high = min(values.values()), max(values.values())
    if len(values) < 2 or high == low:
        return None
    printed = dict(zip(values, column(list(values.values())), strict=True))
    order = sorted(values, key=lambda name: -direction(metric) * values[name])
    rows = [(name, printed[name], round(100 * (values[name] - low) / (high - low), 1)) for name in order]
    return Lineup(metric, rows, _gap(values, metric))


def _gap(values: Mapping[str, float], metric: str) -> str:
    if not {"student", "student-alone", "teacher"} <= set(values):
        return ""
    lead = direction(metric) * (values["teacher"] - values["student-alone"])
    gain = direction(metric) * (values["student"] - values["student-alone"])
    if lead <= 0 or gain <= 0:
        return ""
    if gain > lead:
        return "The student is better than its teacher."
    return f"The student takes over {gain / lead:.0%} of the teacher's lead over the same student trained alone."


@dataclass(frozen=True)
class Panel:
    """A small chart with its heading and, below it, what it comes to."""

    title: str
    svg: Markup
    ends: str = ""
    log: bool = False


@dataclass(frozen=True)
class Loss:
    """The chart of one update's loss, with a row per term: (colour, name, weight, first value, last value, share)."""

    panel: Panel
    rows: list[tuple[int, str, str, str, str, str]]


@dataclass(frozen=True)
class Curves:
    """The figures of one stage, or of several alike."""

    title: str
    detail: str
    losses: list[Loss]
    panels: list[Panel]
    rates: list[str]


def _curves(run: RunFiles) -> list[Curves]:
    groups: dict[Any, list[StageLog]] = {}
    for stage in run.stages:
        terms = tuple((name, *update.terms) for name, update in stage.updates.items())
        groups.setdefault((re.sub(r"\d+", "#", stage.name), terms, tuple(stage.measured)), []).append(stage)
    found = []
    for alike in groups.values():
        found += [_overlaid(alike)] if len(alike) > OVERLAID else [_single(stage) for stage in alike]
    return found


def _single(stage: StageLog) -> Curves:
    steps = stage.planned or stage.reached
    detail = f"{stage.reached:,} steps" if stage.ended else f"step {stage.reached:,}"
    if stage.planned and stage.planned != stage.reached:
        detail += f" of {stage.planned:,}" + (", stopped early" if stage.ended else "")
    updates = list(stage.updates.values())
    losses = [_loss(update, stage.name, steps) for update in updates if len(update.terms) > 1]
    panels = [_only_term(update, stage.name, steps) for update in updates if len(update.terms) == 1]
    panels += [_measured(name, series, stage, steps) for name, series in stage.measured.items()]
    rates = []
    for update in updates:
        for name, series in update.rates.items():
            title = f"learning rate of {name}" + (f" ({update.name})" if len(updates) > 1 else "")
            if len({value for _, value in series}) > 1:
                panels.append(_rate(title, series, stage.name, steps))
            else:
                rates.append(f"{title}: {number(series[0][1])} throughout")
    return Curves(stage.name, detail, losses, panels, rates)


def _loss(update: UpdateLog, stage: str, steps: int) -> Loss:
    terms = list(update.terms.values())
    log = spans_decades([v for term in terms for _, v in term.weighted])
    ends = {term.name: term.weighted[-1][1] for term in terms}
    whole = math.fsum(abs(v) for v in ends.values() if math.isfinite(v))
    told = ", ".join(f"{name} ends at {number(end)}" for name, end in ends.items())
    svg = chart(
        [Line(term.name, term.weighted, i % COLORS) for i, term in enumerate(terms)],
        label=f"Loss of {update.name} in stage {stage}, weighted terms over steps: {told}.",
        steps=steps,
        width=560,
        log=log,
    )
    rows = []
    for i, term in enumerate(terms):
        share = _percent(abs(ends[term.name]) / whole) if whole and math.isfinite(ends[term.name]) else "-"
        first, last = number(term.values[0][1]), number(term.values[-1][1])
        rows.append((i % COLORS, term.name, number(float(f"{term.weight:.4g}")), first, last, share))
    return Loss(Panel(update.name, svg, log=log), rows)


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _only_term(update: UpdateLog, stage: str, steps: int) -> Panel:
    (term,) = update.terms.values()
    log = spans_decades([v for _, v in term.values])
    first, last = number(term.values[0][1]), number(term.values[-1][1])
    label = f"Loss of {update.name} in stage {stage}, its only term {term.name} over steps: from {first} to {last}."
    svg = chart([Line(term.name, term.values)], label=label, steps=steps, log=log)
    return Panel(f"{update.name}: {term.name}", svg, f"from {first} to {last}", log=log)


def _measured(name: str, series: Series, stage: StageLog, steps: int) -> Panel:
    last = series[-1]
    best = None
    if name == stage.monitor and stage.best_step is not None:
        best = next(((s, v) for s, v in series if s == stage.best_step), None)
    ends = f"{number(series[0][1])} at step {series[0][0]:,}, {number(last[1])} at step {last[0]:,}"
    peak = f", best {number(best[1])} at step {best[0]:,}" if best is not None else ""
    label = f"{name} in stage {stage.name} over steps: {ends}{peak}."
    svg = chart([Line(name, series)], label=label, steps=steps, best=best)
    return Panel(name, svg, f"last {number(last[1])}{peak}")


def _rate(title: str, series: Series, stage: str, steps: int) -> Panel:
    ends = f"from {number(series[0][1])} to {number(series[-1][1])}"
    label = f"{title} in stage {stage} over steps: {ends}, at most {number(max(v for _, v in series))}."
    return Panel(title, chart([Line("learning rate", series, 6)], label=label, steps=steps), ends)


def _overlaid(stages: Sequence[StageLog]) -> Curves:
    """Many stages that differ only in their numbers: a line each, in one chart per term and measurement."""
    steps = max(stage.planned or stage.reached for stage in stages)
    series: dict[str, list[Series]] = {}
    for stage in stages:
        for update in stage.updates.values():
            for term in update.terms.values():
                series.setdefault(f"{update.name}/{term.name}", []).append(term.values)
        for name, values in stage.measured.items():
            series.setdefault(name, []).append(values)
    panels = []
    for name, lines in series.items():
        ends = [values[-1][1] for values in lines if math.isfinite(values[-1][1])] or [math.nan]
        label = (
            f"{name} of {len(lines)} stages over steps: they end between {number(min(ends))} and {number(max(ends))}."
        )
        log = spans_decades([v for values in lines for _, v in values])
        svg = chart([Line(name, values) for values in lines], label=label, steps=steps, log=log, faint=True)
        panels.append(Panel(name, svg, f"last from {number(min(ends))} to {number(max(ends))}", log=log))
    title = f"{stages[0].name} to {stages[-1].name}"
    return Curves(title, f"{len(stages)} stages of up to {steps:,} steps, a line each", [], panels, [])


@dataclass(frozen=True)
class Picture:
    """A picture inlined, or only named where it is too large (``source`` is empty then).

    Small ones are shown enlarged ``zoom`` times, a whole number, so that every pixel keeps its shape.
    """

    name: str
    source: str
    width: int
    height: int
    zoom: int


def _pictures(result: Path) -> list[Picture]:
    found = []
    for path in [*sorted(result.glob("*.png")), *sorted(result.glob("*/*.png"))]:
        data = path.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
            continue
        width, height = struct.unpack(">II", data[16:24])
        name = path.relative_to(result).with_suffix("").as_posix()
        source = "data:image/png;base64," + base64.b64encode(data).decode() if len(data) <= PICTURE_BYTES else ""
        found.append(Picture(name, source, width, height, max(1, SMALL // max(width, height, 1))))
    return found


def _feeding(inputs: Mapping[str, Any]) -> str:
    """What a model of the run takes, in a sentence."""
    shapes = [f"{name} of shape {' x '.join(map(str, shape))}" for name, shape in (inputs.get("inputs") or {}).items()]
    if not shapes:
        return ""
    told = f"What its models take: {', '.join(shapes)}, in batches"
    pixels = inputs.get("pixels")
    if pixels:
        black, white, mean, std = (pixels[key] for key in ("black", "white", "mean", "std"))
        divisor = [s * (white - black) for s in std]
        offset = [m * (white - black) + black for m in mean]
        told += f"; pixels stored from {number(black)} to {number(white)} become (pixel - {_list(offset)}) / {_list(divisor)}"
        told += ", a number per channel" if len(mean) > 1 else ""
    return told + " (result/inputs.json)."


def _list(values: Sequence[float]) -> str:
    texts = [f"{value:.5g}" for value in values]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def _seconds(run: RunFiles) -> dict[str, float]:
    return {str(k): float(v) for k, v in run.cost.items() if isinstance(v, int | float) and math.isfinite(v)}


def _cost(run: RunFiles) -> list[dict[str, Any]]:
    """A row per yield: its kind, its steps, its time, the share of the whole and the time per step."""
    seconds = _seconds(run)
    whole = math.fsum(seconds.values())
    about = {str(item.get("name")): item for item in run.yields}
    logged = {stage.name: stage for stage in run.stages}
    rows = []
    for name, spent in seconds.items():
        item, stage = about.get(name, {}), logged.get(name)
        steps = stage.reached if stage is not None else None
        kind = str(item.get("kind") or ("stages" if "+" in name else ""))
        rows.append(
            {
                "name": _named(name.split("+")),
                "kind": {"run": "run of its own, or found in the cache", "stage built later": "stage"}.get(kind, kind),
                "steps": steps,
                "seconds": spent,
                "share": round(100 * spent / whole, 1) if whole else 0.0,
                "per_step": spent / steps if steps else None,
            }
        )
    return rows


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"


def _disk(path: Path) -> list[tuple[str, int]]:
    """Bytes below the directory by what they are; the page itself and files of the moment are left out."""
    found: dict[str, int] = {}
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.name == "report.html":
            continue
        name = f"{entry.name}/" if entry.is_dir() else entry.name if entry.name == "metrics.jsonl" else "other files"
        files = entry.rglob("*") if entry.is_dir() else [entry]
        count = sum(file.stat().st_size for file in files if file.is_file() and not file.name.startswith("."))
        found[name] = found.get(name, 0) + count
    return sorted(((name, count) for name, count in found.items() if count), key=lambda pair: -pair[1])


def _split(name: str) -> tuple[str, str]:
    head, slash, tail = name.rpartition("/")
    return head + slash, tail


def _repeat(run: RunFiles) -> str:
    seed = ["--seed", str(run.seed)] if run.seed is not None else []
    again = run.path.with_name(f"{run.path.name}-again")
    return shlex.join(["stillhouse", "run", str(run.path / "recipe.yaml"), *seed, "--out", str(again)])


def _needs_objects(value: Any) -> bool:
    """Whether a recipe names Python objects, which have to be passed again."""
    if isinstance(value, Mapping):
        return ("object" in value and "fingerprint" in value) or any(map(_needs_objects, value.values()))
    return isinstance(value, list) and any(map(_needs_objects, value))


def _highlighted(text: str) -> list[list[tuple[str, str]]]:
    """YAML as lines of (kind, text): ``key``, ``comment`` or plain."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        if line.lstrip().startswith("#"):
            lines.append([("comment", line)])
        elif found := re.fullmatch(r"(\s*(?:- )*)([^\s:#'\"][^:#]*:)( .*|)", line):
            lines.append([("", found[1]), ("key", found[2]), ("", found[3])])
        else:
            lines.append([("", line)])
    return lines

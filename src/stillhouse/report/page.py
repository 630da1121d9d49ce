"""One self-contained page of a run: everything it says is in it, and it loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError
from stillhouse.registry import entries
from stillhouse.report.account import data_sets, models, named, parts
from stillhouse.report.artefacts import exported, shipped
from stillhouse.report.charts import Dot, scatter
from stillhouse.report.curves import curves
from stillhouse.report.formatting import duration, number, size
from stillhouse.report.health import checks
from stillhouse.report.pictures import Album
from stillhouse.report.reading import RunFiles, needs_objects, read_run
from stillhouse.report.results import Costing, cells, costing, headline, lineup, with_error

VERIFIED = {
    "official": "its loss was checked against the official code",
    "reference": "its loss was checked against a reference library",
    "formula": "its loss was checked against the paper's formulas",
}


def build_from(directory: Path, noun: str, view: Callable[[Mapping[str, Any], Path], Mapping[str, Any]]) -> Path:
    """Write ``<noun>.html`` from the ``<noun>.json`` in a directory, by the template of that name; returns the page.

    Raises:
        UserError: there is no such file.
    """
    source, page = directory / f"{noun}.json", directory / f"{noun}.html"
    if not source.exists():
        raise UserError(f"{directory} holds no finished {noun}: there is no {noun}.json in it.")
    text = filled(f"{noun}.html.j2", view(json.loads(source.read_text(encoding="utf-8")), directory))
    # ASCII alone, so that no reader can take it for another encoding.
    write_text(page, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return page


def _test_samples(run: RunFiles) -> int | None:
    """How many samples the test split has, where that was written down."""
    count = (run.inputs.get("splits") or {}).get("test")
    return count if isinstance(count, int) and count > 0 else None


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
    path = directory / "report.html"
    # ASCII alone, so that no reader can take it for another encoding.
    write_text(path, render(directory, version_info=version_info).encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return path


def render(directory: Path, *, version_info: Mapping[str, Any] | None = None, home: str = "") -> str:
    """The page of :func:`build` as text, nothing written.

    Args:
        directory: a run directory.
        version_info: as for :func:`build`.
        home: the address of a page over all runs, to which the page then leads back.

    Raises:
        UserError: there is no run in the directory, or a file of it is damaged.
    """
    run = read_run(directory)
    try:
        return filled("page.html.j2", {**_view(run, version_info), "home": home})
    except (TypeError, ValueError, AttributeError, LookupError, TemplateError) as error:
        # JSON, but of another shape than a run writes, wherever in its files that may be.
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory} holds files that are not as a run writes them ({told}).") from error


def filled(template: str, view: Mapping[str, Any], *, package: str = "stillhouse.report", script: str = "") -> str:
    """A template with the style, the script and the filters that all pages share.

    Args:
        template: its name.
        view: what it shows.
        package: where it is; templates of this room can be imported in it.
        script: more script, to run after the common one.
    """
    text: str = _template(template, package).render(
        {"style": style(), "script": Markup(common_script() + script), "script_hash": script_hash(script), **view}
    )
    return text


def common_script() -> str:
    """The script of all pages: it copies code and reads values off charts, and no page needs it to be read."""
    return (Path(__file__).parent / "page.js").read_text(encoding="ascii")


def script_hash(more: str = "") -> str:
    """What allows the script of a page, and no other, in its policy."""
    return base64.b64encode(hashlib.sha256((common_script() + more).encode()).digest()).decode()


@cache
def _template(name: str, package: str) -> Any:
    places = dict.fromkeys((package, "stillhouse.report"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(place, "") for place in places]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "size": size, "with_error": _with_error}
    return environment.get_template(name)


def _with_error(value: float | None, error: float | None) -> str:
    return with_error(value, error) if error is not None else number(value)


def _view(run: RunFiles, version_info: Mapping[str, Any] | None) -> dict[str, Any]:
    method = _method(run)
    versions = version_info if version_info is not None else run.about.get("environment") or {}
    artefacts = shipped(run.path / "result")
    health = checks(run)
    album = Album()
    pictures, more_pictures = album.of_result(run.path / "result")
    metric, costs = costing(run)
    return {
        "title": str(run.about.get("name") or method.get("name") or run.path.name),
        "method": method,
        "verified": VERIFIED.get(str(method.get("verified")), ""),
        "run": run,
        "facts": _facts(run, versions),
        "headline": headline(run),
        "progress": None if run.finished else _progress(run),
        "resume": shlex.join(["stillhouse", "resume", str(run.path)]),
        "tables": [cells(table, {item.name for item in artefacts}) for table in run.tables],
        "lineup": lineup(run.metrics or {}, _test_samples(run)),
        "parts": parts(run),
        "data_sets": data_sets(run),
        "models": models(run),
        "checks": health,
        "warnings": sum(check.state == "warn" for check in health),
        "said": [(stage.name, step, text) for stage in run.stages for step, text in stage.warnings],
        "curves": curves(run),
        "pictures": pictures,
        "more_pictures": more_pictures,
        "strips": album.of_training(run.path / "samples"),
        "artefacts": artefacts,
        "exports": exported(run),
        "feeding": _feeding(run.inputs),
        "metric": metric,
        "costs": costs,
        "scatter": _scatter(metric, costs),
        "cost": _cost(run),
        "disk": _disk(run.path),
        "metrics": [(*_split(name), number(value), value) for name, value in (run.metrics or {}).items()],
        "recipe": _highlighted(run.recipe_text),
        "needs_objects": needs_objects(run.recipe),
        "versions": {str(k): v for k, v in versions.items() if v is not None},
        "repeat": _repeat(run),
        "started_as": shlex.join(map(str, run.about.get("command") or [])),
    }


def style() -> Markup:
    """The style sheet of all pages."""
    return Markup((Path(__file__).parent / "page.css").read_text(encoding="ascii"))


def _method(run: RunFiles) -> dict[str, Any]:
    """What is known of the method: as the run wrote it down, else as the index says it."""
    told = dict(run.about.get("method") or {})
    name = told.get("name") or run.recipe.get("method")
    known = next((dict(entry) for entry in entries() if entry["name"] == name), {})
    empty = dict.fromkeys(("title", "summary", "year", "arxiv", "verified"), "")
    return {"name": name, **empty, **known, **told}


def _facts(run: RunFiles, versions: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("status", "finished" if run.finished else "not finished")]
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


def _scatter(metric: str | None, costs: Sequence[Costing]) -> Markup:
    """Quality over the first cost in which the models differ; nothing where they do in none."""
    for across, values in (
        ("parameters", [row.parameters for row in costs]),
        ("evaluations a sample", [row.evaluations for row in costs]),
        ("latency, ms", [row.latency for row in costs]),
        ("seconds to make it", [row.seconds for row in costs]),
    ):
        dots = [
            Dot(row.name, float(value), row.quality, row.error or 0.0, row.ours)
            for row, value in zip(costs, values, strict=True)
            if value is not None and row.quality is not None
        ]
        if metric is None or len({dot.x for dot in dots}) < 2:
            continue
        up = f"test {metric.replace('_', ' ')}"
        told = "; ".join(f"{dot.name} {number(dot.y)} at {number(dot.x)}" for dot in dots)
        return scatter(dots, label=f"{up} over {across}: {told}.", across=across, up=up)
    return Markup("")


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


def _cost(run: RunFiles) -> list[dict[str, Any]]:
    """A row per yield: its kind, its steps, its time, the share of the whole, the time per step, its peak memory."""
    seconds = {name: spent for name, spent in run.cost.items() if math.isfinite(spent)}
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
                "name": named(name.split("+")),
                "kind": {"run": "run, or found in the cache", "stage built later": "stage"}.get(kind, kind),
                "steps": steps,
                "seconds": spent,
                "share": round(100 * spent / whole, 1) if whole else 0.0,
                "per_step": spent / steps if steps else None,
                "memory": run.memory.get(name),
            }
        )
    return rows


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

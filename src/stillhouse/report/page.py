"""One self-contained page of a run."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError
from stillhouse.report.health import findings


def build(directory: Path) -> Path:
    """Write ``report.html`` of the run in ``directory`` and return its path.

    Raises:
        UserError: there is no run in the directory.
    """
    recipe = directory / "recipe.yaml"
    if not recipe.exists():
        raise UserError(f"{directory} holds no run: there is no recipe.yaml in it.")
    about = _json(directory / "run.json") or {}
    metrics = _json(directory / "metrics.json")
    rows = _rows(directory / "metrics.jsonl")
    tables = _json(directory / "result" / "tables.json") or {"tables": [], "notes": []}
    page = Environment(
        loader=PackageLoader("stillhouse.report", "."), autoescape=select_autoescape(["j2", "html"])
    ).get_template("page.html.j2")
    text = page.render(
        name=about.get("method", {}).get("name", directory.name),
        about=about,
        finished=metrics is not None,
        progress=_progress(rows),
        metrics=metrics or {},
        tables=tables["tables"],
        notes=tables["notes"],
        health=findings(rows, metrics or {}),
        curves=[(stage, Markup(svg)) for stage, svg in _curves(rows)],
        pictures=[(path.stem, _inline(path)) for path in sorted((directory / "result").glob("*.png"))],
        artefacts=_artefacts(directory),
        cost=_json(directory / "cost.json") or {},
        recipe=recipe.read_text(),
        command=f"stillhouse run {directory / 'recipe.yaml'} --out {directory}-again",
    )
    path = directory / "report.html"
    write_text(path, text)
    return path


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _progress(rows: Sequence[dict[str, Any]]) -> str:
    return f"stage {rows[-1]['stage']}, step {rows[-1]['step']}" if rows else "before the first logged step"


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _artefacts(directory: Path) -> list[dict[str, Any]]:
    found = []
    for place in sorted(path for path in (directory / "result").glob("*") if path.is_dir()):
        files = [(str(f.relative_to(place)), f.stat().st_size) for f in sorted(place.rglob("*")) if f.is_file()]
        names = {name for name, _ in files}
        load = ""
        if "model.json" in names:
            load = f"import stillhouse.models; model = stillhouse.models.load({str(place)!r})"
        found.append({"name": place.name, "files": files, "load": load})
    return found


def _curves(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """One figure per stage: a small panel per logged number, shared steps."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figures = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        names = dict.fromkeys(
            name for row in own for name, value in row.items() if isinstance(value, int | float) and name != "step"
        )
        names = {name: None for name in names if not name.endswith("/scale")}
        if not names:
            continue
        across = min(3, len(names))
        down = -(-len(names) // across)
        # A fixed salt gives the same identifiers, and so the same page, for the same run.
        with rc_context({"svg.hashsalt": stage, "svg.fonttype": "none", "font.size": 8}):
            figure = Figure(figsize=(3.1 * across, 1.9 * down), layout="constrained")
            for number, name in enumerate(names):
                axes = figure.add_subplot(down, across, number + 1)
                points = [(row["step"], row[name]) for row in own if isinstance(row.get(name), int | float)]
                axes.plot(
                    *zip(*points, strict=True), color="#3b6ea8", linewidth=1.2, marker="." if len(points) < 30 else None
                )
                axes.set_title(name.replace("$", r"\$"), loc="left", fontsize=8)
                axes.spines[["top", "right"]].set_visible(False)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = stream.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
        figures.append((stage, svg))
    return figures

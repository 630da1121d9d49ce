"""What the pages do not repeat but read from the code: systems, fields, recorded claims, the modules of a room.

A page asks for it with a comment on a line of its own:

- ``<!-- systems -->``: every method in the index, as two tables.
- ``<!-- claim -->``: the recorded result of the claim of the system that the page is named after.
- ``<!-- measured -->``: that system's rows of the tables below ``docs/benchmarks``, beside those of the baseline.
- ``<!-- fields -->``: the fields of that system with their bounds and defaults.
- ``<!-- modules stillhouse.losses -->``: the reference of every public module of a package.
- ``<!-- tests engine -->``: the tests of a room, as the sentences that they are named after.

An entry ``systems/*`` of the navigation becomes the pages of that folder, in the order of the index.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src"
PACKAGE = SOURCE / "stillhouse"
MARKER = re.compile(r"^<!-- (systems|claim|measured|fields|modules|tests)(?: (\S+))? -->$", re.MULTILINE)
VERIFIED = {"official": "the official code", "reference": "a reference library", "formula": "the formula"}


def on_config(config: Any) -> Any:
    """Fill in the navigation."""
    config["nav"] = expanded(config["nav"])
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in the markers of a page."""
    return filled(markdown, Path(page.file.src_uri).stem)


def expanded(nav: Sequence[Any]) -> list[Any]:
    """The navigation with ``folder/*`` replaced by the folder's pages: the index page, then the index's order."""
    order = {entry["name"]: place for place, entry in enumerate(entries())}
    full: list[Any] = []
    for item in nav:
        [(title, place)] = item.items() if isinstance(item, dict) else [("", item)]
        if isinstance(place, str) and place.endswith("/*"):
            folder = place.removesuffix("/*")
            names = {path.stem for path in (DOCS / folder).glob("*.md")}
            ranked = sorted(names, key=lambda name: (name != "index", order.get(name, len(order)), name))
            full.append({title: [f"{folder}/{name}.md" for name in ranked]})
        else:
            full.append(item)
    return full


def filled(markdown: str, name: str) -> str:
    """A page's text with its markers replaced; ``name`` is the page's own."""

    def fill(match: re.Match[str]) -> str:
        match match.groups():
            case ("systems", _):
                return systems()
            case ("claim", _):
                return claim(name, recorded(name))
            case ("measured", _):
                return measured(name)
            case ("fields", _):
                return fields(name)
            case ("tests", room):
                return tests(room)
            case (_, package):
                return modules(package)

    return MARKER.sub(fill, markdown)


def entries() -> list[dict[str, Any]]:
    """The index of methods."""
    found: list[dict[str, Any]] = json.loads((PACKAGE / "index.json").read_text())
    return found


def recorded(name: str) -> dict[str, Any] | None:
    """The recorded result of a system's claim."""
    path = PACKAGE / "claims" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def systems() -> str:
    """Two tables: systems with the verdict of their claim, and the classics."""
    parts = []
    for title, classic in (("Systems", False), ("Classics", True)):
        rows = []
        for entry in entries():
            if entry["classic"] != classic:
                continue
            name = entry["name"]
            page = f"[`{name}`]({name}.md)" if (DOCS / "systems" / f"{name}.md").exists() else f"`{name}`"
            paper = f"arXiv {entry['arxiv']}" if entry["arxiv"] else str(entry["year"] or "")
            row = [page, entry["family"], entry["summary"], paper, VERIFIED[entry["verified"]]]
            if not classic:
                result = recorded(name)
                row.append("not recorded" if result is None else verdict(result))
            rows.append(row)
        if rows:
            columns = ["name", "family", "what it gives", "paper", "loss checked against"]
            parts.append(f"## {title}\n\n" + table(columns if classic else [*columns, "claim"], rows))
    return "\n\n".join(parts)


def claim(name: str, result: Mapping[str, Any] | None) -> str:
    """A recorded claim: the statement and its verdict, every arm, every margin, and what it was measured with."""
    if result is None:
        return (
            '!!! note "Not measured yet"\n'
            "    No result of this claim is recorded. Measure it:\n\n"
            f"    ```console\n    $ stillhouse claims {name}\n    ```"
        )
    metrics = list(dict.fromkeys(metric for arm in result["arms"].values() for metric in arm))
    rows = [[f"`{arm}`", *(spread(numbers.get(m, [])) for m in metrics)] for arm, numbers in result["arms"].items()]
    seeds = result["seeds"]
    made_with = ", ".join(f"{key} {value}" for key, value in result["environment"].items() if key != "platform")
    parts = [
        f'!!! {"success" if result["holds"] else "failure"} "The claim {verdict(result)}"\n    {result["claim"]}',
        table(["arm", *(f"`{metric}`" for metric in metrics)], rows),
        f"Mean and standard deviation over {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}.",
        "\n".join(f"- {margin['finding']}." for margin in result["margins"]),
        result.get("remark", ""),
        f"Repeat it: `{result['command']}` ({result['seconds'] / 60:.0f} minutes of runs). Measured {result['date'][:10]} with "
        f"{made_with}.",
    ]
    return "\n\n".join(part for part in parts if part)


def measured(name: str, folder: Path = DOCS / "benchmarks") -> str:
    """What the tables of all methods say of one: its rows and the baseline's, the one that has nothing to be compared with."""
    parts = []
    for path in sorted(folder.glob("*.md")):
        for section in re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:]:
            lines = [line for line in section.splitlines() if line.startswith("|")]
            own = [line for line in lines[2:] if line.startswith(f"| `{name}`")]
            if own:
                baselines = [line for line in lines[2:] if line.split("|")[3:5] == ["  ", "  "] and line not in own]
                title = section.partition("\n")[0]
                parts.append("\n".join([f"{title}:\n", *lines[:2], *own, *baselines]))
    return "\n\n".join(parts) or "Not measured in the tables yet."


def verdict(result: Mapping[str, Any]) -> str:
    """The word for what a claim did."""
    return "holds" if result["holds"] else "fails"


def fields(name: str) -> str:
    """The fields of a method."""
    from stillhouse.cli.info import describe
    from stillhouse.registry import method_class

    described = [describe(field, info) for field, info in method_class(name).model_fields.items()]
    rows = [[f"`{f['field']}`", f["type"], f"`{f['default']}`", f["description"]] for f in described]
    return table(["field", "type", "default", "meaning"], rows)


def modules(package: str) -> str:
    """mkdocstrings blocks for every public module of a package, or for a module."""
    place = SOURCE.joinpath(*package.split("."))
    if not place.is_dir():
        return f"::: {package}"
    names = sorted(path.stem for path in place.glob("*.py") if not path.stem.startswith("_"))
    blocks = [
        f"## {package}.{name}\n\n::: {package}.{name}\n    options:\n      show_root_heading: false\n"
        f"      show_root_toc_entry: false"
        for name in names
    ]
    return "\n\n".join(blocks)


def tests(room: str) -> str:
    """The tests below ``tests/<room>``, file by file."""
    parts = []
    for path in sorted((DOCS.parent / "tests" / room).glob("test_*.py")):
        tree = ast.parse(path.read_text())
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        named = [name.removeprefix("test_").replace("_", " ") for name in names if name.startswith("test_")]
        parts.append(f"`tests/{room}/{path.name}`\n\n" + "\n".join(f"- {sentence}" for sentence in named))
    return "\n\n".join(parts)


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation, with as many digits as the deviation supports."""
    if None in values:
        return "not finite"
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = statistics.stdev(values)
    if deviation == 0 or not math.isfinite(deviation):
        return f"{mean:.4g} ± {deviation:.2g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])

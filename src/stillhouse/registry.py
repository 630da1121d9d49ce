"""Names of methods to their classes. Reading names and titles imports no method: a generated index tells them.

The index ``index.json`` is written by ``python -m stillhouse.registry``, with the tables of the README, and kept fresh by a
test. Methods of other packages are found through the entry point group ``stillhouse.methods``.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from stillhouse.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

    from stillhouse.engine import Method

GROUP = "stillhouse.methods"
INDEX = Path(__file__).parent / "index.json"
RECIPES = Path(__file__).parent / "recipes"
README = Path(__file__).parents[2] / "README.md"


class Entry(TypedDict):
    """What is known of a method without importing it."""

    name: str
    family: str
    title: str
    arxiv: str
    year: int | None
    summary: str
    classic: bool
    verified: str
    target: str


def entries() -> list[Entry]:
    """Every method: those of stillhouse in the index's order, then installed plug-ins."""
    return own_entries() + [_plugin_entry(point) for point in _plugins()]


def own_entries() -> list[Entry]:
    """The methods of stillhouse itself."""
    own: list[Entry] = json.loads(INDEX.read_text())
    return own


def method_class(name: str) -> type[Method]:
    """The class of the method ``name``.

    Raises:
        UserError: there is no such method, or a plug-in does not hold one.
    """
    found = {entry["name"]: entry for entry in entries()}
    if name not in found:
        raise UserError(f"there is no method {name!r}; {nearest(name, found)}")
    module, _, attribute = found[name]["target"].partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the method {name!r} cannot be imported from {found[name]['target']!r}: {error}.") from None
    return cast("type[Method]", cls)


def recipes(name: str) -> dict[str, Path]:
    """The recipes that come with a method, by scale: ``small`` runs anywhere, ``paper`` names real models and data.

    A plug-in's recipes lie in a directory ``recipes/<name>/`` beside the module of its class.
    """
    home = RECIPES / name
    if not home.is_dir():
        for point in _plugins():
            if point.name == name:
                module = import_module(point.value.partition(":")[0])
                home = Path(module.__file__ or "").parent / "recipes" / name
    return {path.stem: path for path in sorted(home.glob("*.yaml"), reverse=True)}


def _plugins() -> list[EntryPoint]:
    if not _declared():
        return []
    from importlib.metadata import entry_points

    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _declared() -> bool:
    """Whether an installed package names the group at all: looked up in its files, which is faster than the library."""
    homes = [Path(place or ".") for place in sys.path]
    # What is installed in another form than a directory of files is the library's to find.
    if any(home.is_file() for home in homes):
        return True
    found = (path for home in homes for path in home.glob("*-info/entry_points.txt"))
    return any(f"[{GROUP}]" in path.read_text(encoding="utf-8", errors="replace") for path in found)


def _plugin_entry(point: EntryPoint) -> Entry:
    summary = point.dist.metadata["Summary"] if point.dist is not None else ""
    return Entry(
        name=point.name,
        family="plug-in",
        title=summary or point.value,
        arxiv="",
        year=None,
        summary=f"from {point.dist.name if point.dist is not None else point.value}",
        classic=False,
        verified="formula",
        target=point.value,
    )


def read_methods() -> list[Entry]:
    """The index as the code of :mod:`stillhouse.methods` says it now."""
    from stillhouse.engine import Method

    home = Path(__file__).parent / "methods"
    found: list[Entry] = []
    for path in sorted(home.rglob("*.py")):
        module_name = ".".join(("stillhouse.methods", *path.relative_to(home).with_suffix("").parts))
        module = import_module(module_name.removesuffix(".__init__"))
        for cls in vars(module).values():
            if not (isinstance(cls, type) and issubclass(cls, Method)):
                continue
            if cls.__module__ == module.__name__ and "name" in cls.__dict__:
                found.append(_entry(cls))
    return sorted(found, key=lambda entry: (entry["classic"], entry["family"], entry["name"]))


def _entry(cls: Any) -> Entry:
    return Entry(
        name=cls.name,
        family=cls.family,
        title=cls.paper.title,
        arxiv=cls.paper.arxiv,
        year=cls.paper.year,
        summary=cls.summary,
        classic=cls.classic,
        verified=cls.verified,
        target=f"{cls.__module__}:{cls.__name__}",
    )


def readme_rows(found: Sequence[Entry], *, classic: bool) -> str:
    """The README's table of the systems, or of the classics."""
    rows = ["| name | what it gives | paper |", "|---|---|---|"]
    for entry in found:
        if entry["classic"] == classic:
            paper = f"arXiv {entry['arxiv']}" if entry["arxiv"] else str(entry["year"] or "")
            rows.append(f"| [`{entry['name']}`](docs/systems/{entry['name']}.md) | {entry['summary']} | {paper} |")
    return "\n".join(rows)


def filled(readme: str, found: Sequence[Entry]) -> str:
    """A README with the tables between its markers ``<!-- systems -->`` ... ``<!-- end -->`` as the index has them."""
    for marker, classic in (("systems", False), ("classics", True)):
        table = f"<!-- {marker} -->\n\n{readme_rows(found, classic=classic)}\n\n<!-- end -->"
        readme = re.sub(rf"<!-- {marker} -->.*?<!-- end -->", lambda _, table=table: table, readme, flags=re.DOTALL)  # type: ignore[misc]
    return readme


if __name__ == "__main__":
    INDEX.write_text(json.dumps(read_methods(), indent=1) + "\n")
    # An installed package has none.
    if README.exists():
        README.write_text(filled(README.read_text(), own_entries()))

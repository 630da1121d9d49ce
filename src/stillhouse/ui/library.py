"""The runs below a directory: found without following links out of it, read once and again only where they changed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stillhouse.errors import UserError
from stillhouse.report.formatting import number
from stillhouse.report.reading import RunFiles, direction, read_run, yaml_mapping

State = Literal["finished", "running", "stopped", "broken"]

READ = ("recipe.yaml", "run.json", "metrics.json", "metrics.jsonl", "cost.json", "checkpoints/yields.json")
"""What the list shows comes from these files of a run; where none of them changed, nothing is read again."""

FRESH = 20.0
"""An unfinished run whose log is younger than so many seconds is running, also where another machine writes it."""

TAIL = 16_384
"""Bytes of the end of a log that are read to say how far a run is."""

LARGEST = 4_000_000
"""A larger recipe or JSON file is not one that a run writes."""


@dataclass(frozen=True)
class Summary:
    """A run in the list.

    Attributes:
        id: its path below the directory, which also is its address.
        method: the method's name.
        data: its data set in short.
        seed: its seed; None where it was not written down.
        started: when it was started, UTC; when its recipe was written, where that is not known.
        state: finished, running, stopped, or broken: it cannot be read.
        detail: how far it is, or what is wrong.
        numbers: (name, value) of its main measurements.
        seconds: of training and measuring so far.
    """

    id: str
    method: str
    data: str
    seed: int | None
    started: str
    state: State
    detail: str = ""
    numbers: tuple[tuple[str, float], ...] = ()
    seconds: float | None = None

    @property
    def text(self) -> str:
        """What a search looks in."""
        return f"{self.id} {self.method} {self.data} seed {self.seed} {self.state} {self.started}".lower()


class Library:
    """All runs below ``root``.

    Nothing outside is read: directories that are links are not entered, and a run with a link that leads out is broken.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is no directory; give one that holds runs.")
        self.root = root
        self._resolved = root.resolve()
        self._lock = threading.Lock()
        self._known: dict[str, Path] = {}
        self._summaries: dict[str, tuple[Any, Summary]] = {}
        self._runs: dict[str, tuple[Any, RunFiles]] = {}

    def summaries(self) -> list[Summary]:
        """Every run, the newest first."""
        with self._lock:
            self._known = dict(self._places())
            locked = _locked_files()
            self._summaries = {name: kept for name, kept in self._summaries.items() if name in self._known}
            found = [self._summary(name, place, locked) for name, place in self._known.items()]
        return sorted(found, key=lambda run: (run.started, run.id), reverse=True)

    def place(self, name: str) -> Path:
        """The directory of a run.

        Raises:
            KeyError: there is no run of this name below the directory.
            UserError: it holds a link that leads out of the directory.
        """
        # Only what was found by looking is ever opened: a name is compared, and never joined to a path.
        if name not in self._known:
            with self._lock:
                self._known = dict(self._places())
        place = self._known[name]
        if not (place / "recipe.yaml").exists():
            raise KeyError(name)
        for link in (*(part for part in (place, *place.parents) if part.is_symlink()), *_links(place)):
            if not link.resolve().is_relative_to(self._resolved):
                raise UserError(f"{link} leads out of {self.root}, so this run is not opened.")
        return place

    def run(self, name: str) -> RunFiles:
        """A run, read whole; again only where it changed.

        Raises:
            KeyError: there is none of this name.
            UserError: it cannot be read.
        """
        place = self.place(name)
        stamp = _stamp(place)
        with self._lock:
            kept = self._runs.get(name)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        found = read_run(place)
        with self._lock:
            self._runs[name] = stamp, found
        return found

    def _places(self) -> Iterator[tuple[str, Path]]:
        """Name and directory of every run; what is within a run belongs to it."""
        waiting = [self.root]
        while waiting:
            here = waiting.pop()
            try:
                with os.scandir(here) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
            except OSError:
                continue
            names = {entry.name for entry in inside}
            if "recipe.yaml" in names and names & {"run.json", "metrics.jsonl", "metrics.json", "checkpoints"}:
                name = here.relative_to(self.root).as_posix()
                yield (self._resolved.name if name == "." else name), here
                continue
            waiting += [
                Path(entry.path)
                for entry in inside
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            ]

    def _summary(self, name: str, place: Path, locked: frozenset[int]) -> Summary:
        stamp = _stamp(place)
        kept = self._summaries.get(name)
        if kept is not None and kept[0] == stamp and kept[1].state in ("finished", "broken"):
            return kept[1]
        try:
            self._refuse_links(place)
            summary = _read_summary(name, place)
        except (UserError, OSError) as error:
            summary = Summary(name, "", "", None, _when(place), "broken", str(error))
        if summary.state == "stopped" and _running(place, locked):
            summary = replace(summary, state="running")
        self._summaries[name] = stamp, summary
        return summary

    def _refuse_links(self, place: Path) -> None:
        for file in (place / "checkpoints", *(place / inside for inside in READ)):
            if file.is_symlink() and not file.resolve().is_relative_to(self._resolved):
                raise UserError(f"{file} leads out of {self.root}.")


def _links(place: Path) -> Iterator[Path]:
    """Every link below a directory; links are not entered."""
    for here, folders, files in os.walk(place, followlinks=False):
        yield from (path for name in (*folders, *files) if (path := Path(here, name)).is_symlink())


def _stamp(place: Path) -> tuple[Any, ...]:
    """Changes when a file of the run does that :data:`READ` names."""
    found: list[tuple[int, int, int] | None] = []
    for name in READ:
        try:
            status = os.stat(place / name)
        except OSError:
            found.append(None)
            continue
        found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _read_summary(name: str, place: Path) -> Summary:
    text = _text(place / "recipe.yaml")
    if not re.search(r"^method:", text, flags=re.M):
        raise UserError("recipe.yaml names no method.")
    # Whole recipes take long to read; the list needs three of its keys.
    recipe = yaml_mapping(_blocks(text, ("method", "seed", "data")))
    summary = Summary(
        name,
        method=str(recipe.get("method") or "?"),
        data=_data(recipe.get("data")),
        seed=_whole(recipe.get("seed")),
        started=_when(place),
        state="stopped",
    )
    try:
        about = _json(place / "run.json") or {}
        told = re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", str(about.get("started") or ""))
        started = told[0].replace("T", " ") if told else summary.started
        summary = replace(summary, seed=_whole(about.get("seed", summary.seed)), started=started)
        costs = (_json(place / "cost.json") or {}).values()
        seconds = [v for v in costs if isinstance(v, int | float) and math.isfinite(v)]
        summary = replace(summary, seconds=math.fsum(seconds) if seconds else None)
        metrics = _json(place / "metrics.json")
        if metrics is not None:
            return replace(summary, state="finished", numbers=main_numbers(metrics))
        detail, numbers = _so_far(place)
        return replace(summary, numbers=numbers, detail=detail)
    except UserError as error:
        return replace(summary, state="broken", detail=str(error))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def main_numbers(metrics: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The run's own test numbers, else the first that say what is better.

    >>> main_numbers({"validation/nll": 0.2, "test/teacher/accuracy": 0.9, "test/accuracy": 0.8, "parameters/x": 3.0})
    (('test/accuracy', 0.8),)
    """
    named = [(k, float(v)) for k, v in metrics.items() if direction(k) and isinstance(v, int | float)]
    whole = [pair for pair in named if pair[0].startswith("test/") and pair[0].count("/") == 1]
    rest = [pair for pair in named if not pair[0].startswith(("parameters", "nfe"))]
    return tuple((whole or rest)[:2])


def _data(spec: Any) -> str:
    if not isinstance(spec, Mapping):
        return str(spec or "")
    kind, path = str(spec.get("kind") or ""), spec.get("path")
    return f"{kind}:{path}" if path else kind


def _when(place: Path) -> str:
    """When the recipe was written."""
    try:
        written = (place / "recipe.yaml").lstat().st_mtime
    except OSError:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(written))


def _so_far(place: Path) -> tuple[str, tuple[tuple[str, float], ...]]:
    """How far an unfinished run is, from the end of its log: in words, and its last validation."""
    rows = _last_rows(place / "metrics.jsonl")
    if not rows:
        return "nothing was logged yet", ()
    stage, step = str(rows[-1]["stage"]), rows[-1]["step"]
    planned = next((item.get("steps") for item in _yields(place) if item.get("name") == stage), None)
    detail = f"{stage}, step {number(step)}" + (f" of {number(planned)}" if isinstance(planned, int) else "")
    for row in reversed(rows):
        found = [(k, float(v)) for k, v in row.items() if k.startswith("validation/") and isinstance(v, int | float)]
        if found:
            return detail, tuple(found[:1])
    return detail, ()


def _last_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            # The first line may be cut, and so may the last, which is being written.
            continue
        if isinstance(row, dict) and "stage" in row and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _yields(place: Path) -> list[Mapping[str, Any]]:
    path = place / "checkpoints" / "yields.json"
    try:
        groups = json.loads(_text(path)) if path.is_file() else []
    except ValueError:
        return []
    if not isinstance(groups, list):
        return []
    items = [item for group in groups for item in (group if isinstance(group, list) else [group])]
    return [item for item in items if isinstance(item, dict)]


def _blocks(text: str, keys: tuple[str, ...]) -> str:
    """The top-level blocks of a recipe with these keys, as a recipe of its own."""
    return "".join(
        block for block in re.split(r"^(?=[^\s#-])", text, flags=re.M) if block.partition(":")[0].strip() in keys
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
    except ValueError:
        raise UserError(f"{path.name} is damaged: it is not JSON.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is damaged: it holds a {type(value).__name__} where a dict belongs.")
    return value


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path.name} is larger than any that a run writes.")
    return path.read_text(encoding="utf-8", errors="replace")


def _running(place: Path, locked: frozenset[int]) -> bool:
    with contextlib.suppress(OSError):
        if (place / ".lock").lstat().st_ino in locked:
            return True
    with contextlib.suppress(OSError):
        return time.time() - (place / "metrics.jsonl").lstat().st_mtime < FRESH
    return False


def _locked_files() -> frozenset[int]:
    """Inodes of the files that are locked on this machine: a run holds its lock as long as it is written.

    Read off the kernel's list, where it has one: trying the lock would keep a run from starting.
    """
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return frozenset()
    return frozenset(int(found[1]) for line in lines if (found := re.search(r" [0-9a-f]+:[0-9a-f]+:(\d+) ", line)))

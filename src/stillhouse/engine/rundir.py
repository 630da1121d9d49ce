"""The run directory: one writer, a log that a resumed run continues exactly, everything in open formats."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stillhouse.engine.storage import as_json, write_text
from stillhouse.errors import RunError, UserError

BEGUN = frozenset({".lock", "metrics.jsonl"})
"""What a run that was killed at once may have left."""


def refuse_foreign(path: Path) -> None:
    """Refuse to begin a run in a directory that holds something else; looks only.

    Raises:
        UserError: it is a file, or holds files and no run.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose a new directory as --out.")
    if path.is_dir() and not (path / "recipe.yaml").exists():
        there = sorted(entry.name for entry in path.iterdir() if entry.name not in BEGUN)
        if there:
            raise UserError(
                f"{path} holds other files, such as {there[0]!r}; choose an empty or a new directory as --out."
            )


class RunDirectory:
    """A directory that holds one run.

    Args:
        path: made if missing.
        writes: False in all processes but the main one: nothing is written or locked there.

    Attributes:
        rows: rows in the log so far.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        self._log: Any = None
        self.rows = 0

    def lock(self, *, wait: bool = False) -> None:
        """Become the one writer.

        Raises:
            UserError: another process writes here (and ``wait`` is False).
        """
        if not self.writes:
            return
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise UserError(
                f"{self.path}: another process is writing this run; wait for it or choose another --out."
            ) from None
        self._log = (self.path / "metrics.jsonl").open("ab")

    def release(self) -> None:
        """Give up writing."""
        log, self._log = self._log, None
        try:
            if log is not None:
                with contextlib.suppress(OSError):  # On a full disk the last row is lost, and that was already said.
                    log.close()
        finally:
            self._lock.release()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``; numbers that are not finite, which JSON lacks, are written as null."""
        self.rows += 1
        if self._log is not None:
            finite = {name: as_json(value) for name, value in row.items()}
            self._log.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
            self._log.flush()

    def flush(self) -> None:
        """Hand the log to the disk."""
        if self._log is not None:
            os.fsync(self._log.fileno())

    def offset(self) -> int:
        """Length of the log in bytes."""
        return self._log.tell() if self._log is not None else 0

    def rewind(self, offset: int) -> None:
        """Cut the log back to where a checkpoint was taken: what came after it will be logged again."""
        if self._log is not None:
            if offset > self._log.tell():
                raise RunError(
                    f"{self.path / 'metrics.jsonl'} is shorter than when the last checkpoint was taken, so the run cannot "
                    "go on from it; put the file back or start a new run."
                )
            self._log.truncate(offset)
            self._log.seek(0, os.SEEK_END)
            self.rows = (self.path / "metrics.jsonl").read_bytes().count(b"\n")

    def forget(self, names: Iterable[str], keep: Iterable[str]) -> None:
        """Remove what the yields ``names`` stored, and that the run has ended; what the yields ``keep`` stored stays."""
        if not self.writes:
            return
        (self.path / "metrics.json").unlink(missing_ok=True)
        keep = list(keep)
        for name in names:
            # Names may nest: the folder of the yield 'a' also holds that of the yield 'a/b'.
            kept = {other[len(name) + 1 :].partition("/")[0] for other in keep if other.startswith(f"{name}/")}
            for root, pattern in (("checkpoints", "*"), ("records", "*/")):
                for path in (self.path / root / name).glob(pattern):
                    if path.name not in kept:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finished(self) -> bool:
        """True when the run has ended and its result was written."""
        return (self.path / "metrics.json").exists()

    def read(self, name: str) -> Any:
        """A JSON file of the run, or None."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        if self.writes:
            write_text(self.path / name, json.dumps(value, indent=2) + "\n")

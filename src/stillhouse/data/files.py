"""Named sets in local files: the directory is a field, or found by name in ``$STILLHOUSE_DATA``; contents are checked."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import ClassVar

from stillhouse.data.dataset import DataSpec
from stillhouse.errors import UserError


class LocalFiles(DataSpec):
    """A set in files whose content is known."""

    path: str | None = None
    """Directory with the files; by default the set's own in the directory that STILLHOUSE_DATA names."""
    verify: bool = True
    """Refuse files whose content is not the known one; a file of one's own, of which none is known, is taken as it is."""

    folders: ClassVar[tuple[str, ...]]
    """Names that the directory may have inside $STILLHOUSE_DATA."""
    sums: ClassVar[dict[str, tuple[str, ...]]]
    """Known sums (MD5 or SHA-256) of each file's content, after decompression where the file is gzipped."""
    origin: ClassVar[str]
    """What to get and where, for the message when nothing is found."""


class Files:
    """Finds, reads and checks the files of a set.

    Attributes:
        read_sums: SHA-256 of what was read, for the fingerprint.
    """

    def __init__(self, spec: LocalFiles) -> None:
        self.spec = spec
        self.read_sums: list[str] = []
        root = os.environ.get("STILLHOUSE_DATA")
        if spec.path is not None:
            self.places = [Path(spec.path).expanduser()]
        else:
            self.places = [Path(root).expanduser() / name for name in spec.folders] if root else []

    def missing(self) -> str:
        """One sentence: what is not there, where it comes from, where it should be."""
        spec = self.spec
        if spec.path is not None:
            where = f"in {spec.path}"
        elif self.places:
            where = f"under {self.places[0].parent}"
        else:
            where = "because STILLHOUSE_DATA is not set"
        return (
            f"The data set {spec.kind!r} was not found {where}: get {spec.origin}, put it in a directory"
            f" {spec.folders[0]!r} and let STILLHOUSE_DATA name the directory above."
        )

    def find(self, name: str) -> Path | None:
        """The file of that name (gzipped or not) in the first place that has it."""
        for place in self.places:
            for path in (place / name, place / f"{name}.gz"):
                if path.is_file():
                    return path
        return None

    def read(self, name: str) -> bytes | None:
        """The checked content of a file, decompressed; ``None`` if it is not there.

        Raises:
            UserError: if it is damaged or not the known one.
        """
        path = self.find(name)
        if path is None:
            return None
        content = path.read_bytes()
        if path.suffix == ".gz" and not name.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error):
                raise UserError(f"{path} is damaged (it cannot be decompressed); get it again.") from None
        sums = self.spec.sums.get(name)
        if self.spec.verify and sums and not any(_sum_of(content, known) == known for known in sums):
            raise UserError(
                f"{path} is not the known file of {self.spec.kind!r} (its SHA-256 is"
                f" {hashlib.sha256(content).hexdigest()[:16]}...); get it again, or set verify: false to use it as it is."
            )
        self.read_sums.append(hashlib.sha256(content).hexdigest())
        return content


def _sum_of(content: bytes, known: str) -> str:
    """The sum of the kind that ``known`` is, told by its length; MD5 is what the sets' authors published."""
    if len(known) == 32:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()
    return hashlib.sha256(content).hexdigest()

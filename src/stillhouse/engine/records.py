"""Records: what a stage keeps along the way, in memory-mapped files written by index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from stillhouse.engine.distributed import World
from stillhouse.engine.stage import Modules, Stage


class Recorder:
    """Writes a stage's records; writing an index again gives the same bytes, so a resumed run needs no bookkeeping.

    Args:
        stage: the stage with its ``records``.
        directory: where the files go: ``<record>/<tensor>.npy`` with a first dimension of records.
        world: only the main process writes.
    """

    def __init__(self, stage: Stage, directory: Path, world: World) -> None:
        self.stage, self.directory, self.world = stage, directory, world
        self.files: dict[tuple[str, str], np.memmap[Any, Any]] = {}

    def take(self, step: int, modules: Modules) -> None:
        """Record what is due at ``step``."""
        for name, record in self.stage.records.items():
            if step % record.every or not self.world.is_main:
                continue
            with torch.no_grad():
                tensors = record.take(modules)
            for key, tensor in tensors.items():
                value = tensor.detach().cpu()
                array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
                self._file(name, key, self.stage.steps // record.every + 1, array)[step // record.every] = array

    def _file(self, record: str, key: str, count: int, like: np.ndarray[Any, Any]) -> np.memmap[Any, Any]:
        if (record, key) not in self.files:
            path = self.directory / record / f"{key}.npy"
            # A file left by a killed run is written on; the rows up to its checkpoint are already right.
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".{path.name}")
                open_memmap(aside, mode="w+", dtype=like.dtype, shape=(count, *like.shape)).flush()
                _claim(aside)
                os.replace(aside, path)
            self.files[record, key] = open_memmap(path, mode="r+")
        return self.files[record, key]

    def flush(self) -> None:
        """Hand what was recorded to the disk."""
        for file in self.files.values():
            file.flush()

    def close(self) -> None:
        """Flush and forget the open files."""
        self.flush()
        self.files.clear()

    def read(self, steps: int) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """The records up to ``steps``, memory-mapped read-only."""
        return {
            name: {
                path.stem: np.load(path, mmap_mode="r")[: steps // record.every + 1]
                for path in sorted((self.directory / name).glob("*.npy"))
            }
            for name, record in self.stage.records.items()
        }


def _claim(path: Path) -> None:
    """Take the file's blocks now: a full disk is an error here, and a crash when a mapped page finds no room later."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

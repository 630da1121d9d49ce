"""A small method whose stages a test writes on the spot, and a runner for it."""

from typing import ClassVar

import pytest
import torch

from stillhouse.data import ObjectData
from stillhouse.engine import Method, Paper, Run, RunDirectory, Settings


def small_data(samples=48, features=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    y = torch.randint(0, classes, (samples,), generator=generator)
    return ObjectData.from_object({"train": (x, y), "validation": (x[:16], y[:16]), "test": (x[:16], y[:16])}).load()


@pytest.fixture(scope="session")
def data():
    return small_data()


@pytest.fixture
def engine(tmp_path, data):
    """``engine(stages, **settings)`` runs a generator function of (method, run) and returns the Run and its Result."""
    made = []

    def execute(stages, *, name="run", seed=0, fields=None, signals=None, listener=None, **settings):
        namespace = {
            "__annotations__": dict.fromkeys(fields or {}, float),
            **(fields or {}),
            "__module__": __name__,
            "name": "scratch",
            "family": "tests",
            "paper": Paper("none", 2026),
            "summary": "made by a test",
            "stages": stages,
        }
        for key in ("name", "family", "paper", "summary"):
            namespace["__annotations__"][key] = ClassVar
        method = type("Scratch", (Method,), namespace)()
        directory = RunDirectory(tmp_path / name)
        directory.lock()
        made.append(directory)
        run = Run(
            method,
            directory,
            seed=seed,
            settings=Settings(device="cpu", **settings),
            data=data,
            signals=signals,
            listener=listener,
        )
        try:
            result = run.execute()
        finally:
            directory.release()
        return run, result

    return execute

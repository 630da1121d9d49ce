"""A writer of run directories for the tests of the report."""

from pathlib import Path

import pytest

from run_writer import RunWriter


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A writer of the run directory ``run``, relative to the present directory, as a user would name it."""
    monkeypatch.chdir(tmp_path)
    return RunWriter(Path("run"))

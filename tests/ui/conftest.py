"""A directory of small runs."""

import os

import pytest

from run_writer import write_run


@pytest.fixture
def runs(tmp_path):
    """A directory with runs of every state; the log of the stopped one is old."""
    home = tmp_path / "runs"
    write_run(home, "kd/0", seed=0, accuracy=0.9, started="2026-01-01T00:00:00+00:00")
    write_run(home, "kd/1", seed=1, accuracy=0.8, started="2026-01-03T00:00:00+00:00")
    write_run(home, "other", method="dkd", data="folder:cats", accuracy=0.7, started="2026-01-02T00:00:00+00:00")
    stopped = write_run(home, "stopped", done=False, started="2026-01-04T00:00:00+00:00")
    os.utime(stopped.path / "metrics.jsonl", (0, 0))
    write_run(home, "broken").text("metrics.json", "{")
    return home

"""The documented example of a method of one's own: found by its entry point, with recipe, resume and report for free."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The example as if it had been installed: its module on the path, and its entry point."""
    site = tmp_path_factory.mktemp("site")
    info = site / "own_method-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-method\nVersion: 0.1.0\nSummary: An example\n")
    (info / "entry_points.txt").write_text("[stillhouse.methods]\nborn-again = own_method:BornAgain\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(EXAMPLE)])}


def command(*arguments):
    return [sys.executable, "-m", "stillhouse", *arguments]


def test_the_example_is_short():
    code = [line for line in (EXAMPLE / "own_method.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 45


def test_it_is_listed_described_run_and_resumed(environment, tmp_path):
    def call(*arguments):
        done = subprocess.run(
            command(*arguments), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "born-again" in [entry["name"] for entry in json.loads(call("list", "--json"))]
    assert "weight_soft" in call("info", "born-again", "--json")
    call("run", "born-again", "--out", "straight", "run.threads=1")
    assert (tmp_path / "straight" / "report.html").exists()

    killed = ["run", "born-again", "--out", "killed", "run.threads=1", "run.checkpoint_every=5"]
    program = subprocess.Popen(command(*killed), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "killed").glob("checkpoints/child/step-*")):
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    call("resume", "killed")
    for name in ("result/child/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name

"""Killed at ten points from a fixed seed, resumed, and equal to a straight run: weights bit for bit, log byte for byte."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")

_random = random.Random(20240229)
# The torture takes 30 + 20 + 20 steps in its three stages and writes a checkpoint every third one.
KILLS = [
    *[("step", n) for n in sorted(_random.sample(range(1, 30), 3))],
    *[("step", n) for n in sorted(_random.sample(range(31, 50), 2))],
    *[("step", n) for n in sorted(_random.sample(range(51, 70), 2))],
    ("write", _random.randrange(2, 8)),
    ("end", 1),
    ("end", 2),
]


def run(directory, *arguments):
    return subprocess.run(
        [sys.executable, str(TORTURE), str(directory), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    done = run(directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), (directory / "metrics.jsonl").read_bytes(), directory


def test_two_equal_runs_are_equal(straight, tmp_path):
    digest, log, _ = straight
    # Other checkpoint times must not change anything either.
    assert run(tmp_path, "--every", 1000).stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(("kind", "count"), KILLS)
def test_a_killed_run_continues_as_if_nothing_had_happened(kind, count, straight, tmp_path):
    digest, log, _ = straight
    killed = run(tmp_path, "--kill", kind, count)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "metrics.json").exists()
    resumed = run(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_killed_again_and_again(straight, tmp_path):
    digest, log, _ = straight
    for kill in (("step", 8), ("step", 15), ("end", 1), ("step", 9)):
        assert run(tmp_path, "--kill", *kill).returncode == -9
    assert run(tmp_path).stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_records_of_a_resumed_run_are_the_same(straight, tmp_path):
    _, _, directory = straight
    run(tmp_path, "--kill", "step", 17)
    run(tmp_path)
    record = Path("records") / "first" / "path" / "weight.npy"
    assert (tmp_path / record).read_bytes() == (directory / record).read_bytes()

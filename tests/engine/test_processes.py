"""Two processes equal one with the doubled batch; two runs may share a cache; a full disk loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.engine.storage import read_tree, write_tree
from stillhouse.errors import RunError

PROGRAM = Path(__file__).with_name("processes.py")
CASES = ["persample", "coupled", "submodule", "functional", "masked", "noisy", "two"]


SINKD = ["sinkd", "sinkd-apart"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in (
        [sys.executable, PROGRAM, one, ",".join(CASES + SINKD), "16"],
        [*launch, PROGRAM, two, ",".join(CASES + SINKD), "8"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_doubled_batch(trained, case):
    one, two = trained
    assert json.loads((one / case / "metrics.json").read_text())["world"] == 1
    assert json.loads((two / case / "metrics.json").read_text())["world"] == 2
    a, b = load_file(one / f"{case}.safetensors"), load_file(two / f"{case}.safetensors")
    start = torch.nn.Linear(4, 8)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert a["net.0.weight"].shape == start.weight.shape


@pytest.mark.parametrize("case", CASES)
def test_the_log_is_written_once_and_means_the_global_batch(trained, case):
    one, two = trained
    rows = [
        [json.loads(line) for line in (home / case / "metrics.jsonl").read_text().splitlines()] for home in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) == 4
    for single, double in zip(*rows, strict=True):
        assert single.keys() == double.keys()
        for key, value in single.items():
            assert double[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6))


def test_sinkd_that_gathers_equals_one_process_with_the_doubled_batch(trained):
    """The method itself, from its teacher to its table; without ``gather`` each process transports within its own half."""
    one, two = ({case: load_file(home / f"{case}.safetensors") for case in SINKD} for home in trained)
    for name, alone in one["sinkd"].items():
        torch.testing.assert_close(two["sinkd"][name], alone, rtol=1e-5, atol=1e-6)
        assert torch.equal(one["sinkd-apart"][name], alone), "a single process has nothing to gather"
    assert not torch.allclose(two["sinkd-apart"]["student.0.weight"], one["sinkd"]["student.0.weight"], atol=1e-4)
    single, double = (
        [json.loads(line) for line in (home / "sinkd" / "metrics.jsonl").read_text().splitlines()] for home in trained
    )
    assert len(single) == len(double)
    assert any("sinkhorn/row_deviation" in row for row in single)
    for row, other in zip(single, double, strict=True):
        assert other == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items()}
    for case, over in (("sinkd", "all processes together"), ("sinkd-apart", "each process on its own")):
        notes = " ".join(json.loads((trained[1] / case / "result" / "tables.json").read_text())["notes"])
        assert f"the samples of {over} (2 processes, 8 samples in each)" in notes


def test_two_runs_at_once_share_a_cache_without_harm(tmp_path):
    environment = {**os.environ, "STILLHOUSE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    recipe = ["run", "sinkd", "epochs=1", "teacher.epochs=2", "cache_teacher=true", "run.device=cpu"]
    programs = [
        subprocess.Popen(
            [sys.executable, "-m", "stillhouse", *recipe, "--out", name],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for program in programs:
        _, stderr = program.communicate(timeout=240)
        assert program.returncode == 0, stderr
    for name in ("metrics.json", "metrics.jsonl", "result/student/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 2, "the teacher and the student alone, once each"
    for value in (tmp_path / "cache").rglob("end"):
        read_tree(value)


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(small_disk):
    write_tree(small_disk / "good", {"weight": torch.ones(1000)})
    with pytest.raises(RunError, match=r"the disk is full: .* was not written; what was written before it is intact"):
        write_tree(small_disk / "good", {"weight": torch.zeros(2_000_000)})
    assert torch.equal(read_tree(small_disk / "good")["weight"], torch.ones(1000))
    assert [path.name for path in small_disk.iterdir()] == ["good"], "nothing half written is left"


# What processes must agree on: see together.py -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    home = tmp_path_factory.mktemp("together")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(Path(__file__).with_name("together.py")), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.mark.parametrize("name", ["unequal", "straight", "resumed"])
def test_all_processes_end_with_the_same_modules(together, name):
    first, second = (load_file(together / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_modules_start_as_the_main_process_made_them(together):
    state = load_file(together / "unequal.1.safetensors")
    torch.manual_seed(100)
    torch.nn.Linear(4, 3)
    assert torch.equal(state["teacher.weight"], torch.nn.Linear(4, 3).weight)
    assert state["odd.flag"].tolist() == [True, True, False]
    assert state["odd.count"] == 0
    assert state["odd.waves"][0, 0] == 1j
    assert torch.equal(state["odd.brief"], torch.full((3, 2), 0.5, dtype=torch.bfloat16))


def test_the_main_process_names_what_is_cached(together):
    for kind in ("computes", "runs"):
        assert len(list((together / "cache" / kind).iterdir())) == 1


def test_processes_with_batch_norm_resume_exactly(together):
    rows = (together / "straight" / "metrics.jsonl").read_bytes()
    assert (together / "resumed" / "metrics.jsonl").read_bytes() == rows
    straight, resumed = (load_file(together / f"{name}.0.safetensors") for name in ("straight", "resumed"))
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key
    assert straight["net.1.num_batches_tracked"] > 0


def test_a_long_computation_is_waited_for_and_a_hang_in_training_is_found(together):
    assert (together / "slow" / "metrics.json").exists()
    # A process that keeps the others waiting within a collective of the training is still found after its time-out.
    assert [json.loads((together / f"hang.{rank}.json").read_text()) for rank in (0, 1)] == [True, True]

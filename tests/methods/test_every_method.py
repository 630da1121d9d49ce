"""What every method owes: its small recipe runs, and stopping or killing it anywhere changes nothing."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.engine import Interrupted, Signals, Silent
from stillhouse.front import run_recipe
from stillhouse.recipe import load_recipe
from stillhouse.registry import INDEX

# The small recipes, made tiny. A method that is missing here fails the test below.
CONDENSED = ["network={kind: convnet, width: 4, depth: 2}", "eval_epochs=4", "eval_networks=2", "features_epochs=1"]
KERNEL = [
    "target.model.channels=[4, 4]",
    "target.epochs=1",
    "network.width=[4, 4]",
    "num_images=6",
    "pool_size=2",
    "pool_steps=4",
    "num_steps=9",
    "batch_size=16",
    "eval_epochs=3",
    "eval_networks=1",
    "protocols=[probe, finetune, data-free]",
    "probe_steps=3",
    "finetune_steps=3",
    "data_free_epochs=3",
    "data_free_teacher={kind: trained, model: 'cnn:4', epochs: 1}",
]
EXPERTS = ["experts.count=2", "experts.epochs=3", "experts.batch_size=512"]
MATCHED = [*CONDENSED[1:], "network.width=4", *EXPERTS, "num_steps=4", "inner_steps=3", "max_start_epoch=2"]
RELABELLED = [
    "network={kind: cnn, channels: [4, 4]}",
    "teacher={kind: trained, model: {kind: cnn, channels: [4, 4]}, epochs: 1}",
    "images_per_class=2",
    "eval_epochs=4",
    "eval_networks=2",
]
DRAWN = ["num_steps=6", "batch_size=4", "eval_samples=12", "probe={kind: cnn, channels: [4]}", "probe_epochs=1"]
SMALL_UNET = "{kind: unet, width: 8, multipliers: [1]}"
CODED = ["data.size=16", "model.widths=[4]", "model.dense_widths=[8]", "num_steps=8", "batch_size=16"]
DISTILLED = ["epochs=1", "teacher.epochs=1", "student.channels=[4, 4]", "teacher.model.channels=[8]"]
LAYERED = ["epochs=1", "teacher.epochs=1", "student.channels=[4, 4, 4]", "teacher.model.channels=[8, 8, 8]"]
TINY = {
    "autoencoder": CODED,
    "barlow-twins": ["epochs=3", "model.channels=[4, 6]", "projector=[8, 8]"],
    "beta-tcvae": CODED,
    "qlae": CODED,
    "quantized-infogan": CODED,
    "datadam": [*CONDENSED, "num_steps=6", "batch_real=4"],
    "dm": [*CONDENSED, "num_steps=6", "batch_real=4"],
    "expert-trajectories": ["network.width=4", *EXPERTS, "sharpness_samples=20"],
    **dict.fromkeys(["mtt", "tesla"], MATCHED),
    "ftd": [*MATCHED, "chains=1"],
    "smooth-trajectories": MATCHED,
    "datm": [*MATCHED, "correct_images=false", "first_max_start_epoch=1", "expansion_steps=2"],
    "denoiser": [*DRAWN, f"model={SMALL_UNET}", "eval_steps=[2, 1]"],
    "clip": ["epochs=2", "batch_size=32", "data.per_class=20", "model.width=6"],
    "dmd2": [
        *DRAWN,
        "generator_every=2",
        f"teacher.model={SMALL_UNET}",
        "teacher.num_steps=4",
        "teacher.batch_size=4",
        "teacher_steps=2",
        "regression_pairs=8",
        "regression_steps=3",
    ],
    "dc": [*CONDENSED, "num_steps=3", "batch_real=4", "outer_loop=2", "inner_loop=2"],
    "dsa": [*CONDENSED, "num_steps=3", "batch_real=4", "outer_loop=2", "inner_loop=2"],
    "herding": CONDENSED,
    "hello": [
        "foundation.data.per_class=12",
        "foundation.epochs=2",
        "foundation.batch_size=32",
        "foundation.model.image.channels=[4, 6, 8]",
        "teacher=cnn:4",
        "teacher_epochs=1",
        "checkpoints=2",
        "labeller_epochs=1",
        "network=cnn:4",
        "eval_batch_size=10",
        "images_per_class=2",
        "pool=12",
        "update_steps=3",
        "eval_epochs=4",
    ],
    "krr-st": KERNEL,
    "mirage": [
        "data.samples=180",
        "network.width=4",
        "eval_networks=1",
        "eval_steps=6",
        "eval_batch_size=8",
        "budget=0.05",
    ],
    "k-center": CONDENSED,
    "random-selection": CONDENSED,
    "rded": [*RELABELLED, "pool=20", "crops=2"],
    "sre2l": [*RELABELLED, "num_steps=6", "batch_size=8"],
    "kd": ["epochs=1", "teacher.epochs=1", "student.channels=[4, 4]", "teacher.model.channels=[8]"],
    "dhkd": DISTILLED,
    "nd-loss": [*DISTILLED, "also=[{kind: kd, weight_soft: {start: 0, end: 1, until: 0.5, by: epoch}}]"],
    "meal-v2": [
        "epochs=1",
        "teacher=[{kind: trained, model: 'cnn:8', epochs: 1}, {kind: trained, model: 'cnn:4', epochs: 1}]",
        "student.channels=[4, 4]",
        "start.epochs=1",
        "mix=cutmix",
    ],
    "mixkd": [*DISTILLED, "study={temperatures: [std], student_mix: [none], teacher_mix: [none, mixup]}"],
    "trg": [*DISTILLED, "student.strides=[2, 1]", "teacher.model.strides=[2]", "data.long_tail=5", "batch_size=16"],
    "sinkd": ["epochs=1", "teacher.epochs=1", "student.channels=[4, 4]", "teacher.model.channels=[8]"],
    "sla": ["epochs=2", "student.channels=[4, 4]", "inference=aggregated", "views_at_once=3"],
    "ssld": [*DISTILLED, "finetune_epochs=1", "per_class=5", "fix={image_size: 10, epochs: 1}"],
    "supervised": ["epochs=1", "model.channels=[4, 4]"],
    "label-smoothing": ["epochs=1", "model.channels=[4, 4]"],
    "ema-teacher": ["epochs=1", "model.channels=[4, 4]"],
    **dict.fromkeys(["at", "cc", "dist", "dkd", "mgd", "nst", "ofd", "pkt", "reviewkd", "rkd", "sp", "vid"], DISTILLED),
    "ab": [*DISTILLED, "init_epochs=1"],
    "ft": [*DISTILLED, "init_epochs=1"],
    "crd": [*DISTILLED, "negatives=16"],
    "fitnet": [*DISTILLED, "init_epochs=1"],
    "fsp": [*LAYERED, "init_epochs=1"],
    "kdsvd": LAYERED,
}
# The stage that a method is about, for those that are killed.
MAIN = {"datadam": "matching", "dmd2": "student", "qlae": "autoencoder", "sinkd": "student"}
NAMES = [entry["name"] for entry in json.loads(INDEX.read_text())]


class Stopper(Silent):
    """Asks the run to stop at one step of each stage, the first time it comes by."""

    def __init__(self, signals, seed):
        self.signals, self.random, self.at, self.seen, self.name = signals, random.Random(seed), {}, set(), ""

    def stage(self, name, steps, done):
        self.name = name
        self.at.setdefault(name, self.random.randrange(1, max(2, steps)))

    def step(self, step):
        if self.name not in self.seen and step >= self.at[self.name]:
            self.seen.add(self.name)
            self.signals.stop = True


def tiny(name, *more):
    return load_recipe(name, [*TINY[name], "run.device=cpu", "run.log_every=3", "run.threads=1", *more], seed=1)


def files(directory: Path) -> dict[str, bytes]:
    kept = [directory / "metrics.jsonl", directory / "metrics.json", *sorted(directory.glob("result/**/*.safetensors"))]
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


def test_every_method_has_a_tiny_form():
    assert set(TINY) == set(NAMES), "a method without a tiny form is a method without these tests"


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_run_that_is_stopped_everywhere_equals_a_straight_one(name, tmp_path):
    recipe = tiny(name)
    straight = run_recipe(recipe, tmp_path / "straight", cache=False)
    assert straight.artefacts
    assert straight.metrics
    assert all(isinstance(value, float) for value in straight.metrics.values())

    signals = Signals()
    stopper = Stopper(signals, seed=name)
    stops = 0
    for _ in range(20):
        try:
            run_recipe(recipe, tmp_path / "stopped", cache=False, listener=stopper, signals=signals)
            break
        except Interrupted:
            stops += 1
            signals.stop = False
    assert stops >= 1
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")


@pytest.mark.parametrize("name", sorted(MAIN))
def test_a_run_that_is_killed_five_times_equals_a_straight_one(name, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), tmp_path, name],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert [life["code"] for life in lives] == [-9] * 5 + [0], "every life but the last is to end by a kill"
    assert [life["kind"] for life in lives].count("write") == 1
    # A life that was ended within the main stage left checkpoints of it, and the next one goes on from the newest.
    continued = [
        (life["left"][-1], after["begun"])
        for life, after in pairwise(lives)
        if life["at"][:2] == [".", MAIN[name]] and life["left"]
    ]
    assert len(continued) >= 2
    assert [begun for _, begun in continued] == [[".", MAIN[name], step] for step, _ in continued]
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """DataDAM and DMD2 in one process and in two, with the same global batch."""
    homes = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        homes.append(tmp_path_factory.mktemp("shared"))
        done = subprocess.run(
            [sys.executable, *launcher, Path(__file__).with_name("shared.py"), homes[-1], "8"],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return homes


@pytest.mark.parametrize("name", ["datadam", "dmd2"])
def test_two_processes_equal_one(name, shared):
    assert [(home / f"{name}.world").read_text() for home in shared] == ["1", "2"]
    one, two = (load_file(home / f"{name}.safetensors") for home in shared)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6)

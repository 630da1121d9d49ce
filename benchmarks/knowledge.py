"""Every method that distils a classifier on the same teacher, student, data and budget: ``docs/benchmarks/knowledge.md``.

The teacher is trained on all the images there are to train on, but for those that choose a model (at most 40,000); the student
sees 2,000 of them. Optimiser, epochs and batches are the same for all; each method's own fields are those of its small recipe.
It is ``stillhouse.compare`` and a page of its numbers: interrupted, the same command goes on.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/knowledge.py [--seeds 5] [--jobs 1] [--out DIR] [--data NAME]
[KEY=VALUE ...]``, with ``STILLHOUSE_DATA``. The whole page goes to ``docs/benchmarks/knowledge.md``, a part of it into DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

import stillhouse
from stillhouse.bench import Comparison, compare
from stillhouse.bench.comparison import ArmResult
from stillhouse.claims.fashion import SHARED, STUDENT, TEACHER

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "knowledge.md"

TEACHER_IMAGES = {"fashion-mnist": 40000, "cifar10": 9000}

EPOCHS_OF_THE_TEACHER = {"fashion-mnist": 5, "cifar10": 30}

EPOCHS, POOL = 12, 5000

METHODS = (
    *("kd", "dkd", "dist", "sinkd", "mixkd", "nd-loss", "dhkd", "meal-v2", "ssld", "sla", "trg"),
    *(
        "fitnet",
        "at",
        "sp",
        "pkt",
        "rkd",
        "vid",
        "crd",
        "cc",
        "nst",
        "ab",
        "ft",
        "fsp",
        "kdsvd",
        "ofd",
        "reviewkd",
        "mgd",
    ),
    *("label-smoothing", "ema-teacher"),
)

CALLED = {"nd-loss": "nd-loss + kd (KD++)"}

PUBLISHED = {
    **{"kd": 73.33, "fitnet": 73.50, "at": 73.44, "sp": 72.94, "cc": 72.97, "vid": 73.09, "rkd": 71.90, "pkt": 73.64},
    **{"ab": 73.17, "ft": 72.86, "fsp": 72.62, "nst": 73.30, "crd": 75.51, "dkd": 76.32, "reviewkd": 75.63},
    **{"dist": 75.79, "nd-loss": 75.54},
}
"""CIFAR-100, resnet32x4 to resnet8x4: CRD's table 1, DKD's table 1, and ReviewKD, DIST and KD++ from the ND loss's table."""

PUBLISHED_ALONE = 72.50


def sources(data: dict[str, Any], out: Path) -> list[str]:
    """The recipes: small ones, or files below ``out`` where a method has a field of its own that depends on data or student."""
    own: dict[str, dict[str, Any]] = {
        "label-smoothing": {"model": STUDENT},
        "ema-teacher": {"model": STUDENT, "decay": 0.99},
        # A pool of unlabelled images is what SSLD is for: more data than the others have, in as many steps.
        "ssld": {
            "pool": {**data, "train_size": POOL},
            "per_class": POOL // 20,
            "num_steps": EPOCHS * 31,
            "warmup_epochs": 1,
            "finetune_epochs": EPOCHS // 2,
        },
    }
    found = []
    for name in METHODS:
        if name not in own:
            found.append(name)
            continue
        path = out / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"method": name, **own[name]}))
        found.append(str(path))
    return found


def compared(name: str, seeds: int, jobs: int, out: Path, overrides: list[str]) -> Comparison:
    """The comparison on one data set."""
    data = {"kind": name, "train_size": 2000}
    teacher = {**TEACHER, "data": {**data, "train_size": TEACHER_IMAGES[name]}, "epochs": EPOCHS_OF_THE_TEACHER[name]}
    fields = {key: value for key, value in SHARED.items() if key not in ("run", "data", "teacher")} | {"epochs": EPOCHS}
    return compare(
        *sources(data, out),
        seeds=seeds,
        jobs=jobs,
        out=out / name,
        metric="test/accuracy",
        settings=SHARED["run"],
        overrides=overrides,
        data=data,
        teacher=teacher,
        command=["python", "benchmarks/knowledge.py", f"--seeds={seeds}"],
        **fields,
    )


def row(arm: ArmResult) -> str:
    """A line of the table."""
    accuracy = arm.metrics["test/accuracy"]
    cells = [f"`{arm.name}`" if arm.name not in CALLED else f"`{arm.name}` with `kd` (KD++)"]
    cells.append(f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}")
    found = arm.differences.get("test/accuracy")
    if found is None:
        cells += ["", ""]
    else:
        low, high = found["interval"]
        cells += [f"{100 * found['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", found["verdict"]]
    published = PUBLISHED.get(arm.name)
    cells.append("" if published is None else f"{published - PUBLISHED_ALONE:+.1f}")
    cells += [f"{arm.metrics['test/nll']['mean']:.2f}", f"{100 * arm.metrics['test/ece']['mean']:.1f}"]
    cells.append("" if arm.cost["seconds"] is None else f"{arm.cost['seconds']:.0f}")
    cells.append(arm.unequal or "")
    return "| " + " | ".join(cells) + " |"


def table(name: str, found: Comparison) -> list[str]:
    """The section of one data set."""
    arms = sorted(found.arms, key=lambda arm: -arm.metrics["test/accuracy"]["mean"])
    verdicts = [arm.differences["test/accuracy"]["verdict"] for arm in arms if arm.differences]
    both = [(arm.metrics["test/accuracy"]["mean"], PUBLISHED[arm.name]) for arm in arms if arm.name in PUBLISHED]
    order = spearmanr(*zip(*both, strict=True)).statistic
    teachers = ", ".join(f"{100 * value:.1f} %" for value in found.teachers.values())
    lines = [
        f"## {name}",
        "",
        f"Teacher {teachers}; {len(found.seeds)} seeds. Of {len(verdicts)} methods {verdicts.count('better')} are better than "
        f"the student trained on labels alone, {verdicts.count('worse')} are worse, and {verdicts.count('within noise')} are "
        f"within noise. The order of the {len(both)} methods with a published figure agrees with the published one to a rank "
        f"correlation of {order:+.2f}.",
        "",
        "| method | accuracy, % | over labels alone, points [95 %] | verdict | published gain | negative log-likelihood | "
        "calibration error, % | seconds | budget |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(arm) for arm in arms),
        "",
    ]
    for note in found.notes:
        lines += [f"- {note}"]
    return lines


def page(found: dict[str, Comparison], command: str) -> str:
    """The whole page."""
    first = next(iter(found.values()))
    versions = ", ".join(f"{name} {first.environment[name]}" for name in ("torch", "python", "processor", "cores"))
    images = " and ".join(f"{TEACHER_IMAGES[name]:,} ({name})" for name in found)

    def channels(model: dict[str, Any]) -> str:
        return ", ".join(str(number) for number in model["channels"])

    return "\n".join(
        [
            "# Knowledge distillation: all methods, one teacher, one student",
            "",
            "Which of them helps a small student that sees few labels, when the teacher knows more? Every method has the same "
            f"frozen teacher (a CNN of {channels(TEACHER['model'])} channels, trained on {images} images), the same student "
            f"(a CNN of {channels(STUDENT)} channels), the same 2,000 images, {EPOCHS} epochs of batches of "
            f"{SHARED['batch_size']}, and SGD at {SHARED['optimizer']['lr']} with momentum and cosine. A method's own fields are "
            "those of its small recipe: the paper's defaults but for what the recipe names. Nothing was tuned on these data, for "
            "no method; a published gain was reached with weights tuned for its networks. The budget is small: a term that slows "
            "the first steps of a student counts against its method here, and may not where there is time.",
            "",
            "*Over labels alone*: the mean difference to the same student without a teacher at equal seeds, and its 95 % "
            "interval (Student's t). *Published gain*: points over a student of 72.50 % on CIFAR-100, resnet32x4 to resnet8x4, "
            "240 epochs (tables of CRD, DKD and the ND loss). Networks, data and budget differ from ours: it is there for the "
            "order, not the size. *Seconds*: one run, with the teacher ready, on one thread of a shared machine. *SSLD* "
            f"does not see the labels at first and learns from a pool of {POOL:,} images without them; *MEAL V2* begins with a "
            "student that was trained on the labels before.",
            "",
            *(line for name, one in found.items() for line in [*table(name, one), ""]),
            f"Repeat with `{command}` (stillhouse {stillhouse.__version__}; {versions}).",
            "",
        ]
    )


def main() -> None:
    """Compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/knowledge"))
    parser.add_argument("--data", action="append", choices=EPOCHS_OF_THE_TEACHER)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    found = {
        name: compared(name, given.seeds, given.jobs, given.out, given.overrides)
        for name in given.data or EPOCHS_OF_THE_TEACHER
    }
    whole = not given.overrides and set(found) == set(EPOCHS_OF_THE_TEACHER)
    target = PAGE if whole else given.out / "knowledge.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(found, f"OMP_NUM_THREADS=1 python benchmarks/knowledge.py --seeds {given.seeds}"))
    print(target)


if __name__ == "__main__":
    main()

"""Anybody's distilled data set judged by the field's fair protocol: against random images, labels and augmentation apart."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.data.distilled import read_card, read_distilled
from stillhouse.engine import (
    Compute,
    Listener,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Signals,
    Stages,
    SubRun,
    Table,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.front import given_data, run_recipe
from stillhouse.methods.datasets.scoring import Scoring, Training
from stillhouse.methods.supervised import Supervised
from stillhouse.metrics import augmentation_robust_score, label_robust_score, paired_difference
from stillhouse.models import ModelSpec, logits
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.siamese import DSA
from stillhouse.recipe import Recipe, build_recipe

PLAIN = DSA(strategy="none")

Rows = list[list[str | float | int]]

TIMED = 5
"""Steps of training whose median gives a network's speed."""


@dataclass(frozen=True)
class Scores:
    """What was measured with one architecture; accuracies have one value per seed.

    Attributes:
        distilled: with the set's own labels and the augmentation of the protocol.
        random: random real images, as many of each class, with labels of the same kind and the same augmentation.
        hard: the set with hard labels.
        plain: the set without augmentation.
        random_plain: random images without augmentation.
        full: mean accuracy on the whole real data with hard labels.
    """

    distilled: list[float]
    random: list[float]
    hard: list[float]
    plain: list[float]
    random_plain: list[float]
    full: float

    @property
    def improvement(self) -> list[float]:
        """Improvement over random selection (IOR)."""
        return _less(self.distilled, self.random)

    @property
    def gap(self) -> list[float]:
        """What is lost to the whole data with hard labels (hard-label recovery, HLR); 0 where all is recovered."""
        return [self.full - value for value in self.hard]

    @property
    def without_augmentation(self) -> list[float]:
        """Improvement over random selection without augmentation."""
        return _less(self.plain, self.random_plain)


class DatasetEvaluation(Scoring):
    """Score a distilled set by DD-Ranking's protocol, on fresh networks at their last epoch.

    The set is never compared by accuracy alone: random real images get labels of the same kind, the same augmentation, the
    same epochs and the same optimiser, a new draw for each seed.
    """

    name: ClassVar[str] = "evaluate-dataset"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", 2025, arxiv="2505.13300"
    )
    summary: ClassVar[str] = "a distilled data set against random images under the same labels and augmentation"

    directory: str = Field(description="where the distilled set is")
    eval_epochs: int = Field(1000, ge=1, description="passes over the tiny set in scoring")
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="learning rates tried for each set and network; the one that is best on the validation split is taken",
    )
    budgets: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.1, 0.3),
        description="parts of the epochs at which the cost curve is measured as well, on networks of their own",
    )
    label_weight: float = Field(0.5, ge=0, le=1, description="weight of the improvement in the label-robust score")
    augment_weight: float = Field(
        0.5, ge=0, le=1, description="weight of the augmented networks in the augmentation-robust score"
    )
    full_epochs: float = Field(30, gt=0, description="passes over the whole real data for the accuracy to be recovered")
    full_networks: int = Field(1, ge=1, description="networks of each architecture that are trained on the whole data")
    full_batch_size: int = Field(64, ge=1, description="batch size of those")
    full_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="optimiser of those"
    )
    teacher: ModelSpec | None = Field(
        None, description="labels random images where the set's labels are soft; the first network by default"
    )

    def stages(self, run: Run) -> Stages:
        """Read the set, train on the whole data, then every comparison."""
        distilled = read_distilled(Path(self.directory), run.data)
        if "test" not in run.data.splits:
            raise UserError(f"data: a set is scored on a test split, and {run.data.name!r} has none.")
        if self.rates and "validation" not in run.data.splits:
            raise UserError(f"rates: they are compared on a validation split, and {run.data.name!r} has none.")
        content = hashlib.sha256(
            b"".join(part.numpy().tobytes() for part in (distilled.images.data, distilled.labels.data))
        )
        # In the name, so that a directory whose set has changed is not taken for the one that was begun.
        yield Compute(f"set-{content.hexdigest()[:8]}", lambda _: len(distilled), form=lambda: len(distilled))
        full: dict[str, float] = {}
        teacher: nn.Module | None = None
        for key, spec in self.architectures().items():
            reached = []
            for number in range(self.full_networks):
                trained = yield self._whole(run, f"full/{key or 'first'}-{number}", spec, number)
                reached.append(trained.metrics["test/accuracy"])
                teacher = teacher if teacher is not None else trained.model
            full[key] = fmean(reached)
        if self.teacher is not None:
            trained = yield self._whole(run, "teacher", self.teacher, 0)
            teacher = trained.model
        own = {"pixel_values": distilled.images.detach(), "labels": distilled.targets().detach()}
        soft = distilled.target != "hard"
        drawn = yield Compute("random", partial(self._random, run, distilled, teacher if soft else None))
        sets = {"distilled": [own] * self.eval_networks, "random": self._drawn(run, drawn, soft=soft)}
        found: dict[str, Scores] = {}
        curve: dict[int, dict[str, list[float]]] = {}
        parts = {max(1, round(part * self.eval_epochs)) for part in self.budgets} - {self.eval_epochs}
        for key, spec in self.architectures().items():
            found[key], trainings = yield from self._scored(run, key, spec, distilled, sets, full[key])
            if not key:
                curve = {self.eval_epochs: {"distilled": found[key].distilled, "random": found[key].random}}
                for epochs in sorted(parts):
                    shorter = {
                        name: [replace(one, epochs=epochs) for one in several] for name, several in trainings.items()
                    }
                    curve[epochs] = yield from self.trained(run, f"after-{epochs}", shorter)
        speeds: dict[str, float] = yield Compute("speed", lambda _: self._speeds(run, own))
        return self._concluded(run, distilled, found, curve, speeds)

    def _whole(self, run: Run, name: str, spec: ModelSpec, number: int) -> SubRun:
        fields = {
            "data": self.data,
            "model": spec,
            "epochs": self.full_epochs,
            "batch_size": min(self.full_batch_size, len(run.data.split("train"))),
            "optimizer": self.full_optimizer,
        }
        return SubRun(name, Supervised(**fields), seed=number, data=run.data)

    def _random(self, run: Run, distilled: DistilledSet, teacher: nn.Module | None, home: Path) -> dict[str, Any]:
        """A draw of real images for each seed, as many of each class as in the set, and their soft labels."""
        split, classes = run.data.split("train"), distilled.class_of
        assert classes is not None
        counts = torch.bincount(classes, minlength=distilled.num_classes or 0).tolist()
        members = split.by_class()
        for label, count in enumerate(counts):
            if count > len(members[label]):
                raise UserError(
                    f"The set in {self.directory} has {count} images of class {label}, more than the {len(members[label])} "
                    f"training images of {run.data.name!r}, so there are no random ones to compare it with."
                )
        index, labels = [], []
        for _ in range(self.eval_networks):
            each = [members[label][torch.randperm(len(members[label]))[:count]] for label, count in enumerate(counts)]
            index.append(torch.cat(each))
            if teacher is not None:
                teacher.to(run.world.device)
                with measuring(teacher):
                    batches = [split.batch(part, device=run.world.device) for part in torch.split(index[-1], 512)]
                    labels.append(torch.cat([logits(teacher, batch).float().softmax(-1).cpu() for batch in batches]))
        return {"index": torch.stack(index), "labels": torch.stack(labels) if labels else torch.zeros(0)}

    def _drawn(self, run: Run, drawn: Mapping[str, Tensor], *, soft: bool) -> list[dict[str, Tensor]]:
        split, found = run.data.split("train"), []
        for number, index in enumerate(drawn["index"]):
            images = torch.cat([split.batch(part)["pixel_values"] for part in index.split(512)])
            found.append({"pixel_values": images, "labels": drawn["labels"][number] if soft else split.labels[index]})
        return found

    def _scored(
        self,
        run: Run,
        key: str,
        spec: ModelSpec,
        distilled: DistilledSet,
        sets: Mapping[str, Sequence[Mapping[str, Tensor]]],
        full: float,
    ) -> Generator[Any, Any, tuple[Scores, dict[str, list[Training]]]]:
        """All comparisons with one architecture."""
        mark = f"-{key}" if key else ""
        standard = self.eval_optimizer
        if distilled.lr is not None:
            standard = standard.scaled(distilled.lr.item() / standard.lr)
        trainings: dict[str, list[Training]] = {}
        for name, several in sets.items():
            optimizer = standard
            if self.rates:
                optimizer = yield from self._rate(run, f"{name}{mark}", self.training(spec, several[0]), standard)
            trainings[name] = [replace(self.training(spec, one), optimizer=optimizer) for one in several]
        asked = dict(trainings)
        if distilled.target != "hard":
            hard = {"pixel_values": distilled.images.detach(), "labels": distilled.labels.detach().argmax(1)}
            asked["hard"] = [replace(one, tensors=hard, optimizer=standard) for one in trainings["distilled"]]
        if self.augment.operations:
            asked |= {
                f"{name}-plain": [replace(one, augment=PLAIN) for one in several] for name, several in trainings.items()
            }
        found = yield from self.trained(run, key or "first", asked)
        scores = Scores(
            distilled=found["distilled"],
            random=found["random"],
            hard=found.get("hard", found["distilled"]),
            plain=found.get("distilled-plain", found["distilled"]),
            random_plain=found.get("random-plain", found["random"]),
            full=full,
        )
        return scores, trainings

    def _rate(self, run: Run, name: str, training: Training, standard: Optimizer) -> Generator[Any, Any, Optimizer]:
        """The optimiser at the rate that is best on the validation split; the first of equal ones."""
        tried = {f"{number}": standard.scaled(rate / standard.lr) for number, rate in enumerate(self.rates)}
        several = {key: [replace(training, optimizer=optimizer)] for key, optimizer in tried.items()}
        found = yield from self.trained(run, f"rate-{name}", several, on="validation")
        return tried[max(found, key=lambda key: found[key][0])]

    def _speeds(self, run: Run, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Seconds in which the first network is trained on one image, in batches of the protocol and of the whole data."""
        found, facts = {}, run.data.facts
        for name, size in (("tiny", min(self.eval_batch_size, len(tensors["labels"]))), ("full", self.full_batch_size)):
            net = self.architecture().build(facts).to(run.world.device).train()
            optimizer = self.eval_optimizer.build(list(net.parameters()))
            batch = run.data.split("train").batch(
                range(min(size, len(run.data.split("train")))), device=run.world.device
            )
            spent = []
            for _ in range(TIMED):
                started = time.perf_counter()
                optimizer.zero_grad()
                augment = self.augment if name == "tiny" else PLAIN
                self.train_loss(augment, Modules(net=net), Batch(batch), run)["ce"].backward()  # type: ignore[union-attr]
                optimizer.step()
                if run.world.device.type == "cuda":
                    torch.cuda.synchronize()
                spent.append((time.perf_counter() - started) / len(batch["labels"]))
            found[name] = median(spent)
        return found

    def _concluded(
        self,
        run: Run,
        distilled: DistilledSet,
        found: Mapping[str, Scores],
        curve: Mapping[int, Mapping[str, list[float]]],
        speeds: Mapping[str, float],
    ) -> Result:
        metrics: dict[str, float] = {}
        fair: Rows = []
        apart_of: Rows = []
        plain: Rows = []
        for key, scores in found.items():
            spec = self.architectures()[key]
            robust = [
                label_robust_score(improved, gap, weight=self.label_weight)
                for improved, gap in zip(scores.improvement, scores.gap, strict=True)
            ]
            apart = [
                augmentation_robust_score(augmented, without, weight=self.augment_weight)
                for augmented, without in zip(scores.improvement, scores.without_augmentation, strict=True)
            ]
            several = {
                "distilled/accuracy": scores.distilled,
                "random/accuracy": scores.random,
                "hard/accuracy": scores.hard,
                "distilled-plain/accuracy": scores.plain,
                "random-plain/accuracy": scores.random_plain,
                "improvement_over_random": scores.improvement,
                "hard_label_recovery_gap": scores.gap,
                "label_robust_score": robust,
                "augmentation_robust_score": apart,
            }
            for name, values in several.items():
                first, _, last = name.partition("/")
                path = "/".join(part for part in (first, key, last) if part)
                metrics[f"test/{path}"] = fmean(values)
                metrics[f"test/{path}_std"] = pstdev(values)
            metrics["/".join(part for part in ("test/full", key, "accuracy") if part)] = scores.full
            network = spec.kind + (" (unseen)" if key else "")
            fair.append(
                [network, *map(_cell, (scores.distilled, scores.random, scores.improvement)), round(scores.full, 4)]
            )
            apart_of.append([network, *map(_cell, (scores.gap, robust, scores.without_augmentation, apart))])
            plain.append([network, *map(_cell, (scores.hard, scores.plain, scores.random_plain))])
        metrics["test/accuracy"] = metrics["test/distilled/accuracy"]
        count, whole = len(distilled), len(run.data.split("train"))
        rows: Rows = []
        for epochs, reached in sorted(curve.items()):
            cost = round(count * epochs * speeds["tiny"], 3)
            rows.append([f"{count} images", count * epochs, cost, *(_cell(several) for several in reached.values())])
        seen = round(whole * self.full_epochs)
        rows.append([f"all {whole}", seen, round(seen * speeds["full"], 3), f"{found[''].full:.3f}", ""])
        line = paired_difference(found[""].improvement)
        notes = [
            f"improvement over random selection with {self.architecture().kind}: {line.mean:+.4f}"
            + (f" (95 % interval {line.interval[0]:+.4f} to {line.interval[1]:+.4f})" if line.interval else "")
            + (", told from noise." if line.clear else ", not told from noise."),
            f"{distilled.target} labels, {distilled.bytes:,} bytes"
            + (
                f", learned rate {distilled.lr.item():.4g} in place of the optimiser's"
                if distilled.lr is not None
                else ""
            )
            + f"; {self.eval_networks} fresh networks each, last epoch, a new random draw for each.",
        ]
        title = f"{count} distilled images of {run.data.name} in {Path(self.directory).name}"
        return Result(
            metrics=metrics,
            tables=[
                Table(title, ["network", "distilled", "random", "improvement", "all data"], fair),
                Table(
                    "Apart from labels and augmentation",
                    ["network", "gap to all", "label-robust", "gain, plain", "aug-robust"],
                    apart_of,
                ),
                Table("What these come from", ["network", "hard labels", "distilled, plain", "random, plain"], plain),
                Table(
                    f"Cost curve of {self.architecture().kind}",
                    ["trained on", "images seen", "seconds", "distilled", "random"],
                    rows,
                ),
            ],
            notes=notes,
        )


def evaluation_recipe(
    directory: str | Path,
    *,
    data: Any = None,
    models: Sequence[Any] = (),
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Recipe:
    """The recipe of :func:`evaluate_dataset`: what is not given is as the set's card says, where it has one.

    Raises:
        UserError: a field is wrong, or nothing says which data set it stands for.
    """
    card = read_card(Path(directory))
    protocol = card.get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    names = {"network": "network", "augment": "augment", "epochs": "eval_epochs", "batch_size": "eval_batch_size"}
    names["optimizer"] = "eval_optimizer"
    values: dict[str, Any] = {field: protocol[name] for name, field in names.items() if name in protocol}
    if models:
        values |= {"network": models[0], "eval_architectures": list(models[1:])}
    if seeds is not None:
        values["eval_networks"] = seeds
    if data is None and not any(override.startswith(("data=", "data.kind=")) for override in overrides):
        data = card.get("data") or card.get("source")
        if data is None:
            raise UserError(
                f"{directory} does not say which data set it stands for; name it, as in --data fashion-mnist."
            )
    values |= {"directory": str(directory), "seed": seed, "run": dict(settings or {}), **fields}
    if data is not None:
        values["data"] = data
    return build_recipe(values, overrides, cls=DatasetEvaluation)


def evaluate_dataset(
    directory: str | Path,
    *,
    data: Any = None,
    validation: Any = None,
    test: Any = None,
    models: Sequence[Any] = (),
    seeds: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    cache: bool = True,
    listener: Listener | None = None,
    signals: Signals | None = None,
    about: dict[str, Any] | None = None,
    **fields: Any,
) -> Result:
    """Score a distilled data set by the field's fair protocol.

    Args:
        directory: the set: an export of this project, a data set of ``datasets.save_to_disk``, or one folder of pictures per
            class.
        data: the real data set, as :func:`stillhouse.distil` takes it; as the card says by default.
        validation: validation data in the same form.
        test: test data in the same form.
        models: networks to train; the first is the one of the cost curve. The card's network, else ``convnet``, by default.
        seeds: fresh networks, and random draws, for each number; 5 by default.
        seed: of all draws.
        out: run directory, where an interrupted evaluation goes on; below ``runs/evaluate-dataset`` by default.
        overrides: ``key=value`` for any field, as on the command line.
        settings: device, precision, threads, ...
        cache: reuse networks trained on the whole data across evaluations.
        listener: told of progress.
        signals: asks for a checkpoint and a stop.
        about: written as ``run.json``.
        **fields: fields of :class:`DatasetEvaluation`: ``eval_epochs``, ``augment``, ``rates``, ...

    Returns:
        The result; its numbers are in ``metrics``, its tables in ``tables``.

    Raises:
        UserError: the set, the data or a field is wrong.
    """
    if (given := given_data(data, validation, test)) is not None:
        data = given
    told = {"data": data, "models": models, "seeds": seeds, "overrides": overrides, "settings": settings, "seed": seed}
    recipe = evaluation_recipe(directory, **told, **fields)
    home = Path(out) if out is not None else default_out(recipe)
    return run_recipe(recipe, home, cache=cache, listener=listener, signals=signals, about=about)


def default_out(recipe: Recipe) -> Path:
    """Where an evaluation goes: equal for an equal recipe, so that the same command continues it."""
    method: Any = recipe.method
    name = f"{Path(method.directory).resolve().name}-{method.digest()[:6]}" + (f"-{recipe.seed}" if recipe.seed else "")
    return Path("runs") / "evaluate-dataset" / name


def _less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _cell(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}±{pstdev(values):.3f}"

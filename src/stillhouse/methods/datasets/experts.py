"""Expert trajectories: networks trained on the real data, with their weights after every epoch."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.data import Batch, Data
from stillhouse.engine import (
    Compute,
    Later,
    Losses,
    Method,
    Modules,
    Optimizer,
    Paper,
    Record,
    Result,
    Run,
    Stage,
    Stages,
    SubRun,
    Table,
    Update,
    sgd,
)
from stillhouse.errors import UserError
from stillhouse.losses.sharpness import gsam, input_gradient_penalty
from stillhouse.methods.supervised import held_out
from stillhouse.metrics.paths import step_lengths, top_eigenvalue, variation
from stillhouse.models import ConvNetSpec, ModelSpec, logits
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.siamese import DSA
from stillhouse.spec import Spec

FILE = "trajectories.json"
EARLY = 10
"""Epochs over which the evenness of a path is told: where weights move fastest."""


class ExpertTraining(Spec):
    """How experts are trained: plain SGD by default (MTT), flat (GSAM) with ``rho``, smooth with a slow start and a penalty."""

    count: int = Field(100, ge=1, description="number of experts, each from weights of its own")
    epochs: int = Field(50, ge=1, description="passes over the real images; the weights after each are kept")
    batch_size: int = Field(256, ge=1, description="real images per step")
    optimizer: Optimizer = Field(sgd(0.01), description="optimiser of the experts")
    rho: float = Field(
        0.0, ge=0, description="length of the climb of sharpness-aware training (GSAM); 0 is plain training"
    )
    rho_min: float | None = Field(
        None,
        ge=0,
        description="its length at the lowest learning rate; it follows the rate, and stays alike by default",
    )
    alpha: float = Field(0.0, ge=0, description="how much of the upright gradient GSAM takes away; 0 is SAM")
    adaptive: bool = Field(True, description="scale the climb by each weight")
    slow_start: int = Field(
        0, ge=0, description="epochs over which the cross-entropy's weight grows from a half to 1 (clipping loss)"
    )
    weight_penalty: float = Field(0.0, ge=0, description="weight of the penalty on the input's gradient (lambda)")
    penalty_norm: Literal["pixel", "image"] = Field(
        "pixel", description="norm of that gradient: of each pixel over its channels (released code), or of each image"
    )
    storage: Literal["float32", "float16"] = Field("float32", description="how weights are stored")
    seed: int = Field(0, ge=0, description="the experts' own seed, so that every run meets the same")
    directory: str | None = Field(
        None,
        description="run directory of expert-trajectories to use in place of training; the other fields then tell nothing",
    )

    @model_validator(mode="after")
    def _rho_moves_with_the_rate(self) -> ExpertTraining:
        if self.rho_min is not None and self.rho_min != self.rho and self.optimizer.constant:
            raise ValueError(
                f"rho_min is {self.rho_min:g} and rho {self.rho:g}, but with a constant learning rate rho cannot follow it; "
                "leave rho_min out or give the optimizer a schedule"
            )
        return self

    def rho_at(self, step: int, steps: int, per_epoch: int) -> float:
        """The climb at a step: proportional to where the learning rate is between its lowest and its highest."""
        if self.rho_min is None or self.optimizer.constant:
            return self.rho
        rates = [self.optimizer.lr_at(at, steps, per_epoch) for at in (step, steps - 1)]
        part = (rates[0] - rates[1]) / (self.optimizer.lr - rates[1])
        return self.rho_min + (self.rho - self.rho_min) * part


class FlatExperts(ExpertTraining):
    """Experts of FTD: GSAM with the paper's values."""

    rho: float = Field(0.01, ge=0, description="length of the climb of sharpness-aware training (GSAM)")
    alpha: float = Field(0.3, ge=0, description="how much of the upright gradient GSAM takes away; 0 is SAM")


class SmoothExperts(ExpertTraining):
    """Experts of AST: strong (momentum and decay) and smooth (slow start, penalty)."""

    optimizer: Optimizer = Field(
        sgd(0.003, momentum=0.9, weight_decay=1e-3, schedule="step", milestones=(0.54,), gamma=0.6),
        description="optimiser of the experts; the rate falls after epoch 27 of 50, as released",
    )
    slow_start: int = Field(10, ge=0, description="epochs over which the cross-entropy's weight grows from a half to 1")
    weight_penalty: float = Field(2.0, ge=0, description="weight of the penalty on the input's gradient (lambda)")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Weights of experts after each epoch, memory-mapped, with what they are of.

    Attributes:
        paths: for each expert [epochs + 1, weights], the initial ones first.
        about: network, data, pixels and training, as plain values.
    """

    paths: Sequence[np.ndarray[Any, Any]]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def epochs(self) -> int:
        """Epochs after the initial weights."""
        return len(self.paths[0]) - 1

    def weights(self, expert: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """A copy of the weights of an expert after an epoch; -1 is the last."""
        return torch.from_numpy(np.array(self.paths[expert][epoch], dtype=np.float32)).to(device)

    def save(self, directory: Path) -> None:
        """Write what they are and where they lie; the weights stay in the run's records."""
        run = directory.parents[1]
        files = [str(Path(str(path.filename)).relative_to(run)) for path in self.paths if isinstance(path, np.memmap)]
        text = json.dumps({**self.about, "epochs": self.epochs, "files": files}, indent=2, allow_nan=False)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")


def load_trajectories(directory: Path) -> Trajectories:
    """Read the trajectories of a finished run of ``expert-trajectories``.

    Raises:
        UserError: they are missing, or shorter than they were.
    """
    try:
        about = json.loads((directory / "result" / "trajectories" / FILE).read_text(encoding="utf-8"))
        paths = [np.load(directory / file, mmap_mode="r") for file in about["files"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"experts.directory: {directory} is no finished run of expert-trajectories ({error}); make one with "
            f"'stillhouse run expert-trajectories --out {directory}'."
        ) from None
    for path in paths:
        if path.shape != (about["epochs"] + 1, about["weights"]):
            raise UserError(
                f"experts.directory: an expert in {directory} has weights of the shape {list(path.shape)}, not "
                f"{[about['epochs'] + 1, about['weights']]}."
            )
    return Trajectories(paths, about)


def described(network: ModelSpec, data: Data, weights: int) -> dict[str, Any]:
    """What trajectories must share with those who use them."""
    scale = data.scale
    pixels = {"mean": list(scale.mean), "std": list(scale.std)} if scale is not None else None
    return {"network": network.dump(), "data": data.fingerprint, "pixels": pixels, "weights": weights}


class ExpertTrajectories(Method):
    """Train experts on the real images and keep their weights after every epoch, for all methods that match trajectories."""

    name: ClassVar[str] = "expert-trajectories"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Dataset Distillation by Matching Training Trajectories", 2022, arxiv="2203.11932", venue="CVPR 2022"
    )
    summary: ClassVar[str] = "weights of networks after each epoch on the real data: the buffers of trajectory matching"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    network: ModelSpec = Field(ConvNetSpec(), description="the network")
    augment: DSA = Field(DSA(), description="differentiable augmentation (DSA) of the real images")
    experts: ExpertTraining = Field(ExpertTraining(), description="how many there are and how they are trained")
    sharpness_samples: int = Field(
        0,
        ge=0,
        description="training images on which the largest Hessian eigenvalue of the last weights is measured; 0: not",
    )

    def stages(self, run: Run) -> Stages:
        """A stage for each expert, in any order; then what they reached."""
        training, facts = self.experts, run.data.facts
        if facts.num_classes is None or "pixel_values" not in facts.inputs:
            raise UserError(f"data: {self.name} needs labelled images, and {run.data.name!r} has none.")
        if training.directory is not None:
            raise UserError("experts.directory: experts that are there need no training; leave it out.")
        trained = yield [
            Later(f"expert-{number}", partial(self.expert, f"expert-{number}", run)) for number in range(training.count)
        ]
        paths = [one.records["path"]["weights"] for one in trained]
        flat = FlatNetwork(self.network.build(facts)).to(run.world.device)
        rows = yield Compute(
            "measured", lambda _: self.measured(paths, flat, run), form=lambda: [[0.0] * 4 for _ in paths]
        )
        means = [fmean(column) for column in zip(*rows, strict=True)]
        names = ["path/length", "path/variation", "test/accuracy", "sharpness"]
        kept = {"path/length", "path/variation"}
        kept |= {"test/accuracy"} if "test" in run.data.splits else set()
        kept |= {"sharpness"} if self.sharpness_samples else set()
        shown = [place for place, name in enumerate(names) if name in kept]
        table = [[number, *(round(row[place], 4) for place in shown)] for number, row in enumerate(rows)]
        about = {**described(self.network, run.data, flat.size), "name": run.data.name, "training": training.dump()}
        return Result(
            artefacts={"trajectories": Trajectories(paths, {**about, "augment": self.augment.dump()})},
            metrics={name: mean for name, mean in zip(names, means, strict=True) if name in kept},
            tables=[Table("Experts after their last epoch", ["expert", *(names[place] for place in shown)], table)],
        )

    def expert(self, name: str, run: Run) -> Stage:
        """The training of one expert."""
        training, split = self.experts, run.data.split("train")
        net = self.network.build(run.data.facts)
        FlatNetwork(net)
        size = max(1, min(training.batch_size, len(split)) // run.world.size)
        batches = split.batches(size, drop_last=False)
        per_epoch = batches.per_epoch(run.world.size)
        dtype = torch.float16 if training.storage == "float16" else torch.float32

        def weights(m: Modules) -> dict[str, Tensor]:
            return {"weights": torch.cat([parameter.flatten() for parameter in m.net.parameters()]).to(dtype)}

        return Stage(
            name,
            modules={"net": net},
            updates=[
                Update(
                    self.loss, {"net": training.optimizer}, weights={"penalty": training.weight_penalty}, name="expert"
                )
            ],
            batches=batches,
            steps=training.epochs * per_epoch,
            records={"path": Record(weights, every=per_epoch)},
        )

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy on augmented images, sharpness-aware and slowly started; the penalty is on the clean ones."""
        training = self.experts
        seen = batch.replace(pixel_values=self.augment.augment(batch["pixel_values"]))
        names = [name for name, _ in m.net.named_parameters()]
        caller = _Caller(m.net)

        def at(values: Sequence[Tensor]) -> Tensor:
            named = {f"net.{name}": value for name, value in zip(names, values, strict=True)}
            return F.cross_entropy(functional_call(caller, named, (seen,)), seen.labels)

        def sharp() -> Tensor:
            rho = training.rho_at(run.step, run.steps, run.per_epoch)
            value = gsam(at, list(m.net.parameters()), rho=rho, alpha=training.alpha, adaptive=training.adaptive)
            return slow_start(run.step // run.per_epoch, training.slow_start) * value

        def penalty() -> Tensor:
            clean = batch["pixel_values"].detach().requires_grad_()
            return input_gradient_penalty(
                logits(m.net, batch.replace(pixel_values=clean)), clean, training.penalty_norm
            )

        return {"ce": sharp, "penalty": penalty}

    def measured(self, paths: Sequence[np.ndarray[Any, Any]], flat: FlatNetwork, run: Run) -> list[list[float]]:
        """For each expert: length of its path, evenness of its first epochs, test accuracy, largest eigenvalue."""
        device, rows = run.world.device, []
        train = run.data.split("train")
        few = train.take(min(self.sharpness_samples, len(train))) if self.sharpness_samples else None
        sample = few.batch(range(len(few)), device=device) if few is not None else None
        for number, path in enumerate(paths):
            lengths = torch.stack([step_lengths(_pair(path, epoch))[0] for epoch in range(len(path) - 1)])
            still = (lengths == 0).nonzero().flatten().tolist()
            if still:
                raise UserError(
                    f"expert-{number}: the weights after epoch {still[0]} are those after epoch {still[0] + 1}; an expert "
                    "that does not move cannot be matched, so raise experts.optimizer.lr."
                )
            last = torch.from_numpy(np.array(path[-1], dtype=np.float32)).to(device)
            flat.load(last)
            accuracy = held_out(flat.network, run).get("test/accuracy", 0.0)
            sharpness = 0.0
            if sample is not None:
                loss = lambda weights, sample=sample: F.cross_entropy(flat.logits(weights, sample), sample.labels)  # noqa: E731
                sharpness = top_eigenvalue(loss, last)
            rows.append([float(lengths.sum()), variation(lengths[:EARLY]), accuracy, sharpness])
        return rows


def slow_start(epoch: int, epochs: int) -> float:
    """Weight of the cross-entropy in an epoch: from a half up by equal steps, 1 from ``epochs`` on (clipping loss of AST).

    >>> [slow_start(epoch, 10) for epoch in (0, 1, 9, 10, 30)], slow_start(0, 0)
    ([0.5, 0.55, 0.95, 1.0, 1.0], 1.0)
    """
    return 0.5 + 0.5 * epoch / epochs if epoch < epochs else 1.0


def experts_of(
    run: Run, network: ModelSpec, augment: DSA, training: ExpertTraining
) -> Generator[SubRun, Any, Trajectories]:
    """Train the experts, or find them: ``trajectories = yield from experts_of(...)``.

    Raises:
        UserError: those of ``training.directory`` are of another network, data set or pixels.
    """
    if training.directory is None:
        plain = ExpertTraining.model_validate(training.model_dump())
        method = ExpertTrajectories(data=run.method.data, network=network, augment=augment, experts=plain)
        result = yield SubRun("experts", method, seed=training.seed, data=run.data)
        found: Trajectories = result.artefacts["trajectories"]
        return found
    found = load_trajectories(Path(training.directory))
    wanted = described(network, run.data, FlatNetwork(network.build(run.data.facts)).size)
    for name, value in wanted.items():
        if found.about.get(name) != value:
            raise UserError(
                f"experts.directory: the experts in {training.directory} have {name} {found.about.get(name)!r}, and here it is "
                f"{value!r}; train experts of your own by leaving it out."
            )
    return found


class _Caller(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> Tensor:
        return logits(self.net, batch)


def _pair(path: np.ndarray[Any, Any], epoch: int) -> Tensor:
    return torch.from_numpy(np.array(path[epoch : epoch + 2], dtype=np.float32))

"""Plain training on labels: what teachers are made by, and the line that every student must be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Augment, Batch, Split
from stillhouse.engine import (
    Compute,
    Evaluation,
    Held,
    Losses,
    Method,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Table,
    Update,
    Weight,
    measuring,
)
from stillhouse.metrics import classification, regression
from stillhouse.models import ModelSpec, count_parameters, logits


class TrainingFields(Method):
    """Fields shared by methods that train a network on labelled batches."""

    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="optimiser of the trained network"
    )
    epochs: float = Field(30, gt=0, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    accumulate: int = Field(1, ge=1, description="micro-batches per step")
    augment: Augment = Field("none", description="augmentation of the training images", validate_default=True)
    keep: Literal["last", "best"] = Field("last", description="weights to keep: the last, or the best on validation")
    evaluations: int = Field(10, ge=1, description="measurements on the validation split during training")
    patience: int | None = Field(None, ge=1, description="measurements without improvement before stopping early")

    def training_stage(
        self,
        run: Run,
        name: str,
        modules: Mapping[str, nn.Module | Held],
        update: Update,
        *,
        trained: str,
    ) -> Stage:
        """A stage over the training split that measures the module ``trained`` on the validation split."""
        batches = run.data.split("train").batches(self.batch_size, augment=self.augment)
        steps = max(1, round(self.epochs * batches.per_epoch(run.world.size) / self.accumulate))
        evaluation = None
        if "validation" in run.data.splits:
            regresses = run.data.facts.task == "regression"
            evaluation = Evaluation(
                lambda m: _named("validation", quality(m[trained], run.data.split("validation"), run)),
                every=max(1, steps // self.evaluations),
                monitor="validation/mse" if regresses else "validation/accuracy",
                mode="min" if regresses else "max",
                patience=self.patience,
            )
        return Stage(
            name,
            modules=modules,
            updates=[update],
            batches=batches,
            steps=steps,
            evaluate=evaluation,
            keep=self.keep if evaluation else "last",
            accumulate=self.accumulate,
        )


class Supervised(TrainingFields):
    """Train a network on the labels of the training split, with cross-entropy or squared error."""

    name: ClassVar[str] = "supervised"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Learning representations by back-propagating errors", 1986, venue="Nature 323")
    summary: ClassVar[str] = "plain training on labels; makes the teachers and is the line to beat"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    model: ModelSpec = Field("cnn", description="the network to train", validate_default=True)
    weight_ce: Weight = Field(1.0, description="weight of the loss on the labels")

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy on class labels, squared error on targets."""
        return {"ce": lambda: hard_loss(logits(m.model, batch), batch, run)}

    def stages(self, run: Run) -> Stages:
        """One stage."""
        model = self.model.build(run.data.facts)
        trained = yield self.training_stage(
            run, "model", {"model": model}, Update(self.loss, trains={"model": self.optimizer}), trained="model"
        )
        test = yield Compute("test", lambda _: held_out(model, run))
        return Result(
            artefacts={"model": model},
            metrics={**trained.best, **test},
            tables=[
                Table(
                    "Result",
                    ["model", "parameters", *test],
                    [[self.model.kind, count_parameters(model), *test.values()]],
                )
            ],
        )


def hard_loss(student_logits: Tensor, batch: Batch, run: Run) -> Tensor:
    """The loss on what the batch is labelled with: classes, soft labels, or regression targets."""
    if run.data.facts.task == "regression":
        return F.mse_loss(student_logits.squeeze(-1), batch.labels.to(student_logits.dtype))
    return losses.cross_entropy(student_logits, batch.labels)


def quality(model: nn.Module, split: Split, run: Run, batch_size: int = 512) -> dict[str, float]:
    """Numbers of a model on a split: accuracy, nll, ... of a classifier, mse of a regressor."""
    measure = regression if run.data.facts.task == "regression" else classification
    with measuring(model):
        return measure(lambda batch: logits(model, batch), split.in_order(batch_size, device=run.world.device))


def held_out(model: nn.Module, run: Run) -> dict[str, float]:
    """Numbers of a model on the test split; nothing where the data has none."""
    if "test" not in run.data.splits:
        return {}
    return _named("test", quality(model, run.data.split("test"), run))


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}

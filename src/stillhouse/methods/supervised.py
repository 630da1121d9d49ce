"""Plain training on labels: what teachers are made by, and the line that every student must be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from stillhouse.metrics import classification, regression, token_prediction
from stillhouse.models import IGNORED, ModelSpec, count_parameters, logits, targets

MONITORED: dict[str, tuple[str, Literal["max", "min"]]] = {"regression": ("mse", "min"), "language": ("nll", "min")}
"""By which number the best weights are known, and whether it should be large or small; elsewhere the accuracy."""

POSITIONS = 4096
"""Positions of sequences that are measured at once: their logits are a vocabulary wide."""


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
        views: int | None = None,
    ) -> Stage:
        """A stage over the training split that measures the module ``trained`` on the validation split.

        With ``views`` it meets that many fixed views of each sample in place of a new augmentation each time.
        """
        batches = run.data.split("train").batches(self.batch_size, augment=self.augment, views=views)
        steps = max(1, round(self.epochs * batches.per_epoch(run.world.size) / self.accumulate))
        evaluation = None
        if "validation" in run.data.splits:
            monitor, mode = MONITORED.get(run.data.facts.task, ("accuracy", "max"))
            evaluation = Evaluation(
                lambda m: _named("validation", quality(m[trained], run.data.split("validation"), run)),
                every=max(1, steps // self.evaluations),
                monitor=f"validation/{monitor}",
                mode=mode,
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
        return {"ce": lambda: hard_loss(m.model, logits(m.model, batch), batch, run)}

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


def hard_loss(model: nn.Module, model_logits: Tensor, batch: Batch, run: Run) -> Tensor:
    """The loss of a model's logits on what the batch is labelled with: classes, soft labels, numbers, or tokens.

    Of sequences it is the mean over the labelled positions of all processes.
    """
    if run.data.facts.task == "regression":
        return F.mse_loss(model_logits.squeeze(-1), batch.labels.to(model_logits.dtype))
    labels = placed(model, batch, run)
    if model_logits.dim() <= 2:
        return losses.cross_entropy(model_logits, labels)
    rows = losses.cross_entropy(model_logits, labels, reduction="none", chunk=rows_at_once(model_logits))
    return run.mean(rows, labels != IGNORED)


def placed(model: nn.Module, batch: Mapping[str, Tensor], run: Run) -> Tensor:
    """The labels where the model's logits stand; see :func:`stillhouse.models.targets`."""
    return targets(model, batch, next_token=run.data.next_token)


def rows_at_once(sequence_logits: Tensor) -> int | None:
    """Positions that a loss handles at once: all, unless float32 copies of their logits would take much memory."""
    return None if sequence_logits.numel() <= 2**26 else max(1, 2**24 // sequence_logits.shape[-1])


def quality(model: nn.Module, split: Split, run: Run, batch_size: int = 512) -> dict[str, float]:
    """Numbers of a model on a split: accuracy, nll, ... of a classifier or of a model of tokens, mse of a regressor."""
    with measuring(model):
        if run.data.facts.task == "language":
            return token_prediction(
                lambda batch: (logits(model, batch), placed(model, batch, run)), sequences(split, run)
            )
        measure = regression if run.data.facts.task == "regression" else classification
        return measure(lambda batch: logits(model, batch), split.in_order(batch_size, device=run.world.device))


def sequences(split: Split, run: Run) -> Iterator[Batch]:
    """A split of sequences in order, in batches of about :data:`POSITIONS` positions."""
    return split.in_order(max(1, POSITIONS // longest(split)), device=run.world.device)


def longest(split: Split) -> int:
    """Positions of the longest sequence."""
    return max(shape[0] for shape in split.facts.inputs.values() if shape)


def held_out(model: nn.Module, run: Run) -> dict[str, float]:
    """Numbers of a model on the test split; nothing where the data has none."""
    if "test" not in run.data.splits:
        return {}
    return _named("test", quality(model, run.data.split("test"), run))


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}

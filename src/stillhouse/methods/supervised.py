"""Plain training on labels: what teachers are made by, and the line that every student must be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Augment, Batch, Split
from stillhouse.data.dataset import hard
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
from stillhouse.errors import UserError
from stillhouse.metrics import classification, regression, shot_accuracy, token_prediction
from stillhouse.models import IGNORED, ModelSpec, count_parameters, logits, targets
from stillhouse.models.layers import parameters_by_stage
from stillhouse.modules.mixing import Mixing, Mixture

MONITORED: dict[str, tuple[str, Literal["max", "min"]]] = {"regression": ("mse", "min"), "language": ("nll", "min")}
"""By which number the best weights are known, and whether it should be large or small; elsewhere the accuracy."""

POSITIONS = 4096
"""Positions of sequences that are measured at once: their logits are a vocabulary wide."""


MIXED = "is mixed"
"""Name in a mixed batch of the mask of samples that have two parts; the others are whole samples of the data."""


class TrainingFields(Method):
    """Fields shared by methods that train a network on labelled batches."""

    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="optimiser of the trained network"
    )
    epochs: float = Field(30, gt=0, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    accumulate: int = Field(1, ge=1, description="micro-batches per step")
    augment: Augment = Field("none", description="augmentation of the training images", validate_default=True)
    mix: Mixing = Field(
        "none",
        description="mix the samples of each training batch, with soft labels: mixup, cutmix, {kind: mixup, fraction, ...}",
        validate_default=True,
    )
    keep: Literal["last", "best"] = Field("last", description="weights to keep: the last, or the best on validation")
    evaluations: int = Field(10, ge=1, description="measurements on the validation split during training")
    patience: int | None = Field(None, ge=1, description="measurements without improvement before stopping early")
    stage_rates: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="learning rate of each stage of the network, first to last, as a factor (a pretrained backbone that is "
        "fine-tuned: 0.1, 0.1, 0.2, 0.2, 0.3); what comes after the last stage has 1",
    )

    def training_stage(
        self,
        run: Run,
        name: str,
        modules: Mapping[str, nn.Module | Held],
        update: Update,
        *,
        trained: str,
        views: int | None = None,
        split: Split | None = None,
        anew: bool = False,
    ) -> Stage:
        """A stage over the training split (or another) that measures the module ``trained`` on the validation split.

        With ``views`` it meets that many fixed views of each sample in place of a new augmentation each time, with ``anew``
        each batch is drawn from all samples.
        """
        train = run.data.split("train") if split is None else split
        check_classes(train, run)
        batches = train.batches(self.batch_size, augment=self.augment, views=views, anew=anew)
        steps = max(1, round(self.epochs * batches.per_epoch(run.world.size) / self.accumulate))
        if self.stage_rates is not None:
            network = modules[trained]
            assert isinstance(network, nn.Module)
            example = train.batch(range(min(2, len(train))), device=run.world.device)
            network.to(run.world.device)
            update = replace(update, trains=by_stage(update.trains, trained, network, example, self.stage_rates))
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
            prepare=None if self.mix.kind == "none" else self.blended,
            evaluate=evaluation,
            keep=self.keep if evaluation else "last",
            accumulate=self.accumulate,
        )

    def blended(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """The batch with its inputs and labels mixed; what else it holds follows the first part of each new sample."""
        mixture = self.mix.draw(next(iter(batch.inputs.values())), rank=run.world.rank, world=run.world.size)
        return made_of(batch, mixture, run)


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
        test = yield Compute("test", lambda _: held_out(model, run), form=dict[str, float])
        return Result(
            artefacts={"model": model},
            metrics={**trained.kept, **test},
            tables=[
                Table(
                    "Result",
                    ["model", "parameters", *test],
                    [[self.model.kind, count_parameters(model), *test.values()]],
                )
            ],
        )


def check_classes(train: Split, run: Run) -> None:
    """Refuse to train a classifier where there is nothing to tell apart.

    Raises:
        UserError: all training samples are of one class.
    """
    classes = run.data.facts.num_classes
    labels = train.source.labels if run.data.facts.task == "classification" else None
    if classes == 1 or (labels is not None and len(torch.unique(hard(labels))) == 1):
        raise UserError(
            f"All {len(train):,} training samples of {run.data.name!r} are of one class, so there is nothing to learn; a "
            "classifier needs samples of two classes or more."
        )


def by_stage(
    trains: Mapping[str | tuple[str, ...], Optimizer],
    name: str,
    network: nn.Module,
    example: Batch,
    rates: tuple[float, ...],
) -> dict[str | tuple[str, ...], Optimizer]:
    """What an update trains, with a learning rate of its own for each stage of the network ``name``.

    Raises:
        UserError: the network has another number of stages.
    """
    found, rest = parameters_by_stage(network, example)
    if len(found) != len(rates):
        raise UserError(
            f"stage_rates has {len(rates)} factors and the network {len(found)} stages (as it runs: "
            f"{', '.join(names[-1].rpartition('.')[0] for names in found if names)}); give one factor a stage."
        )
    divided: dict[str | tuple[str, ...], Optimizer] = {}
    for pattern, optimizer in trains.items():
        parts = (pattern,) if isinstance(pattern, str) else pattern
        if name not in parts:
            divided[pattern] = optimizer
            continue
        # Exclusions, such as "!student.classifier", stay with every group that they touch.
        without = {part.removeprefix("!").removeprefix(f"{name}.") for part in parts if part.startswith(f"!{name}.")}
        others = tuple(part for part in parts if part != name and not part.startswith(f"!{name}."))
        for names, rate in zip((*found, rest), (*rates, 1.0), strict=True):
            kept = [one for one in names if not any(one == path or one.startswith(f"{path}.") for path in without)]
            kept = [one for one in kept if network.get_parameter(one).requires_grad]
            group = tuple(f"{name}.{one}" for one in kept) + (others if names is rest else ())
            if group:
                divided[group] = optimizer.scaled(rate)
    return divided


def made_of(batch: Batch, mixture: Mixture, run: Run) -> Batch:
    """The batch of a mixture's samples; logs now and then what share of them has two parts."""
    mixed = {name: mixture.inputs(values) for name, values in batch.inputs.items()}
    if "labels" in batch:
        mixed["labels"] = mixture.labels(batch.labels, run.data.facts.num_classes)
    others = {name: values[mixture.first] for name, values in batch.items() if name not in mixed}
    step = run.step + 1
    if step == run.steps or step % run.settings.log_every == 0:
        share = run.gather(mixture.mixed.float()).mean()
        run.log({"stage": run.stage, "step": step, "mix/mixed": float(share)})
    found = batch.replace(**mixed, **others, **{MIXED: mixture.mixed})
    found.aside = batch.aside | {MIXED}
    return found


def hard_loss(model: nn.Module, model_logits: Tensor, batch: Batch, run: Run) -> Tensor:
    """The loss of a model's logits on what the batch is labelled with: classes, soft labels, numbers, or tokens.

    Of sequences it is the mean over the labelled positions of all processes.
    """
    if run.data.facts.task == "regression":
        given = model_logits.squeeze(-1)
        if given.shape != batch.labels.shape:
            raise UserError(
                f"{type(model).__name__} gives {tuple(model_logits.shape[1:])} numbers a sample, and the data has "
                f"{tuple(batch.labels.shape[1:]) or 1} to predict; a regressor gives one number for each."
            )
        return F.mse_loss(given, batch.labels.to(model_logits.dtype))
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
    test = run.data.split("test")
    return _named("test", {**quality(model, test, run), **by_shots(model, test, run)})


def by_shots(model: nn.Module, split: Split, run: Run) -> dict[str, float]:
    """Accuracy on classes with many and with few training samples; nothing where the data has no long tail."""
    if run.method.data.long_tail is None:
        return {}
    counts = torch.tensor([len(part) for part in run.data.split("train").by_class().values()])
    with measuring(model):
        batches = split.in_order(512, device=run.world.device)
        found = shot_accuracy(lambda batch: logits(model, batch), batches, counts)
    return {f"accuracy_{name}": value for name, value in found.items()}


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}

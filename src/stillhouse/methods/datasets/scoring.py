"""How a tiny training set is scored: fresh networks are trained on it, and measured once, after the last step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.engine import Compute, Later, Losses, Method, Modules, Optimizer, Run, Stage, Update
from stillhouse.methods.supervised import quality
from stillhouse.models import ConvNetSpec, ModelSpec, logits
from stillhouse.modules.siamese import DSA


@dataclass(frozen=True)
class Training:
    """One fresh network and what it is trained on.

    Attributes:
        spec: the network.
        tensors: the images and their labels: class numbers, or a distribution per row.
        epochs: passes over them.
        augment: differentiable augmentation of each batch.
        optimizer: how it is trained.
        stage: makes the stage of a name and a network, where it is another one than that of ``tensors`` and ``augment``.
    """

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    epochs: int
    augment: DSA
    optimizer: Optimizer
    stage: Callable[[str, nn.Module], Stage] | None = None


class Scoring(Method):
    """Base of methods that score tiny training sets. Networks are always fresh and measured at their last epoch."""

    network: ModelSpec = Field(
        ConvNetSpec(), description="the network that is matched, and trained on the tiny set to score it"
    )
    augment: DSA = Field(
        DSA(), description="differentiable augmentation (DSA), shared by real and tiny images of a class"
    )
    eval_networks: int = Field(5, ge=1, description="fresh networks that are trained on the tiny set")
    eval_architectures: tuple[ModelSpec, ...] = Field(
        (), description="unseen architectures to score the set on as well"
    )
    eval_epochs: int = Field(1800, ge=1, description="passes over the tiny set in scoring")
    eval_batch_size: int = Field(64, ge=1, description="batch size in scoring")
    eval_optimizer: Optimizer = Field(
        Optimizer(name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.5,)),
        description="optimiser in scoring; the learning rate falls to a tenth at half (released code)",
    )

    def architecture(self) -> ModelSpec:
        """The network that is matched, and trained to score a set."""
        return self.network

    def architectures(self) -> dict[str, ModelSpec]:
        """Every network that scores a set by its key in the names of numbers: ``""`` for the matched one."""
        unseen = {f"{number}-{spec.kind}": spec for number, spec in enumerate(self.eval_architectures)}
        return {"": self.architecture(), **unseen}

    def training(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Training:
        """One network trained as the fields say."""
        return Training(spec, tensors, self.eval_epochs, self.augment, self.eval_optimizer)

    def trained(
        self, run: Run, name: str, trainings: Mapping[str, Sequence[Training]], *, on: str = "test"
    ) -> Generator[Any, Any, dict[str, list[float]]]:
        """Train every network and measure its accuracy at the last epoch, never the best.

        Args:
            run: the run.
            name: unique in the run; the stages are ``score/NAME-KEY-0``, ...
            trainings: the networks by a key, ``""`` for none.
            on: the split on which they are measured.
        """
        facts = run.data.facts
        nets: dict[str, list[nn.Module]] = {key: [] for key in trainings}

        def build(key: str, training: Training, stage: str) -> Stage:
            net = training.spec.build(facts)
            nets[key].append(net)
            if training.stage is not None:
                return training.stage(stage, net)
            split = Split("distilled", facts, training.tensors)
            # The processes share a batch.
            size = max(1, min(self.eval_batch_size, len(split)) // run.world.size)
            batches = split.batches(size, drop_last=False)
            steps = training.epochs * batches.per_epoch(run.world.size)
            loss = partial(self.train_loss, training.augment)
            update = Update(loss, {"net": training.optimizer}, name="train_loss")
            return Stage(stage, {"net": net}, [update], steps=steps, batches=batches)

        stages = []
        for key, several in trainings.items():
            for number, training in enumerate(several):
                stage = f"score/{name}{'-' + key if key else ''}-{number}"
                stages.append(Later(stage, partial(build, key, training, stage)))
        yield stages
        measured: dict[str, list[float]] = yield Compute(
            f"scores/{name}",
            lambda _: {
                key: [quality(net, run.data.split(on), run)["accuracy"] for net in found] for key, found in nets.items()
            },
            form=lambda: {key: [0.0 for _ in found] for key, found in nets.items()},
        )
        return measured

    def train_loss(self, augment: DSA, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy of a network on augmented tiny images, with the same augmentation as in distilling."""
        images = augment.augment(batch["pixel_values"])
        return {"ce": F.cross_entropy(logits(m.net, batch.replace(pixel_values=images)), batch.labels)}

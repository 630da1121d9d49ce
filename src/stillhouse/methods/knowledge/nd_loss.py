"""ND loss: the norm and the direction of the student's embedding as a term beside any distillation (arXiv 2305.17007)."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.engine import Compute, Losses, Optimizer, Paper, Run, Weight, measuring
from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import direction, norm_direction, norm_growth
from stillhouse.methods.distillation import CIFAR_SGD, KnowledgeDistillation, Objective, Reads
from stillhouse.methods.wiring import Outputs, Pair, Wiring
from stillhouse.models import fingerprint
from stillhouse.modules.projectors import EmbeddingProjector


class NDLoss(KnowledgeDistillation):
    """Longer embeddings that point to the TEACHER's class mean: ``L_ND = mean[1 - <z, e_y> / max(|z|, |f_t|)]``.

    z is the student's embedding through a projector (none where the widths agree), f_t the teacher's, e_y the direction of
    the teacher's mean embedding of class y over the training split. Short embeddings are pulled along e_y with a constant
    gradient, long ones only turned. By default KD stands beside it, with a weight that grows from 0 over the first epochs
    (KD++); with ``also: [dkd]``, ``[dist]`` or ``[reviewkd]`` it is DKD++, DIST++ or ReviewKD++.
    """

    name: ClassVar[str] = "nd-loss"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", 2023, arxiv="2305.17007"
    )
    summary: ClassVar[str] = (
        "embeddings as long as the teacher's and turned to its class means; beside KD, DKD, DIST, ReviewKD"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"labels", "embedding"})

    weight_nd: Weight = Field(2.0, description="weight of the ND term")
    form: Literal["norm-direction", "cosine", "norm"] = Field(
        "norm-direction", description="the joint term, or one of its halves: direction only, or growth of the norm only"
    )
    norm_step: float = Field(1.0, gt=0, description="growth that the form 'norm' asks of each embedding's length")
    projector: bool = Field(True, description="project embeddings of another width than the teacher's")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout within the projector")
    also: tuple[Objective, ...] = Field(
        (
            {
                "kind": "kd",
                "temperature": 4.0,
                "weight_soft": {"start": 0.0, "end": 1.0, "until": 20 / 240, "by": "epoch"},
            },
        ),
        description="what it stands beside: KD by default, its weight growing over the first twelfth of the epochs",
    )
    optimizer: Optimizer = Field(
        CIFAR_SGD.model_copy(update={"lr": 0.1, "nesterov": True}),
        description="optimiser of the student and the projector",
    )
    epochs: float = Field(240, gt=0, description="passes over the training split")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The projector, and the directions of the teacher's class means, which :meth:`ready` fills in."""
        assert pair.student.embedding is not None
        assert pair.teacher.embedding is not None
        mine, theirs = pair.student.embedding.shape[-1], pair.teacher.embedding.shape[-1]
        if mine != theirs and not self.projector:
            raise UserError(
                f"nd-loss: the student's embedding has {mine} numbers and the teacher's {theirs}; set projector=true."
            )
        classes = run.data.facts.num_classes
        assert classes is not None
        if mine != theirs and run.method.batch_size == 1:  # type: ignore[attr-defined]
            raise UserError(
                "nd-loss: the projector's batch norm has no statistics of one sample; use a batch_size of 2 or more."
            )
        projector = nn.Identity() if mine == theirs else EmbeddingProjector(mine, theirs, self.dropout)
        return {"projector": projector, "directions": Directions(classes, theirs)}

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Compute, Any, None]:
        """The teacher's mean embedding of each class over the training split: in eval mode, without augmentation."""
        for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
            teacher = wiring.teachers[link.name]
            about = ["class means", fingerprint(teacher), repr(teacher), run.data.fingerprint, torch.__version__]
            key = json.dumps([*about, self.teacher_classifier, run.world.device.type, torch.get_num_threads()])

            def means(
                _: Path, share: float = 1.0, read: Callable[[Batch], Outputs] = link.read, teacher: nn.Module = teacher
            ) -> dict[str, Tensor]:
                split = run.data.split("train")
                with measuring(teacher):
                    found = class_means(read, split.spaced(max(1, round(share * len(split)))), run)
                if share < 1:  # A forecast may have met no sample of a class.
                    found["means"][found["counts"] == 0], found["counts"] = 1.0, found["counts"].clamp_min(1)
                return found

            found = yield Compute(f"class-means-{link.name}", means, key=key, part=means)
            parts["directions"].fill(found["means"], found["counts"])  # type: ignore[operator]

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The ND term."""
        return {"nd": lambda: self.nd(pair)}

    def nd(self, pair: Pair) -> Tensor:
        """The term in the chosen form."""
        assert pair.student.embedding is not None
        z = pair.parts["projector"](pair.student.embedding)
        towards = pair.parts["directions"](pair.batch.labels)
        match self.form:
            case "cosine":
                return direction(z, towards)
            case "norm":
                return norm_growth(z, self.norm_step)
        assert pair.teacher.embedding is not None
        return norm_direction(z, pair.teacher.embedding, towards)

    def measure(self, wiring: Wiring, place: int, run: Run) -> dict[str, float]:
        """On test images: mean length of the embeddings, raw and projected, and mean cosine to the class mean."""
        if "test" not in run.data.splits:
            return {}
        found: dict[str, float] = {}
        for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
            rows = []
            for batch in run.data.split("test").in_order(512, device=run.world.device):
                mine, theirs = wiring.read(batch).embedding, link.read(batch).embedding
                assert mine is not None
                assert theirs is not None
                z, towards = parts["projector"](mine), parts["directions"](batch.labels)
                cosine = nn.functional.cosine_similarity(z, towards)
                rows.append(torch.stack([mine.norm(dim=1), z.norm(dim=1), theirs.norm(dim=1), cosine], 1).double())
            raw, projected, teacher, cosine_ = torch.cat(rows).mean(0).tolist()
            at = "" if len(wiring.links) == 1 else f"/{link.name}"
            found[f"test/embedding_norm{at}"] = raw
            found[f"test/embedding_norm_ratio{at}"] = projected / teacher
            found[f"test/embedding_cosine{at}"] = cosine_
        return found


class Directions(nn.Module):
    """The unit direction of each class's mean embedding; no parameters, filled once."""

    rows: Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(classes, width))

    def fill(self, means: Tensor, counts: Tensor) -> None:
        """Take over the means.

        Raises:
            UserError: a class has no sample, or its mean has no direction.
        """
        absent = [place for place, count in enumerate(counts.tolist()) if count == 0]
        if absent:
            raise UserError(
                f"nd-loss: the training split has no sample of the class {absent[0]}, so the teacher has no mean there; "
                "train on data of all classes."
            )
        lengths = means.norm(dim=1, keepdim=True)
        if not bool((lengths > 0).all()):
            raise UserError("nd-loss: the teacher's mean embedding of a class is 0, which has no direction.")
        self.rows.copy_(means / lengths)

    def forward(self, labels: Tensor) -> Tensor:
        """Directions of the classes ``labels``."""
        return self.rows[labels]


def class_means(read: Callable[[Batch], Outputs], split: Split, run: Run) -> dict[str, Tensor]:
    """Mean embedding of each class over a split, and how many samples each has; sums in float64."""
    classes = split.facts.num_classes
    assert classes is not None
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.float64)
    for batch in split.in_order(512, device=run.world.device):
        embedding = read(batch).embedding
        assert embedding is not None
        rows = embedding.double().cpu()
        labels = batch.labels.cpu()
        if sums is None:
            sums = torch.zeros(classes, rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, rows)
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    assert sums is not None
    return {"means": (sums / counts.clamp_min(1)[:, None]).float(), "counts": counts.long()}

"""The memory of contrastive representation distillation (CRD, arXiv 1910.10699): embeddings of every training sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.contrastive import log_partition, noise_contrastive

Integers = Callable[..., Tensor]
"""Draws integers in 0 .. high-1: ``(high, *shape)`` to a tensor of that shape."""


class ContrastiveMemory(nn.Module):
    """Student and teacher embeddings of all training samples, and the loss that contrasts a batch with them.

    Each student's embedding is to tell its own sample's teacher embedding from those of other samples, and the other way
    round. The candidates come from the two banks, whose rows follow the embeddings with a momentum: once per step, by
    :meth:`after_step`, so that a step may consist of several batches. The constants log Z are those of the first batch.
    Embeddings have unit length (:class:`~stillhouse.modules.projectors.LinearProjector` with ``normalize``).

    Args:
        num_samples: number n of training samples.
        width: width of the embeddings, 128 in the official code.
        labels: the class of every training sample: negatives then come from other classes, as in the official code.
            Without, from all other samples.
        negatives: negatives per sample, 16384 in the official code.
        temperature: divides cosines, 0.07 there.
        momentum: share of a row that stays, 0.5 there.
        mode: the positive is the sample itself (``"exact"``), or any of its class (``"relax"``).
        replacement: draw negatives with replacement. Without, as the official loader does where the other classes have
            enough samples, costs a random number per training sample and row.

    Raises:
        UserError: sizes or constants out of range, labels that are not one per sample, or a class that all samples have.
    """

    student: Tensor
    teacher: Tensor
    log_normalizers: Tensor
    _classes: Tensor
    _order: Tensor
    _counts: Tensor
    _starts: Tensor

    def __init__(
        self,
        num_samples: int,
        width: int = 128,
        *,
        labels: Int[Tensor, " samples"] | None = None,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        mode: Literal["exact", "relax"] = "exact",
        replacement: bool = True,
    ) -> None:
        super().__init__()
        if num_samples < 2 or width < 1 or negatives < 1:
            raise UserError(
                f"A contrastive memory holds at least 2 samples of width 1 and draws at least 1 negative, not {num_samples}, "
                f"{width} and {negatives}."
            )
        if not temperature > 0 or not 0 <= momentum < 1:
            raise UserError(
                f"A contrastive memory's temperature is above 0 and its momentum between 0 and 1, not {temperature} and "
                f"{momentum}."
            )
        if mode not in ("exact", "relax"):
            raise UserError(f"A contrastive memory's mode is 'exact' or 'relax', not {mode!r}.")
        if labels is None and mode == "relax":
            raise UserError(
                "mode='relax' draws positives of the same class, so a contrastive memory needs labels for it."
            )
        self.num_samples, self.negatives = num_samples, negatives
        self.temperature, self.momentum = temperature, momentum
        self.mode, self.replacement = mode, replacement
        bound = 1 / math.sqrt(width / 3)
        for name in ("student", "teacher"):
            self.register_buffer(name, torch.empty(num_samples, width).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.full((2,), math.nan))
        classes = torch.arange(num_samples) if labels is None else labels.detach().cpu().long()
        if classes.shape != (num_samples,) or bool((classes < 0).any()):
            raise UserError(
                f"A contrastive memory's labels are one class per sample ({num_samples}), 0 or more, not of shape "
                f"{tuple(classes.shape)}."
            )
        counts = classes.bincount()
        if int(counts.max()) == num_samples:
            raise UserError("All samples have one class, so none is left to be a negative; leave labels out.")
        if not replacement and negatives > num_samples - int(counts.max()):
            raise UserError(
                f"Without replacement there are {num_samples - int(counts.max())} negatives at most, not {negatives}; draw "
                "with replacement, or fewer."
            )
        # Samples in the order of their classes, each class a stretch of it.
        for name, tensor in (
            ("_classes", classes),
            ("_order", classes.argsort(stable=True)),
            ("_counts", counts),
            ("_starts", counts.cumsum(0) - counts),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self,
        student: Float[Tensor, "batch width"],
        teacher: Float[Tensor, "batch width"],
        index: Int[Tensor, " batch"],
        candidates: Int[Tensor, "batch candidates"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss, student against the teacher's bank plus teacher against the student's.

        Args:
            student: the student's embeddings, of unit length.
            teacher: the teacher's.
            index: place of each sample in the training data.
            candidates: for each sample the positive's place and its negatives'; drawn when not given.

        Raises:
            UserError: embeddings of another width, or samples that differ in number.
        """
        expected = (len(index), self.student.shape[1])
        if student.shape != expected or teacher.shape != expected:
            raise UserError(
                f"This contrastive memory compares embeddings of shape {expected}, not {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}."
            )
        if candidates is None:
            candidates = self.draw(index)
        student, teacher = _wide(student), _wide(teacher)
        with torch.autocast(student.device.type, enabled=False):
            scores = [self._scores(student, self.teacher, candidates), self._scores(teacher, self.student, candidates)]
        estimates = torch.stack([log_partition(score, self.num_samples) for score in scores])
        constants = torch.where(self.log_normalizers.isnan(), estimates.to(self.log_normalizers), self.log_normalizers)
        if self.training and torch.is_grad_enabled():
            self.log_normalizers.copy_(constants)
            self._seen.append((index, student.detach(), teacher.detach()))
        losses = [
            noise_contrastive(score, self.num_samples, constant)
            for score, constant in zip(scores, constants, strict=True)
        ]
        return losses[0] + losses[1]

    @torch.no_grad()
    def draw(self, index: Int[Tensor, " batch"], integers: Integers | None = None) -> Int[Tensor, "batch candidates"]:
        """Places of the positive and of the negatives of each sample.

        Args:
            index: place of each sample in the training data.
            integers: source of random integers, ``(high, *shape)`` to a tensor; torch's global generator by default.
        """
        classes = self._classes[index]
        starts, counts = (table[classes][:, None] for table in (self._starts, self._counts))
        source = integers or (lambda high, *shape: torch.randint(high, shape, device=index.device))

        def below(limits: Tensor, columns: int) -> Tensor:
            # Of numbers so large the remainder is as good as uniform.
            return source(2**62, len(index), columns) % limits

        positive = index[:, None]
        if self.mode == "relax":
            positive = self._order[starts + below(counts, 1)]
        if self.replacement:
            place = below(self.num_samples - counts, self.negatives)
            negative = self._order[place + (place >= starts) * counts]
        else:
            keys = source(2**62, len(index), self.num_samples)
            negative = keys.masked_fill(self._classes == classes[:, None], -1).topk(self.negatives).indices
        return torch.cat([positive, negative], 1)

    @torch.no_grad()
    def after_step(self, run: Any = None) -> None:
        """Move the rows of the samples that were seen since the last step towards their embeddings, to unit length again.

        Args:
            run: where several processes train together, what gathers their samples; None for one process.
        """
        for seen in self._seen:
            index, student, teacher = seen if run is None else (run.gather(part) for part in seen)
            for bank, embeddings in ((self.student, student), (self.teacher, teacher)):
                moved = self.momentum * bank[index] + (1 - self.momentum) * embeddings.to(bank)
                bank[index] = F.normalize(moved)
        self._seen.clear()

    def _scores(self, anchors: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
        """Cosine over temperature of each anchor with its candidates."""
        bank = bank.to(anchors.dtype)
        (batch, many), width = candidates.shape, bank.shape[1]
        # With many candidates it is quicker to ask the whole bank than to copy their rows.
        if self.num_samples * (batch + width) <= 2 * batch * many * width:
            cosines = (anchors @ bank.T).gather(1, candidates)
        else:
            cosines = (bank[candidates] @ anchors[:, :, None]).squeeze(2)
        return cosines / self.temperature

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.num_samples}, width={self.student.shape[1]}, negatives={self.negatives}, "
            f"temperature={self.temperature}, momentum={self.momentum}, mode={self.mode!r}"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

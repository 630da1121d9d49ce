"""A teacher's outputs, computed once on the training samples, stored, and looked up in place of the teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Augment, Batch, Split
from stillhouse.engine import Compute, Run, measuring
from stillhouse.errors import UserError
from stillhouse.methods.supervised import MIXED
from stillhouse.models import fingerprint, logits
from stillhouse.spec import Spec

GIGABYTE = 2**30


class TeacherCache(Spec):
    """How a teacher's outputs are stored before training; they serve every method and seed that meets the same inputs."""

    views: int | None = Field(
        None, ge=1, description="fixed views of each sample under an augmentation, one in turn each epoch"
    )
    top: int | None = Field(
        None, ge=1, description="keep the largest so many logits and the mass of the others; all by default"
    )
    temperature: float = Field(
        1.0, gt=0, description="with top: the softmax temperature at which the kept masses are exact"
    )
    limit: float = Field(8.0, gt=0, description="most gigabytes to store; more is refused before anything is computed")

    version: ClassVar[int] = 2

    def size(self, samples: int, rows: int, classes: int) -> int:
        """Bytes that the outputs of ``samples`` take, each with ``rows`` distributions over ``classes``."""
        row = 4 * classes if self.top is None else 12 * self.top + 4
        return samples * (self.views or 1) * rows * row

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else value


class TeacherOutputs(nn.Module):
    """A teacher's stored logits on every training sample, by index and view.

    Args:
        stored: ``logits`` (views, samples, ..., classes); or ``top`` (views, samples, ..., k), the largest logits, ``place``,
            their classes, and ``rest``, the logit that stands for each of the others. Where a forecast stored those of fewer
            samples, they stand for all.
        classes: number of classes.
    """

    def __init__(self, stored: Mapping[str, Tensor], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.names = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def forward(self, index: Int[Tensor, " batch"], view: Int[Tensor, " batch"] | None = None) -> Tensor:
        """Logits of the samples at ``index``."""
        views = torch.zeros_like(index) if view is None else view
        places = index.remainder(getattr(self, self.names[0]).shape[1])
        found = {name: getattr(self, name)[views, places] for name in self.names}
        return found["logits"] if "logits" in found else dense(found, self.classes)

    def of(self, batch: Batch) -> Tensor:
        """Logits of a batch of training samples."""
        said: Tensor = self(batch.index, batch.get("view"))
        return said


class PartlyStored(TeacherOutputs):
    """Stored logits of samples that are whole, and the teacher's own of those that were mixed.

    Which rows are asked for is known only on the device, so each step waits for it once.

    Args:
        outputs: the stored logits.
        teacher: the teacher.
    """

    def __init__(self, outputs: TeacherOutputs, teacher: nn.Module) -> None:
        super().__init__({name: outputs.get_buffer(name) for name in outputs.names}, outputs.classes)
        self.teacher = teacher

    def of(self, batch: Batch) -> Tensor:
        said = super().of(batch)
        rows = batch[MIXED].nonzero().flatten()
        if not len(rows):
            return said
        asked = Batch({name: values[rows] for name, values in batch.inputs.items()})
        return said.index_copy(0, rows, logits(self.teacher, asked).to(said.dtype))


def dense(kept: Mapping[str, Tensor], classes: int) -> Float[Tensor, "*rows classes"]:
    """Logits again, from what :func:`sparse` kept."""
    rest = kept["rest"]
    whole = rest.unsqueeze(-1).expand(*rest.shape, classes).clone()
    return whole.scatter_(-1, kept["place"], kept["top"])


def sparse(whole: Float[Tensor, "*rows classes"], top: int, temperature: float) -> tuple[dict[str, Tensor], Tensor]:
    """The largest logits, their classes, and the logit that gives the other classes their mass in equal shares.

    At ``temperature`` the kept probabilities and the sum of the others are exact, so the total variation between the full
    distribution and the kept one is at most that sum.

    Returns:
        What :func:`dense` takes, and the mass of the classes that were not kept, per row.

    >>> kept, mass = sparse(torch.tensor([2.0, 0.0, 1.0, 0.0]), top=2, temperature=1.0)
    >>> [round(p, 4) for p in dense(kept, 4).softmax(-1).tolist()], round(float(mass), 4)
    ([0.6103, 0.0826, 0.2245, 0.0826], 0.1652)
    """
    whole = whole.float()
    values, place = whole.topk(top, dim=-1)
    scaled = whole / temperature
    others = torch.logsumexp(scaled.scatter(-1, place, -math.inf), -1)
    rest = temperature * (others - math.log(whole.shape[-1] - top))
    return {"top": values, "place": place, "rest": rest}, (others - torch.logsumexp(scaled, -1)).exp()


def stored_outputs(
    cache: TeacherCache, name: str, teacher: nn.Module, run: Run, augment: Augment, at_once: int
) -> Generator[Compute, Any, tuple[TeacherOutputs, list[str]]]:
    """Compute a teacher's outputs on the training split, or find them: ``outputs, notes = yield from stored_outputs(...)``.

    Args:
        cache: what to store.
        name: the teacher's name in the run.
        teacher: the teacher.
        run: the run.
        augment: the augmentation whose fixed views are stored.
        at_once: samples in a batch.

    Raises:
        UserError: the outputs would take more than the cache's limit, or it keeps more logits than there are classes.
    """
    train, views = run.data.split("train"), cache.views or 1
    # The views are the recipe's and not the run's: every seed meets the same ones.
    parts = [
        "outputs",
        fingerprint(teacher),
        repr(teacher),
        run.data.fingerprint,
        "train",
        augment.dump(),
        cache.dump(),
    ]
    key = json.dumps([*parts, cache.version, torch.__version__, run.world.device.type, torch.get_num_threads()])

    def compute(split: Split) -> dict[str, Any]:
        teacher.to(run.world.device)
        found: list[dict[str, Tensor]] = []
        worst, total, rows = 0.0, 0.0, 0
        classes = 0
        with measuring(teacher):
            batches = split.batches(
                min(at_once, len(split)), shuffle=False, drop_last=False, augment=augment, views=views
            )
            for batch in _passes(batches, views, run):
                out = logits(teacher, batch)
                if not found:
                    classes = out.shape[-1]
                    _forecast(cache, name, len(train), out, run)
                if cache.top is None:
                    found.append({"logits": out.float().cpu()})
                    continue
                kept, mass = sparse(out, cache.top, cache.temperature)
                found.append({key: tensor.cpu() for key, tensor in kept.items()})
                worst, total, rows = max(worst, float(mass.max())), total + float(mass.sum()), rows + mass.numel()
        whole = {key: torch.cat([part[key] for part in found]) for key in found[0]}
        tensors = {key: tensor.view(views, len(split), *tensor.shape[1:]) for key, tensor in whole.items()}
        bound = {"largest": worst, "mean": total / rows} if rows else {}
        return {"tensors": tensors, "classes": classes, "bound": bound}

    stored = yield Compute(
        f"{name}-outputs",
        lambda _: compute(train),
        key=key,
        part=lambda _, share: compute(train.spaced(max(1, round(share * len(train))))),
    )
    notes = []
    if bound := stored["bound"]:
        notes.append(
            f"of {name}'s predictions the {cache.top} largest of {stored['classes']} classes are kept, the others share their "
            f"mass: at temperature {cache.temperature:g} the two distributions differ by at most {bound['largest']:.2g} in "
            f"total variation ({bound['mean']:.2g} on average)."
        )
    return TeacherOutputs(stored["tensors"], stored["classes"]), notes


def _forecast(cache: TeacherCache, name: str, samples: int, out: Tensor, run: Run) -> None:
    rows, classes = math.prod(out.shape[1:-1]), out.shape[-1]
    if cache.top is not None and cache.top >= classes:
        raise UserError(
            f"cache_teacher.top: {name} has {classes} outputs, so there is nothing to leave out with top={cache.top}; "
            "choose fewer, or keep all."
        )
    size = cache.size(samples, rows, classes) / GIGABYTE
    if size > cache.limit:
        smaller = (
            "keep fewer with cache_teacher.top" if cache.top is None else "keep fewer with a smaller top or fewer views"
        )
        raise UserError(
            f"cache_teacher: the outputs of {name} would take {size:.3g} GB ({samples:,} samples, {cache.views or 1} views, "
            f"{rows * classes:,} numbers each), more than the limit of {cache.limit:g} GB; {smaller}, raise "
            "cache_teacher.limit, or set cache_teacher=false."
        )
    many = f"{cache.views} views of " if (cache.views or 1) > 1 else ""
    run.listener.say(
        f"the outputs of {name} on {many}{samples:,} samples are computed once; they take {1024 * size:.3g} MB."
    )


def _passes(batches: Any, views: int, run: Run) -> Iterator[Batch]:
    stream = batches.open(0, device=run.world.device)
    for _ in range(views * stream.per_epoch):
        yield next(stream)
    stream.close()

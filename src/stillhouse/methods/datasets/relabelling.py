"""What SRe2L and RDED have in common: a teacher labels random views of the tiny set, and fresh networks train on these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Batch
from stillhouse.data.splits import number_of
from stillhouse.engine import Compute, Losses, Modules, Optimizer, Result, Run, Stage, Update, Weight, frozen, measuring
from stillhouse.errors import UserError
from stillhouse.methods.datasets.condensation import Condensation
from stillhouse.methods.supervised import held_out
from stillhouse.methods.teacher import TeacherSpec, TrainedTeacher
from stillhouse.models import ImageNetResNetSpec, ModelSpec, logits
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.soft_views import ViewPlan, Views, seen

GIGABYTE = 2**30


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's logits on views of a tiny set: an artefact that goes with the set.

    Attributes:
        views: what was drawn; ``sources`` count in the set. Runs of one pass over the set follow each other.
        logits: file of the logits, float16 or float32, a row for each view.
        images: number of images, so that a pass is that many views.
        batch_size: views that were mixed among each other, in their order.
        temperature: at which networks are trained on them.
    """

    views: Views
    logits: Path
    images: int
    batch_size: int
    temperature: float

    def rows(self, where: Tensor) -> Tensor:
        """Logits of some views, as float32."""
        stored = np.load(self.logits, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(np.asarray(stored[where.numpy()], dtype=np.float32))

    @property
    def bytes(self) -> int:
        """Bytes of everything that is stored."""
        views = sum(tensor.numel() * tensor.element_size() for tensor in self.views.small().values())
        return views + self.logits.stat().st_size

    def save(self, directory: Path) -> None:
        """Write ``views.safetensors``, ``logits.npy`` and a page that says how to read them."""
        facts = {"images": self.images, "batch_size": self.batch_size, "temperature": self.temperature}
        save_file(self.views.small(), directory / "views.safetensors", metadata={"stillhouse": json.dumps(facts)})
        shutil.copyfile(self.logits, directory / "logits.npy")
        (directory / "README.md").write_text(
            _PAGE.format(**facts, passes=len(self.views) // self.images, bytes=self.bytes), encoding="utf-8"
        )


_PAGE = """# Soft labels

{passes} passes over the {images} images of the set, a view and its teacher's logits for each, {bytes} bytes.

Row by row, `views.safetensors` says of each view: `sources`, the two images it is of; of each of them `strips` (orders of
rows and columns of strips), `crops` (top, left, height, width, resized to the whole, bilinear) and `mirrored`; `pasted`, the
box (top, left, height, width) that comes from the second; `share`, that of the first where the two are blended.
`logits.npy` has the teacher's logits. `stillhouse.modules.soft_views.seen(images, views)` makes the pixels.

Train a fresh network on batches of {batch_size} views in this order, towards `softmax(logits / {temperature:g})`, its own
logits divided by the same temperature.
"""


class Relabelling(Condensation):
    """Base of methods whose images are labelled view by view by the teacher that made or chose them."""

    images_per_class: int = Field(10, ge=1, description="images of each class in the tiny set (IPC)")
    network: ModelSpec = Field(ImageNetResNetSpec(depth=18), description="the network that is trained on the tiny set")
    teacher: TeacherSpec = Field(
        TrainedTeacher(
            model=ImageNetResNetSpec(depth=18),
            optimizer=Optimizer(name="sgd", lr=0.2, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
            epochs=50,
            batch_size=256,
            augment="crop-flip",
        ),
        description="the network that knows the whole data set: trained on it here, or pretrained",
    )
    relabel: Literal["stored", "online", "hard"] = Field(
        "stored",
        description="stored: views drawn and labelled once, for all networks, and handed over with the set; online: new "
        "ones for each network, as it trains; hard: class labels alone (an ablation)",
    )
    label_views: ViewPlan | None = Field(
        None, description="how views are drawn; by default as the method's paper has it"
    )
    label_precision: Literal["half", "single"] = Field("half", description="numbers in which logits are stored")
    label_limit: float = Field(64.0, gt=0, description="most gigabytes of stored labels; more is refused beforehand")
    temperature: float = Field(20.0, gt=0, description="softmax temperature of both sides in training on soft labels")
    weight_soft: Weight = Field(
        1.0, description="weight of the divergence from the teacher (not times the squared temperature)"
    )
    eval_epochs: int = Field(300, ge=1, description="passes over the tiny set in scoring, each of new views")
    eval_batch_size: int = Field(64, ge=1, description="batch size in scoring; views are mixed within a batch")
    eval_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine"),
        description="optimiser in scoring; weight decay is for matrices and kernels only, as released",
    )

    def plan(self) -> ViewPlan:
        """How views are drawn."""
        return self.label_views or ViewPlan()

    def ready(self, run: Run) -> Generator[Any, Any, tuple[nn.Module, dict[str, float]]]:
        """The teacher, frozen and measured."""
        teacher = yield from self.teacher.ready(run)
        teacher = teacher.to(run.world.device).requires_grad_(False).eval()
        test = yield Compute("teacher-test", lambda _: held_out(teacher, run), form=dict[str, float])
        return teacher, {name.replace("test/", "test/teacher/"): value for name, value in test.items()}

    def relabelled(
        self, run: Run, distilled: DistilledSet, teacher: nn.Module, name: str
    ) -> Generator[Any, Any, tuple[dict[str, list[float]], SoftLabels | None]]:
        """Scores of fresh networks on the set as this method labels it, and the labels where they are stored."""
        if self.relabel == "hard":
            return (yield from self.scored(run, distilled, name)), None
        images = distilled.images.detach().cpu().clone()
        size = min(self.eval_batch_size, len(images))
        stored = None
        if self.relabel == "stored":
            self._check_room(len(images), run)
            made = yield Compute(
                f"labels/{name}",
                lambda home: self._label(images, teacher, size, home, run),
                form=lambda: self._form(images, size),
            )
            stored = SoftLabels(Views(**made["views"]), made.get("logits", Path()), len(images), size, self.temperature)
        stage = partial(self._training, run, images.to(run.world.device), teacher, size, stored)
        trainings = {
            key: [replace(self.training(spec, {}), stage=stage)] * self.eval_networks
            for key, spec in self.architectures().items()
        }
        return (yield from self.trained(run, name, trainings)), stored

    def handed_over(
        self,
        run: Run,
        distilled: DistilledSet,
        scores: dict[str, list[float]],
        soft: SoftLabels | None,
        more: dict[str, float],
    ) -> Result:
        """The result: set, soft labels, scores, and further numbers."""
        protocol: dict[str, Any] = {"labels": self.relabel}
        notes = []
        if self.relabel != "hard":
            protocol |= {"views": self.plan().dump(), "temperature": self.temperature, "augment": "none"}
        if soft is not None:
            more = {**more, "labels/bytes": float(soft.bytes)}
            notes.append(
                f"the soft labels take {soft.bytes / 2**20:.3g} MiB, the images {distilled.bytes / 2**20:.3g} MiB; they belong "
                "to the set and are in result/labels."
            )
        result = self.concluded(
            run,
            distilled,
            {"distilled": scores},
            protocol=protocol,
            artefacts={} if soft is None else {"labels": soft},
            notes=notes,
        )
        result.metrics.update(more)
        return result

    def _check_room(self, images: int, run: Run) -> None:
        need = (
            images * self.eval_epochs * (run.data.facts.num_classes or 1) * (2 if self.label_precision == "half" else 4)
        )
        if need > self.label_limit * GIGABYTE:
            raise UserError(
                f"relabel: the teacher's logits on {self.eval_epochs} views of {images:,} images would take "
                f"{need / GIGABYTE:.3g} GB, more than label_limit={self.label_limit:g}; raise it, use fewer eval_epochs, or "
                "relabel=online."
            )

    def _drawn(self, images: Tensor, size: int) -> Views:
        """The views of one pass over the set, in batches of ``size``."""
        order = torch.randperm(len(images))
        parts = []
        for batch in torch.split(order, size):
            views = self.plan().draw(len(batch), (images.shape[-2], images.shape[-1]))
            parts.append(Views(**{**views.tensors, "sources": batch[views.sources]}))
        return Views.joined(parts)

    def _label(self, images: Tensor, teacher: nn.Module, size: int, home: Path, run: Run) -> dict[str, Any]:
        """Draw all views, and store what the teacher says of them."""
        count = len(images)
        path = home / "logits.npy"
        passes, stored = [], None
        on_device = images.to(run.world.device)
        with measuring(teacher):
            for number in range(self.eval_epochs):
                views = self._drawn(images, size)
                passes.append(views)
                for start in range(0, count, size):
                    found = logits(teacher, Batch(pixel_values=seen(on_device, views[start : start + size])))
                    if stored is None:
                        kind = np.float16 if self.label_precision == "half" else np.float32
                        shape = (self.eval_epochs * count, found.shape[1])
                        stored = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
                    place = number * count + start
                    stored[place : place + len(found)] = found.float().cpu().numpy()
        assert stored is not None
        stored.flush()
        return {"views": Views.joined(passes).small(), "logits": path}

    def _form(self, images: Tensor, size: int) -> dict[str, Any]:
        drawn = self._drawn(images, size)
        return {"views": Views.joined([drawn] * self.eval_epochs).small()}

    def _training(
        self,
        run: Run,
        images: Tensor,
        teacher: nn.Module,
        size: int,
        stored: SoftLabels | None,
        stage: str,
        net: nn.Module,
    ) -> Stage:
        """The training of a fresh network on views of the set."""
        count = len(images)
        per_pass = -(-count // size)

        def prepare(m: Modules, _: Batch, run: Run) -> Batch:
            number, step = divmod(run.step, per_pass)
            start, end = step * size, min(count, (step + 1) * size)
            # This process's part of the batch; whatever it is mixed with is at hand.
            rank, world = run.world.rank, run.world.size
            part = slice(start + (end - start) * rank // world, start + (end - start) * (rank + 1) // world)
            rows = torch.arange(number * count + part.start, number * count + part.stop)
            if stored is not None:
                pixels, soft = seen(images, stored.views[rows]), stored.rows(rows).to(images.device)
            else:
                # All batches of a pass come from one order.
                order = torch.randperm(
                    count, generator=torch.Generator().manual_seed(number_of("order", run.seed, stage, number))
                )
                views = self.plan().draw(end - start, (images.shape[-2], images.shape[-1]))
                views = Views(**{**views.tensors, "sources": order[start:end][views.sources]})
                pixels = seen(images, views[part.start - start : part.stop - start])
                with torch.no_grad():
                    soft = logits(m.teacher, Batch(pixel_values=pixels))
            return Batch(pixel_values=pixels, soft=soft)

        modules: dict[str, Any] = {"net": net}
        if stored is None:
            modules["teacher"] = frozen(teacher)
        update = Update(self.soft_loss, _decayed(net, self.eval_optimizer))
        return Stage(stage, modules, [update], steps=self.eval_epochs * per_pass, prepare=prepare)

    def soft_loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """``KL(softmax(teacher / T) || softmax(net / T))``, a mean over the global batch."""
        own = logits(m.net, Batch(pixel_values=batch["pixel_values"]))
        rows = losses.kl(own, batch["soft"], self.temperature, scale_by_temperature_squared=False, reduction="none")
        return {"soft": run.mean(rows)}


def _decayed(net: nn.Module, optimizer: Optimizer) -> dict[str | tuple[str, ...], Optimizer]:
    """What is trained: weight decay for matrices and kernels, none for biases and norms."""
    plain = optimizer.model_copy(update={"weight_decay": 0.0})
    groups: dict[str | tuple[str, ...], Optimizer] = {}
    for many, chosen in ((True, optimizer), (False, plain)):
        names = tuple(f"net.{name}" for name, weight in net.named_parameters() if (weight.dim() > 1) is many)
        if names:
            groups[names] = chosen
    return groups

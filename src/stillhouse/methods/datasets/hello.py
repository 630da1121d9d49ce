"""HeLlO: stitched real crops, and a light labeller in place of a soft label for every view (arXiv 2408.08201)."""

from __future__ import annotations

import copy
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Augment, Batch, DataSpec, Split
from stillhouse.engine import (
    Compute,
    Later,
    Losses,
    Modules,
    Optimizer,
    Paper,
    Record,
    Result,
    Run,
    Stage,
    Stages,
    SubRun,
    Update,
    Weight,
    adam,
    frozen,
    frozen_through,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.methods.clip import CLIP, prompts
from stillhouse.methods.datasets.condensation import Condensation, image
from stillhouse.methods.supervised import quality
from stillhouse.models import (
    HubTowers,
    ImageNetResNetSpec,
    ModelSpec,
    TwoTowers,
    TwoTowersSpec,
    fingerprint,
    load_clip,
    logits,
)
from stillhouse.modules.crops import crop_resized, random_crops, stitch
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.labeller import Labeller, view_label_bytes
from stillhouse.modules.mixing import CutMix, Mixing
from stillhouse.spec import Tagged

Towers = TwoTowers | HubTowers

FACTORS, PEFT, MADE_OF = "adapter_model.safetensors", "adapter_config.json", "labeller.json"


class FoundationSpec(Tagged):
    """A model of images and texts that anybody can have again: ``clip:NAME``, or towers trained before the run."""

    noun = "foundation model"

    def ready(self, run: Run) -> Generator[SubRun, Any, Towers]:
        """Load it, or train it or find it in the cache."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it gets ready.")


class PublishedCLIP(FoundationSpec):
    """A CLIP model of transformers by hub id or directory."""

    kind = "clip"

    name: str = Field("openai/clip-vit-base-patch32", description="hub id or directory")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(name=text) if text else cls()

    def ready(self, run: Run) -> Generator[SubRun, Any, Towers]:
        yield from ()
        return load_clip(self.name, self.revision)


class TrainedTowers(FoundationSpec):
    """Two small towers trained on captioned images before the run, with a seed of their own."""

    kind = "two-towers"

    model: ModelSpec = Field(TwoTowersSpec(), description="the towers")
    data: DataSpec = Field(DataSpec.parse("characters"), description="captioned images")
    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=3e-3, weight_decay=0.01, schedule="cosine"), description="optimiser of both towers"
    )
    epochs: float = Field(40, gt=0, description="passes over the captioned images")
    batch_size: int = Field(128, ge=2, description="pairs per process and step")
    seed: int = Field(0, ge=0, description="their own seed, so that every run meets the same towers")

    def ready(self, run: Run) -> Generator[SubRun, Any, Towers]:
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "seed"}
        result = yield SubRun("foundation", CLIP(**fields), seed=self.seed)
        towers: TwoTowers = result.model
        return towers


@dataclass(frozen=True)
class LabellerExport:
    """A labeller as an artefact: what was trained, and what the rest is made from again.

    Attributes:
        labeller: the labeller.
        about: class names, prompt, foundation and its checksum, ranks, pixels: plain values.
        dtype: numbers in which factors are stored.
    """

    labeller: Labeller
    about: Mapping[str, Any]
    dtype: torch.dtype

    def save(self, directory: Path) -> None:
        """Write factors (in peft's form), peft's configuration and the description into ``directory``."""
        factors = {name: value.to(self.dtype).cpu().contiguous() for name, value in self.labeller.factors().items()}
        save_file(factors, directory / FACTORS)
        rank = self.about["encoder_rank"]
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": list(self.labeller.adapted),
            "bias": "none",
            "base_model_name_or_path": self.about["foundation"].get("name"),
        }
        for name, content in ((PEFT, config), (MADE_OF, dict(self.about))):
            (directory / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_labeller(directory: Path, towers: Towers) -> Labeller:
    """The labeller that a run handed over, made again on its foundation.

    Args:
        directory: ``result/labeller`` of the run.
        towers: the foundation model; changed in place.

    Raises:
        UserError: there is no labeller, or it was made on another foundation.
    """
    try:
        about = json.loads((directory / MADE_OF).read_text(encoding="utf-8"))
        with safe_open(directory / FACTORS, "pt") as file:
            factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError:
        raise UserError(f"{directory} holds no labeller; it needs {MADE_OF} and {FACTORS}.") from None
    found = checksum(towers)
    if found != about["checksum"]:
        raise UserError(
            f"{directory}: the labeller was made on a foundation with checksum {about['checksum']}, and this one has {found}; "
            "its labels would be others in silence."
        )
    labeller = built(towers, about)
    labeller.load_factors(factors)
    return labeller.eval()


def checksum(towers: Towers) -> str:
    """A hash of everything that labels depend on in a foundation."""
    return fingerprint(towers)


def built(towers: Towers, about: Mapping[str, Any]) -> Labeller:
    """A labeller at its start: zero-shot classification by the names, or an empty head."""
    towers.eval()
    with torch.no_grad():
        texts = prompts(about["prompt"], tuple(about["class_names"])) if about["text_init"] else ["a"]
        named = towers.encode_texts(texts)
    base = named if about["text_init"] else named.new_zeros(about["classes"], named.shape[1])
    return Labeller(
        towers.image,
        base,
        scale=about["scale"],
        encoder_rank=about["encoder_rank"],
        head_rank=about["head_rank"],
        layers=towers.adaptable,
        gain=about["gain"],
        shift=about["shift"],
        size=towers.size,
    )


class Tiles(nn.Module):
    """Parts of stitched images that are updated so that, enlarged, they look to an encoder as they did before.

    Args:
        images: the parts.
        patches: the crops at full size that they were shrunk from.
        low: least value of each channel.
        high: largest value of each channel.
    """

    patches: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, images: Tensor, patches: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images.detach().clone())
        for name, value in (("patches", patches), ("low", low), ("high", high)):
            self.register_buffer(name, value.detach().clone(), persistent=False)

    def after_step(self, run: Run) -> None:
        """Back into the range of pixels."""
        with torch.no_grad():
            self.images.copy_(torch.maximum(torch.minimum(self.images, self.high), self.low))


class HeLlO(Condensation):
    """Choose and stitch real crops, and train low-rank changes of a foundation model that label them as students train.

    The labeller ``f(x) = s (W_0 + B A) E(x) / |E(x)|`` starts as zero-shot classification by the class names and learns, on
    the real set, ``MSE(f(x), mean logits of weak teachers) + lambda CE(f(x), y)``; the teachers are checkpoints of one
    training. Students learn ``MSE(h(x), f(x)) + beta CE(h(x), y)`` on augmented images, labelled as they are seen.
    """

    name: ClassVar[str] = "hello"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Heavy Labels Out! Dataset Distillation with Label Space Lightening",
        2025,
        arxiv="2408.08201",
        venue="ICCV 2025",
    )
    summary: ClassVar[str] = "stitched real crops with a small online labeller in place of gigabytes of soft labels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    images_per_class: int = Field(10, ge=1, description="images of each class in the tiny set (IPC)")
    network: ModelSpec = Field(ImageNetResNetSpec(depth=18), description="the student that is trained on the tiny set")
    foundation: FoundationSpec = Field(
        PublishedCLIP(), description="the model of images and texts: clip:NAME, two-towers"
    )
    prompt: str = Field("a photo of a {}", description="what asks for a class, its name in place of the braces")
    text_init: bool = Field(True, description="start the head as the class names' embeddings, which are not stored")
    encoder_rank: int = Field(
        8, ge=0, description="rank of the changes in the encoder (r1); 0: a probe on frozen features"
    )
    head_rank: int | None = Field(64, ge=1, description="rank of the head's change (r2); null stores the head whole")
    logit_scale: float | None = Field(None, gt=0, description="factor of the cosines (s); the foundation's by default")
    store: Literal["half", "single"] = Field("half", description="numbers in which the labeller is stored, and used")
    teacher: ModelSpec = Field(ImageNetResNetSpec(depth=18), description="the network of the weak teachers")
    teacher_optimizer: Optimizer = Field(
        Optimizer(name="sgd", lr=0.2, momentum=0.9, weight_decay=1e-4, schedule="cosine"), description="their optimiser"
    )
    teacher_epochs: float = Field(50, gt=0, description="passes over the real set in the training they are taken from")
    teacher_batch_size: int = Field(256, ge=1, description="batch size of it")
    checkpoints: int = Field(
        9, ge=1, description="weak teachers, evenly from that training; the last is the converged one"
    )
    combine: Literal["mean", "sample"] = Field(
        "mean", description="average their logits, or draw one of them for a batch"
    )
    labeller_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="optimiser of the low-rank factors"
    )
    labeller_epochs: float = Field(10, gt=0, description="passes over the real set in training the labeller")
    labeller_batch_size: int = Field(128, ge=1, description="batch size of it")
    real_augment: Augment = Field(
        "crop-flip", description="augmentation of real images for teachers and labeller", validate_default=True
    )
    weight_match: Weight = Field(1.0, description="weight of the squared distance to the weak teachers' logits")
    weight_label: Weight = Field(1.0, description="weight of the labels of real images (lambda)")
    pool: int = Field(300, ge=1, description="images of each class that crops are cut from; all if there are fewer")
    crops: int = Field(5, ge=1, description="random crops of each image, of which the best is kept")
    factor: int = Field(2, ge=1, description="crops along each side of a stitched image")
    smallest: float = Field(0.08, gt=0, le=1, description="least share of an image's area in a crop")
    update_steps: int = Field(
        100, ge=0, description="steps that make shrunk crops look as before to the encoder; 0: none"
    )
    update_lr: float = Field(0.01, gt=0, description="learning rate of these steps (Adam)")
    labels: Literal["labeller", "teacher", "per-image", "hard"] = Field(
        "labeller",
        description="what students learn: labeller; teacher: the converged one's word for each view (what is stored whole "
        "elsewhere); per-image: its word for each image, once; hard: class labels alone",
    )
    view_smallest: float = Field(0.08, gt=0, le=1, description="least share of an image in a student's view")
    view_flip: bool = Field(True, description="mirror half of the views; off for characters")
    view_mix: Mixing = Field(CutMix(shared=True), description="how views are mixed", validate_default=True)
    weight_soft: Weight = Field(1.0, description="weight of the squared distance to the labeller's logits")
    weight_hard: Weight = Field(0.025, description="weight of the class labels of views (beta)")
    eval_epochs: int = Field(300, ge=1, description="passes over the tiny set in scoring, each of new views")
    eval_batch_size: int = Field(64, ge=1, description="batch size in scoring")
    eval_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine"), description="optimiser in scoring"
    )

    @model_validator(mode="after")
    def _head_is_known(self) -> Self:
        if not self.text_init and self.head_rank is not None:
            raise ValueError(
                "head_rank: without text_init there is nothing that a change could be of; set head_rank to null"
            )
        return self

    def stages(self, run: Run) -> Stages:
        """Foundation, weak teachers, labeller, images, scores."""
        self.check_data(run)
        self.check_crops(run)
        towers = yield from self.foundation.ready(run)
        about = self.about(towers, run)
        labeller = built(copy.deepcopy(towers), about).to(run.world.device)
        zero_shot = yield Compute("zero-shot", lambda _: self.accuracy(labeller, run), form=float)
        teachers = yield from self.weak_teachers(run)
        yield self.labeller_stage(run, labeller, teachers)
        dtype = torch.float16 if self.store == "half" else torch.float32
        # Students learn from what is stored, and not from what it was rounded from.
        labeller.round(dtype)
        export = LabellerExport(labeller, about, dtype)
        known = yield Compute("stored", partial(self.known, export, teachers[-1], run), form=dict[str, float])
        distilled, pictures = yield from self.images(run, labeller, teachers[-1])
        scores = yield from self.scored_online(run, distilled, labeller, teachers[-1])
        result = self.concluded(
            run, distilled, {"distilled": scores}, pictures=pictures, notes=self.notes(known, distilled)
        )
        result.metrics |= {"test/zero-shot/accuracy": zero_shot, **known, **self.bytes(known, distilled, run)}
        return self.with_labeller(result, export)

    # The labeller ---------------------------------------------------------------------------------------------------

    def about(self, towers: Towers, run: Run) -> dict[str, Any]:
        """What a labeller is made from, besides its factors."""
        facts, scale = run.data.facts, run.data.scale
        names = facts.class_names
        if self.text_init:
            # Said before anything is trained.
            prompts(self.prompt, names)
        gain = shift = None
        if scale is not None and not scale.given:
            mean, std = (values.tolist() for values in (towers.mean, towers.std))
            if len(scale.mean) not in (1, len(mean)):
                raise UserError(
                    f"foundation: it reads {len(mean)} channels and the images of {run.data.name!r} have {len(scale.mean)}."
                )
            ours = [values * (len(mean) if len(values) == 1 else 1) for values in (scale.mean, scale.std)]
            gain = [own / theirs for own, theirs in zip(ours[1], std, strict=True)]
            shift = [(own - their) / by for own, their, by in zip(ours[0], mean, std, strict=True)]
        return {
            "class_names": list(names),
            "classes": facts.num_classes,
            "prompt": self.prompt,
            "text_init": self.text_init,
            "foundation": self.foundation.dump(),
            "checksum": checksum(towers),
            "scale": float(self.logit_scale or towers.scale.detach()),
            "encoder_rank": self.encoder_rank,
            "head_rank": self.head_rank,
            "gain": gain,
            "shift": shift,
        }

    def weak_teachers(self, run: Run) -> Generator[Any, Any, list[nn.Module]]:
        """Checkpoints of one training on the real set, evenly spaced; the last one is the end."""
        net = self.teacher.build(run.data.facts)
        batches = self.real_batches(run, self.teacher_batch_size)
        total = max(self.checkpoints, round(self.teacher_epochs * batches.per_epoch(run.world.size)))
        every = max(1, round(total / self.checkpoints))
        trained = yield Stage(
            "weak-teachers",
            {"net": net},
            [Update(classified, {"net": self.teacher_optimizer}, name="teach")],
            steps=every * self.checkpoints,
            batches=batches,
            records={"net": Record(lambda m: m.net.state_dict(), every=every)},
        )
        kept = trained.records.get("net", {})
        teachers = []
        for number in range(1, self.checkpoints + 1):
            teacher = copy.deepcopy(net)
            if kept:
                teacher.load_state_dict({name: torch.as_tensor(np.array(rows[number])) for name, rows in kept.items()})
            teachers.append(teacher.eval())
        return teachers

    def real_batches(self, run: Run, size: int) -> Any:
        """Batches of the real set."""
        split = run.data.split("train")
        return split.batches(min(size, max(1, len(split) // run.world.size)), augment=self.real_augment)

    def labeller_stage(self, run: Run, labeller: Labeller, teachers: Sequence[nn.Module]) -> Stage:
        """The training of the factors."""
        batches = self.real_batches(run, self.labeller_batch_size)
        held = {f"teacher-{number}": frozen(teacher) for number, teacher in enumerate(teachers)}
        return Stage(
            "labeller",
            {"labeller": labeller, **held},
            [Update(self.lighten, {"labeller": self.labeller_optimizer}, name="lighten", eval=("labeller",))],
            steps=max(1, round(self.labeller_epochs * batches.per_epoch(run.world.size))),
            batches=batches,
        )

    def lighten(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Squared distance of the labeller's logits to the weak teachers', and cross-entropy on the labels."""
        found = m.labeller(batch["pixel_values"])
        return {
            "match": lambda: F.mse_loss(found, self.weak(m, batch, run).to(found.dtype)),
            "label": lambda: losses.cross_entropy(found, batch.labels),
        }

    def weak(self, m: Modules, batch: Batch, run: Run) -> Tensor:
        """What the weak teachers say together of a batch."""
        images = {"pixel_values": batch["pixel_values"]}
        if self.combine == "sample":
            drawn = int(torch.randint(self.checkpoints, (), generator=torch.Generator().manual_seed(run.step)))
            return logits(m[f"teacher-{drawn}"], images)
        return torch.stack([logits(m[f"teacher-{number}"], images) for number in range(self.checkpoints)]).mean(0)

    def accuracy(self, model: nn.Module, run: Run) -> float:
        """Test accuracy of a labeller or teacher."""
        model.to(run.world.device)
        return quality(model, run.data.split("test"), run)["accuracy"]

    def known(self, export: LabellerExport, teacher: nn.Module, run: Run, home: Path) -> dict[str, float]:
        """The labeller's accuracy, the numbers it stores, and the bytes of its files; the converged teacher's accuracy."""
        export.save(home)
        numbers = sum(value.numel() for value in export.labeller.factors().values())
        return {
            "test/labeller/accuracy": self.accuracy(export.labeller, run),
            "test/teacher/accuracy": self.accuracy(teacher, run),
            "labeller/numbers": float(numbers),
            "labeller/bytes": float(sum(path.stat().st_size for path in home.iterdir())),
        }

    def bytes(self, known: Mapping[str, float], distilled: DistilledSet, run: Run) -> dict[str, float]:
        """Bytes of what students learn from besides images, and of a half-precision label for every view."""
        classes = run.data.facts.num_classes or 1
        full = view_label_bytes(self.eval_epochs, len(distilled), classes)
        kept = {
            "labeller": known.get("labeller/bytes", 0.0),
            "teacher": float(full),
            "per-image": float(view_label_bytes(1, len(distilled), classes)),
            "hard": 0.0,
        }[self.labels]
        return {"labels/bytes": kept, "labels/full_bytes": float(full), "labels/share": kept / full}

    def notes(self, known: Mapping[str, float], distilled: DistilledSet) -> list[str]:
        """What is stored, in words."""
        if self.labels != "labeller":
            return [f"students learned from labels={self.labels}; the labeller was made and is not what they saw."]
        return [
            f"the labeller stores {known.get('labeller/numbers', 0):,.0f} numbers; the images take {distilled.bytes / 2**20:.3g} "
            "MiB as floats. It needs its foundation model, the class names and the prompt to label anything."
        ]

    def with_labeller(self, result: Result, export: LabellerExport) -> Result:
        """The result with the labeller beside the set."""
        if self.labels == "labeller":
            result.artefacts["labeller"] = export
        return result

    # The images -----------------------------------------------------------------------------------------------------

    def check_crops(self, run: Run) -> None:
        """Refuse classes with fewer images than the crops that are asked for."""
        wanted = self.images_per_class * self.factor**2
        _, height, width = image(run.data.facts)
        if min(height, width) < 2 * self.factor:
            raise UserError(
                f"factor is {self.factor}, which leaves crops of less than 2 pixels in images of {height}x{width}."
            )
        for label, members in run.data.split("train").by_class().items():
            if min(len(members), self.pool) < wanted:
                raise UserError(
                    f"images_per_class is {self.images_per_class} of {self.factor**2} crops each, but class {label} has only "
                    f"{min(len(members), self.pool)} images for the {wanted} that this needs; use a smaller factor or "
                    "a larger pool."
                )

    def images(
        self, run: Run, labeller: Labeller, teacher: nn.Module
    ) -> Generator[Any, Any, tuple[DistilledSet, dict[str, Tensor]]]:
        """The stitched images, updated for the labeller's encoder."""
        facts, scale = run.data.facts, run.data.scale
        channels, height, width = image(facts)
        classes, wanted = facts.num_classes or 0, self.images_per_class * self.factor**2
        part = (height // self.factor, width // self.factor)
        made = yield Compute(
            "crops",
            lambda _: self.chosen(teacher, run),
            form=lambda: {
                "patches": torch.zeros(classes * wanted, channels, height, width),
                "tiles": torch.zeros(classes * wanted, channels, *part),
                "index": torch.arange(classes * wanted),
                "boxes": torch.zeros(classes * wanted, 4, dtype=torch.long),
            },
        )
        space: dict[str, Any] = {"mean": scale.mean, "std": scale.std} if scale is not None else {}
        low, high = made["patches"].amin((0, 2, 3)).view(-1, 1, 1), made["patches"].amax((0, 2, 3)).view(-1, 1, 1)
        if scale is not None and not scale.given:
            low, high = (scale.from_unit(torch.full((1, channels, 1, 1), value))[0] for value in (0.0, 1.0))
        tiles = Tiles(made["tiles"], made["patches"], low, high)
        if self.update_steps and self.factor > 1:
            yield Stage(
                "update",
                {"tiles": tiles, "labeller": frozen_through(labeller)},
                [Update(self.look_alike, {"tiles.images": adam(self.update_lr)}, name="look_alike")],
                steps=self.update_steps,
            )
        parts = tiles.images.detach().cpu().view(classes, wanted, channels, *part)
        images = torch.cat([stitch(own, (height, width), self.factor) for own in parts])
        labels = torch.arange(classes).repeat_interleave(self.images_per_class)
        provenance = {
            "method": self.name,
            "data": run.data.name,
            "seed": run.seed,
            "start": {"samples": made["index"].tolist(), "boxes": made["boxes"].tolist()},
        }
        distilled = DistilledSet(images, labels, num_classes=classes, provenance=provenance, **space)
        return distilled, {}

    def chosen(self, teacher: nn.Module, run: Run) -> dict[str, Tensor]:
        """Of each class the crops that the teacher is surest of, at full size and shrunk, class by class."""
        split, (_, height, width) = run.data.split("train"), image(run.data.facts)
        wanted, part = self.images_per_class * self.factor**2, (height // self.factor, width // self.factor)
        found: dict[str, list[Tensor]] = {"patches": [], "tiles": [], "index": [], "boxes": []}
        teacher.to(run.world.device)
        with measuring(teacher):
            for label, members in split.by_class().items():
                members = members[torch.randperm(len(members))[: self.pool]]
                real = split.batch(members)["pixel_values"]
                boxes = random_crops(self.crops * len(real), (height, width), smallest=self.smallest, ratio=1.0)
                boxes = boxes.view(self.crops, len(real), 4)
                score = torch.stack([surprise(teacher, crop_resized(real, own), label, run) for own in boxes])
                least, which = score.min(0)
                place = least.argsort(stable=True)[:wanted]
                kept = boxes[which[place], place]
                found["patches"].append(crop_resized(real[place], kept))
                found["tiles"].append(crop_resized(real[place], kept, part))
                found["index"].append(members[place])
                found["boxes"].append(kept)
        return {name: torch.cat(values) for name, values in found.items()}

    def look_alike(self, m: Modules, batch: Batch, run: Run) -> Iterator[Losses]:
        """Squared distance between the encoder's view of the crops and of the same shrunk and enlarged, in pieces."""
        count = len(m.tiles.images)
        for rows in torch.split(torch.arange(count), 128):
            yield {"look": len(rows) / count * F.mse_loss(*seen_both(m.labeller, m.tiles, rows))}

    # Students -------------------------------------------------------------------------------------------------------

    def scored_online(
        self, run: Run, distilled: DistilledSet, labeller: Labeller, teacher: nn.Module
    ) -> Generator[Any, Any, dict[str, list[float]]]:
        """Test accuracy of fresh networks trained on views that are labelled as they are seen; last epoch."""
        tensors = {"pixel_values": distilled.images.detach().cpu().clone(), "labels": distilled.labels.cpu().clone()}
        if self.labels == "per-image":
            tensors["soft"] = yield Compute(
                "per-image",
                lambda _: told(teacher, tensors["pixel_values"], run),
                form=lambda: torch.zeros(len(distilled), run.data.facts.num_classes or 1),
            )
        split = Split("distilled", run.data.facts, tensors, aside=frozenset({"soft"}))
        batches = split.batches(max(1, min(self.eval_batch_size, len(split)) // run.world.size), drop_last=False)
        held = {"labeller": labeller, "teacher": teacher}.get(self.labels)
        nets: dict[str, list[nn.Module]] = {key: [] for key in self.architectures()}

        def build(key: str, spec: ModelSpec, stage: str) -> Stage:
            net = spec.build(run.data.facts)
            nets[key].append(net)
            return Stage(
                stage,
                {"net": net, **({"labeller": frozen(held)} if held is not None else {})},
                [Update(self.student_loss, {"net": self.eval_optimizer}, name="student")],
                steps=self.eval_epochs * batches.per_epoch(run.world.size),
                batches=batches,
                prepare=self.view,
            )

        stages = []
        for key, spec in self.architectures().items():
            for number in range(self.eval_networks):
                stage = f"score/distilled{'-' + key if key else ''}-{number}"
                stages.append(Later(stage, partial(build, key, spec, stage)))
        yield stages
        measured: dict[str, list[float]] = yield Compute(
            "scores/distilled",
            lambda _: {key: [self.accuracy(net, run) for net in found] for key, found in nets.items()},
            form=lambda: {key: [0.0 for _ in found] for key, found in nets.items()},
        )
        return measured

    def view(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """A view of each image, mixed with another; whoever labels it sees the same pixels."""
        images, world, rank = batch["pixel_values"], run.world.size, run.world.rank
        count = len(images)
        mine = slice(rank * count, (rank + 1) * count)
        size = (images.shape[-2], images.shape[-1])
        boxes = random_crops(count * world, size, smallest=self.view_smallest)[mine]
        mirrored = (torch.rand(count * world) < (0.5 if self.view_flip else 0.0))[mine]
        seen = crop_resized(images, boxes, mirrored=mirrored)
        classes = run.data.facts.num_classes
        if self.view_mix.kind == "none" or count < 2:
            return batch.replace(pixel_values=seen, labels=F.one_hot(batch.labels, classes or 1).float())
        mixture = self.view_mix.draw(seen, rank=rank, world=world)
        changed = {"pixel_values": mixture.inputs(seen), "labels": mixture.labels(batch.labels, classes)}
        if "soft" in batch:
            changed["soft"] = mixture.labels(batch["soft"])
        return batch.replace(**changed)

    def student_loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Squared distance to the label's logits, and cross-entropy on the class labels."""
        images = {"pixel_values": batch["pixel_values"]}
        own = logits(m.net, images)
        terms: dict[str, Any] = {"hard": lambda: F.cross_entropy(own, batch.labels)}
        if self.labels == "per-image":
            terms["soft"] = lambda: F.mse_loss(own, batch["soft"])
        elif self.labels != "hard":
            terms["soft"] = lambda: F.mse_loss(own, logits(m.labeller, images).to(own.dtype))
        return terms


def classified(m: Modules, batch: Batch, run: Run) -> Losses:
    """Cross-entropy on labels."""
    return {"ce": losses.cross_entropy(logits(m.net, batch), batch.labels)}


def surprise(teacher: nn.Module, images: Tensor, label: int, run: Run) -> Float[Tensor, " images"]:
    """Cross-entropy of a teacher on images of one class."""
    found = []
    for some in torch.split(images, 256):
        own = logits(teacher, {"pixel_values": some.to(run.world.device)}).float()
        wanted = own.new_full((len(own),), label, dtype=torch.long)
        found.append(F.cross_entropy(own, wanted, reduction="none").cpu())
    return torch.cat(found)


def told(teacher: nn.Module, images: Tensor, run: Run) -> Float[Tensor, "images classes"]:
    """A teacher's logits for images, once."""
    teacher.to(run.world.device)
    with measuring(teacher):
        return torch.cat(
            [
                logits(teacher, {"pixel_values": some.to(run.world.device)}).float().cpu()
                for some in torch.split(images, 256)
            ]
        )


def seen_both(labeller: Labeller, tiles: Tiles, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's view of shrunk crops, enlarged again, and of the crops."""
    patches = tiles.patches[rows]
    enlarged = F.interpolate(
        tiles.images[rows], (patches.shape[-2], patches.shape[-1]), mode="bilinear", align_corners=False
    )
    with torch.no_grad():
        wanted = labeller.embed(patches)
    return labeller.embed(enlarged), wanted

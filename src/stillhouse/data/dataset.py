"""Data sets: what a recipe says about data (:class:`DataSpec`) and what that gives (:class:`Data`, :class:`Split`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data.augment import Augment
from stillhouse.data.batch import Batch
from stillhouse.data.batches import Batches
from stillhouse.data.looks import look
from stillhouse.data.pixels import PixelScale, PixelSpace, at_size
from stillhouse.data.sources import MEMORY_LIMIT, Memory, Source, in_chunks
from stillhouse.data.splits import RULE, balanced_order, carve, long_tailed
from stillhouse.data.text import Tokenize
from stillhouse.errors import UserError, nearest
from stillhouse.facts import Facts, Task
from stillhouse.spec import Spec, Tagged, read


class Split:
    """One part of a data set.

    Attributes:
        name: "train", "validation", "test", or a name of the source's own.
        facts: shapes, classes and task.
        source: the samples in stored form.
        scale: how stored pixels become a model's; ``None`` where there are none.
        aside: names that travel with a batch and are no inputs.
    """

    def __init__(
        self,
        name: str,
        facts: Facts,
        source: Source | Mapping[str, Tensor],
        *,
        scale: PixelScale | None = None,
        aside: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.facts, self.scale, self.aside = name, facts, scale, aside
        self.source = source if isinstance(source, Source) else Memory(source)
        self._tensors: dict[str, Tensor] | None = None
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}
        self._classes: dict[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tensors(self) -> dict[str, Tensor] | None:
        """All samples as a model sees them, made on first use; ``None`` for a split that is not in memory."""
        if self._tensors is None and isinstance(self.source, Memory):
            stored = dict(self.source.tensors)
            if self.scale is not None and "pixel_values" in stored:
                stored["pixel_values"] = self.scale.to_model(stored["pixel_values"])
            self._tensors = stored
        return self._tensors

    @property
    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """The split as a map-style data set of dicts, for anything that wants one."""
        return _MapStyle(self)

    @property
    def labels(self) -> Tensor:
        """Labels of all samples in order.

        Raises:
            UserError: if the split is unlabelled.
        """
        labels = self.source.labels
        if labels is None:
            found = [chunk["labels"] for chunk in in_chunks(self.source) if "labels" in chunk]
            if not found:
                raise UserError(f"The split {self.name!r} has no labels.")
            labels = torch.cat(found)
        return labels

    def batches(
        self,
        batch_size: int | None,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: Augment | str | dict[str, Any] = "none",
        views: int | None = None,
        anew: bool = False,
        fields: Sequence[str] | None = None,
        among: Shaped[Tensor, " part"] | None = None,
        workers: int = 0,
    ) -> Batches:
        """Describe batches of this split; see :class:`~stillhouse.data.Batches` for the arguments.

        Raises:
            UserError: for a batch size below one, an unknown augmentation or a field that the split lacks.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}.")
        if among is not None and among.dtype == torch.bool:
            among = among.nonzero().flatten()
        chosen = _augmentation(augment)
        if chosen.kind != "none" and "pixel_values" not in self.facts.inputs:
            raise UserError(f"The split {self.name!r} has no images, so augment must be 'none', not {chosen.kind!r}.")
        names = None if fields is None else tuple(fields)
        if names is not None and isinstance(self.source, Memory):
            for name in names:
                if name not in self.source.tensors:
                    raise UserError(
                        f"The split {self.name!r} has no field {name!r}; {nearest(name, self.source.tensors)}."
                    )
        return Batches(
            self,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            augment=None if chosen.kind == "none" else chosen,
            views=views,
            anew=anew,
            fields=names,
            among=among,
            workers=workers,
        )

    def batch(self, indices: Int[Tensor, " batch"] | Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The samples at the given positions, without augmentation."""
        index = torch.as_tensor(indices, dtype=torch.long).cpu()
        stored = self.source.fetch(index)
        stored["index"] = index
        return self.prepare(stored, device=torch.device(device))

    def in_order(self, batch_size: int, *, device: torch.device | str = "cpu", workers: int = 0) -> Iterator[Batch]:
        """Every sample once, in order, for evaluation; the last batch may be smaller.

        A forecast that is :func:`~stillhouse.data.looks.looking` is given evenly spaced samples of a large split.
        """
        if not len(self):
            return
        taken = look()
        if taken is not None and len(self) > taken.most:
            took: list[float] = []
            sizes: list[int] = []
            began, places = taken.clock(), self._spaced(taken.most)
            for batch in self.subset(places).in_order(batch_size, device=device, workers=workers):
                yield batch.replace(index=places[batch.index])
                now = taken.clock()
                took, sizes, began = [*took, now - began], [*sizes, batch.size], now
            taken.count(took, sizes, len(self))
            return
        batches = self.batches(min(batch_size, len(self)), shuffle=False, drop_last=False, workers=workers)
        stream = batches.open(0, device=device)
        for _ in range(stream.per_epoch):
            yield next(stream)
        stream.close()

    def take(self, count: int) -> Split:
        """The first ``count`` samples of a fixed, class-balanced order (the same in every run).

        Raises:
            UserError: if the split is smaller.
        """
        if not 0 < count <= len(self):
            raise UserError(f"Cannot take {count} samples of the split {self.name!r}, which holds {len(self)}.")
        labels = None
        if self.facts.task == "classification":
            labels = hard(self.labels)
        return self.subset(balanced_order(labels, len(self), "take")[:count])

    def spaced(self, count: int) -> Split:
        """So many samples at equal distances from each other, in order; all where there are no more.

        >>> Split("train", Facts({}), {"labels": torch.arange(10)}).spaced(4).labels.tolist()
        [0, 2, 5, 7]
        """
        return self if count >= len(self) else self.subset(self._spaced(count))

    def _spaced(self, count: int) -> Int[Tensor, " part"]:
        return torch.arange(count) * len(self) // count

    def long_tailed(self, ratio: float, most: int | None = None) -> Split:
        """A part of fixed samples in which class sizes fall exponentially; see :func:`~stillhouse.data.splits.long_tailed`.

        Raises:
            UserError: if the split has no class labels, or too few samples of a class.
        """
        if self.facts.num_classes is None:
            raise UserError(f"long_tail: the split {self.name!r} has no class labels.")
        return self.subset(long_tailed(hard(self.labels), self.facts.num_classes, ratio, most))

    def not_finite(self, most: int = 4096) -> tuple[str, int] | None:
        """Name and position of an input that is NaN or infinite; None where there is none among evenly spaced samples.

        >>> Split("train", Facts({"x": (2,)}), {"x": torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])}).not_finite()
        ('x', 1)
        """
        for start in range(0, min(most, len(self)), 512):
            places = self._spaced(min(most, len(self)))[start : start + 512]
            for name, values in self.batch(places).items():
                if values.is_floating_point():
                    bad = ~torch.isfinite(values).flatten(1).all(1) if values.ndim > 1 else ~torch.isfinite(values)
                    if bool(bad.any()):
                        return name, int(places[bad.nonzero()[0, 0]])
        return None

    def subset(self, indices: Int[Tensor, " part"]) -> Split:
        """A split of its own from the samples at the given positions; its ``index`` counts from 0."""
        source = self.source.select(indices)
        return Split(self.name, self.facts, source, scale=self.scale, aside=self.aside)

    def by_class(self) -> dict[int, Int[Tensor, " part"]]:
        """Ascending positions of each class's samples, for every class number (soft labels count by their maximum).

        Raises:
            UserError: if the split has no class labels.
        """
        if self.facts.num_classes is None:
            raise UserError(f"The split {self.name!r} has no class labels.")
        if self._classes is None:
            labels = hard(self.labels)
            self._classes = {label: (labels == label).nonzero().flatten() for label in range(self.facts.num_classes)}
        return self._classes

    def on(self, device: torch.device, fields: tuple[str, ...] | None = None) -> dict[str, Tensor] | None:
        """The stored tensors on ``device`` (copied once) for in-memory splits; ``None`` for others.

        A split that would fill more than an eighth of a device's free memory stays on the CPU.
        """
        if not isinstance(self.source, Memory):
            return None
        tensors = self.source.tensors
        if device.type != "cpu":
            if device not in self._on_device:
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8 * MEMORY_LIMIT
                fits = size <= free // 8
                self._on_device[device] = {k: t.to(device) for k, t in tensors.items()} if fits else tensors
            tensors = self._on_device[device]
        return dict(tensors) if fields is None else {name: tensors[name] for name in fields}

    def prepare(
        self,
        stored: dict[str, Tensor],
        *,
        device: torch.device,
        augment: Augment | None = None,
        rank: int = 0,
        world: int = 1,
        view: int | None = None,
    ) -> Batch:
        """A fetched batch as a model sees it: on ``device``, augmented in [0, 1], pixels in the model's space.

        With ``view`` it holds that fixed view of each sample, and says so.
        """
        if device.type != "cpu":
            stored = {name: tensor.to(device, non_blocking=True) for name, tensor in stored.items()}
        if self.scale is not None and "pixel_values" in stored:
            pixels = stored["pixel_values"]
            if augment is None:
                stored["pixel_values"] = self.scale.to_model(pixels)
            else:
                unit = self.scale.stored_to_unit(pixels)
                seen = (
                    augment(unit, rank=rank, world=world)
                    if view is None
                    else augment.fixed(unit, stored["index"], view)
                )
                stored["pixel_values"] = self.scale.from_unit(seen)
        if view is not None:
            stored["view"] = torch.full_like(stored["index"], view)
        batch = Batch(stored)
        if self.aside:
            batch.aside = self.aside
        return batch


def hard(labels: Shaped[Tensor, "samples *classes"]) -> Int[Tensor, " samples"]:
    """Class numbers; soft labels count by their maximum."""
    return labels.argmax(1) if labels.ndim == 2 else labels


class _MapStyle(Dataset[dict[str, Tensor]]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return {name: tensor[0] for name, tensor in self.split.batch([position % len(self)]).items()}


def _augmentation(value: Augment | str | dict[str, Any]) -> Augment:
    if isinstance(value, Augment):
        return value
    try:
        return Augment.parse(value)
    except ValueError as error:
        raise UserError(f"augment: {error}.") from None


@dataclass(frozen=True, eq=False)
class Data:
    """A loaded data set.

    Attributes:
        name: how it is written in a recipe.
        facts: what a model builder needs to know.
        splits: "train" and, where the source has or allows them, "validation" and "test".
        fingerprint: hash of the content and of the fields that shape it.
        scale: how pixels map to a model's space; ``None`` where there are no images.
    """

    name: str
    facts: Facts
    splits: dict[str, Split]
    fingerprint: str
    scale: PixelScale | None = None

    def described(self) -> dict[str, Any]:
        """What somebody needs to know who feeds a model of this data, as plain values: sizes, inputs, classes, pixels."""
        told: dict[str, Any] = {"data": self.name, "task": self.facts.task}
        told["splits"] = {name: len(split) for name, split in self.splits.items()}
        told["inputs"] = {name: list(shape) for name, shape in self.facts.inputs.items()}
        if self.facts.class_names:
            told["class_names"] = list(self.facts.class_names)
        if self.scale is not None and not self.scale.given:
            low, high = self.scale.low, self.scale.low + self.scale.span
            told["pixels"] = {"black": low, "white": high, "mean": list(self.scale.mean), "std": list(self.scale.std)}
        return told

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            UserError: if there is none.
        """
        if name not in self.splits:
            there = ", ".join(repr(split) for split in self.splits)
            raise UserError(f"The data set {self.name!r} has no split {name!r}; it has {there}.")
        return self.splits[name]

    @cached_property
    def next_token(self) -> bool:
        """Whether these are texts to go on with: token ids without labels, or whose labels are the ids themselves.

        That is what a model that does not say what it predicts is to be trained for; labels that differ from the ids (of a
        tagger, or already shifted) are predicted where they stand. Seen from the first samples.
        """
        train = self.split("train")
        if self.facts.task != "language" or not len(train):
            return False
        batch = train.batch(range(min(64, len(train))))
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if ids is None or labels is None:
            return ids is not None
        return labels.shape == ids.shape and bool(((labels == ids) | (labels == -100)).all())

    def to_unit(self, pixels: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """A model's pixels as pictures in [0, 1], clipped.

        Raises:
            UserError: if the set has no images.
        """
        return self._scaled().to_unit(pixels)

    def from_unit(self, pixels: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Pictures in [0, 1] as a model sees them; differentiable.

        Raises:
            UserError: if the set has no images.
        """
        return self._scaled().from_unit(pixels)

    def _scaled(self) -> PixelScale:
        if self.scale is None:
            raise UserError(f"The data set {self.name!r} has no images.")
        return self.scale


class LongTail(Spec):
    """A training split whose class sizes fall exponentially, from the first class to the last; a number is the ratio."""

    ratio: float = Field(ge=1)
    """How many times larger the first class is than the last."""
    most: int | None = Field(None, ge=1)
    """Samples of the first class; all that there are by default."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"ratio": value} if isinstance(value, int | float) else value


class DataSpec(Tagged):
    """What a recipe says about its data: text (``digits``, ``hf:owner/name``), a mapping, or Python objects."""

    noun: ClassVar[str] = "data set"
    outside: ClassVar[frozenset[str]] = frozenset({"path", "verify", "in_memory", "vocabulary_size"})
    """Fields that say where data is or how it is read, or are known by what they lead to (a vocabulary): no part of a
    fingerprint."""

    train_size: int | None = Field(None, ge=1)
    """Train on the first so many samples of a fixed class-balanced order; all by default."""
    long_tail: LongTail | None = None
    """Train on classes of unequal size: the ratio of the largest to the smallest, or {ratio, most}."""

    @model_validator(mode="after")
    def _one_cut(self) -> Self:
        if self.train_size is not None and self.long_tail is not None:
            raise ValueError("train_size and long_tail both choose the training samples; give long_tail.most instead")
        return self

    @classmethod
    def parse(cls, value: Any) -> Self:
        if isinstance(value, dict) and _holds_objects(value):
            return cls.members["object"].from_object(value)  # type: ignore[return-value]
        return super().parse(value)

    def load(self) -> Data:
        """Read the data.

        Raises:
            UserError: if it is missing, damaged or not as the fields say.
        """
        raise NotImplementedError

    def foreseen(self) -> Data | None:
        """Blank data of the form that the set has, where that is known without reading it; None where it is not."""
        return None

    @property
    def title(self) -> str:
        """The name that messages and reports give the set."""
        return self.kind

    def content_hash(self, *sums: object) -> str:
        """A data set's fingerprint: of the fields that shape it, and of the given sums of its content."""
        fields = {name: value for name, value in self.dump().items() if name not in self.outside}
        if self.long_tail is None:
            # Younger than sets that are known by a fingerprint.
            del fields["long_tail"]
        text = json.dumps([self.version, RULE, fields, [str(item) for item in sums]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def assemble(
        self,
        sources: Mapping[str, Source | Mapping[str, Tensor]],
        sums: Sequence[object],
        *,
        task: Task = "classification",
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
        factors: Mapping[str, int] | None = None,
        scale: PixelScale | None = None,
        aside: frozenset[str] = frozenset(),
        tokenize: Tokenize | None = None,
        vocabulary: Sequence[str] | None = None,
        edge_vocabulary: Sequence[str] | None = None,
    ) -> Data:
        """Put a data set together from the splits' samples; cuts the training split to ``train_size``.

        A ``vocabulary`` names the labels of nodes in the order of their ids, which have one more for all others. A
        vocabulary, like a pixel scale, belongs to the whole training split, so that a teacher trained on all and a
        student trained on few samples read the same ids.
        """
        held = {name: part if isinstance(part, Source) else Memory(part) for name, part in sources.items()}
        sample = held["train"].fetch(torch.zeros(1, dtype=torch.long))
        inputs = {k: tuple(v.shape[1:]) for k, v in Batch(sample).inputs.items() if k not in aside}
        facts = Facts(
            inputs=inputs,
            num_classes=(num_classes or len(class_names)) if task == "classification" else None,
            task=task,
            class_names=tuple(class_names),
            factors=dict(factors or {}),
            vocabulary_size=_beyond(vocabulary) if tokenize is None else tokenize.vocabulary_size,
            edge_vocabulary_size=_beyond(edge_vocabulary),
            vocabulary=tuple(vocabulary or ()),
            edge_vocabulary=tuple(edge_vocabulary or ()),
        )
        learned = () if tokenize is None else tokenize.sums
        splits = {name: Split(name, facts, source, scale=scale, aside=aside) for name, source in held.items()}
        splits["train"] = self.cut(splits["train"])
        return Data(self.title, facts, splits, self.content_hash(*sums, *learned), scale)

    def cut(self, train: Split) -> Split:
        """The part of the training split that ``train_size`` or ``long_tail`` asks for.

        Raises:
            UserError: there are not so many samples.
        """
        if self.train_size is not None:
            if self.train_size > len(train):
                raise UserError(
                    f"train_size {self.train_size} is more than the {len(train)} training samples of {self.title!r}."
                )
            return train.take(self.train_size)
        return train if self.long_tail is None else train.long_tailed(self.long_tail.ratio, self.long_tail.most)


def _beyond(vocabulary: Sequence[str] | None) -> int | None:
    """Number of ids: one for each name, and one for what has none."""
    return None if vocabulary is None else len(vocabulary) + 1


class PixelSpec(DataSpec):
    """A data set of images."""

    pixels: PixelSpace = "standard"
    """Pixels a model sees: mean 0 and deviation 1 per channel over the training split, in [0, 1], or in [-1, 1]."""

    def scale_of(self, train: Source, levels: float = 255) -> PixelScale:
        """The pixel scale, measured on the whole training split before ``train_size`` cuts it.

        So a teacher trained on all and a student trained on few samples see the same pixels. Of a split that is not in
        memory, 2048 samples of a fixed shuffle are measured.
        """
        if isinstance(train, Memory):
            images = train.tensors["pixel_values"]
        else:
            images = train.fetch(balanced_order(None, len(train), "scale")[:2048])["pixel_values"]
        return PixelScale.of(self.pixels, images, levels)


class ImageSpec(PixelSpec):
    """A data set of images that can be brought to a size."""

    image_size: int | None = Field(None, ge=4, le=4096)
    """Side of the square images: a small black frame (28 to 32), else a resize; as stored by default."""

    def sized(self, part: Mapping[str, Tensor], levels: float = 255) -> dict[str, Tensor]:
        """Samples with their images at ``image_size``; where that is a change, as bytes of 256 levels."""
        images = part["pixel_values"]
        if self.image_size is None or images.shape[-2:] == (self.image_size,) * 2:
            return dict(part)
        if levels != 255:
            images = (images.float() * (255 / levels)).round().to(torch.uint8)
        return {**part, "pixel_values": at_size(images, self.image_size, 255)}


class Carving(DataSpec):
    """Fields of sources that may lack an official split."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the training samples set aside for validation, where the source has no such split."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share of all samples set aside for testing, where the source has no such split."""

    def carved(self, sources: Mapping[str, Source], labels: Tensor | None) -> dict[str, Source]:
        """All splits: those of the source, and fixed, class-balanced parts of "train" for those that are missing.

        Args:
            sources: the source's own splits.
            labels: class of each training sample, to divide class by class; ``None`` divides regardless.
        """
        train = sources["train"]
        parts = self._parts(len(train), sources, labels)
        if len(parts) == 1:
            return dict(sources)
        own = {name: source for name, source in sources.items() if name != "train"}
        found = {**{name: train.select(index) for name, index in parts.items()}, **own}
        return {name: found[name] for name in ("train", "validation", "test") if name in found}

    def training_rows(self, count: int, own: Container[str], labels: Tensor | None) -> Int[Tensor, " rows"]:
        """Which of the source's ``count`` training samples :meth:`carved` leaves for training.

        Args:
            count: training samples of the source.
            own: names of the source's own splits.
            labels: as in :meth:`carved`.
        """
        return self._parts(count, own, labels)["train"]

    def _parts(self, count: int, own: Container[str], labels: Tensor | None) -> dict[str, Tensor]:
        shares = {name: getattr(self, name) for name in ("validation", "test") if name not in own}
        shares = {name: share for name, share in shares.items() if share > 0}
        if not shares:
            return {"train": torch.arange(count)}
        if sum(shares.values()) >= 1:
            raise UserError(f"validation {self.validation} and test {self.test} leave no samples to train on.")
        return carve(labels, count, {"train": 1 - sum(shares.values()), **shares}, "carve")


def load_data(value: Any, *, where: str = "") -> Data:
    """Load data from anything that a recipe or a Python caller may give (see :class:`DataSpec`).

    Raises:
        UserError: if it cannot be understood or read.
    """
    if isinstance(value, Data):
        return value
    return read_spec(value, where=where).load()


def read_spec(value: Any, *, where: str = "") -> DataSpec:
    """Validate ``value`` as a data spec, with the one-sentence error of :func:`stillhouse.spec.read`."""
    holder = read(_Holder, {"data": value}, where=where)
    spec: DataSpec = holder.data
    return spec


def _holds_objects(value: Any) -> bool:
    """Whether a dict is data itself (tensors or data sets by name) and no description."""
    if isinstance(value, dict) and type(value) is dict:
        return "kind" not in value and any(map(_holds_objects, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_objects, value))
    return not isinstance(value, str | int | float | bool | None)


class _Holder(Spec):
    data: DataSpec

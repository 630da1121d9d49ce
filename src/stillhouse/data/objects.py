"""Data that a Python caller has: tensors, map-style data sets, Hugging Face data sets, or what an import path returns."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_serializer, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from stillhouse.data.dataset import Data, hard
from stillhouse.data.generators import GeneratorsAside
from stillhouse.data.hub import HubFields, sum_of_rows
from stillhouse.data.images import as_bytes
from stillhouse.data.pixels import PixelScale, PixelSpace, at_size
from stillhouse.data.sources import Memory, Relabelled, Rows, Source, in_chunks, settle
from stillhouse.data.tables import SPLIT_NAMES, few_numbers
from stillhouse.errors import UnreachableError, UserError
from stillhouse.facts import Task
from stillhouse.spec import IMPORT_PATH

RENAMED = {"label": "labels", "image": "pixel_values", "images": "pixel_values", "x": "inputs", "y": "labels"}
ACCEPTED = "a map-style Dataset, an (x, y) pair of tensors, a dict of tensors, a dict of these by split, or Data"


class ObjectFields(HubFields):
    """Reading of Python objects into data."""

    pixels: Literal["given"] | PixelSpace = "given"  # type: ignore[assignment]
    """"given" leaves float images as they are and brings bytes to [0, 1]; the others expect bytes or floats in [0, 1]."""
    num_classes: int | None = Field(None, ge=1)
    """Number of classes, where the labels or the data set do not say."""

    def data_from(self, value: Any, content: str) -> Data:
        """Data from any accepted object; ``content`` is the hash of the object."""
        if isinstance(value, Data):
            if self.train_size is None and self.long_tail is None:
                return value
            splits = {**value.splits, "train": self.cut(value.split("train"))}
            return Data(value.name, value.facts, splits, self.content_hash(value.fingerprint), value.scale)
        if _is_hub(value):
            return self.from_datasets(value if isinstance(value, dict) else {"train": value})
        parts = {name: source_of(part, self.image_size) for name, part in by_split(value).items()}
        held = {name: settle(source, self.in_memory) for name, source in parts.items()}
        labels = {name: labels_of(source) for name, source in held.items()}
        for name, source in held.items():
            if isinstance(source, DatasetRows):
                source.known_labels = labels[name]
        dtype = self._labels_as(labels["train"])
        if dtype is not None:
            held = {name: _relabelled(source, dtype) for name, source in held.items()}
            labels = {name: None if part is None else part.to(dtype) for name, part in labels.items()}
        task, count = _task(labels, held["train"])
        class_names = [str(name) for name in getattr(value, "classes", ())] if task == "classification" else []
        stratify = hard(labels["train"]) if labels["train"] is not None and task == "classification" else None
        carved = self.carved(held, stratify)
        num_classes = self.num_classes or (len(class_names) or count)
        if class_names and len(class_names) != num_classes:
            class_names = []
        return self.assemble(
            carved,
            [content],
            task=task,
            num_classes=num_classes,
            class_names=class_names,
            scale=self._scale(carved["train"]),
        )

    def _labels_as(self, labels: Tensor | None) -> torch.dtype | None:
        """The type that labels are brought to, where theirs does not say what they are; None where it does.

        Raises:
            UserError: they are floats that may be class numbers, and nobody says so.
        """
        if labels is None or labels.ndim != 1:
            return None
        whole = few_numbers(labels) if labels.is_floating_point() and self.task != "regression" else []
        if self.task == "auto" and whole:
            shown = ", ".join(map(str, whole[:3])) + (", ..." if len(whole) > 3 else "")
            raise UserError(
                f"The labels are floats that are whole numbers ({shown}): give classes as integers, as in labels.long(), or say "
                "what they are with data={'kind': 'object', 'object': ..., 'task': 'regression'} (or 'classification')."
            )
        if self.task == "classification" and labels.is_floating_point():
            if not bool((labels == labels.round()).all()):
                raise UserError("task is classification, but the labels are numbers with fractions.")
            return torch.long
        return torch.float32 if self.task == "regression" and not labels.is_floating_point() else None

    def _scale(self, train: Source) -> PixelScale | None:
        sample = train.fetch(torch.zeros(1, dtype=torch.long)).get("pixel_values")
        if sample is None:
            return None
        whole_bytes = sample.dtype == torch.uint8
        if self.pixels == "given":
            if whole_bytes:
                return PixelScale.of("unit", sample, 255)
            index = torch.arange(0, len(train), max(1, len(train) // 2048))
            images = train.tensors["pixel_values"] if isinstance(train, Memory) else train.fetch(index)["pixel_values"]
            return PixelScale.as_given(images)
        return self.scale_of(train, levels=255 if whole_bytes else 1)


class Held:
    """A Python object in a recipe: known by its name and by the hash of its content."""

    def __init__(self, value: Any) -> None:
        self.value = value
        kind = type(value)
        self.name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        self.content = content_of(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and (self.name, self.content) == (other.name, other.content)

    def __hash__(self) -> int:
        return hash((self.name, self.content))


class ObjectData(ObjectFields):
    """Python objects; such a recipe runs only with the objects passed again."""

    kind: ClassVar[str] = "object"

    object: Any
    """A map-style ``Dataset``, a pair (x, y) of tensors, a dict of tensors, a dict of these by split, a Hugging Face data
    set, or ``Data``."""
    fingerprint: str = ""
    """Hash of the object's content."""

    @classmethod
    def from_object(cls, value: Any) -> Self:
        return cls(object=value)

    @model_validator(mode="before")
    @classmethod
    def _hold(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or isinstance(fields.get("object", ""), str | Held):
            return fields
        value = fields["object"]
        check(value)
        held = Held(value)
        return {**fields, "object": held, "fingerprint": held.content}

    @field_serializer("object")
    def _name(self, value: Held | str) -> str:
        return value if isinstance(value, str) else value.name

    @property
    def title(self) -> str:
        return str(self._name(self.object))

    def load(self) -> Data:
        if isinstance(self.object, str):
            raise UserError(
                f"The data was a Python object ({self.object}, fingerprint {self.fingerprint}): such a recipe runs only"
                " with the object passed again."
            )
        return self.data_from(self.object.value, self.object.content)


class ImportedData(ObjectFields):
    """What a Python import path gives: an object as :class:`ObjectData` takes, or a function that returns one."""

    kind: ClassVar[str] = "import"

    path: str = Field(pattern=IMPORT_PATH)
    """``package.module:name``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(path=text)

    @property
    def title(self) -> str:
        return self.path

    def load(self) -> Data:
        module, _, name = self.path.partition(":")
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UnreachableError(f"{self.path!r} could not be imported: {error}.") from None
        for part in name.split("."):
            if not hasattr(value, part):
                raise UserError(f"The module {module!r} has no {name!r}.")
            value = getattr(value, part)
        if callable(value) and not isinstance(value, Dataset):
            value = self._called(value)
        try:
            check(value)
        except ValueError as error:
            raise UserError(f"{self.path!r}: {error}.") from None
        return self.data_from(value, content_of(value))

    def _called(self, function: Any) -> Any:
        """What the function returns for the arguments, which are those that it takes."""
        try:
            inspect.signature(function).bind(**self.arguments)
        except TypeError as error:
            raise UserError(f"{self.path!r} cannot be called with the 'arguments' of the data: {error}.") from None
        except ValueError:  # A builtin without a signature.
            pass
        return function(**self.arguments)


def check(value: Any) -> None:
    """Raise ValueError with the reason unless ``value`` is a kind of object that data can be made from."""
    if isinstance(value, DataLoader):
        raise ValueError("pass the data set itself, not a DataLoader; batches are made by the run")
    if isinstance(value, IterableDataset):
        raise ValueError("an IterableDataset has no order to resume in; pass a map-style Dataset")
    if isinstance(value, Data) or _is_hub(value) or _is_map_style(value):
        return
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            if not isinstance(name, str):
                raise ValueError("a dict of data has names as keys")
            if not _is_array(part):
                check(part)
        return
    if _is_sequence(value) and 1 <= len(value) <= 2 and all(map(_is_array, value)):
        return
    raise ValueError(f"data is text, a mapping with 'kind', {ACCEPTED}, not {type(value).__name__}")


def by_split(value: Any) -> dict[str, Any]:
    """Parts by split name; an object that is not divided is all "train"."""
    if isinstance(value, Mapping) and not any(_is_array(part) for part in value.values()):
        ours = {theirs: split for split, names in SPLIT_NAMES.items() for theirs in names}
        unknown = [name for name in value if name not in ours]
        if unknown:
            raise UserError(f"There is no split {unknown[0]!r}; splits are train, validation and test.")
        parts = {ours[name]: part for name, part in value.items()}
        if "train" not in parts:
            raise UserError(f"The data has no training split among {sorted(value)}.")
        return parts
    return {"train": value}


def source_of(value: Any, image_size: int | None) -> Source:
    """The samples of one part.

    Raises:
        UserError: if there are none.
    """
    first = next(iter(value.values())) if isinstance(value, Mapping) else value[0] if _is_sequence(value) else value
    if not len(first):
        raise UserError("The data holds no samples.")
    if isinstance(value, Mapping):
        tensors = {renamed(name): tensor_of(array) for name, array in value.items()}
        if "inputs" in tensors:
            inputs = tensors.pop("inputs")
            tensors = {input_name(inputs[0]): inputs, **tensors}
    elif _is_sequence(value):
        arrays = [tensor_of(array) for array in value]
        tensors = {input_name(arrays[0][0]): arrays[0], **({"labels": arrays[1]} if len(arrays) == 2 else {})}
    else:
        return DatasetRows(value, image_size)
    return Memory({name: _sized(name, tensor, image_size) for name, tensor in tensors.items()})


def _sized(name: str, tensor: Tensor, image_size: int | None) -> Tensor:
    if name != "pixel_values":
        return tensor
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    return tensor if image_size is None else at_size(tensor, image_size, 255)


class DatasetRows(Rows):
    """A map-style data set whose items are tensors, pairs (input, label) or dicts."""

    foreign = True

    def __init__(self, dataset: Any, image_size: int | None) -> None:
        self.dataset, self.image_size = dataset, image_size
        self.known_labels: Tensor | None = None
        self.random = self._draws()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        if self.known_labels is not None:
            return self.known_labels
        dataset, index = self.dataset, None
        while isinstance(dataset, Subset):
            places = torch.as_tensor(list(dataset.indices))
            index = places if index is None else places[index]
            dataset = dataset.dataset
        targets = getattr(dataset, "targets", None)
        if targets is None or getattr(dataset, "target_transform", None) is not None:
            return None
        labels = torch.as_tensor(targets)
        return labels if index is None else labels[index]

    def row(self, position: int) -> dict[str, Tensor]:
        item = self.dataset[position]
        if isinstance(item, Mapping):
            named = {renamed(name): _value_of(value) for name, value in item.items()}
            if "inputs" in named:
                inputs = named.pop("inputs")
                named = {input_name(inputs): inputs, **named}
        elif _is_sequence(item):
            if not 1 <= len(item) <= 2:
                raise UserError(f"Items with {len(item)} parts need names: let the data set return dicts.")
            inputs = _value_of(item[0])
            named = {input_name(inputs): inputs, **({"labels": _value_of(item[1])} if len(item) == 2 else {})}
        else:
            inputs = _value_of(item)
            named = {input_name(inputs): inputs}
        return {name: _sized(name, value[None], self.image_size)[0] for name, value in named.items()}

    def _draws(self) -> bool:
        """Whether items depend on the random generators, seen from a few items under two seeds."""
        places = sorted({0, len(self) // 3, len(self) // 2, len(self) - 1})
        with GeneratorsAside() as generators:
            seen = []
            for seed in (1, 2):
                generators.seed(seed)
                seen.append([self.row(place) for place in places])
        return any(not torch.equal(one[name], other[name]) for one, other in zip(*seen, strict=True) for name in one)


def _relabelled(source: Source, dtype: torch.dtype) -> Source:
    if isinstance(source, Memory):
        return Memory({**source.tensors, "labels": source.tensors["labels"].to(dtype)})
    return Relabelled(source, dtype)


def renamed(name: str) -> str:
    """The batch's name for a usual one."""
    return RENAMED.get(name, name)


def input_name(sample: Tensor) -> str:
    """What an unnamed input is, by the shape and type of one sample."""
    if sample.ndim == 3 or (sample.ndim == 2 and sample.dtype == torch.uint8):
        return "pixel_values"
    return "input_ids" if sample.ndim == 1 and sample.dtype == torch.long else "features"


def tensor_of(array: Any) -> Tensor:
    """An array as a tensor in the types of batches: float32, long, or bytes."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.uint8 and tensor.ndim >= 2:
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _value_of(value: Any) -> Tensor:
    if hasattr(value, "convert") and hasattr(value, "mode"):
        return as_bytes(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] in (1, 3):
        value = np.ascontiguousarray(value.transpose(2, 0, 1))
    if isinstance(value, Tensor | np.ndarray):
        return tensor_of(value)
    if isinstance(value, bool | int | float | np.generic | Sequence) and not isinstance(value, str | bytes):
        return tensor_of(torch.as_tensor(value))
    raise UserError(f"Items hold tensors, arrays, images and numbers, not {type(value).__name__}.")


def labels_of(source: Source) -> Tensor | None:
    """All labels; a source that does not know them is read once."""
    labels = source.labels
    if labels is None and "labels" in source.fetch(torch.zeros(1, dtype=torch.long)):
        labels = torch.cat([chunk["labels"] for chunk in in_chunks(source)])
    return labels


def _task(labels: Mapping[str, Tensor | None], train: Source) -> tuple[Task, int]:
    """What the labels mean, and the number of classes."""
    found = [part for part in labels.values() if part is not None]
    own = labels["train"]
    if own is None:
        sample = train.fetch(torch.zeros(1, dtype=torch.long))
        return ("language" if "input_ids" in sample else "unlabelled"), 0
    if not own.is_floating_point():
        if own.ndim > 1:
            return "language", 0
        return "classification", int(max(part.max() for part in found)) + 1
    if own.ndim == 2 and bool((own >= 0).all()) and torch.allclose(own.sum(1), torch.ones(len(own)), atol=1e-4):
        return "classification", own.shape[1]
    return "regression", 0


def content_of(value: Any) -> str:
    """Hash of an object's content: of every tensor, or of up to 64 spread items of a data set that reads as it goes."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if _is_array(value):
        tensor = tensor_of(value).contiguous()
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    elif isinstance(value, Data):
        digest.update(value.fingerprint.encode())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(name.encode())
            _feed(digest, value[name])
    elif _is_sequence(value):
        for part in value:
            _feed(digest, part)
    elif _is_hub(value):
        digest.update(sum_of_rows(value).encode())
    elif hasattr(value, "tensors"):
        _feed(digest, value.tensors)
    else:
        rows = DatasetRows(value, None)
        digest.update(f"{type(value).__qualname__}{len(rows)}".encode())
        with GeneratorsAside() as generators:
            generators.seed(0)
            for place in torch.linspace(0, len(rows) - 1, min(64, len(rows))).long().tolist():
                _feed(digest, rows.row(place))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_hub(value: Any) -> bool:
    if isinstance(value, dict) and type(value) is not dict:
        return type(value).__module__.split(".")[0] == "datasets"
    return type(value).__module__.split(".")[0] == "datasets" and hasattr(value, "features")


def _is_map_style(value: Any) -> bool:
    if isinstance(value, Mapping | Sequence | Tensor | np.ndarray | str):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")

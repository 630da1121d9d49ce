"""Hugging Face data sets: by hub id, from a local directory, or as objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.data.blank import Blank
from stillhouse.data.dataset import Carving, Data, DataSpec, ImageSpec
from stillhouse.data.images import as_bytes
from stillhouse.data.sources import MEMORY_LIMIT, InMemory, Seeds, Source, settle, stack
from stillhouse.data.tables import SPLIT_NAMES, as_classes, is_class, many_numbers
from stillhouse.data.text import TextFields, Tokenize
from stillhouse.errors import UnreachableError, UserError, nearest
from stillhouse.facts import Task


@dataclass(frozen=True)
class Known:
    """The form of a data set of the hub, for forecasts without it.

    Attributes:
        counts: samples of its labelled splits.
        shape: channels, height and width of its images; None where they vary.
        labels: classes of each column of labels, the one that is read by default first.
    """

    counts: Mapping[str, int]
    shape: tuple[int, int, int] | None
    labels: Mapping[str, int]


SMALL = {"train": 50_000, "test": 10_000}
DIGITS = {"train": 60_000, "test": 10_000}
KNOWN = {
    "uoft-cs/cifar10": Known(SMALL, (3, 32, 32), {"label": 10}),
    "uoft-cs/cifar100": Known(SMALL, (3, 32, 32), {"fine_label": 100, "coarse_label": 20}),
    "ylecun/mnist": Known(DIGITS, (1, 28, 28), {"label": 10}),
    "zalando-datasets/fashion_mnist": Known(DIGITS, (1, 28, 28), {"label": 10}),
    "zh-plus/tiny-imagenet": Known({"train": 100_000, "validation": 10_000}, (3, 64, 64), {"label": 200}),
    "ILSVRC/imagenet-1k": Known({"train": 1_281_167, "validation": 50_000}, None, {"label": 1000}),
}
"""Data sets of images by hub id."""

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "intent")


class HubFields(TextFields, ImageSpec, Carving):
    """Fields that say which columns of a Hugging Face data set are what."""

    image_column: str | None = None
    """Column of images; by default the first of the type Image."""
    label_column: str | None = None
    """Column of labels; by default the only ClassLabel, or one named label, labels, fine_label, target, class or intent."""
    columns: tuple[str, ...] | None = None
    """Numeric columns to read as ``features``; by default, without images and text, all numeric ones but the label."""
    task: Literal["auto", "classification", "regression"] = "auto"
    """What labels of one number per sample are; "auto" takes text and whole numbers for classes."""
    channels: int | None = Field(None, ge=1, le=3)
    """1 reads images as grey, 3 as colour; by default as the first image is."""
    splits: dict[str, str] = Field(default_factory=dict)
    """Which of the source's splits is "train", "validation" or "test", where their names do not say."""
    in_memory: InMemory = "auto"
    """Read everything once; "auto" does for splits below 2 GiB."""

    def from_datasets(self, found: Mapping[str, Any]) -> Data:
        """Data from Hugging Face ``Dataset`` objects by split name."""
        parts = self._named_splits(found)
        features = parts["train"].features
        label = self._label_column(features)
        labels, task, class_names = self._labels(parts, label, features)
        hidden = [name for name in parts if name != "train" and labels and bool((labels[name] < 0).all())]
        parts = {name: part for name, part in parts.items() if name not in hidden}
        stratify = labels["train"] if labels is not None and task == "classification" else None
        sources: dict[str, Source] = {}
        reader = self._reader(parts, label, stratify)
        for name, part in parts.items():
            sources[name] = HubRows(part, reader, None if labels is None else labels[name])
        carved = self.carved(sources, stratify)
        held = {name: settle(source, self.in_memory) for name, source in carved.items()}
        scale = self.scale_of(held["train"]) if "pixel_values" in reader.makes else None
        if labels is None and "input_ids" in reader.makes:
            task = "language"
        sums = [f"{name}:{sum_of_rows(part)}" for name, part in parts.items()]
        return self.assemble(held, sums, task=task, class_names=class_names, scale=scale, tokenize=reader.tokenize)

    def _named_splits(self, found: Mapping[str, Any]) -> dict[str, Any]:
        for ours, theirs in self.splits.items():
            if ours not in SPLIT_NAMES:
                raise UserError(f"splits: there is no split {ours!r}; {nearest(ours, SPLIT_NAMES)}.")
            if theirs not in found:
                raise UserError(f"The data set {self.title!r} has no split {theirs!r}; {nearest(theirs, found)}.")
        taken = set(self.splits.values())
        parts = {}
        for ours, names in SPLIT_NAMES.items():
            own = [name for name in names if name in found and name not in taken]
            chosen = self.splits.get(ours, own[0] if own else None)
            if chosen is not None:
                parts[ours] = found[chosen]
        if "train" not in parts and len(found) == 1:
            parts["train"] = next(iter(found.values()))
        if "train" not in parts:
            raise UserError(
                f"The data set {self.title!r} has no training split among {sorted(found)}; name one as 'splits'."
            )
        return parts

    def _label_column(self, features: Mapping[str, Any]) -> str | None:
        if self.label_column is not None:
            return self._existing(self.label_column, features)
        classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        named = [name for name in LABEL_NAMES if name in features]
        return classes[0] if len(classes) == 1 else next(iter(named), None)

    def _existing(self, name: str, features: Mapping[str, Any]) -> str:
        if name not in features:
            raise UserError(f"The data set {self.title!r} has no column {name!r}; {nearest(name, features)}.")
        return name

    def _labels(
        self, parts: Mapping[str, Any], label: str | None, features: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor] | None, Task, list[str]]:
        if label is None:
            return None, "unlabelled", []
        columns = {name: list(part.with_format(None)[label]) for name, part in parts.items()}
        names = getattr(features[label], "names", None)
        if names is not None:
            return {n: torch.tensor(c, dtype=torch.long) for n, c in columns.items()}, "classification", list(names)
        every = [value for column in columns.values() for value in column]
        if any(value is None for value in every):
            raise UserError(f"The column {label!r} of {self.title!r} has missing values.")
        if self.task == "auto" and (count := many_numbers(every)):
            raise UserError(
                f"The column {label!r} of {self.title!r} takes {count:,} different whole numbers in {len(every):,} rows; say "
                "task: regression if it is a quantity, or task: classification."
            )
        if self.task == "regression":
            if not all(isinstance(value, int | float) for value in every):
                raise UserError(f"The column {label!r} of {self.title!r} holds text, which is no quantity.")
            return {n: torch.tensor(c, dtype=torch.float32) for n, c in columns.items()}, "regression", []
        if all(isinstance(value, int) for value in every):
            count = max(every) + 1
            labels = {name: torch.tensor(column, dtype=torch.long) for name, column in columns.items()}
            return labels, "classification", [str(number) for number in range(count)]
        if all(isinstance(value, str) or is_class(value) for value in every):
            labels, class_names = as_classes(columns)
            return labels, "classification", class_names
        return {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}, "regression", []

    def _reader(self, parts: Mapping[str, Any], label: str | None, stratify: Tensor | None) -> HubReader:
        train = parts["train"]
        features = train.features
        image = self.image_column
        if image is None and self.text_column is None and self.columns is None:
            image = next((name for name, feature in features.items() if type(feature).__name__ == "Image"), None)
        if image is not None:
            first = train[0][self._existing(image, features)]
            channels = self.channels or (1 if getattr(first, "mode", "RGB") in ("1", "L") else 3)
            return HubReader(image=image, channels=channels, size=self.image_size)
        if self.text_column is not None:
            column = self._existing(self.text_column, features)
            return HubReader(text=column, tokenize=self.tokenize(self._training_texts(parts, column, stratify)))
        if self.columns is not None:
            return HubReader(numbers=tuple(self._existing(name, features) for name in self.columns))
        numbers = tuple(name for name, feature in features.items() if name != label and _is_numeric(feature))
        if not numbers:
            texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") == "string"]
            hint = f"set text_column (there is {texts[0]!r}) and tokenizer" if texts else "set image_column or columns"
            raise UserError(f"No input was found among the columns {list(features)} of {self.title!r}; {hint}.")
        return HubReader(numbers=numbers)

    def _training_texts(self, parts: Mapping[str, Any], column: str, stratify: Tensor | None) -> Iterator[str]:
        rows = self.training_rows(len(parts["train"]), parts, stratify)
        texts = parts["train"].with_format(None).select_columns([column]).select(rows.tolist())
        for row in texts:
            yield row[column]


class HubReader:
    """Turns rows (a dict of lists) into tensors; one of the three kinds of input."""

    def __init__(
        self,
        *,
        image: str | None = None,
        channels: int = 3,
        size: int | None = None,
        text: str | None = None,
        tokenize: Tokenize | None = None,
        numbers: tuple[str, ...] = (),
    ) -> None:
        self.image, self.channels, self.size = image, channels, size
        self.text, self.tokenize, self.numbers = text, tokenize, numbers
        self.makes = ("pixel_values",) if image else ("input_ids", "attention_mask") if text else ("features",)
        self.columns = [image] if image else [text] if text else list(numbers)

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.image is not None:
            return stack([{"pixel_values": self._pixels(image)} for image in rows[self.image]])
        if self.text is not None and self.tokenize is not None:
            return self.tokenize(rows[self.text])
        columns = [np.asarray(rows[name], dtype=np.float32) for name in self.numbers]
        flat = [column.reshape(len(column), -1) for column in columns]
        return {"features": torch.from_numpy(np.concatenate(flat, axis=1))}

    def _pixels(self, image: Any) -> Tensor:
        if hasattr(image, "convert"):
            return as_bytes(image, self.channels, self.size)
        from PIL import Image

        return as_bytes(Image.fromarray(np.asarray(image, dtype=np.uint8)), self.channels, self.size)


class HubRows(Source):
    """A Hugging Face ``Dataset`` read by rows."""

    def __init__(self, dataset: Any, reader: HubReader, labels: Tensor | None) -> None:
        self.dataset, self.reader, self._labels = dataset.with_format(None), reader, labels
        self.inputs = self.dataset.select_columns(reader.columns)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def fetch(self, index: Tensor, seeds: Seeds | None = None) -> dict[str, Tensor]:
        batch = self.reader(self.inputs[index.tolist()])
        if self._labels is not None:
            batch["labels"] = self._labels[index]
        return batch


class HubData(HubFields):
    """A data set of the Hugging Face hub (``hf:owner/name``) or in a local directory (``hf:PATH``).

    Code of a repository is never run.
    """

    kind: ClassVar[str] = "hf"

    path: str
    """Hub id, or a directory written by ``save_to_disk`` or holding Parquet, CSV, JSON or image files."""
    config: str | None = None
    """Configuration of the data set, where it has several."""
    revision: str | None = None
    """Git revision on the hub; part of the fingerprint."""

    outside: ClassVar[frozenset[str]] = DataSpec.outside

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError("write the data set after the colon, as in hf:owner/name")
        return cls(path=text)

    @property
    def title(self) -> str:
        return f"hf:{self.path}" + (f" ({self.config})" if self.config else "")

    def foreseen(self) -> Data | None:
        known = KNOWN.get(self.path)
        if known is None or self.splits or self.text_column is not None or self.columns is not None:
            return None
        label = self.label_column or next(iter(known.labels))
        sides = known.shape[1:] if self.image_size is None and known.shape else [self.image_size] * 2
        if label not in known.labels or None in sides:
            return None
        form = {"pixel_values": ((self.channels or (known.shape or (3,))[0], *sides), torch.uint8)}
        classes = known.labels[label]
        whole = {name: Blank(count, form, classes) for name, count in known.counts.items()}
        sources = self.carved(whole, whole["train"].labels)
        return self.assemble(sources, ["blank"], num_classes=classes, scale=self.scale_of(sources["train"]))

    def load(self) -> Data:
        try:
            import datasets
        except ImportError:
            raise UserError("Hub data sets need datasets: pip install 'stillhouse[hub]'.") from None
        local = Path(self.path).expanduser()
        try:
            if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
                found = datasets.load_from_disk(str(local))
            else:
                found = datasets.load_dataset(
                    str(local) if local.is_dir() else self.path, self.config, revision=self.revision
                )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UnreachableError(f"The data set {self.title!r} could not be read: {first}.") from None
        return self.from_datasets(found if isinstance(found, dict) else {"train": found})


def _is_numeric(feature: Any) -> bool:
    """Whether a column holds numbers or lists of numbers of one length."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return getattr(feature, "length", -1) > 0 and _is_numeric(inner)
    dtype = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ == "Value" and dtype.startswith(("int", "uint", "float", "bool"))


def sum_of_rows(dataset: Any) -> str:
    """Sum of the rows; of their recorded history (a fingerprint of ``datasets``) where there is too much to read."""
    table = dataset.data.table
    if table.nbytes > MEMORY_LIMIT:
        return str(dataset._fingerprint)
    import pyarrow

    digest = hashlib.sha256(str(dataset.features).encode())
    with pyarrow.ipc.new_stream(_Hashing(digest), table.schema.remove_metadata()) as writer:
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches(max_chunksize=4096):
            writer.write_batch(batch)
    if dataset._indices is not None:
        digest.update(np.asarray(dataset._indices.column(0).to_numpy()).tobytes())
    return digest.hexdigest()


class _Hashing:
    """A file that only sums what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return len(content)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""

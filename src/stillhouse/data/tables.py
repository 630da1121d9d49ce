"""Tables in files: CSV, JSON lines and Parquet, with numeric feature columns (or one of text) and a label column."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.data.dataset import Carving, Data
from stillhouse.data.sources import Memory, Source
from stillhouse.data.text import TextFields, Tokenize
from stillhouse.errors import UserError, nearest
from stillhouse.facts import Task

Columns = dict[str, Sequence[Any]]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""What sources call the splits."""

CLASSES = 100
"""More different numbers than that are no classes, unless most of them come again."""


class TableSpec(TextFields, Carving):
    """A table in a file, or in a directory with one file per split (``train``, ``validation``, ``test``)."""

    path: str
    """The file or directory; files may be gzipped."""
    label_column: str | None = "label"
    """Column of classes (text or whole numbers) or of targets (other numbers); ``None`` for unlabelled data."""
    columns: tuple[str, ...] | None = None
    """Numeric feature columns; by default all but the label."""
    task: Literal["auto", "classification", "regression"] = "auto"
    """What the label is; "auto" takes text and whole numbers for classes."""
    standardize: bool = True
    """Give each feature mean 0 and deviation 1 over the training split."""

    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError(f"write the file after the colon, as in {cls.kind}:PATH")
        return cls(path=text)

    @property
    def title(self) -> str:
        return f"{self.kind}:{self.path}"

    def read_columns(self, path: Path) -> Columns:
        """The columns of one file."""
        raise NotImplementedError

    def load(self) -> Data:
        files = self._files()
        tables = {name: self._checked(path, self.read_columns(path)) for name, path in files.items()}
        labels, task, class_names = self._labels(tables, files)
        stratify = labels["train"] if labels is not None and task == "classification" else None
        tokenize = None if self.text_column is None else self.tokenize(self._training_texts(tables, stratify))
        sources: dict[str, Source] = {}
        for name, table in tables.items():
            held = self._inputs(table, files[name], tokenize)
            sources[name] = Memory(held if labels is None else {**held, "labels": labels[name]})
        carved = self.carved(sources, stratify)
        if self.standardize and self.text_column is None:
            carved = standardized(carved)
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()]
        return self.assemble(carved, sums, task=task, class_names=class_names, tokenize=tokenize)

    def _files(self) -> dict[str, Path]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return {"train": path}
        if not path.is_dir():
            raise UserError(f"There is no file or directory {self.path}.")
        found = {
            split: path / f"{name}{suffix}"
            for split, names in SPLIT_NAMES.items()
            for name in reversed(names)
            for suffix in self.suffixes
            if (path / f"{name}{suffix}").is_file()
        }
        if "train" not in found:
            raise UserError(f"The directory {self.path} has no file train{self.suffixes[0]}.")
        return found

    def _checked(self, path: Path, table: Columns) -> Columns:
        if self.label_column is not None and self.label_column not in table:
            some = ", ".join(map(repr, list(table)[:8])) + (", ..." if len(table) > 8 else "")
            raise UserError(
                f"{path} has no column {self.label_column!r}, which should hold the label; its columns are {some}: name the "
                f"label's as label_column (data={{kind: {self.kind}, path: {self.path}, label_column: NAME}}), or null for none."
            )
        for name in (self.text_column, *(self.columns or ())):
            if name is not None and name not in table:
                raise UserError(f"{path} has no column {name!r}; {nearest(name, table)}.".replace("?.", "?"))
        if not table or not len(next(iter(table.values()))):
            raise UserError(f"{path} holds no rows.")
        return table

    def _training_texts(self, tables: Mapping[str, Columns], labels: Tensor | None) -> Iterator[str]:
        texts = tables["train"][str(self.text_column)]
        for row in self.training_rows(len(texts), tables, labels).tolist():
            yield str(texts[row])

    def _inputs(self, table: Columns, path: Path, tokenize: Tokenize | None) -> dict[str, Tensor]:
        if tokenize is not None:
            return tokenize([str(text) for text in table[str(self.text_column)]])
        names = self.columns or tuple(name for name in table if name != self.label_column)
        if not names:
            raise UserError(f"{path} has no column besides the label {self.label_column!r}.")
        features = np.stack([numeric(table[name], name, path) for name in names], axis=1)
        return {"features": torch.from_numpy(features).float()}

    def _labels(
        self, tables: Mapping[str, Columns], files: Mapping[str, Path]
    ) -> tuple[dict[str, Tensor] | None, Task, list[str]]:
        if self.label_column is None:
            return None, "language" if self.text_column else "unlabelled", []
        columns = {split: list(table[self.label_column]) for split, table in tables.items()}
        for split, values in columns.items():
            missing = next((row for row, value in enumerate(values) if value is None or value == ""), None)
            if missing is not None:
                raise UserError(f"{files[split]}: row {missing + 1} has no {self.label_column!r}.")
        every = [value for values in columns.values() for value in values]
        if self.task == "auto" and (count := many_numbers(every)):
            raise UserError(
                f"{files['train']}: the label {self.label_column!r} takes {count:,} different whole numbers in {len(every):,} "
                "rows; say task: regression if it is a quantity, or task: classification."
            )
        if self.task == "regression" or (self.task == "auto" and not all(map(is_class, every))):
            held = {n: numeric(values, self.label_column, files[n]) for n, values in columns.items()}
            return {name: torch.from_numpy(values).float() for name, values in held.items()}, "regression", []
        labels, class_names = as_classes(columns)
        return labels, "classification", class_names


def is_class(value: Any) -> bool:
    """Whether a value names a class: any text that is no fraction, any whole number."""
    if isinstance(value, str):
        try:
            return float(value).is_integer()
        except ValueError:
            return True
    return isinstance(value, bool | np.bool_ | int | np.integer) or float(value).is_integer()


def many_numbers(values: Sequence[Any]) -> int:
    """How many different whole numbers there are, where there are too many for classes; 0 otherwise."""
    different = set(values)
    if len(different) <= CLASSES or 2 * len(different) <= len(values) or not all(map(_is_number, different)):
        return 0
    return len(different) if all(map(is_class, different)) else 0


def few_numbers(labels: Tensor) -> list[int]:
    """The different values of float labels that may well be class numbers: few, and whole; else nothing."""
    different = torch.as_tensor(sorted(set(labels.tolist())))
    few = len(different) <= CLASSES and 2 * len(different) <= len(labels)
    return different.long().tolist() if few and bool((different == different.round()).all()) else []


def as_classes(columns: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Tensor], list[str]]:
    """Class numbers per split and class names: in numeric order if all are numbers, else in that of the alphabet."""
    names = {split: [_class_name(value) for value in values] for split, values in columns.items()}
    every = sorted({name for values in names.values() for name in values})
    if all(name.lstrip("-").isdigit() for name in every):
        every.sort(key=int)
    number = {name: label for label, name in enumerate(every)}
    return {split: torch.tensor([number[name] for name in values]) for split, values in names.items()}, every


def _class_name(value: Any) -> str:
    if isinstance(value, str):
        # A column with a missing value is often written in floats; 2.0 comes before 10.0, and is what 2 is.
        text = value.strip()
        return str(int(float(text))) if text.endswith(".0") and text[:-2].lstrip("-").isdecimal() else text
    return str(value) if isinstance(value, bool | np.bool_) else str(int(value))


def numeric(values: Sequence[Any], name: str, path: Path) -> np.ndarray:
    """A column as float64.

    Raises:
        UserError: naming the first value that is missing or no finite number.
    """
    try:
        column = np.asarray([np.nan if value is None or value == "" else value for value in values], dtype=np.float64)
    except (TypeError, ValueError):
        row, value = next((row, value) for row, value in enumerate(values, 1) if not _is_number(value))
        raise UserError(
            f"{path}: the column {name!r} is not numeric (row {row} holds {value!r}); list the numeric ones as 'columns'."
        ) from None
    if not np.isfinite(column).all():
        row = int(np.flatnonzero(~np.isfinite(column))[0]) + 1
        raise UserError(f"{path}: the column {name!r} has no finite number in row {row}.")
    return column


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return value is None or value == ""
    return True


def standardized(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Sources with ``features`` of mean 0 and deviation 1 over "train" (constant columns become 0)."""
    train = sources["train"].fetch(torch.arange(len(sources["train"])))["features"].double()
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    scaled: dict[str, Source] = {}
    for name, source in sources.items():
        tensors = source.fetch(torch.arange(len(source)))
        scaled[name] = Memory({**tensors, "features": ((tensors["features"].double() - mean) / std).float()})
    return scaled


class CSVData(TableSpec):
    """Comma-separated values with a header line."""

    kind: ClassVar[str] = "csv"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".csv.gz")

    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between values."""

    def read_columns(self, path: Path) -> Columns:
        try:
            rows = list(csv.reader(io.StringIO(_text_of(path), newline=""), delimiter=self.delimiter))
        except (csv.Error, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read as values between {self.delimiter!r}: {error}.") from None
        header = rows[0] if rows else None
        if header is None:
            raise UserError(f"{path} is empty.")
        names = [name.strip() for name in header]
        body = [row for row in rows[1:] if row]
        for number, row in enumerate(body, 1):
            if len(row) != len(names):
                raise UserError(f"{path}: row {number} has {len(row)} values for {len(names)} columns.")
        return {name: [row[place] for row in body] for place, name in enumerate(names)}


class JSONLData(TableSpec):
    """One JSON object per line, all with the same keys."""

    kind: ClassVar[str] = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz")

    def read_columns(self, path: Path) -> Columns:
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg}).") from None
            if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
                raise UserError(f"{path}: line {number} is not an object with the keys of the first line.")
            rows.append(row)
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


class ParquetData(TableSpec):
    """An Apache Parquet file."""

    kind: ClassVar[str] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def read_columns(self, path: Path) -> Columns:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError("Parquet files need pyarrow: pip install 'stillhouse[hub]'.") from None
        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
        return {name: table.column(name).to_pylist() for name in table.column_names}


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError):
        raise UserError(f"{path} is not UTF-8 text.") from None

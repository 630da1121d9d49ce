"""Export: one artefact of a run, alone, in a format that others load; compared with PyTorch before it is kept."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor, nn

from stillhouse.engine import Result
from stillhouse.engine.storage import told_when_full, write_text
from stillhouse.errors import RunError, UserError, nearest
from stillhouse.exporting.artefacts import Artefact, found
from stillhouse.exporting.entries import BATCH_SIZES, Called, Named, called
from stillhouse.exporting.formats import FORMATS, ONNX, Caller, Format
from stillhouse.metrics import latency, parameters

__all__ = ["Export", "FormatName", "export"]

FormatName = Literal["safetensors", "onnx", "torch-export"]

RECORD = "export.json"
"""What was exported, as a list, beside the files."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Largest difference that is accepted, in units of the largest output (of 1 where that is less); 1e-4 of others."""


@dataclass(frozen=True)
class Export:
    """What was exported, and how it compares.

    Attributes:
        format: the format.
        artefact: the artefact's name.
        file: the file or directory.
        load: the lines of Python that load it.
        inputs: shapes by name; a dimension that may vary is a word.
        outputs: likewise.
        largest_difference: largest absolute difference of an output to PyTorch's.
        tolerance: what was accepted.
        samples: number of samples that were compared.
        batch_sizes: in batches of these sizes.
        real: whether they come from the run's data and are not random.
        latency_ms: milliseconds for one sample: by engine, with ``one_thread`` and with ``default_threads``.
        threads: the default number of threads.
        parameters: number of parameters.
        bytes: size of the file, or of all files of the directory.
        opset: operator set of an ONNX graph.
        notes: sentences worth telling.
    """

    format: str
    artefact: str
    file: Path
    load: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    largest_difference: float
    tolerance: float
    samples: int
    batch_sizes: tuple[int, ...]
    real: bool
    latency_ms: dict[str, dict[str, float]]
    threads: int
    parameters: int
    bytes: int
    opset: int | None
    notes: tuple[str, ...]

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "file": self.file.as_posix()}


def export(
    source: Result | str | os.PathLike[str],
    format: FormatName | str = "safetensors",
    *,
    artefact: str | None = None,
    out: str | os.PathLike[str] | None = None,
    opset: int | None = None,
    module: nn.Module | None = None,
    samples: Mapping[str, Tensor] | None = None,
) -> Export:
    """Write one module of a run in a format that others load, when it computes what PyTorch does.

    The module is exported in evaluation mode, for batches of any size. Its outputs are compared with PyTorch's on samples
    of the run's data (random ones of the recorded shapes where the data cannot be read) in several batch sizes; beyond the
    tolerance nothing is kept. What was exported is recorded in ``export.json`` beside the files.

    Args:
        source: a result, a run directory, or the directory of a saved model.
        format: ``safetensors``, ``onnx`` or ``torch-export``.
        artefact: which artefact, where a run ships several modules.
        out: where the files go; ``export`` in the run directory by default.
        opset: the operator set of ONNX; torch's choice by default.
        module: your own module for weights that were trained in a Python object; they are loaded into a copy.
        samples: a batch of inputs in place of the run's data.

    Returns:
        What was written, the largest difference, the latency.

    Raises:
        UserError: there is no such artefact, or it cannot be exported to this format.
        RunError: the exported form computes something else.
    """
    if format not in FORMATS:
        raise UserError(f"--format: there is no format {format!r}; {nearest(format, FORMATS)}")
    if opset is not None and format != "onnx":
        raise UserError(f"--opset: only onnx has operator sets, not {format}.")
    form: Format = ONNX(opset) if format == "onnx" else FORMATS[format]()
    origin = source if isinstance(source, Result) else Path(source)
    chosen, known = found(origin, artefact, module, samples)
    base = chosen.run or (origin if isinstance(origin, Path) else None)
    if out is None and base is None:
        raise UserError("this result was made in a temporary directory; say with out= where the export goes.")
    home = Path(out) if out is not None else base / "export"  # type: ignore[operator]
    notes = []
    if format == "onnx" and any(p.dtype in TOLERANCE for p in chosen.module.parameters()):
        chosen.module.float()
        notes.append("its half-precision weights are written in single precision, which every ONNX engine computes in.")
    use = called(chosen, known)
    if known.note:
        notes.append(known.note)
    home.mkdir(parents=True, exist_ok=True)
    with told_when_full(home), FileLock(home / ".lock"), tempfile.TemporaryDirectory(dir=home, prefix=".") as aside:
        partial = Path(aside) / f"{chosen.name}{form.suffix}"
        told = form.write(chosen, use, partial)
        difference, tolerance = _compared(form, chosen, use, partial, told)
        times = _timed(form, chosen, use, partial)
        size = sum(file.stat().st_size for file in Path(aside).rglob("*") if file.is_file())
        final = home / partial.name
        for written in Path(aside).iterdir():
            _moved(written, home / written.name)
        done = Export(
            format=form.name,
            artefact=chosen.name,
            file=final,
            load=form.loading(chosen, use, final),
            inputs=told["inputs"],
            outputs=told["outputs"],
            largest_difference=difference,
            tolerance=tolerance,
            samples=sum(BATCH_SIZES),
            batch_sizes=BATCH_SIZES,
            real=known.real,
            latency_ms=times,
            threads=torch.get_num_threads(),
            parameters=parameters(chosen.module),
            bytes=size,
            opset=told.get("opset"),
            notes=tuple(notes),
        )
        _record(done, home / RECORD)
    return done


def _compared(
    form: Format, artefact: Artefact, use: Called, place: Path, told: Mapping[str, Any]
) -> tuple[float, float]:
    """The largest difference to PyTorch's outputs over all batches, and what is accepted.

    Raises:
        RunError: it is more than that, or an output has another shape.
    """
    call = form.read(artefact, use, place, None)
    batches = use.batches()
    if any("length" in shape for shape in told["inputs"].values()):
        batches.append(use.shortened())
    difference, scale = 0.0, 1.0
    for batch in batches:
        for name, ours, theirs in zip(use.outputs, use(batch), call(batch), strict=True):
            if ours.shape != theirs.shape:
                raise RunError(
                    f"{artefact.name}: as {form.name} the output {name!r} has the shape {tuple(theirs.shape)}, in PyTorch "
                    f"{tuple(ours.shape)}; nothing was kept."
                )
            if ours.numel():
                # What is NaN in both differs by NaN, which no tolerance accepts.
                difference = _larger(difference, float((ours.double() - theirs.double()).abs().max()))
                scale = max(scale, float(ours.double().abs().max()))
    dtype = next((p.dtype for p in artefact.module.parameters() if p.is_floating_point()), torch.float32)
    tolerance = TOLERANCE.get(dtype, 1e-4) * scale
    if not difference <= tolerance:
        raise RunError(
            f"{artefact.name}: as {form.name} it differs from PyTorch by up to {difference:.3g}, more than the "
            f"{tolerance:.3g} that rounding explains; nothing was kept."
        )
    return difference, tolerance


def _larger(one: float, other: float) -> float:
    return other if not other <= one else one


def _timed(form: Format, artefact: Artefact, use: Called, place: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of PyTorch and of the exported form for one sample."""
    example = use.batches()[0]
    times: dict[str, dict[str, float]] = {"PyTorch": {}}
    for label, threads in (("one_thread", 1), ("default_threads", None)):
        with _threads(threads):
            times["PyTorch"][label] = _milliseconds(use, example)
            if form.engine != "PyTorch":
                exported = form.read(artefact, use, place, threads)
                times.setdefault(form.engine, {})[label] = _milliseconds(exported, example)
    return times


def _milliseconds(call: Caller, example: Named) -> float:
    first = latency(call, example, repeats=1, warmup=1)
    # A second of a slow model tells as much as thirty calls of a fast one.
    repeats = max(3, min(30, int(1 / max(first, 1e-9))))
    return round(1e3 * latency(call, example, repeats=repeats, warmup=min(5, repeats)), 4)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _moved(written: Path, place: Path) -> None:
    """Put a finished file or directory where it belongs, in place of an older one."""
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(written, place)


def _record(done: Export, place: Path) -> None:
    """Write an export into the list beside it, in place of an older one of the same artefact and format."""
    before: Any = []
    if place.is_file():
        try:
            before = json.loads(place.read_text(encoding="utf-8"))
        except ValueError:
            before = []
    rows = [row for row in before if isinstance(row, dict)] if isinstance(before, list) else []
    rows = [row for row in rows if (row.get("artefact"), row.get("format")) != (done.artefact, done.format)]
    write_text(place, json.dumps([*rows, done.dump()], indent=2, allow_nan=False) + "\n")

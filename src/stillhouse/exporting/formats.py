"""The formats: how each is written, called again, timed and loaded by others."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.exporting.artefacts import Artefact, copied, quiet
from stillhouse.exporting.entries import UNTRACEABLE, Called, Named, reason_of, without_cache
from stillhouse.metrics import model_bytes
from stillhouse.models import load, load_weights, origin, save

Caller = Callable[[Named], tuple[Tensor, ...]]

PROTOBUF_LIMIT = 2**31 - 2**27
"""Bytes of weights from which they lie beside an ONNX file: the file itself can hold no more."""


class Format(ABC):
    """A form that a module is exported to.

    Attributes:
        name: as on the command line.
        suffix: of its file; empty for a directory.
        engine: what runs it.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    engine: ClassVar[str]

    @abstractmethod
    def write(self, artefact: Artefact, called: Called, place: Path) -> dict[str, Any]:
        """Write to ``place``; the shapes of inputs and outputs and whatever else is worth recording."""

    @abstractmethod
    def read(self, artefact: Artefact, called: Called, place: Path, threads: int | None) -> Caller:
        """What was written, as a function of named inputs, on so many threads (the engine's choice without)."""

    @abstractmethod
    def loading(self, artefact: Artefact, called: Called, place: Path) -> str:
        """The lines of Python that load it."""


class SafeTensors(Format):
    """A directory with safetensors and what rebuilds the module."""

    name = "safetensors"
    suffix = ""
    engine = "PyTorch"

    def write(self, artefact: Artefact, called: Called, place: Path) -> dict[str, Any]:
        with quiet():
            save(artefact.module, place)
        # What a sampler needs beside a diffusion model's network.
        for home in filter(None, (artefact.folder, artefact.folder and artefact.folder.parent)):
            if (home / "process.json").is_file():
                shutil.copy(home / "process.json", place / "process.json")
                if (home / "scheduler").is_dir():
                    shutil.copytree(home / "scheduler", place / "scheduler", dirs_exist_ok=True)
                break
        return _shapes(called)

    def read(self, artefact: Artefact, called: Called, place: Path, threads: int | None) -> Caller:
        if _rebuilds(place):
            with quiet():
                module = load(place)
        else:
            module = copied(artefact.module)
            with torch.no_grad():
                for tensor in module.state_dict().values():
                    tensor.zero_()
            load_weights(module, place)
        without_cache(module)
        return partial(called.on, module)

    def loading(self, artefact: Artefact, called: Called, place: Path) -> str:
        library, cls, where = (
            type(artefact.module).__module__.partition(".")[0],
            type(artefact.module).__name__,
            _text(place),
        )
        if library in ("transformers", "diffusers"):
            return f"from {library} import {cls}\nmodel = {cls}.from_pretrained({where})"
        if origin(artefact.module) is None:
            return f"import stillhouse.models\nstillhouse.models.load_weights(model, {where})  # model: your own module"
        return f"import stillhouse.models\nmodel = stillhouse.models.load({where})"


class TorchExport(Format):
    """A traced program of ``torch.export``, which needs torch alone."""

    name = "torch-export"
    suffix = ".pt2"
    engine = "torch.export"

    def write(self, artefact: Artefact, called: Called, place: Path) -> dict[str, Any]:
        program = traced(artefact, called)
        torch.export.save(program, place)
        return _program_shapes(program, called)

    def read(self, artefact: Artefact, called: Called, place: Path, threads: int | None) -> Caller:
        module = torch.export.load(place).module()
        alone = len(called.inputs) == 1

        def call(batch: Named) -> tuple[Tensor, ...]:
            with torch.no_grad():
                outputs: tuple[Tensor, ...] = module(*batch.values()) if alone else module(**batch)
                return outputs

        return call

    def loading(self, artefact: Artefact, called: Called, place: Path) -> str:
        names = list(called.inputs)
        given = names[0] if len(names) == 1 else ", ".join(f"{name}={name}" for name in names)
        return (
            f"import torch\nmodel = torch.export.load({_text(place)}).module()\n"
            f"{_unpacked(called.outputs)} = model({given})"
        )


class ONNX(Format):
    """A graph for ONNX Runtime and other engines."""

    name = "onnx"
    suffix = ".onnx"
    engine = "ONNX Runtime"

    def __init__(self, opset: int | None = None) -> None:
        # Its builds send events to their makers unless this is set before they are imported.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        for library in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(library)
            except ModuleNotFoundError as error:
                if error.name != library:
                    raise
                raise UserError(f"ONNX needs {library}; install it with: pip install 'stillhouse[onnx]'.") from None
        newest = importlib.import_module("onnx").defs.onnx_opset_version()
        if opset is not None and not 18 <= opset <= newest:
            raise UserError(f"--opset: an operator set from 18 to {newest} can be written, not {opset}.")
        self.opset = opset

    def write(self, artefact: Artefact, called: Called, place: Path) -> dict[str, Any]:
        onnx = importlib.import_module("onnx")
        program = traced(artefact, called)
        with quiet():
            try:
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    opset_version=self.opset,
                    input_names=list(called.inputs),
                    output_names=list(called.outputs),
                )
            except UNTRACEABLE as error:
                raise UserError(f"{artefact.name} cannot be written as ONNX: {reason_of(error)}.") from error
            assert exported is not None
            exported.save(place, external_data=model_bytes(artefact.module) > PROTOBUF_LIMIT)
        model = onnx.load(place, load_external_data=False)
        told = _program_shapes(program, called)
        _name_axes(model.graph, told["symbols"])
        onnx.save(model, place)
        onnx.checker.check_model(place)
        found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if self.opset is not None and found != self.opset:
            raise UserError(
                f"--opset: {artefact.name} needs operators of set {found}, which {self.opset} lacks; leave it out."
            )
        return {**told, "opset": found}

    def read(self, artefact: Artefact, called: Called, place: Path, threads: int | None) -> Caller:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        session = runtime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])

        def call(batch: Named) -> tuple[Tensor, ...]:
            arrays = session.run(None, {name: value.numpy() for name, value in batch.items()})
            return tuple(torch.from_numpy(array) for array in arrays)

        return call

    def loading(self, artefact: Artefact, called: Called, place: Path) -> str:
        given = ", ".join(f'"{name}": {name}' for name in called.inputs)
        return (
            f"import onnxruntime\nsession = onnxruntime.InferenceSession({_text(place)})\n"
            f"{_unpacked(called.outputs)} = session.run(None, {{{given}}})  # NumPy arrays; of a tensor: .numpy()"
        )


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (SafeTensors, ONNX, TorchExport)}


def traced(artefact: Artefact, called: Called) -> torch.export.ExportedProgram:
    """The program that a module runs, for batches of any size and, where it allows them, texts of any length.

    Raises:
        UserError: it cannot be traced, or only for one batch size.
    """
    example = called.batches()[1]
    dim = torch.export.Dim
    problem: Exception | None = None
    for growing in dict.fromkeys((called.growing, ())):
        shapes = {name: {0: dim.DYNAMIC} | ({1: dim.AUTO} if name in growing else {}) for name in example}
        alone = len(example) == 1
        args, kwargs = (tuple(example.values()), None) if alone else ((), example)
        with quiet(), torch.no_grad():
            try:
                return torch.export.export(called.entry, args, kwargs, dynamic_shapes=shapes)
            except UNTRACEABLE as error:
                problem = error
    assert problem is not None
    raise UserError(
        f"{artefact.name} cannot be traced by torch.export: {reason_of(problem)}; what depends on values or a fixed batch size "
        "must be written with tensor operations, or take --format safetensors."
    ) from problem


def _program_shapes(program: torch.export.ExportedProgram, called: Called) -> dict[str, Any]:
    """Shapes of a program's inputs and outputs; a dimension that may vary is a word."""
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    words: dict[str, str] = {}

    def told(names: Iterable[str], found: Iterable[Any]) -> dict[str, list[int | str]]:
        return {
            name: [_word(size, place, name, words) for place, size in enumerate(nodes[str(node)].shape)]
            for name, node in zip(names, found, strict=True)
        }

    signature = program.graph_signature
    inputs = told(called.inputs, signature.user_inputs)
    return {"inputs": inputs, "outputs": told(called.outputs, signature.user_outputs), "symbols": words}


def _word(size: Any, place: int, name: str, words: dict[str, str]) -> int | str:
    """What a dimension is called: equal words mean equal sizes, so an encoder's texts are not as long as a decoder's."""
    if isinstance(size, int):
        return size
    symbol = str(size)
    if symbol not in words:
        length = "decoder_length" if name.startswith("decoder") else "length"
        words[symbol] = ("batch" if place == 0 else length) if symbol.isidentifier() else symbol
    return words[symbol]


def _name_axes(graph: Any, words: Mapping[str, str]) -> None:
    """Call the varying axes of an ONNX graph what they are."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: words.get(match[0], match[0]), size.dim_param)


def _shapes(called: Called) -> dict[str, Any]:
    outputs = called(called.batches()[1])
    inputs = {
        name: ["batch", *(["length"] if name in called.growing else list(value.shape[1:2])), *value.shape[2:]]
        for name, value in called.inputs.items()
    }
    return {
        "inputs": inputs,
        "outputs": {n: ["batch", *o.shape[1:]] for n, o in zip(called.outputs, outputs, strict=True)},
    }


def _rebuilds(place: Path) -> bool:
    described = place / "model.json"
    told = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    return (place / "config.json").is_file() or told.get("spec") is not None


def _unpacked(names: tuple[str, ...]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _text(place: Path) -> str:
    return json.dumps(place.as_posix(), ensure_ascii=False)

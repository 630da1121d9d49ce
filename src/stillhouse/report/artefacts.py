"""What a run ships: its artefacts, their files, and the lines of Python that load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.report.formatting import duration
from stillhouse.report.reading import RunFiles

SHOWN = 12
"""Files of an artefact that are listed by name."""


@dataclass(frozen=True)
class Shipped:
    """An artefact on disk.

    Attributes:
        name: its name in the result.
        files: the first files with their sizes in bytes.
        more: how many further files there are.
        total: bytes of all of them.
        loads: pieces of Python, each of which loads it or a part of it.
    """

    name: str
    files: list[tuple[str, int]]
    more: int
    total: int
    loads: list[str] = field(default_factory=list)


def shipped(result: Path) -> list[Shipped]:
    """The artefacts in the ``result`` directory of a run, by name."""
    found = []
    for place in sorted(path for path in result.glob("*") if path.is_dir()):
        files = [(file, file.stat().st_size) for file in sorted(place.rglob("*")) if file.is_file()]
        # Files at the top first: those in folders are often many and alike.
        files.sort(key=lambda pair: len(pair[0].relative_to(place).parts))
        listed = [(file.relative_to(place).as_posix(), count) for file, count in files[:SHOWN]]
        total = sum(count for _, count in files)
        folders = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
        loads = [line for folder in folders for line in loading(folder)]
        found.append(Shipped(place.name, listed, max(0, len(files) - SHOWN), total, loads))
    return found


@dataclass(frozen=True)
class Export:
    """A model in another format: its file, the file's bytes (None where it is gone), the code that loads it, remarks."""

    format: str
    file: str
    size: int | None
    load: str
    remarks: list[str]


def exported(run: RunFiles) -> list[Export]:
    """What was exported of a run, as ``export/export.json`` lists it."""
    found = []
    for item in run.exports:
        name = str(item.get("file") or "")
        # The list names files as the command was given them; the run may lie elsewhere now.
        places = [run.path / "export" / name, run.path / "export" / Path(name).name, run.path / name]
        place = next((path for path in places if name and path.exists()), None)
        size = _bytes(place) if place is not None else None
        found.append(Export(str(item.get("format") or name), name, size, str(item.get("load") or ""), _remarks(item)))
    return found


def _remarks(item: Mapping[str, Any]) -> list[str]:
    """How an export was judged: its difference from PyTorch, its speed, and notes."""
    remarks = []
    difference, artefact = item.get("largest_difference"), item.get("artefact")
    if isinstance(artefact, str):
        remarks.append(f"of {artefact}")
    if isinstance(difference, int | float):
        remarks.append(
            f"outputs differ from PyTorch's by at most {difference:.2g}" if difference else "outputs equal PyTorch's"
        )
    latency = item.get("latency_ms")
    for engine, times in latency.items() if isinstance(latency, dict) else ():
        one = times.get("one_thread") if isinstance(times, dict) else None
        if isinstance(one, int | float):
            remarks.append(f"{duration(one / 1000)} a sample in {engine} on one thread")
    notes = item.get("notes")
    return remarks + [str(note) for note in (notes if isinstance(notes, list) else [])]


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def loading(folder: Path) -> list[str]:
    """The Python that loads what lies in a folder, judged by its files."""
    names = {path.name for path in folder.iterdir()}
    where = json.dumps(folder.as_posix(), ensure_ascii=False)
    if "model_index.json" in names:
        cls = _json(folder / "model_index.json").get("_class_name") or "DiffusionPipeline"
        return [f"from diffusers import {cls}\npipeline = {cls}.from_pretrained({where})"]
    if "config.json" in names:
        config = _json(folder / "config.json")
        if "_class_name" in config:
            cls = config["_class_name"]
            return [f"from diffusers import {cls}\nmodel = {cls}.from_pretrained({where})"]
        cls = next(iter(config.get("architectures") or []), "AutoModel")
        return [f"from transformers import {cls}\nmodel = {cls}.from_pretrained({where})"]
    if {"model.safetensors", "model.json"} <= names:
        if _json(folder / "model.json").get("spec") is None:
            return [
                f"import stillhouse.models\nstillhouse.models.load_weights(model, {where})  # model: your own module"
            ]
        return [f"import stillhouse.models\nmodel = stillhouse.models.load({where})"]
    if {"dataset_info.json", "state.json"} <= names:
        return [f"import datasets\ndataset = datasets.load_from_disk({where})"]
    if "distilled.safetensors" in names:
        return [
            f"from pathlib import Path\nfrom stillhouse.data.export import load_tensors\n"
            f'distilled = load_tensors(Path({where}) / "distilled.safetensors")'
        ]
    return [
        f"from safetensors.torch import load_file\ntensors = load_file({json.dumps((folder / name).as_posix())})"
        for name in sorted(names)
        if name.endswith(".safetensors")
    ]


def _json(path: Path) -> dict[str, Any]:
    """A library's JSON file; empty where it is none, as the page can do without it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""Where data and models come from and under which licence, as far as that is known without asking anybody."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.report.reading import yaml_mapping


@dataclass(frozen=True)
class Origin:
    """Where something comes from.

    Attributes:
        source: who made it, or where it lies.
        licence: its licence and who says so; "not known" with the reason where nobody does.
    """

    source: str
    licence: str


DATA_SETS = {
    "digits": Origin(
        "scikit-learn, from the Optical Recognition of Handwritten Digits of Alpaydin and Kaynak (UCI repository)",
        "CC BY 4.0, by the UCI repository; scikit-learn, which brings it along, is BSD-3-Clause",
    ),
    "mnist": Origin(
        "LeCun, Cortes and Burges, from NIST's images",
        "CC BY-SA 3.0, by the documentation of Keras; its makers' own page names none",
    ),
    "fashion-mnist": Origin("Zalando Research (arXiv 1708.07747)", "MIT, by its repository"),
    "cifar10": Origin(
        "Krizhevsky, Nair and Hinton, from the 80 Million Tiny Images", "none named by its makers, who ask to be cited"
    ),
    "cifar100": Origin(
        "Krizhevsky, Nair and Hinton, from the 80 Million Tiny Images", "none named by its makers, who ask to be cited"
    ),
    "clinc150": Origin("Larson et al. (arXiv 1909.02027)", "CC BY 3.0, by its repository"),
    "dsprites": Origin(
        "Matthey, Higgins, Lerchner and Hassabis 2017",
        "not known: its page names none for the images; LOVE, which drew them, is under the zlib licence",
    ),
    "sprites": Origin("drawn by stillhouse", "no outside material: it is drawn from a formula"),
    "scenes": Origin("drawn by stillhouse", "no outside material: it is drawn from a formula"),
    "characters": Origin(
        "drawn by stillhouse in fonts that come with matplotlib",
        "no outside material but pictures of DejaVu, STIX and Computer Modern, which are free fonts",
    ),
    "graph-motifs": Origin("drawn by stillhouse", "no outside material: it is drawn from a formula"),
    "tudataset": Origin(
        "TUDataset (arXiv 2007.08663), from the authors of each set",
        "not known: the collection names none for its sets, only whom to cite",
    ),
    "ring": Origin("drawn by stillhouse", "no outside material: it is drawn from a formula"),
}
"""The data sets that stillhouse knows by name."""

LICENCE_FILES = ("LICENSE", "LICENCE", "LICENSE.md", "LICENSE.txt", "LICENCE.txt", "COPYING")
"""Files that hold a licence."""


def data_origin(spec: Mapping[str, Any]) -> Origin:
    """Where the data of a recipe comes from."""
    kind = str(spec.get("kind") or "")
    if kind in DATA_SETS:
        return DATA_SETS[kind]
    path = str(spec.get("path") or "")
    match kind:
        case "hf":
            return _hub("datasets", path, spec.get("revision"))
        case "folder" | "csv" | "jsonl" | "parquet":
            return Origin(path or "files of your own", _beside(Path(path or ".").expanduser()))
        case "object":
            return Origin("a Python object", "not known: it was given as a Python object")
        case "import":
            return Origin(f"Python code, {path}", "not known: Python code gives it")
    return Origin(path, "not known")


def model_origin(spec: Mapping[str, Any]) -> Origin:
    """Where a model's weights come from; its source is empty where they start at random."""
    kind = str(spec.get("kind") or "")
    match kind:
        case "hf" if spec.get("name"):
            return _hub("models", str(spec["name"]), spec.get("revision"))
        case "file":
            path = str(spec.get("path") or "")
            return Origin(path, _beside(Path(path).expanduser()))
        case "object":
            return Origin(f"a Python object, {spec.get('object')}", "not known: it was given as a Python object")
        case "import":
            return Origin(f"Python code, {spec.get('path')}", "not known: Python code makes it")
    return Origin("", "")


def _hub(kind: Literal["datasets", "models"], name: str, revision: Any) -> Origin:
    """A repository of the Hugging Face hub, or a directory in its form."""
    local = Path(name).expanduser()
    if local.is_dir():
        return Origin(name, _beside(local))
    address = f"huggingface.co/{'datasets/' if kind == 'datasets' else ''}{name}"
    for place in _snapshots(kind, name, revision):
        told = _told(place)
        if told:
            return Origin(address, told)
    return Origin(address, f"not known: no card of it is on this machine; see {address}")


def _snapshots(kind: str, name: str, revision: Any) -> Iterator[Path]:
    """Downloaded states of a repository in the hub's cache, the one that was asked for first."""
    home = _hub_cache() / f"{kind}--{name.replace('/', '--')}"
    if not name or not home.is_dir():
        return
    reference = home / "refs" / str(revision or "main")
    wanted = reference.read_text(encoding="utf-8").strip() if reference.is_file() else str(revision or "")
    states = sorted(path for path in (home / "snapshots").glob("*") if path.is_dir())
    yield from sorted(states, key=lambda path: path.name != wanted)


def _hub_cache() -> Path:
    """The hub's cache, by the variables that its library reads."""
    asked = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if asked:
        return Path(asked).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def _beside(path: Path) -> str:
    """The licence told by files in a directory, or beside a file."""
    place = path if path.is_dir() else path.parent
    return _told(place) or "not known: no card and no licence file lies beside it"


def _told(place: Path) -> str:
    """What the card, the config or the licence file in a directory says; empty where nothing does."""
    for name, fields in (("card", _front_matter(place / "README.md")), ("config.json", _config(place / "config.json"))):
        found = fields.get("license") or fields.get("licence")
        if found == "other":
            found = fields.get("license_name") or found
        if found and isinstance(found, str | list):
            return f"{found if isinstance(found, str) else ', '.join(map(str, found))}, by its {name}"
    for name in LICENCE_FILES:
        first = next((line.strip() for line in _text(place / name).splitlines() if line.strip()), "")
        if first:
            return f"{first[:80]}, by its {name}"
    return ""


def _front_matter(card: Path) -> Mapping[str, Any]:
    """What a model or data card says in its head, between lines of three dashes."""
    found = re.match(r"---\n(.*?)\n---\s", _text(card), flags=re.S)
    return yaml_mapping(found[1]) if found else {}


def _config(path: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _text(path: Path) -> str:
    """The beginning of a text file; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace", newline=None) as file:
        return file.read(100_000)

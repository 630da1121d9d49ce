"""A distilled set in formats that others read: safetensors, PNG folders, a Hugging Face data set, a picture, a card.

The tensors are lossless. Everything else holds pixels in [0, 1] rounded to 8 bits, and the card says so.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.modules.distilled import DistilledSet

if TYPE_CHECKING:
    from types import ModuleType

TENSORS, PICTURE, FOLDERS, HUGGING_FACE, CARD = "distilled.safetensors", "picture.png", "images", "dataset", "README.md"


@dataclass(frozen=True)
class Card:
    """What a person needs to know to use and to trust a distilled set.

    Attributes:
        method: the system that made it.
        source: the real data set.
        seed: seed of the run.
        protocol: how networks are to be trained on it (network, optimiser, steps, augmentation), plain values.
        paper: where the method is described.
        results: what networks trained on it reached, by name of the measurement.
        class_names: names of the classes in label order; their numbers by default.
        data: how the real data set is read, as in a recipe.
    """

    method: str
    source: str
    seed: int
    protocol: Mapping[str, Any]
    paper: str = ""
    results: Mapping[str, float] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistilledExport:
    """A distilled set with its card, as an artefact of a result: it writes itself in every format.

    Attributes:
        distilled: the set.
        card: what the set itself does not know.
    """

    distilled: DistilledSet
    card: Card

    def save(self, directory: Path) -> None:
        """Write into ``directory``; see :func:`save_distilled_set`."""
        save_distilled_set(self.distilled, directory, self.card)


def save_distilled_set(distilled: DistilledSet, directory: str | Path, card: Card) -> dict[str, Path]:
    """Write every format that fits the set: the tensors first, then picture, PNG folders, Hugging Face data set, card.

    Pictures need one or three channels, folders need classes; the Hugging Face data set is written where ``datasets`` is
    installed, since everything else does without.

    Args:
        distilled: the set.
        directory: where; made when missing. An earlier export there is replaced.
        card: what the set itself does not know.

    Returns:
        The path of each format by name.

    Raises:
        UserError: an optional library is missing (the tensors are written before it is needed), or names do not fit.
    """
    names, directory = _class_names(distilled.num_classes, card.class_names), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / TENSORS).exists():
        for stale in (FOLDERS, HUGGING_FACE):
            shutil.rmtree(directory / stale, ignore_errors=True)
    paths = {"tensors": directory / TENSORS}
    save_tensors(paths["tensors"], distilled, class_names=names)
    classes = distilled.class_of
    if distilled.images.shape[1] in (1, 3):
        pixels = distilled.pixels
        paths["picture"] = directory / PICTURE
        save_picture(paths["picture"], pixels, classes)
        if classes is not None:
            paths["folders"] = directory / FOLDERS
            save_class_folders(paths["folders"], pixels, classes, names)
        if find_spec("datasets") is not None:
            paths["dataset"] = directory / HUGGING_FACE
            soft = None if distilled.target == "hard" else (distilled.target, distilled.labels.detach())
            save_huggingface(paths["dataset"], pixels, classes, names, soft=soft)
    paths["card"] = directory / CARD
    paths["card"].write_text(_card_text(distilled, card, names, paths), encoding="utf-8")
    return paths


def save_tensors(path: Path, distilled: DistilledSet, *, class_names: Sequence[str] = ()) -> None:
    """Write images (as networks see them), labels, step size and standardisation without loss, as safetensors."""
    state = {name: value.detach().cpu().contiguous() for name, value in distilled.state_dict().items()}
    facts = {
        "target": distilled.target,
        "num_classes": distilled.num_classes,
        "learn_labels": isinstance(distilled.labels, torch.nn.Parameter),
        "class_names": list(class_names),
        "provenance": distilled.provenance,
    }
    save_file(state, path, metadata={"stillhouse": json.dumps(facts)})


def load_tensors(path: Path) -> DistilledSet:
    """Read what :func:`save_tensors` wrote: an equal set.

    Raises:
        UserError: the file is missing or was written by something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a distilled set: {str(error).rstrip('.')}.") from None
    if "stillhouse" not in metadata:
        raise UserError(f"{path} is no distilled set; write one with save_tensors.")
    facts = json.loads(metadata["stillhouse"])
    distilled = DistilledSet(
        state["images"],
        state["labels"],
        target=facts["target"],
        classes=state.get("classes"),
        num_classes=facts["num_classes"],
        learn_labels=facts["learn_labels"],
        lr=1.0 if "lr" in state else None,
        provenance=facts["provenance"],
    )
    distilled.load_state_dict(state)
    return distilled


def save_picture(
    path: Path,
    pixels: Float[Tensor, "samples channels height width"],
    classes: Int[Tensor, " samples"] | None = None,
    *,
    columns: int = 10,
    max_rows: int = 100,
    zoom: int | None = None,
) -> None:
    """Draw the images as a grid, a row for each class (or simply in order where there are no classes), as PNG.

    Args:
        path: of the PNG.
        pixels: in [0, 1], one or three channels.
        classes: class of each image.
        columns: at most so many images in a row; the first ones of a class are shown.
        max_rows: at most so many rows.
        zoom: whole-number enlargement; by default small images are enlarged to at least 64 pixels.
    """
    levels = eight_bit(pixels)
    if classes is None:
        rows = [list(range(start, min(start + columns, len(levels)))) for start in range(0, len(levels), columns)]
    else:
        numbers = classes.cpu()
        rows = [(numbers == label).nonzero().flatten()[:columns].tolist() for label in sorted(set(numbers.tolist()))]
    rows = rows[:max_rows]
    height, width = levels.shape[1:3]
    zoom = zoom if zoom is not None else math.ceil(64 / max(height, width))
    gap = 2
    tall, wide = height * zoom + gap, width * zoom + gap
    canvas = np.full((len(rows) * tall + gap, max(map(len, rows)) * wide + gap, levels.shape[3]), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            tile = levels[index].repeat(zoom, axis=0).repeat(zoom, axis=1)
            canvas[r * tall + gap : (r + 1) * tall, c * wide + gap : (c + 1) * wide] = tile
    _picture(canvas).save(path, format="PNG")


def save_class_folders(
    directory: Path,
    pixels: Float[Tensor, "samples channels height width"],
    classes: Int[Tensor, " samples"],
    class_names: Sequence[str] = (),
) -> None:
    """Write PNG files as ``directory/<label>_<class>/<index>.png``.

    Folder names begin with the zero-padded label, so readers that number classes by sorted folder names (torchvision's
    ImageFolder, ``datasets``' imagefolder) give the same labels.

    Raises:
        UserError: the directory has something in it, which would become part of the set.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; files left there would become part of the set.")
    levels = eight_bit(pixels)
    labels = classes.tolist()
    names = _class_names(max([*labels, len(class_names) - 1]) + 1, class_names)
    width, digits = len(str(len(names) - 1)), len(str(len(levels) - 1))
    folders = [directory / f"{label:0{width}d}_{plain_name(name)}" for label, name in enumerate(names)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for index, label in enumerate(labels):
        _picture(levels[index]).save(folders[label] / f"{index:0{digits}d}.png", format="PNG")


def save_huggingface(
    directory: Path,
    pixels: Float[Tensor, "samples channels height width"],
    classes: Int[Tensor, " samples"] | None,
    class_names: Sequence[str] = (),
    *,
    soft: tuple[str, Float[Tensor, "samples values"]] | None = None,
) -> None:
    """Write a data set that ``datasets.load_from_disk`` opens, with the columns ``image`` and ``label``.

    Args:
        directory: where.
        pixels: in [0, 1], one or three channels.
        classes: class of each image; ``None`` writes no ``label``.
        class_names: names of the classes in label order.
        soft: name and rows of a further column, such as ``("logits", ...)``.

    Raises:
        UserError: ``datasets`` is not installed.
    """
    library = _datasets()
    features: dict[str, Any] = {"image": library.Image()}
    columns: dict[str, Any] = {"image": [_picture(image) for image in eight_bit(pixels)]}
    if classes is not None:
        count = max(len(class_names), int(classes.max()) + 1)
        features["label"] = library.ClassLabel(names=list(_class_names(count, class_names)))
        columns["label"] = classes.tolist()
    if soft is not None:
        features[soft[0]] = library.Sequence(library.Value("float32"))
        columns[soft[0]] = soft[1].float().tolist()
    quiet = library.utils.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        library.Dataset.from_dict(columns, features=library.Features(features)).save_to_disk(str(directory))
    finally:
        if not quiet:
            library.enable_progress_bars()


def eight_bit(
    pixels: Float[Tensor, "samples channels height width"],
) -> UInt8[np.ndarray[Any, Any], "samples height width channels"]:
    """Pixels in [0, 1] as the nearest of 256 levels, channels last; off by at most 1/510.

    Raises:
        UserError: values outside [0, 1] (standardised images, say), or neither one nor three channels.

    >>> eight_bit(torch.tensor([[[[0.0, 0.5, 1.0]]]])).ravel().tolist()
    [0, 128, 255]
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise UserError(
            f"Pictures have one or three channels, [samples, channels, height, width]; got {list(pixels.shape)}."
        )
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise UserError(f"Pictures need pixel values in [0, 1], not in [{low:.3g}, {high:.3g}]; undo standardisation.")
    # In double precision, where the half levels that decide the rounding are exact.
    levels = (pixels.detach().double() * 255 + 0.5).floor().to(torch.uint8)
    array: np.ndarray[Any, Any] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return array


def _card_text(distilled: DistilledSet, card: Card, names: Sequence[str], paths: Mapping[str, Path]) -> str:
    count, channels, height, width = distilled.images.shape
    packed = sum(file.stat().st_size for file in paths["folders"].rglob("*.png")) if "folders" in paths else None
    start = distilled.provenance.get("start")
    if isinstance(start, dict) and "samples" in start:
        start = f"real samples, listed in {TENSORS}"
    facts = {
        "method": card.method,
        "paper": card.paper,
        "source": card.source,
        "data": dict(card.data),
        "seed": card.seed,
        "samples": count,
        "images_per_class": distilled.images_per_class,
        "image": [channels, height, width],
        "labels": distilled.target,
        "learned_rate": None if distilled.lr is None else float(f"{distilled.lr.item():.6g}"),
        "clipped": float(f"{distilled.clipped:.4g}"),
        "bytes": distilled.bytes,
        "bytes_png": packed,
        "protocol": dict(card.protocol),
        "results": dict(card.results),
        "provenance": {**distilled.provenance, "start": start},
        "class_names": list(names),
    }
    front: dict[str, Any] = {
        "pretty_name": f"{card.source} distilled by {card.method}",
        "task_categories": ["image-classification"],
        "size_categories": [_size_category(count)],
        "tags": ["dataset-distillation", "stillhouse"],
    }
    if packed is not None:
        files = [{"split": "train", "path": f"{FOLDERS}/*/*.png"}]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    front["distilled"] = {key: value for key, value in facts.items() if value not in (None, "", {}, [])}
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.dump(front, text)
    template = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined).from_string(_CARD)
    names_of_files = {"tensors": TENSORS, "picture": PICTURE, "folders": FOLDERS, "dataset": HUGGING_FACE}
    return template.render(
        front=text.getvalue(), title=front["pretty_name"], facts=facts, paths=paths, file=names_of_files
    )


_CARD = """---
{{ front }}---

# {{ title }}

{% if "picture" in paths %}
![the first images]({{ file.picture }})

{% endif %}
{{ facts.samples }} images of {{ facts.image[1] }}x{{ facts.image[2] }}\
{% if facts.images_per_class %}, {{ facts.images_per_class }} per class{% endif %}, \
{% if facts.labels == "features" %}
learned so that networks pre-trained on them see {{ facts.source }} as their target model does.
{% else %}
learned so that networks trained on them do well on {{ facts.source }}.
{% endif %}
Train a fresh network as the protocol above says, and measure it once, after the last step.

- `{{ file.tensors }}` is without loss ({{ facts.bytes }} bytes of values): `images` as networks see them, so that
  pixels are `images * std + mean`, `labels`\
{% if facts.labels == "logits" %} (logits: train on their softmax){% endif %}\
{% if facts.labels == "features" %} (representations: train a network's outputs to them by squared error){% endif %}\
{% if facts.learned_rate is not none %}, and `lr`, the learned step size{% endif %}.
{% if "dataset" in paths %}
- `{{ file.dataset }}/` opens with `datasets.load_from_disk`.
{% endif %}
{% if "folders" in paths %}
- `{{ file.folders }}/` has a folder of PNG files for each class ({{ facts.bytes_png }} bytes)\
{% if facts.labels != "hard" %}; it keeps only the class of each image{% endif %}.
{% endif %}
{% if "dataset" in paths %}

Outside `{{ file.tensors }}` pixels are cut to [0, 1] ({{ "%.2f" % (100 * facts.clipped) }} % of the values lie outside)
and rounded to 8 bits, which moves them by at most 1/510.
{% endif %}
"""


def _class_names(num_classes: int | None, names: Sequence[str]) -> tuple[str, ...]:
    if num_classes is None:
        return ()
    if not names:
        return tuple(str(label) for label in range(num_classes))
    if len(names) != num_classes or len(set(names)) != len(names):
        raise UserError(f"{num_classes} classes need as many different names, not {len(set(names))}.")
    return tuple(names)


def plain_name(name: str) -> str:
    """A class name as part of a folder name on any system."""
    return "".join(letter if letter.isalnum() or letter in "-+" else "_" for letter in name)[:100]


def _size_category(count: int) -> str:
    bounds = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((text for bound, text in bounds if count < bound), "1M<n<10M")


def _picture(levels: UInt8[np.ndarray[Any, Any], "height width channels"]) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("PNG files need Pillow; install it with: pip install 'stillhouse[datasets]'.") from None
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "A Hugging Face data set needs datasets; install it with: pip install 'stillhouse[datasets]'."
        ) from None
    library: ModuleType = datasets
    return library

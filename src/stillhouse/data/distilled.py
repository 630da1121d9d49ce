"""Anybody's distilled set read from a directory: lossless tensors, a Hugging Face data set, or class folders of pictures.

Pixels become those that a network of the real data set sees, and classes are matched with its classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor

from stillhouse.data.dataset import Data
from stillhouse.data.export import CARD, FOLDERS, HUGGING_FACE, TENSORS, load_tensors, plain_name
from stillhouse.data.hub import LABEL_NAMES
from stillhouse.data.images import SUFFIXES, ImageFiles, as_bytes
from stillhouse.errors import UserError
from stillhouse.modules.distilled import DistilledSet

SOFT = ("logits", "probabilities")


def read_distilled(directory: Path, data: Data) -> DistilledSet:
    """The distilled set in ``directory``, which stands for the real set ``data``.

    The first of these that is there is read: ``distilled.safetensors``; a data set of ``datasets.save_to_disk`` (in the
    directory or in ``dataset/``); pictures in one folder per class (in the directory or in ``images/``). Classes are matched
    by numbers before the folders' names (``0_cat``), else by name, else by order.

    Args:
        directory: where the set is.
        data: the real set; its images give the size, the channels and the pixel scale.

    Returns:
        The images as networks of ``data`` see them, ordered by class.

    Raises:
        UserError: there is no set, it cannot be read, or it does not fit ``data``.
    """
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}.")
    shape, classes = data.facts.inputs.get("pixel_values"), data.facts.num_classes
    if shape is None or classes is None:
        raise UserError(f"The data set {data.name!r} has no images with class labels to hold a distilled set against.")
    if (directory / TENSORS).exists():
        found = load_tensors(directory / TENSORS)
    elif (home := _saved(directory)) is not None:
        found = _hugging_face(home, data)
    else:
        found = _folders(directory, data)
    if tuple(found.images.shape[1:]) != shape:
        raise UserError(
            f"The images in {directory} are {_size(found.images.shape[1:])} and those of {data.name!r} {_size(shape)}; "
            "name the data set that it was distilled from, at the same image_size."
        )
    if found.target == "features" or found.class_of is None:
        raise UserError(f"The set in {directory} has no class labels, so no classifier can be trained on it.")
    if (found.num_classes or 0) > classes or (found.target != "hard" and found.labels.shape[1] != classes):
        raise UserError(f"The set in {directory} has {_count(found)} classes and {data.name!r} {classes}.")
    return _as_seen(found, data)


def read_card(directory: Path) -> dict[str, Any]:
    """What a set's card says of it (``method``, ``source``, ``data``, ``protocol``, ...); {} where there is none."""
    path = directory / CARD
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = YAML(typ="safe", pure=True).load(parts[1])
    except YAMLError:
        return {}
    told = front.get("distilled") if isinstance(front, dict) else None
    return told if isinstance(told, dict) else {}


def _as_seen(found: DistilledSet, data: Data) -> DistilledSet:
    """The set in order of classes, its images on the real set's pixel scale; pixels outside [0, 1] stay there."""
    images, classes = found.images.detach(), found.class_of
    assert classes is not None
    scale = data.scale
    if scale is not None and (
        not torch.allclose(found.mean, torch.tensor(scale.mean))
        or not torch.allclose(found.std, torch.tensor(scale.std))
    ):
        images = scale.from_unit(images * found.std[:, None, None] + found.mean[:, None, None])
    order = classes.sort(stable=True).indices
    space: dict[str, Any] = {} if scale is None else {"mean": scale.mean, "std": scale.std}
    return DistilledSet(
        images[order],
        found.labels.detach()[order],
        target=found.target,
        classes=None if found.target == "hard" else classes[order],
        num_classes=data.facts.num_classes,
        lr=None if found.lr is None else found.lr.item(),
        provenance=found.provenance,
        **space,
    )


def _saved(directory: Path) -> Path | None:
    """Where ``datasets.save_to_disk`` wrote, in the directory or in its ``dataset/``."""
    for home in (directory, directory / HUGGING_FACE):
        if (home / "state.json").is_file() or (home / "dataset_dict.json").is_file():
            return home
    return None


def _hugging_face(home: Path, data: Data) -> DistilledSet:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{home} is a Hugging Face data set, which needs datasets; install it with: pip install 'stillhouse[datasets]'."
        ) from None
    try:
        rows: Any = datasets.load_from_disk(str(home))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{home} cannot be read as a Hugging Face data set: {reason}.") from None
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows and len(rows) != 1:
            raise UserError(
                f"{home} has the splits {', '.join(sorted(rows))}; a distilled set is 'train', or the only one."
            )
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    features = rows.features
    image = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    label = next((name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    label = label or next((name for name in LABEL_NAMES if name in features), None)
    if image is None or label is None or not len(rows):
        raise UserError(f"{home} needs rows with an image and a label; its columns are {', '.join(features)}.")
    try:
        pictures = list(rows[image])
    except (OSError, SyntaxError) as error:
        raise UserError(f"{home} holds an image that cannot be read: {str(error).rstrip('.')}.") from None
    missing = next((position for position, picture in enumerate(pictures) if picture is None), None)
    if missing is not None:
        raise UserError(f"{home} has no image in row {missing}.")
    images = _pixels([as_bytes(picture) for picture in pictures], data, home)
    names = getattr(features[label], "names", None)
    column = list(rows[label])
    if names is None and not all(isinstance(value, int) and value >= 0 for value in column):
        raise UserError(f"The column {label!r} of {home} holds no class numbers.")
    number = _numbers(names, data, home) if names is not None else list(range(max(column) + 1))
    classes = torch.tensor([number[value] for value in column])
    soft = next((name for name in SOFT if name in features), None)
    if soft is None:
        return DistilledSet(images, classes, num_classes=max(number) + 1)
    values = torch.tensor(rows[soft], dtype=torch.float32)
    moved = torch.zeros(len(values), max(number) + 1)
    moved[:, number] = values
    return DistilledSet(images, moved, target=soft, classes=classes, num_classes=max(number) + 1)  # type: ignore[arg-type]


def _folders(directory: Path, data: Data) -> DistilledSet:
    for home in (directory / FOLDERS, directory):
        places = sorted(p for p in home.iterdir() if p.is_dir() and not p.name.startswith(".")) if home.is_dir() else []
        files = [sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES) for place in places]
        if any(files):
            break
    else:
        raise UserError(
            f"{directory} holds no distilled set: neither {TENSORS}, nor a Hugging Face data set, nor one folder of pictures "
            "per class."
        )
    names = [place.name for place in places]
    number = _numbers(names, data, home)
    labels = torch.tensor([number[place] for place, found in enumerate(files) for _ in found])
    paths = [path for found in files for path in found]
    reader = ImageFiles(paths, None, None, None)
    images = _pixels([reader.row(position)["pixel_values"] for position in range(len(paths))], data, home)
    return DistilledSet(images, labels, num_classes=max(number) + 1)


def _pixels(images: Sequence[Tensor], data: Data, home: Path) -> Tensor:
    """Pictures as [0, 1], with as many channels as the real set's where nothing is lost by it."""
    wanted = data.facts.inputs["pixel_values"][0]
    found = []
    for image in images:
        if len(image) == 1 < wanted == 3:
            image = image.expand(3, -1, -1)
        elif len(image) == 3 > wanted == 1:
            if not (torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])):
                raise UserError(f"The images in {home} are in colour and those of {data.name!r} are grey.")
            image = image[:1]
        found.append(image)
    sizes = sorted({tuple(image.shape) for image in found})
    if len(sizes) > 1:
        raise UserError(f"The images in {home} have different sizes ({_size(sizes[0])}, {_size(sizes[1])}, ...).")
    return torch.stack(found).float() / 255


def _numbers(names: Sequence[str], data: Data, home: Path) -> list[int]:
    """The real set's class of each of a distilled set's classes, in the order of ``names``."""
    count, known = data.facts.num_classes or 0, data.facts.class_names
    for own, theirs in (
        (list(names), list(known)),
        ([plain_name(name) for name in names], [plain_name(name) for name in known]),
        ([plain_name(re.sub(r"^\d+_", "", name)) for name in names], [plain_name(name) for name in known]),
    ):
        if set(own) <= set(theirs) and len(set(own)) == len(own):
            return [theirs.index(name) for name in own]
    by_number = [int(match.group(1)) if (match := re.fullmatch(r"(\d+)(_.*)?", name)) else count for name in names]
    if len(set(by_number)) == len(names) and max(by_number) < count:
        return by_number
    if len(names) == count:
        return list(range(count))
    raise UserError(
        f"The classes in {home} ({', '.join(names[:3])}, ...) are {len(names)}, and {data.name!r} has {count} of other names."
    )


def _size(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _count(found: DistilledSet) -> int:
    return found.labels.shape[1] if found.target != "hard" else int(found.num_classes or 0)

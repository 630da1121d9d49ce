"""Trees of tensors and plain values on disk: safetensors plus JSON, written atomically, verified when read.

Nothing is ever unpickled. A stored tree is a directory of ``tensors.safetensors``, ``tree.json`` and ``digests.json``
that appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.errors import RunError

TENSORS, TREE, DIGESTS = "tensors.safetensors", "tree.json", "digests.json"


class CorruptError(RunError):
    """A stored tree is incomplete or was changed since it was written."""


def write_tree(directory: Path, tree: Any, *, base: Path | None = None) -> None:
    """Store ``tree`` as ``directory``: all of it or nothing (write aside, fsync, rename).

    Args:
        directory: where the tree appears; an older tree there is replaced.
        tree: tensors, numpy arrays, numbers, strings, None, and lists, tuples and dicts of them; paths below ``base``.
        base: directory to which paths in the tree are relative.

    Raises:
        RunError: the disk is full, or the tree holds something that cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    plain = _encode(tree, "", tensors, seen, base)
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    with told_when_full(directory):
        try:
            # There is one writer at a time, so whatever else lies aside was left by a process that was killed.
            for left in directory.parent.glob(f".{directory.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(tensors, aside / TENSORS)
            (aside / TREE).write_text(json.dumps(plain))
            digests = {name: _digest(aside / name) for name in (TENSORS, TREE)}
            (aside / DIGESTS).write_text(json.dumps(digests))
            for name in (TENSORS, TREE, DIGESTS):
                _sync(aside / name)
            _sync(aside)
            if directory.exists():
                shutil.rmtree(directory)
            os.replace(aside, directory)
            _sync(directory.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def read_tree(directory: Path, *, base: Path | None = None) -> Any:
    """Read back what :func:`write_tree` stored; tied tensors come back as one tensor.

    Raises:
        CorruptError: a file is missing, truncated or changed.
    """
    try:
        digests = json.loads((directory / DIGESTS).read_text())
        for name in (TENSORS, TREE):
            if _digest(directory / name) != digests[name]:
                raise CorruptError(f"{directory / name} was truncated or changed since it was written.")
        tensors = load_file(directory / TENSORS)
        plain = json.loads((directory / TREE).read_text())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CorruptError(f"{directory} cannot be read ({error}).") from None
    return _decode(plain, tensors, base)


def as_json(value: Any) -> Any:
    """A number as JSON has it: what is not finite, which JSON lacks, is null. Other values as they are."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (write aside, fsync, rename)."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with told_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text)
            _sync(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _encode(
    value: Any, key: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str], base: Path | None
) -> Any:
    match value:
        case Tensor():
            tensor = value.detach()
            identity = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() == 0 or identity not in seen:
                # Keys may hold dots themselves, so two places can spell the same name.
                name = key
                while not name or name in tensors:
                    name += "'"
                storage = ("storage", tensor.untyped_storage().data_ptr())
                # safetensors refuses two names of one memory: a view of what is stored already is stored as a copy.
                tensors[name] = tensor.contiguous().clone() if storage in seen else _owned(tensor.cpu())
                seen[identity] = seen[storage] = name
                return {"$tensor": name}
            return {"$tensor": seen[identity]}
        case np.ndarray() if value.dtype.kind in "biufc":
            writable = value if value.flags.writeable and value.flags.c_contiguous else np.array(value, order="C")
            return {"$array": _encode(torch.from_numpy(writable), key, tensors, seen, base)["$tensor"]}
        case np.generic():
            return value.item()
        case None | bool() | int() | float() | str():
            return value
        case Path():
            if base is None or not value.is_relative_to(base):
                raise RunError(f"the path {value} is not below {base}, so it cannot be stored.")
            return {"$path": str(value.relative_to(base))}
        case dict():
            if all(isinstance(name, str) and not name.startswith("$") for name in value):
                return {k: _encode(v, f"{key}.{k}" if key else k, tensors, seen, base) for k, v in value.items()}
            return {
                "$items": [
                    [k, _encode(v, f"{key}.{k}" if key else str(k), tensors, seen, base)] for k, v in value.items()
                ]
            }
        case tuple():
            return {"$tuple": [_encode(v, f"{key}.{i}", tensors, seen, base) for i, v in enumerate(value)]}
        case list():
            return [_encode(v, f"{key}.{i}", tensors, seen, base) for i, v in enumerate(value)]
        case _:
            raise RunError(
                f"{key or 'the value'} is a {type(value).__name__}; only tensors, numbers, strings, lists, "
                "string-keyed dicts and paths below the run directory can be stored."
            )


def _owned(tensor: Tensor) -> Tensor:
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.contiguous().clone()


def _decode(plain: Any, tensors: dict[str, Tensor], base: Path | None) -> Any:
    match plain:
        case {"$tensor": name}:
            return tensors[name]
        case {"$array": name}:
            return tensors[name].numpy()
        case {"$path": relative}:
            if base is None:
                raise CorruptError(f"the stored path {relative} has no directory to belong to.")
            if not (base / relative).exists():
                raise CorruptError(f"{base / relative} is missing.")
            return base / relative
        case {"$tuple": items}:
            return tuple(_decode(item, tensors, base) for item in items)
        case {"$items": items}:
            return {k: _decode(v, tensors, base) for k, v in items}
        case dict():
            return {k: _decode(v, tensors, base) for k, v in plain.items()}
        case list():
            return [_decode(item, tensors, base) for item in plain]
        case _:
            return plain


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told_when_full(target: Path) -> Iterator[None]:
    """Turn a full disk into a sentence. safetensors reports it in words, not as an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"the disk is full: {target} was not written; what was written before it is intact.") from None
    except SafetensorError as error:
        if "No space left" not in str(error) and "quota" not in str(error).lower():
            raise
        raise RunError(f"the disk is full: {target} was not written; what was written before it is intact.") from None

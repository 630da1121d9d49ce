"""Models on disk: weights in safetensors, and beside them what rebuilds the module."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.hub import diffusers, transformers
from stillhouse.models.spec import ModelSpec, origin, remember
from stillhouse.spec import Spec, read

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"


def save(
    module: nn.Module,
    directory: str | os.PathLike[str],
    spec: ModelSpec | Mapping[str, Any] | None = None,
    facts: Facts | None = None,
) -> Path:
    """Write ``module`` to ``directory``, so that :func:`load` and the model kind ``file`` give it back.

    A model of transformers or diffusers is written by its own ``save_pretrained`` and stays readable by its library.
    Any other becomes ``model.safetensors``; tied tensors are stored once, their other names in the file's metadata (in
    the form of ``safetensors.torch.save_model``). ``model.json`` holds the spec and the facts.

    Args:
        module: the model.
        directory: made if it does not exist; files of the same names are replaced.
        spec: what built the module; known for a module that a spec's ``build`` made. Without it the weights load only
            into a module you build yourself, or into a transformers or diffusers class.
        facts: the facts about the data that the spec was built with; known likewise.

    Returns:
        The directory.

    Raises:
        UserError: the module's state holds something else than tensors.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (known := origin(module)) is not None:
        spec, facts = spec if spec is not None else known[0], facts if facts is not None else known[1]
    if _library(module):
        module.save_pretrained(directory)  # type: ignore[operator]
    else:
        tensors, aliases = _unique(module)
        partial = directory / f".{WEIGHTS}.partial"
        save_file(tensors, partial, metadata={"format": "pt", **aliases})
        partial.replace(directory / WEIGHTS)
    description = {
        "dtype": next(
            (str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()), None
        ),
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "spec": spec.dump() if isinstance(spec, ModelSpec) else spec,
        "facts": dataclasses.asdict(facts) if facts is not None else None,
    }
    partial = directory / f".{DESCRIPTION}.partial"
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / DESCRIPTION)
    return directory


def load(path: str | os.PathLike[str], facts: Facts | None = None) -> nn.Module:
    """The module that :func:`save` wrote, in evaluation mode on the CPU, with the stored data types.

    Args:
        path: the directory, a ``.safetensors`` file with its description of the same name (``.json``) beside it, or any
            directory written by ``save_pretrained`` of transformers or diffusers.
        facts: used where none were stored.

    Raises:
        UserError: there is nothing to load, or nothing says how to build the module.
    """
    weights, description_file = _files(path)
    description = _json(description_file)
    config = _json(weights.parent / "config.json")
    cls = _library_class(config, description)
    if cls is not None:
        return _from_pretrained(cls, weights.parent, description)
    if not config and not weights.exists():
        raise UserError(f"There is no model in {str(path)!r}; it needs {weights.name!r} and {description_file.name!r}.")
    if description.get("spec") is None:
        raise UserError(
            f"{str(weights.parent)!r} does not say how to build the model; build it yourself and call "
            f"stillhouse.models.load_weights(module, path)."
        )
    spec: ModelSpec = read(_Described, {"spec": description["spec"]}, where=str(description_file)).spec
    facts = stored_facts(weights.parent if description_file.name == DESCRIPTION else path) or facts
    if facts is None:
        raise UserError(f"{str(description_file)!r} holds no facts about the data; pass them to load().")
    module = spec.build(facts)
    if config:
        module = _from_pretrained(type(module), weights.parent, description)
        remember(module, spec, facts)
        return module
    state = _read_state(weights)
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    _load_state(module, state, weights)
    return module.eval()


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Copy the weights that :func:`save` wrote into ``module``, in place and in its data types; returned for chaining.

    Raises:
        UserError: the file is missing or damaged, or its names or shapes are not those of the module.
    """
    weights, _ = _files(path)
    _load_state(module, _read_state(weights), weights)
    return module


def stored_facts(path: str | os.PathLike[str]) -> Facts | None:
    """The facts about the data that :func:`save` wrote beside a model; None where it wrote none.

    Raises:
        UserError: they are damaged.
    """
    _, description_file = _files(path)
    stored = _json(description_file).get("facts")
    if stored is None:
        return None
    try:
        shapes = {str(name): tuple(map(int, shape)) for name, shape in stored["inputs"].items()}
        names = {name: tuple(stored.get(name, ())) for name in ("class_names", "vocabulary", "edge_vocabulary")}
        return Facts(**{**stored, "inputs": shapes, **names})
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"The facts in {str(description_file)!r} are damaged.") from None


class _Described(Spec):
    spec: ModelSpec


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".json")
    return path / WEIGHTS, path / DESCRIPTION


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _unique(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state, each memory once, and for every other name the name that it is stored under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    kept_as: dict[tuple[Any, ...], str] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name!r} of {type(module).__name__} is a {type(value).__name__} and not a tensor, which a safetensors file "
                f"cannot hold; keep it in a buffer."
            )
        memory = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and memory in kept_as:
            aliases[name] = kept_as[memory]
            continue
        kept_as[memory] = name
        # A view of another tensor's memory (not the whole of it) is written as a tensor of its own.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _read_state(weights: Path) -> dict[str, Tensor]:
    if not weights.exists():
        raise UserError(f"There are no weights at {str(weights)!r}.")
    try:
        with safe_open(weights, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{str(weights)!r} is not a whole safetensors file: {error}.") from None
    return state | {name: state[kept] for name, kept in metadata.items() if kept in state}


def _load_state(module: nn.Module, state: dict[str, Tensor], weights: Path) -> None:
    name_of = type(module).__name__
    expected = module.state_dict()
    for name in expected:
        if name not in state:
            raise UserError(f"{str(weights)!r} has no {name!r}, which {name_of} needs; it belongs to another model.")
        if expected[name].shape != state[name].shape:
            raise UserError(
                f"{name!r} has the shape {tuple(state[name].shape)} in {str(weights)!r} and "
                f"{tuple(expected[name].shape)} in {name_of}; the model was built for other data or from another spec."
            )
    for name in sorted(state):
        if name not in expected:
            raise UserError(f"{str(weights)!r} has {name!r}, which {name_of} has not; it belongs to another model.")
    module.load_state_dict(state)


def _library(module: nn.Module) -> bool:
    """Whether the module is a model of transformers or diffusers (found without importing either)."""
    bases = {(base.__module__, base.__name__) for base in type(module).__mro__}
    return not bases.isdisjoint(
        {("transformers.modeling_utils", "PreTrainedModel"), ("diffusers.models.modeling_utils", "ModelMixin")}
    )


def _library_class(config: dict[str, Any], description: dict[str, Any]) -> Any:
    """The class that a ``config.json`` names in transformers or diffusers; None where it is somebody's own."""
    library = str(description.get("class", "")).partition(".")[0]
    if config.get("architectures") and library in ("", "transformers"):
        return getattr(transformers(), config["architectures"][0], None)
    if "_class_name" in config and library in ("", "diffusers"):
        return getattr(diffusers(), config["_class_name"], None)
    return None


def _from_pretrained(cls: Any, directory: Path, description: dict[str, Any]) -> nn.Module:
    dtype = getattr(torch, description.get("dtype") or "float32")
    keyword = "dtype" if cls.__module__.startswith("transformers.") else "torch_dtype"
    module: nn.Module = cls.from_pretrained(directory, **{keyword: dtype})
    return module.eval()

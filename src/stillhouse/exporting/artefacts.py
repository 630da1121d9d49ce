"""What is exported: the artefact of a run, of a saved directory or of a result, and samples to compare it on."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data import Batch, Data
from stillhouse.engine import Result
from stillhouse.errors import UserError, nearest
from stillhouse.facts import Facts
from stillhouse.methods.generators.process import Diffusion, Process
from stillhouse.methods.generators.teacher import Written
from stillhouse.models import Predictor, load, load_weights, origin
from stillhouse.models.storage import stored_facts
from stillhouse.recipe import Recipe, load_recipe
from stillhouse.spec import read

TOKENS = frozenset({"input_ids", "decoder_input_ids"})
"""Inputs of a batch that are numbers of a vocabulary."""
WHOLE = TOKENS | {"attention_mask", "decoder_attention_mask", "token_type_ids", "position_ids"}
"""Inputs of a batch that are whole numbers, one per position of a text."""


@dataclass(frozen=True)
class Sampling:
    """What the network of a diffusion model works on, and the times at which its sampler evaluates it."""

    process: Process
    times: Tensor


@dataclass(frozen=True)
class Artefact:
    """A module that can be exported, and what is known of its use.

    Attributes:
        name: its name in the result.
        module: the module itself; of a diffusion model its network.
        folder: where it is stored; None for one that is in memory only.
        run: the run directory it belongs to; None for a directory that belongs to none.
        sampling: how a diffusion model's network is sampled from.
        facts: of the data, as they are stored.
    """

    name: str
    module: nn.Module
    folder: Path | None = None
    run: Path | None = None
    sampling: Sampling | None = None
    facts: Facts | None = None


@dataclass
class Samples:
    """What is known of a run's data, read when it is needed.

    Attributes:
        run: the run directory; None where there is none.
        given: a batch that the caller passed.
        real: whether the samples come from data and are not drawn at random.
        note: why they are drawn, where a run's data could have been expected.
    """

    run: Path | None = None
    given: Mapping[str, Tensor] | None = None
    real: bool = True
    note: str = ""
    data: Data | None = None
    recipe: Recipe | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.run is None or self.given is not None:
            return
        try:
            self.recipe = load_recipe(self.run / "recipe.yaml")
            # A method whose teacher brings all it needs has no data.
            self.data = self.recipe.method.data.load() if getattr(self.recipe.method, "data", None) else None
        except UserError as error:
            self.note = f"the run's data could not be read again ({str(error).rstrip('.')}), so its samples were drawn at random."

    def batch(self, count: int, facts: Facts | None) -> Batch:
        """So many samples: those given, those of the run's data, or else random ones of the recorded shapes.

        Raises:
            UserError: nothing says what the module is fed.
        """
        if self.given is not None:
            size = min(len(value) for value in self.given.values())
            index = torch.arange(count) % size
            return Batch({name: value[index] for name, value in self.given.items()})
        if self.data is not None:
            name = next(split for split in ("test", "validation", "train") if split in self.data.splits)
            split = self.data.split(name)
            return split.batch(torch.arange(count) % len(split))
        self.real = False
        return _drawn(count, facts or self._recorded())

    def _recorded(self) -> Facts:
        place = self.run / "result" / "inputs.json" if self.run is not None else None
        if place is None or not place.is_file():
            raise UserError(
                "nothing says what the model is fed: its directory holds no facts about the data; in Python pass a batch "
                "of inputs as samples=."
            )
        try:
            told = json.loads(place.read_text(encoding="utf-8"))
            shapes = {name: tuple(map(int, shape)) for name, shape in told["inputs"].items()}
            return Facts(shapes, num_classes=len(told.get("class_names", ())) or None, task=told["task"])
        except (TypeError, ValueError, KeyError, AttributeError):
            raise UserError(f"{place} is damaged; in Python pass a batch of inputs as samples=.") from None


def _drawn(count: int, facts: Facts) -> Batch:
    generator = torch.Generator().manual_seed(0)
    batch = Batch()
    for name, shape in facts.inputs.items():
        if name in TOKENS:
            high = facts.vocabulary_size or 100
            batch[name] = torch.randint(high, (count, *shape), generator=generator)
        elif name in WHOLE:
            batch[name] = torch.full((count, *shape), 1 if name.endswith("mask") else 0, dtype=torch.long)
        else:
            batch[name] = torch.randn(count, *shape, generator=generator)
    return batch


def found(
    source: Result | Path, name: str | None, given: nn.Module | None, samples: Mapping[str, Tensor] | None
) -> tuple[Artefact, Samples]:
    """The artefact that ``source`` ships under ``name`` (its only module without one), and samples for it.

    Args:
        source: a result, a run directory, or the directory of a saved model.
        name: which artefact.
        given: a module of one's own, for weights that say not how they are built.
        samples: a batch of inputs in place of the run's data.

    Raises:
        UserError: there is none, there are several, or it is no module.
    """
    if isinstance(source, Result):
        chosen = _chosen(name, {n: isinstance(a, nn.Module) for n, a in source.artefacts.items()}, "the result")
        known = Samples(source.directory, samples)
        module = source.artefacts[chosen]
        assert isinstance(module, nn.Module)
        if isinstance(module, Diffusion):
            sampling = Sampling(module.process, module.times)
            return Artefact(chosen, copied(module.net), None, source.directory, sampling), known
        built = origin(module)
        held = copied(module)
        return Artefact(chosen, held, None, source.directory, facts=built[1] if built else None), known
    if not source.is_dir():
        raise UserError(f"there is no directory {str(source)!r}; name a run directory or that of a saved model.")
    if (source / "recipe.yaml").is_file():
        result = source / "result"
        if not result.is_dir() or not (source / "metrics.json").is_file():
            raise UserError(
                f"{source} has not finished, so there is nothing to export; continue it with 'stillhouse resume {source}'."
            )
        places = {path.name: path for path in sorted(result.iterdir()) if path.is_dir()}
        chosen = _chosen(name, {n: _home(place) is not None for n, place in places.items()}, str(source))
        return _opened(chosen, places[chosen], source, given, samples)
    if name is not None and name != source.name:
        raise UserError(f"{source} is no run directory, so it has no artefact {name!r}; leave --artefact out.")
    if _home(source) is None:
        raise UserError(f"{source} holds neither a run (recipe.yaml) nor a saved model (model.json or config.json).")
    run = next((place for place in list(source.parents)[:3] if (place / "recipe.yaml").is_file()), None)
    return _opened(source.name, source, run, given, samples)


def copied(module: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, so that exporting leaves the caller's module as it is."""
    try:
        return copy.deepcopy(module).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the module {type(module).__name__!r} cannot be copied ({error}), so it cannot be exported."
        ) from error


def _chosen(name: str | None, modules: Mapping[str, bool], where: str) -> str:
    """The artefact that is meant, by whether each is a module."""
    ships = [known for known, is_module in modules.items() if is_module]
    if name is None:
        if len(ships) == 1:
            return ships[0]
        if ships:
            raise UserError(f"{where} ships {_listed(ships)}; say which with --artefact {ships[0]}.")
        others = f"only {_listed(list(modules))}, which is no model" if modules else "nothing"
        raise UserError(f"{where} ships {others}, so there is nothing to export; it is in open formats as it lies.")
    if name not in modules:
        raise UserError(f"{where} has no artefact {name!r}; {nearest(name, modules)}")
    if name not in ships:
        raise UserError(f"the artefact {name!r} of {where} is no model and lies in open formats as it is.")
    return name


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(map(repr, names[:-1])), repr(names[-1]))))


def _home(folder: Path) -> Path | None:
    """Where the weights of a saved model lie; None for a folder that holds none."""
    for place in (folder, folder / "unet"):
        if (place / "model.json").is_file() or (place / "config.json").is_file():
            return place
    return None


def _opened(
    name: str, folder: Path, run: Path | None, given: nn.Module | None, samples: Mapping[str, Tensor] | None
) -> tuple[Artefact, Samples]:
    home = _home(folder)
    assert home is not None
    module = _loaded(home, given)
    known = Samples(run, samples)
    built = origin(module)
    facts = built[1] if built is not None else stored_facts(home)
    described = next(
        (place / "process.json" for place in (home, home.parent) if (place / "process.json").is_file()), None
    )
    if described is None:
        return Artefact(name, module, home, run, facts=facts), known
    told = json.loads(described.read_text(encoding="utf-8"))
    written = read(Written, {key: told.get(key) for key in Written.model_fields}, where=str(described))
    fields = tuple(getattr(getattr(known.recipe and known.recipe.method, "teacher", None), "conditions", ()))
    data_facts = known.data.facts if known.data is not None else facts
    process = Process.of(module, written.schedule, written.prediction, data_facts, fields, null=written.null_class)
    times = torch.tensor(told["times"]).to(written.schedule.times.dtype)
    return Artefact(name, module, home, run, Sampling(process, times), facts), known


def _loaded(home: Path, given: nn.Module | None) -> nn.Module:
    if given is not None:
        return load_weights(copied(given), home)
    told = _description(home)
    if not (home / "config.json").is_file() and told.get("spec") is None:
        raise UserError(
            f"{home} holds the weights of {told.get('class')!r}, given as a Python object, and not how to build it; in Python "
            f"call stillhouse.export({str(home)!r}, module=your_module)."
        )
    with quiet():
        module = load(home)
    if isinstance(module, Predictor):
        raise UserError(f"{home} holds an estimator that is no PyTorch module, so it cannot be exported.")
    return module


def _description(home: Path) -> dict[str, Any]:
    """``model.json``; empty where there is none."""
    path = home / "model.json"
    found: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds a {type(found).__name__} where a dict belongs.")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what libraries tell their own authors while they load and trace."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""What a run did, in words: its parts, its data, its models, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.report.formatting import number
from stillhouse.report.provenance import data_origin, model_origin
from stillhouse.report.reading import RunFiles, StageLog

TELLING = 4
"""Fields of a spec that are told beside its kind."""


@dataclass(frozen=True)
class Part:
    """A part of a run: its name, what it was in words, and its seconds where they are known."""

    name: str
    what: str
    seconds: float | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set of a run: (what, value) pairs in words."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
        name: what the method calls it.
        architecture: its class, and below it the fields of its description.
        parameters: their number; None where it was not written down.
        role: what happened to it.
        source: where its weights come from.
        licence: that of weights made by others; empty for weights made here.
    """

    name: str
    architecture: str
    fields: str
    parameters: int | None
    role: str
    source: str
    licence: str


def parts(run: RunFiles) -> list[Part]:
    """What the run did, in order; parts that differ by a number alone are told once."""
    logged = {stage.name: stage for stage in run.stages}
    groups: list[list[Mapping[str, Any]]] = []
    for item in run.yields:
        alike = _alike(item)
        if groups and alike is not None and alike == _alike(groups[-1][-1]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return [_part(group, logged, run) for group in groups]


def _alike(item: Mapping[str, Any]) -> str | None:
    """What parts have in common that differ by a number alone; None for a part that has none in its name."""
    name = str(item.get("name"))
    return re.sub(r"\d+", "#", f"{item.get('kind')} {name}") if re.search(r"\d", name) else None


def _part(group: Sequence[Mapping[str, Any]], logged: Mapping[str, StageLog], run: RunFiles) -> Part:
    item, names = group[0], [str(item.get("name")) for item in group]
    kind = str(item.get("kind"))
    if kind == "run":
        what = _nested(str(item.get("of")))
    elif kind.startswith("stage"):
        what = _trained(item, [logged[name] for name in names if name in logged])
    else:
        what = "a computation"
    if len(group) > 1:
        what = f"{len(group)} alike, each: {what}"
    # Stages that were yielded together have one time, under their names together.
    seconds = [run.cost[name] for name in dict.fromkeys((*names, "+".join(names))) if name in run.cost]
    return Part(named(names), what + ".", sum(seconds) if seconds else None)


def named(names: Sequence[str]) -> str:
    """Several names in short.

    >>> named(["a", "b"]), named([f"expert-{i}" for i in range(8)])
    ('a, b', 'expert-0 to expert-7 (8)')
    """
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"


def _nested(of: str) -> str:
    method, seed = of.split(" ")[0], of.rpartition(" seed ")[2]
    return f"a run of its own ({method}, seed {seed}), or found in the cache of earlier runs"


def _trained(item: Mapping[str, Any], stages: Sequence[StageLog]) -> str:
    steps = max((stage.reached for stage in stages), default=0) or item.get("steps")
    roles: dict[str, list[str]] = {}
    for name, (mode, _, _) in _modules(item):
        roles.setdefault(mode, []).append(name)
    told = f"trained {_and(roles['trained'])}" if "trained" in roles else "trained"
    told += f" for {steps:,} steps" if steps else ""
    words = {"frozen": "{} as it was", "frozen_through": "{} as it was", "scratch": "{} drawn afresh at every step"}
    rest = [phrase.format(_and(roles[mode])) for mode, phrase in words.items() if mode in roles]
    told += f", with {_and(rest)}" if rest else ""
    rhythm = _rhythm(item.get("updates") or [])
    return f"{told}; {rhythm}" if rhythm else told


def _rhythm(updates: Sequence[Any]) -> str:
    """How often which loss fires, where there are several."""
    found = [re.fullmatch(r"(.*) trains .* every (\S+) times (\d+)", str(update)) for update in updates]
    if len(found) < 2 or None in found:
        return ""
    told = []
    for match in found:
        assert match is not None
        often = {"1": "every step", "called": "the steps the method chooses"}.get(match[2], f"every {match[2]}th step")
        told.append(f"{match[1]} at {often}" + (f", {match[3]} times" if match[3] != "1" else ""))
    return f"losses: {_and(told)}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _modules(item: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """The modules of a stage: (name, (mode, class, shapes))."""
    for name, signature in (item.get("modules") or {}).items():
        found = re.match(r"(\w+) (\S+) ?(.*)", str(signature), flags=re.S)
        if found:
            yield str(name), (found[1], found[2], found[3])


def data_sets(run: RunFiles) -> list[DataSet]:
    """The data of a run: its own, and what its teachers were trained on where that is other data."""
    found = []
    for name, spec in _data_specs(run.recipe):
        origin = data_origin(spec)
        facts = [("set", _title(spec)), ("source", origin.source), ("licence", origin.licence)]
        if name == "data":
            facts[1:1] = _sizes(run.inputs)
        found.append(DataSet("Data" if name == "data" else f"Data of {name.removesuffix('.data')}", facts))
    return found


def _data_specs(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    spec = recipe.get("data")
    if isinstance(spec, Mapping):
        yield "data", spec
    for name, teacher in _teachers(recipe):
        other = teacher.get("data")
        if isinstance(other, Mapping) and other != spec:
            yield f"{name}.data", other


def _teachers(recipe: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The teachers of a recipe as the run names them."""
    given = recipe.get("teacher")
    specs = [spec for spec in (given if isinstance(given, list) else [given]) if isinstance(spec, Mapping)]
    return [("teacher" if len(specs) == 1 else f"teacher-{i}", spec) for i, spec in enumerate(specs)]


def _title(spec: Mapping[str, Any]) -> str:
    kind, path = str(spec.get("kind") or "?"), spec.get("path")
    title = f"{kind}:{path}" if path else kind
    rest = _fields(spec, without=("kind", "path", "pixels", "verify", "in_memory"))
    return f"{title} ({rest})" if rest else title


def _sizes(inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    splits = inputs.get("splits") or {}
    if splits:
        facts.append(("samples", ", ".join(f"{number(count)} {name}" for name, count in splits.items())))
    shapes = [f"{name} {' × '.join(map(str, shape))}" for name, shape in (inputs.get("inputs") or {}).items()]
    if shapes:
        facts.append(("a sample", ", ".join(shapes)))
    names = list(map(str, inputs.get("class_names") or []))
    if names:
        listed = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} ..."
        facts.append(("classes", f"{len(names)}: {listed}"))
    return facts


def _fields(spec: Mapping[str, Any], without: Sequence[str]) -> str:
    """The first fields of a spec that say something, in words."""
    told = []
    for name, value in spec.items():
        if name in without or value is None or value is False or value in ("", [], {}) or isinstance(value, Mapping):
            continue
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        told.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return "; ".join(told[:TELLING])


def models(run: RunFiles) -> list[Model]:
    """The models of a run, in the order in which they appear."""
    seen: dict[str, tuple[str, list[str]]] = {}
    for item in run.yields:
        for name, (mode, cls, _) in _modules(item):
            kept = seen.setdefault(name, (cls, []))[1]
            role = {"trained": "trained", "scratch": "drawn afresh", "frozen": "as it is", "frozen_through": "as it is"}
            kept.append(f"{role.get(mode, mode)} in {item.get('name')}")
    for name in run.parameters:
        seen.setdefault(name, ("", []))
    nested = {str(item.get("name")): str(item.get("of")) for item in run.yields if item.get("kind") == "run"}
    specs = _model_specs(run.recipe)
    found = []
    for name, (cls, roles) in seen.items():
        spec = specs.get(name) or specs.get(name.removesuffix("-alone")) or {}
        origin = model_origin(spec)
        source = origin.source
        if name in nested:
            source = f"a run of {nested[name].split(' ')[0]} before"
        elif not source and spec:
            source = "random start"
        fields = _fields(
            spec, without=("kind", "name", "path", "object", "fingerprint", "num_outputs", "copy_on_build")
        )
        base = seen.get(name.removesuffix("-alone"), ("", []))[0]
        shown = cls or base or str(spec.get("kind") or "")
        if name in nested and not roles:
            roles = [f"trained in {name}"]
        licence = "" if name in nested else origin.licence
        found.append(
            Model(name, shown, fields, run.parameters.get(name), "; ".join(dict.fromkeys(roles)), source, licence)
        )
    return found


def _model_specs(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Descriptions of models by the name that the run gives them."""
    specs = {}
    for name, value in [*recipe.items(), *_teachers(recipe)]:
        inner = value.get("model") if isinstance(value, Mapping) else None
        spec = inner if isinstance(inner, Mapping) else value
        if isinstance(spec, Mapping) and "kind" in spec and name not in ("data", "augment"):
            specs[name] = spec
    return specs

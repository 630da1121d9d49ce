"""The arms of a comparison: recipes that differ in what belongs to their method alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.engine import Method
from stillhouse.errors import UserError, nearest
from stillhouse.methods.datasets.condensation import Condensation
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.methods.supervised import Supervised, TrainingFields
from stillhouse.recipe import Recipe, build_recipe, load_recipe
from stillhouse.registry import method_class

OBJECTIVE = ("also", "student_layers", "teacher_layers", "student_classifier", "teacher_classifier")
"""Fields of common bases that say what is learned, like the weights of terms: each method keeps its own."""

PLAIN = "plain-student"
"""The arm of the student that is trained on the labels alone."""


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        name: how it is called in the comparison.
        source: what the user wrote; empty for an arm that was added.
        recipe: what is run, with every seed.
        taken: its fields that come from another arm: field to that arm's name.
        set_aside: those of them whose value in its own recipe was another one.
    """

    name: str
    source: str
    recipe: Recipe
    taken: Mapping[str, str]
    set_aside: tuple[str, ...] = ()


def arrange(
    sources: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    fields: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
) -> list[Arm]:
    """The arms, those of the sources first, all on equal terms.

    What two methods have from a common base (data, teacher, student, optimiser, epochs, ...) is shared: each arm takes it from
    the first arm before it that has it, so the first source's recipe decides. What says what is learned (the weights of terms,
    further objectives, where features are read), and what a method defines itself, it keeps from its own recipe. How runs are
    carried out (the ``run`` block) is the first's as well.

    Args:
        sources: method names, ``name/scale``, or recipe files.
        overrides: ``key=value``, for every arm that has the field.
        fields: fields as Python values, for every arm that has them.
        settings: values of the ``run`` block.
        own: shared fields that each arm keeps from its own recipe nonetheless.

    Raises:
        UserError: a recipe is wrong, a field is none of any arm, two sources are alike, or the methods are of different kinds.
    """
    given = dict(fields or {})
    recipes = [load_recipe(source) for source in sources]
    classes = [method_class(recipe.method.name) for recipe in recipes]
    _check(sources, classes, overrides, given, own)
    arms: list[Arm] = []
    for source, recipe, cls in zip(sources, recipes, classes, strict=True):
        values: dict[str, Any] = {name: getattr(recipe.method, name) for name in cls.model_fields}
        taken: dict[str, str] = {}
        for arm in arms:
            for name in shared(type(arm.recipe.method), cls):
                if name not in taken and name not in own:
                    values[name], taken[name] = getattr(arm.recipe.method, name), arm.name
        # What the user set for all is no arm's to give up.
        mine = _with(recipe, {name: value for name, value in given.items() if name in cls.model_fields}, overrides)
        aside = [name for name in taken if _plain(values[name]) != _plain(getattr(mine, name))]
        values |= {name: value for name, value in given.items() if name in cls.model_fields and name not in taken}
        own_texts = [text for text in overrides if _head(text) in cls.model_fields and _head(text) not in taken]
        if issubclass(cls, KnowledgeDistillation) and "compare_alone" not in (*given, *map(_head, overrides)):
            # The student alone is an arm of its own.
            values["compare_alone"] = False
        values |= {"method": recipe.method.name, "run": arms[0].recipe.settings if arms else None}
        if not arms:
            values["run"] = {**recipe.settings.dump(), **(settings or {})}
            own_texts += [text for text in overrides if _head(text) == "run"]
        made = build_recipe(values, own_texts, where=source)
        changed = tuple(name for name in aside if name != "compare_alone")
        arms.append(Arm(_name(source, arms), source, replace(made, source=source), taken, changed))
    return arms + _added(arms)


def _with(recipe: Recipe, given: Mapping[str, Any], overrides: Sequence[str]) -> Method:
    """The method of a recipe with what was set for all arms; of overrides those that suit its own values."""
    method = recipe.method
    for text in overrides:
        if _head(text) in type(method).model_fields:
            values = {name: getattr(method, name) for name in type(method).model_fields} | {"method": method.name}
            with suppress(UserError):  # Such as the channels of a student that has none: the field is taken over whole.
                method = build_recipe(values, [text]).method
    values = {name: getattr(method, name) for name in type(method).model_fields} | dict(given)
    return build_recipe(values | {"method": method.name}).method if given else method


def shared(one: type[Method], other: type[Method]) -> list[str]:
    """Fields that two methods have from common bases (no methods themselves) and that do not say what is learned."""
    bases: list[Any] = [base for base in one.__mro__ if base in other.__mro__ and _is_base(base)]
    names = dict.fromkeys(name for base in bases for name in base.model_fields)
    return [name for name in names if name not in OBJECTIVE and not name.startswith("weight_")]


def baseline_of(arms: Sequence[Arm], named: str | None = None) -> str:
    """The arm that the others are compared with: the one that is named, an added one, else the first.

    Raises:
        UserError: there is no arm of that name.
    """
    names = [arm.name for arm in arms]
    if named is not None and named not in names:
        raise UserError(f"--baseline: there is no arm {named!r}; {nearest(named, names)}")
    return named or next((arm.name for arm in arms if not arm.source or arm.name == PLAIN), None) or _line(arms)


def _line(arms: Sequence[Arm]) -> str:
    """Among arms of the user's own choice: the plain line of their kind, else the first."""
    lines = ("supervised", "random-selection")
    return next((arm.name for arm in arms if arm.recipe.method.name in lines), arms[0].name)


def _added(arms: Sequence[Arm]) -> list[Arm]:
    """The line that every arm must be compared with, where it is not among the arms already."""
    students = [arm for arm in arms if isinstance(arm.recipe.method, KnowledgeDistillation)]
    sets = [arm for arm in arms if isinstance(arm.recipe.method, Condensation)]
    if students:
        first, cls = students[0], Supervised
        method: Any = first.recipe.method
        values = {name: getattr(method, name) for name in TrainingFields.model_fields} | {"model": method.student}
        taken = dict.fromkeys([*TrainingFields.model_fields, "model"], first.name)
    elif sets:
        first, cls = sets[0], method_class("random-selection")  # type: ignore[assignment]
        names = shared(type(first.recipe.method), cls)
        values = {name: getattr(first.recipe.method, name) for name in names}
        taken = dict.fromkeys(names, first.name)
    else:
        return []
    recipe = build_recipe({"method": cls.name, "run": first.recipe.settings, **values}, where=cls.name)
    if any(arm.recipe.method == recipe.method for arm in arms):
        return []
    name = PLAIN if students else cls.name
    return [Arm(_name(name, arms), "", replace(recipe, source=cls.name), taken)]


def _check(
    sources: Sequence[str],
    classes: Sequence[type[Method]],
    overrides: Sequence[str],
    given: Mapping[str, Any],
    own: Sequence[str],
) -> None:
    twice = next((source for number, source in enumerate(sources) if source in sources[:number]), None)
    if twice is not None:
        raise UserError(f"{twice!r} is named twice; an arm that differs needs a recipe file of its own.")
    for cls in classes[1:]:
        if cls.family != classes[0].family and set(shared(classes[0], cls)) <= set(Method.model_fields):
            raise UserError(
                f"{classes[0].name} ({classes[0].family}) and {cls.name} ({cls.family}) have nothing in common but the data; "
                "compare methods of one kind."
            )
    known = dict.fromkeys(name for cls in classes for name in cls.model_fields)
    for text in overrides:
        if _head(text) == "seed":
            raise UserError(f"{text}: every arm runs with the same seeds; choose their number with --seeds.")
        # What is no override at all is for build_recipe to say.
        if "=" in text and _head(text) not in (*known, "run", "method"):
            raise UserError(f"{text}: none of the methods has such a field; {nearest(_head(text), known)}")
    for name in [*given, *own]:
        if name not in known:
            raise UserError(f"{name}: none of the methods has such a field; {nearest(name, known)}")
    wrong = next((text for text in overrides if "=" not in text or _head(text) == "method"), None)
    if wrong is not None:
        build_recipe({"method": classes[0].name}, [wrong])


def _is_base(cls: type) -> bool:
    return issubclass(cls, Method) and "name" not in cls.__dict__


def _head(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].strip()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.dump() if hasattr(value, "dump") else value


def _name(source: str, arms: Sequence[Arm]) -> str:
    """What an arm is called: the method, ``method-scale``, or the file's stem; numbered where that is taken."""
    text = Path(source).stem if source.endswith((".yaml", ".yml")) else source.replace("/", "-")
    taken = {arm.name for arm in arms}
    return next(
        name for number in range(1, len(arms) + 2) if (name := text + (f"-{number}" if number > 1 else "")) not in taken
    )

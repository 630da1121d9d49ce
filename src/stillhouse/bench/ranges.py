"""What a search tries: a range of numbers, or a choice, for a field of the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic.fields import FieldInfo

from stillhouse.errors import UserError
from stillhouse.recipe import Recipe, field_at

if TYPE_CHECKING:
    from optuna.trial import Trial

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(?:(log|lin):)?({NUMBER})\.\.({NUMBER})")

WEIGHT, TEMPERATURE = 10.0, 4.0
"""How far a weight and a temperature are searched by default: from so many times less to so many times more."""


@dataclass(frozen=True)
class Range:
    """The values of one field.

    Attributes:
        key: the field's key path.
        low, high: the ends of a range of numbers.
        log: drawn evenly over the logarithm.
        whole: integers alone.
        choices: values as a recipe writes them, in place of a range.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    def draw(self, trial: Trial) -> float | int | str:
        """The value that a trial suggests."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.whole:
            return int(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return float(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def ends(self) -> list[float | int | str]:
        """Values that must be valid for the whole range to be."""
        if self.choices:
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def told(self) -> str:
        """The range in words.

        >>> Range("optimizer.lr", 1e-4, 0.1, log=True).told()
        'optimizer.lr from 0.0001 to 0.1 (logarithmic)'
        """
        if self.choices:
            return f"{self.key} one of {', '.join(self.choices)}"
        return f"{self.key} from {self.low:g} to {self.high:g}" + (" (logarithmic)" if self.log else "")

    def dump(self) -> dict[str, Any]:
        """Plain values; :meth:`load` reads them."""
        return asdict(self) | {"choices": list(self.choices)}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Range:
        """What :meth:`dump` gave."""
        return cls(**{**values, "choices": tuple(values["choices"])})


def override(key: str, value: Any) -> str:
    """A drawn value as ``key=value``."""
    return f"{key}={value if isinstance(value, str) else repr(value)}"


def is_range(text: str) -> bool:
    """Whether ``key=value`` gives a range or a choice in place of a value.

    >>> [is_range(text) for text in ("lr=1e-4..1e-1", "lr=log:1..2", "divergence=kl|js", "data=folder:../a", "epochs=3")]
    [True, True, True, False, False]
    """
    value = text.partition("=")[2]
    return RANGE.fullmatch(value) is not None or "|" in value


def read_range(text: str, recipe: Recipe) -> Range:
    """Read ``key=LOW..HIGH`` or ``key=A|B``.

    A range over more than a decade is logarithmic; ``log:`` and ``lin:`` before it decide otherwise. A field of integers
    is searched over integers.

    Raises:
        UserError: there is no such field, or the range is none.
    """
    key, _, value = text.partition("=")
    annotation = field_at(recipe, key)
    if "|" in value:
        choices = tuple(part.strip() for part in value.split("|"))
        if "" in choices or len(set(choices)) < len(choices):
            raise UserError(f"{text}: a choice names two or more different values, such as {key}=a|b.")
        return Range(key, choices=choices)
    found = RANGE.fullmatch(value)
    assert found is not None
    low, high = float(found[2]), float(found[3])
    if low >= high:
        raise UserError(f"{text}: the range begins at {low:g} and must end above that.")
    log = found[1] == "log" or (found[1] is None and low > 0 and high > 10 * low)
    if log and low <= 0:
        raise UserError(f"{text}: a logarithmic range begins above 0.")
    types = _types(annotation)
    whole = int in types and float not in types
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{text}: {key} takes integers, so its range begins and ends at integers.")
    return Range(key, low, high, log, whole)


def default_ranges(recipe: Recipe) -> list[Range]:
    """Ranges of a method's weights and temperatures around their values in the recipe.

    Weights from a tenth to ten times, temperatures from a quarter to four times. Of several weights that of the labels
    stays: together they only scale the loss.

    Raises:
        UserError: it has none.
    """
    values = {name: getattr(recipe.method, name) for name in type(recipe.method).model_fields}
    numbers = {name: value for name, value in values.items() if isinstance(value, float) and value > 0}
    weights = [name for name in numbers if name.startswith("weight_")]
    searched = {name: WEIGHT for name in weights if name != "weight_ce"}
    searched |= {name: TEMPERATURE for name in numbers if name.startswith("temperature")}
    if not searched:
        raise UserError(
            f"{recipe.method.name} has no weights or temperatures to search; give ranges, such as optimizer.lr=1e-4..1e-1."
        )
    found = []
    for name, by in searched.items():
        most = min(_bounds(type(recipe.method).model_fields[name]), default=math.inf)
        found.append(Range(name, numbers[name] / by, min(numbers[name] * by, most), log=True))
    return found


def _bounds(field: FieldInfo) -> list[float]:
    """What a number of a field may be at most."""
    found = [getattr(item, key, None) for item in field.metadata for key in ("le", "lt")]
    return [bound for bound in found if bound is not None]


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    arguments: Sequence[Any] = get_args(annotation)
    return {annotation}.union(*(_types(argument) for argument in arguments)) if arguments else {annotation}

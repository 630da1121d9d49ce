"""What is wrong with an arm, said before any arm is run: each is walked without training."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.bench.arms import Arm
from stillhouse.engine.rehearsal import rehearse
from stillhouse.errors import UserError

MISTAKES = (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError, MemoryError)
"""What models, data and methods raise that do not fit together, besides sentences."""


def check(arms: Sequence[Arm], *, cache: bool = True) -> dict[str, list[str] | None]:
    """Walk every arm: models are built, each stage takes a step, what would be measured is measured on few samples.

    Returns:
        Per arm the names of the numbers that it ends with; None where those are not known before it is run.

    Raises:
        UserError: an arm could not be run; says which and why.
    """
    found: dict[str, list[str] | None] = {}
    for arm in arms:
        try:
            walked = rehearse(arm.recipe.method, settings=arm.recipe.settings, cache=cache, timed=False)
        except UserError as error:
            raise UserError(f"{arm.name}: {error}") from None
        except MISTAKES as error:
            raise UserError(f"{arm.name} cannot be run: {reason(error)}") from error
        found[arm.name] = walked.metrics
    return found


def reason(error: BaseException) -> str:
    """The first line of what was raised, with its kind where that is no sentence of ours."""
    line = (str(error).splitlines() or [""])[0].strip()
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {line}".rstrip(": ")

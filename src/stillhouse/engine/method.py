"""What every method is: a validated set of hyper-parameters plus a generator of stages."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillhouse.data import DataSpec
from stillhouse.spec import Spec

if TYPE_CHECKING:
    from stillhouse.engine.result import Result
    from stillhouse.engine.run import Run
    from stillhouse.engine.stage import Yield


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str = ""
    venue: str = ""
    url: str = ""


Stages = Generator["Yield", Any, "Result"]
"""What :meth:`Method.stages` is: yields stages, gets them back trained, returns a result."""


class Method(Spec):
    """A published system: its hyper-parameters as fields (the paper's defaults), its algorithm as :meth:`stages`.

    Class attributes:
        name: the name on the command line.
        family: the wing of the house it belongs to.
        paper: its source.
        summary: what it is for, in one line.
        verified: how its loss was checked: against the ``official`` code, a ``reference`` library, or the ``formula``.
        classic: True for the well-known baselines that systems are compared with.
        version: raised by hand when the same fields train something else than before (it is part of cache keys).
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[Paper]
    summary: ClassVar[str]
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"
    classic: ClassVar[bool] = False

    data: DataSpec = Field(
        DataSpec.parse("digits"), description="the data set: a name, hf:owner/name, folder:PATH, csv:PATH, ..."
    )

    def stages(self, run: Run) -> Stages:
        """Describe the training: yield stages, computations and runs of other methods; return the result."""
        raise NotImplementedError(f"{type(self).__name__} describes no stages; write 'def stages(self, run)'.")

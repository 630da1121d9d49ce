"""The engine: stages in, trained modules out. It knows nothing of any method."""

from stillhouse.engine.distributed import World
from stillhouse.engine.fit import Interrupted, measuring
from stillhouse.engine.health import Line
from stillhouse.engine.method import Method, Paper, Stages
from stillhouse.engine.optim import Optimizer, Ramp, Weight, adam, adamw, sgd
from stillhouse.engine.projection import Projection
from stillhouse.engine.result import Artefact, Result, Saveable, Table
from stillhouse.engine.run import Listener, Run, Settings, Signals, Silent
from stillhouse.engine.rundir import RunDirectory
from stillhouse.engine.stage import (
    SKIP,
    Compute,
    Evaluation,
    Held,
    Later,
    Loss,
    Losses,
    Modules,
    Record,
    Stage,
    SubRun,
    Term,
    Trained,
    Update,
    frozen,
    frozen_through,
    scratch,
)

__all__ = [
    "SKIP",
    "Artefact",
    "Compute",
    "Evaluation",
    "Held",
    "Interrupted",
    "Later",
    "Line",
    "Listener",
    "Loss",
    "Losses",
    "Method",
    "Modules",
    "Optimizer",
    "Paper",
    "Projection",
    "Ramp",
    "Record",
    "Result",
    "Run",
    "RunDirectory",
    "Saveable",
    "Settings",
    "Signals",
    "Silent",
    "Stage",
    "Stages",
    "SubRun",
    "Table",
    "Term",
    "Trained",
    "Update",
    "Weight",
    "World",
    "adam",
    "adamw",
    "frozen",
    "frozen_through",
    "measuring",
    "scratch",
    "sgd",
]

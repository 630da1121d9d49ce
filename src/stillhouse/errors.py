"""What can go wrong, as a person reads it: one sentence, and the exit code of the command line."""

from __future__ import annotations

from collections.abc import Iterable


class StillhouseError(Exception):
    """A failure with a sentence to show. ``exit_code`` is what the command line exits with."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # What people and libraries write into it may hold line ends, or control a terminal.
        line = "".join(c if c.isprintable() or c.isspace() else repr(c)[1:-1] for c in message)
        line = " ".join(line.split()) if len(line.splitlines()) > 1 else line
        # A sentence that ends with names, or with what was meant, gets or loses its full stop here.
        line = line[:-1] if line.endswith("?.") else line
        super().__init__(line if line.endswith((".", "?", "!", ":")) or not line else f"{line}.")


class UserError(StillhouseError):
    """Something the user wrote or passed is wrong: a name, a field, a file, a shape."""

    exit_code = 2


class UnreachableError(UserError):
    """Something that a recipe names is not here: a model or data set of the hub, files, an import path.

    What it says may well be right elsewhere: a dry run says so and goes on, where a run stops.
    """


class RunError(StillhouseError):
    """A run that was well described could not go on: a non-finite loss, a full disk, a lost directory."""


class NonFiniteError(RunError):
    """A loss term or a gradient became NaN or infinite; nothing was stepped.

    Attributes:
        stage: name of the stage.
        term: name of the loss term (or ``"gradient"``).
        step: step of the stage at which it happened.
    """

    def __init__(self, message: str, *, stage: str, term: str, step: int) -> None:
        super().__init__(message)
        self.stage, self.term, self.step = stage, term, step


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say what was meant: ``"did you mean 'x'?"``, or the list of valid names when nothing is near.

    >>> nearest("temprature", ["temperature", "weight_kl"])
    "did you mean 'temperature'?"
    >>> nearest("q", ["a", "b"])
    "valid names are 'a', 'b'"
    """
    import difflib  # Only a mistake pays for it.

    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names are " + ", ".join(repr(n) for n in names)

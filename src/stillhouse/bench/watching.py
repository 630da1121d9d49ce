"""Who watches a worker: a listener that is also told which run is at hand."""

from __future__ import annotations

from typing import Protocol

from stillhouse.engine import Listener, Silent


class Watcher(Listener, Protocol):
    """Somebody who watches a worker."""

    def begins(self, run: str) -> None:
        """The worker has taken a run."""

    def ends(self, run: str, how: str) -> None:
        """The worker is done with it."""


class Unwatched(Silent):
    """A watcher that does nothing."""

    def begins(self, run: str) -> None:
        """Ignore."""

    def ends(self, run: str, how: str) -> None:
        """Ignore."""

"""Reports: a run directory as one page that can be sent to somebody; a comparison's or a search's likewise."""

from __future__ import annotations

from pathlib import Path

from stillhouse.errors import UserError
from stillhouse.report.environment import environment
from stillhouse.report.page import build

__all__ = ["build", "environment", "rebuild"]


def rebuild(directory: Path) -> Path:
    """Write the page of a run, a comparison or a search again; returns it.

    Raises:
        UserError: the directory holds none, or a comparison or search without any result yet.
    """
    if (directory / "comparison.json").is_file():
        from stillhouse.report.comparison import build_comparison

        return build_comparison(directory)
    if (directory / "search.json").is_file():
        from stillhouse.report.search import build_search

        return build_search(directory)
    if (directory / "plan.json").is_file():
        raise UserError(
            f"{directory} holds a comparison or a search that has not ended, which has no page yet; the command that began it "
            "goes on with it."
        )
    return build(directory)

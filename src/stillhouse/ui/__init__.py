"""A local page over many runs: list, filter, compare. It reads and never writes, and answers this machine alone."""

from stillhouse.ui.library import Library, Summary
from stillhouse.ui.service import application, serve

__all__ = ["Library", "Summary", "application", "serve"]

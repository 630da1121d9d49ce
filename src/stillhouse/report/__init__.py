"""Reports: a run directory as one page that can be sent to somebody."""

from stillhouse.report.environment import environment
from stillhouse.report.page import build

__all__ = ["build", "environment"]

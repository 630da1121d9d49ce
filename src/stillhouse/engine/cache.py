"""Where runs share what they have in common: trained teachers, teachers' outputs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """``$STILLHOUSE_CACHE``, or the user's cache directory."""
    named = os.environ.get("STILLHOUSE_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("stillhouse"))

"""Work without the network: what is not on this machine is said to be missing, at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that Hugging Face's libraries read when they are imported."""

LIBRARIES = ("huggingface_hub.constants", "datasets.config")
"""Where those that are imported already keep them."""

_depth = 0


def is_offline() -> bool:
    """Whether nothing is to be downloaded now."""
    return _depth > 0


@contextmanager
def offline() -> Iterator[None]:
    """Download nothing within the block, also not through Hugging Face's libraries."""
    global _depth
    before = {flag: os.environ.get(flag) for flag in FLAGS}
    known = {place: getattr(*place) for place in _kept()}
    _depth += 1
    try:
        for flag in FLAGS:
            os.environ[flag] = "1"
        for module, flag in known:
            setattr(module, flag, True)
        yield
    finally:
        _depth -= 1
        for flag, value in before.items():
            if value is None:
                del os.environ[flag]
            else:
                os.environ[flag] = value
        for module, flag in _kept():
            # One that was imported within the block has read the variables that held there.
            setattr(module, flag, known.get((module, flag), (before[flag] or "").upper() in ("1", "ON", "YES", "TRUE")))


def _kept() -> list[tuple[ModuleType, str]]:
    modules = [sys.modules[name] for name in LIBRARIES if name in sys.modules]
    return [(module, flag) for module in modules for flag in FLAGS if hasattr(module, flag)]

"""What a run is made with: versions and machine."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("stillhouse", "torch", "numpy", "transformers", "diffusers")


def environment() -> dict[str, Any]:
    """Versions of what matters, the processor, its cores, the threads in use, and the accelerator if torch sees one.

    Returns:
        Plain values by name: ``python``, ``platform``, the installed ones of :data:`PACKAGES`, ``processor``, ``cores``,
        ``threads``, ``source`` (a digest of this package's Python files, which between releases says more than the
        version) and, where there is one, ``accelerator`` with ``cuda`` for NVIDIA's.
    """
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["processor"] = _processor()
    found["cores"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["source"] = source_digest()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["accelerator"] = torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
        found["cuda"] = torch.version.cuda
    elif torch.backends.mps.is_available():
        found["accelerator"] = "Apple GPU (mps)"
    return found


@cache
def source_digest() -> str:
    """Twelve hexadecimal digits that stand for the Python files of this package."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""What a run is made with: versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("stillhouse", "torch", "numpy", "transformers", "diffusers")


def environment() -> dict[str, Any]:
    """Versions of what matters, the processor, its cores, the threads in use, and the accelerator if torch sees one.

    Returns:
        Plain values by name: ``python``, ``platform``, the installed ones of :data:`PACKAGES`, ``processor``, ``cores``,
        ``threads`` and, where there is one, ``accelerator`` with ``cuda`` for NVIDIA's.
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
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["accelerator"] = torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
        found["cuda"] = torch.version.cuda
    elif torch.backends.mps.is_available():
        found["accelerator"] = "Apple GPU (mps)"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

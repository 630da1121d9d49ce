"""What a run was made with: versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions of what matters, the processor, and the accelerator if torch sees one."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("stillhouse", "torch", "numpy", "transformers", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["processor"] = _processor()
    found["cores"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

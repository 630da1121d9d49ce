"""``ui``: a local page over many runs, until Ctrl-C."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stillhouse.ui import serve


def show(directory: Path, port: int) -> None:
    """Serve the runs below a directory on this machine."""

    def say(address: str) -> None:
        print(f"{address}  (this machine only; Ctrl-C ends it)", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        serve(directory, port, say)

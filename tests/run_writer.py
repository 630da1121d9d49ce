"""Small run directories, written by hand as the engine writes them."""

import json
import struct
import zlib
from pathlib import Path

RECIPE = "# Run again with: stillhouse run recipe.yaml\nmethod: sinkd\nseed: 3\nkeep: last\nweight_kd: 0.9\n"


class RunWriter:
    """Writes a run directory piece by piece.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text("recipe.yaml", RECIPE)

    def text(self, name, text):
        """Write a text file."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")
        return self

    def json(self, name, value):
        """Write a JSON file."""
        return self.text(name, json.dumps(value))

    def rows(self, rows, name="metrics.jsonl"):
        """Write a log."""
        return self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def stage(self, name="student", steps=100, updates=("loss",), **modules):
        """Record that the method yielded this stage alone."""
        signature = {
            "kind": "stage",
            "name": name,
            "steps": steps,
            "modules": modules,
            "updates": [f"{update} trains ['{name}'] every 1 times 1" for update in updates],
        }
        return self.json("checkpoints/yields.json", [[signature]])

    def finish(self, **metrics):
        """Write final numbers: the run has ended."""
        return self.json("metrics.json", {name.replace("__", "/"): value for name, value in metrics.items()})

    def picture(self, name, width=40, height=20, shade=0):
        """Write a PNG of one shade of grey."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(png(width, height, shade))
        return self


def png(width, height, shade=0):
    """A grey picture."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes([shade]) * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def logged(count=20, steps=200, stage="student", level=0.9):
    """The rows of a distillation: two terms, a learning rate, a validation."""
    rows = []
    for i in range(1, count + 1):
        step = i * steps // count
        rows.append(
            {
                "stage": stage,
                "step": step,
                "loss/ce": 2 / i,
                "loss/ce/scale": 0.2 / i,
                "loss/kd": 1 + 1 / i,
                "loss/lr/student": 0.1 * (1 - i / (count + 1)),
            }
        )
        rows.append({"stage": stage, "step": step, "validation/accuracy": level - 0.5 / i})
    return rows


def write_run(
    home, name, *, method="kd", seed=0, data="digits", started="2026-01-02T03:04:05+00:00", accuracy=0.9, done=True
):
    """A run with curves, a picture and final numbers."""
    write = RunWriter(home / name)
    block = (
        f"data:\n  kind: {data}\n" if ":" not in data else "data:\n  kind: folder\n  path: " + data.split(":")[1] + "\n"
    )
    write.text("recipe.yaml", f"# a comment\nmethod: {method}\nseed: {seed}\n{block}temperature: {4.0 + seed}\n")
    write.json("run.json", {"seed": seed, "started": started, "method": {"name": method}})
    write.stage(steps=200).rows(logged(level=accuracy))
    write.picture("result/digits.png", shade=seed)
    write.json("cost.json", {"student": 1.5 + seed})
    if done:
        write.json(
            "metrics.json",
            {"test/teacher/accuracy": 0.99, "test/accuracy": accuracy, "test/student/accuracy": accuracy},
        )
    return write

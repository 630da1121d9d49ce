"""Small run directories, written by hand as the engine writes them."""

import json
from pathlib import Path

import pytest

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


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A writer of the run directory ``run``, relative to the present directory, as a user would name it."""
    monkeypatch.chdir(tmp_path)
    return RunWriter(Path("run"))

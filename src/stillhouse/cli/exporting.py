"""``export``: write a module of a run in another format, and say how it compares and how it is loaded."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stillhouse.cli.tables import result_table
from stillhouse.exporting import Export, export
from stillhouse.report import build


def write(directory: Path, form: str, *, artefact: str | None, out: Path | None, opset: int | None) -> None:
    """Export, and print what was exported."""
    done = export(directory, form, artefact=artefact, out=out, opset=opset)
    console = Console()
    show(done, console)
    if out is None and (directory / "recipe.yaml").is_file():
        console.print(f"report: {escape(str(build(directory)))}", highlight=False, soft_wrap=True)


def show(done: Export, console: Console) -> None:
    """Print an export: what goes in and out, how it compares with PyTorch, its latency, and how to load it."""
    opset = f", opset {done.opset}" if done.opset is not None else ""
    console.print(
        f"[bold]{escape(done.artefact)}[/bold] as {done.format} in {escape(str(done.file))} "
        f"({done.bytes:,} bytes, {done.parameters:,} parameters{opset})",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"takes {escape(_shapes(done.inputs))}; gives {escape(_shapes(done.outputs))}", highlight=False)
    sizes = ", ".join(map(str, done.batch_sizes))
    kind = "samples of the run's data" if done.real else "random samples"
    console.print(
        f"largest difference to PyTorch: {done.largest_difference:.3g} over {done.samples} {kind} in batches of {sizes} "
        f"(at most {done.tolerance:.3g} is accepted)",
        highlight=False,
    )
    for note in done.notes:
        console.print(escape(note), style="dim", highlight=False)
    rows = [[name, times["one_thread"], times["default_threads"]] for name, times in done.latency_ms.items()]
    columns = ["engine", "1 thread", f"default ({done.threads} thread{'s' if done.threads > 1 else ''} of PyTorch)"]
    result_table("Latency of one sample on the CPU (ms)", columns, rows, console)
    console.print("load it with:\n", highlight=False)
    for line in done.load.splitlines():
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _shapes(shapes: dict[str, list[int | str]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())

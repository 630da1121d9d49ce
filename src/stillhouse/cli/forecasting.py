"""``stillhouse run ... --dry-run``: what a run would do, and what it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from stillhouse.engine.rehearsal import Forecast, Step, UpdateForecast, rehearse
from stillhouse.recipe import Recipe, load_recipe
from stillhouse.report.formatting import duration


def dry(source: str, overrides: Sequence[str], *, seed: int | None, cache: bool, as_json: bool) -> None:
    """Rehearse a recipe and print the forecast."""
    recipe = load_recipe(source, overrides, seed=seed)
    found = rehearse(recipe.method, seed=recipe.seed, settings=recipe.settings, cache=cache)
    if as_json:
        print(json.dumps({"method": recipe.method.name, "seed": recipe.seed, **asdict(found)}, indent=1))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines(recipe, found):
        console.print(line)


def lines(recipe: Recipe, found: Forecast) -> list[str]:
    """The forecast for people."""
    told = [f"{recipe.method.name} (seed {recipe.seed}, {found.device})"]
    if found.data is not None:
        samples = ", ".join(f"{count:,} {name}" for name, count in found.data["samples"].items())
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.data["inputs"].items())
        classes = f", {found.data['classes']} classes" if found.data["classes"] else ""
        told.append(f"data {found.data['name']}: {samples}; {shapes}{classes}")
    for path, model in found.models.items():
        about = model if isinstance(model, str) else f"{model['class']}, {model['parameters']:,} parameters"
        told.append(f"{path}: {about}")
    told.append("")
    for step in found.steps:
        told += _step(step, "")
    told += [f"missing: {sentence}" for sentence in found.missing] + list(found.said)
    least = "" if found.complete else "at least "
    if any(step.at_least for step in found.steps):
        told.append(
            f"forecast: at the peak at least {_memory(found.memory)} of weights, gradients and optimiser states; what the "
            "samples take besides, and the time, are not known."
        )
    elif any(step.seconds is not None for step in found.steps):
        what = "on the accelerator" if found.device.startswith("cuda") else "of the whole process"
        told.append(f"forecast: {least}{duration(found.seconds)}, {least}{_memory(found.memory)} {what} at the peak.")
    told.append("the recipe is valid; nothing was trained and nothing was written.")
    return told


def _step(step: Step, indent: str) -> list[str]:
    costs = []
    if step.done:
        costs.append("done before")
    elif step.seconds is not None:
        costs.append(duration(step.seconds))
    if step.memory:
        costs.append(("at least " if step.at_least else "") + _memory(step.memory))
    head = f"{indent}{step.name}: {step.kind}"
    if step.kind == "stage":
        of = f" of {step.batch_size} samples" if step.batch_size else ""
        micro = f", each {step.accumulate} micro-batches" if step.accumulate > 1 else ""
        each = f", {duration(step.step_seconds)} each" if step.step_seconds else ""
        head += f", {step.steps:,} steps{of}{micro}{each}"
    told = [head + (f" ({', '.join(costs)})" if costs else "")]
    if step.evaluations:
        told.append(f"{indent}  measured {step.evaluations} times, {duration(step.evaluation_seconds or 0.0)} each")
    for name, module in step.modules.items():
        told.append(f"{indent}  {name}: {module['class']}, {module['parameters']:,} parameters, {module['mode']}")
    told += [f"{indent}  {_update(update)}" for update in step.updates]
    if step.note and not step.done:
        told.append(f"{indent}  {step.note}")
    for inner in step.within:
        told += _step(inner, indent + "  ")
    return told


def _update(update: UpdateForecast) -> str:
    every = "when its function says so" if update.every is None else "every step"
    if update.every is not None and update.every > 1:
        every = f"every {update.every} steps"
    times = f", {update.times} times" if update.times > 1 else ""
    firings = f" ({update.firings:,} in all)" if update.firings is not None and (update.every != 1 or times) else ""
    return (
        f"update {update.name}: {every}{times}{firings}, trains {update.parameters:,} parameters by "
        f"{', '.join(update.optimizers)}"
    )


def _memory(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"

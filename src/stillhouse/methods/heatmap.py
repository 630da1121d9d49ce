"""A grid of numbers as a picture, for results that compare combinations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def heat_map(
    values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Float[Tensor, "3 height width"]:
    """The numbers as coloured, labelled cells, in [0, 1].

    Args:
        values: one list a row.
        rows: name of each row.
        columns: name of each column.
        title: what the numbers are.

    >>> heat_map([[0.5, 0.6]], rows=["one"], columns=["a", "b"]).shape[0]
    3
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 + 1.1 * len(columns), 1.2 + 0.5 * len(rows)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    grid = np.asarray(values, dtype=float)
    axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for at, value in np.ndenumerate(grid):
        axes.text(at[1], at[0], f"{value:.4g}", ha="center", va="center", color="white" if value < middle else "black")
    canvas.draw()
    drawn = torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())
    return drawn[..., :3].permute(2, 0, 1).float() / 255

"""How much of an update's gradient comes from each of its terms: sampled, so that it costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.engine.seeding import forked_generators

if TYPE_CHECKING:
    from stillhouse.engine.run import Run

SPACING = 50
"""Steps from one sample to the next, for each term: a term's sample is one more backward."""

MOST = 20
"""Samples in a stage, about."""


class GradientShares:
    """Samples the norm of each weighted term's gradient before the backward that trains.

    A sample leaves no trace: each backward keeps the graph, its gradients are measured as they arrive and dropped, and
    the generators, the buffers and ``.grad`` are put back. Pieces of one term, of a loss that is a generator, count as
    if their gradients were orthogonal.

    Args:
        parameters: what the update trains.
        steps: steps of the stage.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int) -> None:
        self.parameters, self.steps = parameters, steps
        self.next = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._squares: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether a sample is to be taken."""
        return step >= self.next

    def measure(
        self,
        terms: Iterable[tuple[str, Tensor]],
        run: Run,
        owners: Sequence[tuple[dict[str, Tensor | None], str]],
        scale: Callable[[Tensor], Tensor],
        *,
        whole: bool,
    ) -> None:
        """Differentiate each term (weighted, with its graph), of one micro-batch or of a piece of it.

        Args:
            terms: names and values.
            run: the run.
            owners: whose buffers a backward that computes its forward again could move, and their names.
            scale: what a gradient scaler does to a loss.
            whole: these are all terms there are, so that every process has the same ones and their gradients can be
                averaged over the processes; else each process measures its own part of the batch.
        """
        draws = run._draws
        held = [(*place, buffer, buffer.clone()) for place in owners if (buffer := place[0][place[1]]) is not None]
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        squares: list[Tensor] = []
        arriving: Callable[[Tensor], None] = lambda parameter: squares.append(_measured(parameter))  # noqa: E731
        together = whole and run.world.size > 1
        register = "register_post_accumulate_grad_hook"
        handles = [] if together else [getattr(parameter, register)(arriving) for parameter in self.parameters]
        try:
            with forked_generators(0, run.world.device):
                for name, term in terms:
                    squares.clear()
                    if term.requires_grad:
                        torch.autograd.backward(scale(term), inputs=list(self.parameters), retain_graph=True)
                    if together:
                        run.world.average_gradients(self.parameters)
                        squares += [_measured(parameter) for parameter in self.parameters]
                    square = torch.stack(squares).sum() if squares else term.detach().new_zeros(()).float()
                    known = self._squares.get(name)
                    self._squares[name] = square if known is None else known + square
        finally:
            for handle in handles:
                handle.remove()
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            run._draws = draws
            for owner, name, buffer, saved in held:
                owner[name] = buffer
                # Past autograd, which may have saved the buffer for the backward to come.
                buffer.data.copy_(saved)

    def taken(self, step: int) -> None:
        """The firing at ``step`` was measured; of a single term there is nothing to know."""
        if len(self._squares) > 1:
            for name, square in self._squares.items():
                norm = square.sqrt()
                self.sums[name] = self.sums[name] + norm if name in self.sums else norm
                self.counts[name] = self.counts.get(name, 0) + 1
        self.next = step + max(SPACING * len(self._squares), -(-self.steps // MOST))
        self._squares = {}

    def flush(self, average: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each term's share of the sum of the norms since the last flush; nothing where there was none to measure."""
        if not self.sums:
            return {}
        counts = torch.tensor([self.counts[name] for name in self.sums], device=next(iter(self.sums.values())).device)
        norms = average(torch.stack(list(self.sums.values())) / counts)
        shares = (norms / norms.sum()).tolist()
        found = dict(zip(self.sums, shares, strict=True))
        self.sums, self.counts = {}, {}
        return found if all(share == share for share in shares) else {}

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What a resumed run needs; sums are those of all processes, by rank."""
        sums = gather(torch.stack(list(self.sums.values()))[None]).T if self.sums else ()
        return {"next": self.next, "sums": dict(zip(self.sums, sums, strict=True)), "counts": dict(self.counts)}

    def load(self, state: dict[str, Any], pick: Callable[[Tensor], Tensor]) -> None:
        """Put back what :meth:`state` gave; ``pick`` chooses this process's sum."""
        self.next, self.counts = state["next"], dict(state["counts"])
        self.sums = {name: pick(sums) for name, sums in state["sums"].items()}


def _measured(parameter: Tensor) -> Tensor:
    """The squared norm of a gradient that has just arrived, which is dropped: memory never holds two terms' gradients."""
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = None
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if half else None)
    return norm.float().square()

"""With which statistics the batch norms of a network that is not trained normalise: its own, or those of each batch."""

from __future__ import annotations

from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms of a network, of every dimension and also synchronised ones."""
    return [sub for sub in module.modules() if isinstance(sub, _BatchNorm)]


class BatchStatistics:
    """While open, the batch norms of a module in eval mode normalise with the statistics of the batch at hand.

    Nothing else switches: dropout stays off, and the running statistics are neither read nor moved. So a frozen teacher
    adapts to the batch that its student sees (the paper of SSLD, arXiv 2103.05959) and is bit for bit the same afterwards.
    What it says of a sample then depends on the others in the batch; in several processes, on those of the same process,
    unless its norms are ``nn.SyncBatchNorm``.

    Args:
        module: the network.

    Attributes:
        count: number of its batch norms; with 0 nothing changes.

    >>> import torch
    >>> norm = nn.BatchNorm1d(1).eval()
    >>> with BatchStatistics(norm):
    ...     norm(torch.tensor([[1.0], [3.0]])).detach().round().flatten().tolist()
    [-1.0, 1.0]
    >>> norm(torch.tensor([[1.0], [3.0]])).detach().round().flatten().tolist(), norm.num_batches_tracked.item()
    ([1.0, 3.0], 0)
    """

    def __init__(self, module: nn.Module) -> None:
        norms = batch_norms(module)
        self.count = len(norms)
        self._before: dict[int, list[tuple[bool, bool]]] = {id(norm): [] for norm in norms}
        self._handles = []
        for norm in norms:
            self._handles.append(norm.register_forward_pre_hook(self._enter))
            self._handles.append(norm.register_forward_hook(self._leave, always_call=True))

    def _enter(self, norm: Any, _: Any) -> None:
        if id(norm) in self._before:
            self._before[id(norm)].append((norm.training, norm.track_running_stats))
            # A norm in training mode that tracks nothing takes the batch's statistics and leaves its buffers alone.
            norm.training, norm.track_running_stats = True, False

    def _leave(self, norm: Any, *_: Any) -> None:
        if self._before.get(id(norm)):
            norm.training, norm.track_running_stats = self._before[id(norm)].pop()

    def close(self) -> None:
        """Back to the running statistics."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

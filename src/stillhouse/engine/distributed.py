"""Processes: who am I, gather, mean, and the averaging of gradients. One process is a world of size 1."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(weeks=1)
"""How long processes wait for what one of them does alone: a computation, a lock that another run holds, a large file."""

BUCKET = 2**26
"""Elements in one message where whole modules are sent."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this process trains.
        patient: the same processes as a group that waits for :data:`PATIENCE`. The others keep the launcher's time-out,
            so that a process that hangs in training is found.
    """

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @classmethod
    def start(cls, device: str = "auto") -> World:
        """Join the processes that ``torchrun`` (or accelerate's launcher) started, or be alone.

        Args:
            device: ``auto`` (the accelerator when there is one), ``cpu``, ``cuda`` or ``mps``.

        Raises:
            UserError: the device is not on this machine.
        """
        if device not in ("auto", "cpu") and not getattr(torch, device).is_available():
            raise UserError(f"run.device: there is no {device} device on this machine; use 'auto' or 'cpu'.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            # Left to itself on a machine without an accelerator it takes each process for the only one.
            state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
            patient = _patient(dist.group.WORLD)
            return cls(state.process_index, state.num_processes, torch.device(state.device), patient)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return cls(0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate a tensor over processes along dimension 0, in rank order, with gradient.

        Every process must pass the same shape. A loss of the gathered tensor, computed alike in every process, gives
        after the engine's averaging the gradient of one process that holds the whole batch.
        """
        if self.size == 1:
            return x
        if not x.requires_grad:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous())
            return torch.cat(parts)
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))  # type: ignore[no-untyped-call]

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the elements of all processes that ``mask`` selects (all without a mask), with gradient.

        The processes may hold different numbers of selected elements; of none at all the mean is 0. A floating mask
        weighs. What is returned in one process is its share, scaled so that the average over processes, which the
        engine takes of gradients and logs, is the global mean.
        """
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        chosen = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
        count = chosen.sum()
        if self.size > 1:
            dist.all_reduce(count)
        # What is masked out may be infinite, and 0 * inf is NaN.
        kept = x if mask is None else torch.where(chosen == 0, 0, x * chosen)
        return kept.sum() * self.size / torch.where(count == 0, 1, count)

    def average(self, x: Tensor) -> Tensor:
        """Average a tensor without gradient over processes."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
            x /= self.size
        return x

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average ``.grad`` over processes in one flat bucket per data type, in the order given.

        A parameter without a gradient here counts as zero, so that processes whose batch did not reach it stay in step.
        """
        if self.size == 1:
            return
        buckets: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            buckets.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in buckets.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.size
            for gradient, piece in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Write the main process's values into ``tensors``, in place, in flat messages by data type.

        Every process must pass the same shapes in the same order.
        """
        if self.size == 1:
            return
        buckets: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        counts: Counter[torch.dtype] = Counter()
        for tensor in tensors:
            buckets.setdefault((tensor.dtype, counts[tensor.dtype] // BUCKET), []).append(tensor.detach())
            counts[tensor.dtype] += tensor.numel()
        for same in buckets.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            # As bytes: not every back end sends every data type.
            dist.broadcast(flat.view(torch.uint8), src=0)
            if not self.is_main:
                for tensor, piece in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                    tensor.copy_(piece.view(tensor.shape))

    def from_main(self, value: T) -> T:
        """The main process's value, in every process; waits for it as long as it takes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes, as long as it takes."""
        if self.size > 1:
            dist.barrier(self.patient)

    def any(self, flag: bool) -> bool:
        """True in every process when it is true in one."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """:meth:`any` of each flag, in one message."""
        if self.size == 1:
            return list(flags)
        box = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in box.tolist()]

    def first(self, value: T | None) -> T | None:
        """The value of the first process that has one; for a few small values."""
        if self.size == 1:
            return value
        box: list[T | None] = [None] * self.size
        dist.all_gather_object(box, value)
        return next((one for one in box if one is not None), None)


@lru_cache(maxsize=1)
def _patient(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One such group per set of processes, however often a world is started: groups hold sockets and threads."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group

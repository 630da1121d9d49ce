"""Limits on memory: a mistyped width or image size is refused in one sentence before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stillhouse.errors import UserError

TENSORS = 100_000
"""So many tensors make no model: a mistyped depth would be built for hours."""

WITHOUT_MEMORY = 2**56
"""Bytes that a model on the meta device may have, where it takes none: more than any machine has."""

FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
)


def physical() -> int:
    """Bytes of memory of this machine."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return WITHOUT_MEMORY
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Limited(TorchFunctionMode):
    """Counts the tensors that are made, and refuses the one that would be too many or too large."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__()
        self.what, self.limit = what, limit
        self.taken = self.tensors = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in FACTORIES:
            self.take(args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count one tensor.

        Raises:
            UserError: it is too much.
        """
        size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        self.taken += math.prod(size) * dtype.itemsize
        self.tensors += 1
        if self.taken > self.limit:
            raise UserError(
                f"{self.what} would take more than the {self.limit / 2**30:,.1f} GiB of memory that there are; make it smaller."
            )
        if self.tensors > TENSORS:
            raise UserError(f"{self.what} would have more than {TENSORS:,} tensors; make it less deep.")


@contextmanager
def limited(what: str, *, on_meta: bool) -> Iterator[None]:
    """Refuse within the block what memory cannot hold.

    Raises:
        UserError: ``what`` would take more than there is.
    """
    limit = WITHOUT_MEMORY if on_meta else physical()
    try:
        with Limited(what, limit):
            yield
    except (MemoryError, OverflowError):
        raise UserError(f"{what} has sizes that no memory holds; make it smaller.") from None
    except RuntimeError as error:
        if "negative dimension" in str(error):
            raise UserError(f"{what} has a size below 0; sizes are whole numbers from 1 on.") from None
        if not out_of_memory(error):
            raise
        raise UserError(f"{what} would take more memory than there is; make it smaller.") from None


def check_room(size: int, what: str) -> None:
    """Refuse ``size`` bytes that this machine does not have.

    Raises:
        UserError: it has fewer.
    """
    if size > physical():
        raise UserError(
            f"{what} would take {size / 2**30:,.1f} GiB of memory, more than the {physical() / 2**30:,.1f} GiB that there are."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough: torch says so in words."""
    said = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in said)
    )

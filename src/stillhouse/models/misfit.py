"""What to say when a network cannot read what it is given: which layer stumbled, what it takes, what it got."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.memory import out_of_memory

OF_FORM = re.compile(
    r"shape|size|dimension|\bdim\b|channel|multipl|dtype|same type|out of range|more than 1 value|expected|elements|divisible|"
    r"must match",
    re.IGNORECASE,
)
"""Words of which one stands in every message about the form of a tensor."""


class MisfitError(UserError):
    """A network was given inputs of a form that it does not take."""


def misfit(module: nn.Module, inputs: Mapping[str, Any], error: Exception) -> MisfitError | None:
    """The error in one sentence, where it is about the form of the inputs; None where it is another one.

    Args:
        module: the network that was called.
        inputs: what it was called with, by name; the first dimension is the batch.
        error: what it raised.
    """
    # Subclasses are torch's own signals, such as those of tracing.
    plain = type(error) in (RuntimeError, ValueError, IndexError)
    if not plain or out_of_memory(error) or not OF_FORM.search(str(error)):
        return None
    given = " and ".join(f"{name} {_form(value)}" for name, value in inputs.items() if isinstance(value, Tensor))
    layer, read = _where(module, error)
    reason = None if layer is None or read is None else _wants(layer, read)
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if layer is None or layer is module:
        what = f"it {reason}" if reason else first_line
    else:
        path = next(name for name, part in module.named_modules() if part is layer)
        what = f"its layer {path!r} ({type(layer).__name__}) {reason or f'says: {first_line}'}"
    return MisfitError(f"{type(module).__name__} cannot read {given} of this data: {what}.")


def _form(value: Tensor) -> str:
    """A batch's samples in words.

    >>> _form(torch.zeros(5, 1, 8, 8)), _form(torch.zeros(5, 3)), _form(torch.zeros(5))
    ('of 1x8x8', 'of size 3', '(one number each)')
    """
    if value.dim() == 1:
        return "(one number each)"
    return f"of size {value.shape[1]}" if value.dim() == 2 else "of " + "x".join(str(n) for n in value.shape[1:])


def _where(module: nn.Module, error: Exception) -> tuple[nn.Module | None, Tensor | None]:
    """The innermost part of the network that was running, and the tensor that it was reading."""
    parts, trace = set(module.modules()), error.__traceback__
    found: tuple[nn.Module | None, Tensor | None] = (None, None)
    while trace is not None:
        local = trace.tb_frame.f_locals
        part = local.get("self")
        if isinstance(part, nn.Module) and part in parts and trace.tb_frame.f_code.co_name.endswith("forward"):
            tensors = (v for v in local.values() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))
            found = part, next(tensors, None)
        trace = trace.tb_next
    return found


def _wants(layer: nn.Module, read: Tensor) -> str | None:
    """What a layer of torch's takes and what it got; None where both are alike, or it is no such layer."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and read.is_floating_point() and weight.dtype != read.dtype:
        own, other = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, read.dtype))
        if not isinstance(layer, nn.Embedding):
            return (
                f"has weights of {own} and was given {other}; bring the model to the data's type, as with model.float()"
            )
    if isinstance(weight, Tensor) and not isinstance(layer, nn.Embedding) and not read.is_floating_point():
        return "takes floats and was given whole numbers; ids need an embedding first"
    if isinstance(layer, nn.Linear):
        return _numbers("features", layer.in_features, read.shape[-1])
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        axes = len(layer.kernel_size)
        if read.dim() not in (axes + 1, axes + 2):
            return f"takes inputs of {axes + 1} dimensions (channels first) and was given {read.dim() - 1}"
        return _numbers("channels", layer.in_channels, read.shape[-axes - 1])
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return _numbers("channels", layer.num_features, read.shape[1] if read.dim() > 1 else 1)
    if isinstance(layer, nn.LayerNorm):
        last = tuple(read.shape[-len(layer.normalized_shape) :])
        return None if last == layer.normalized_shape else f"takes {tuple(layer.normalized_shape)} and was given {last}"
    if isinstance(layer, nn.RNNBase):
        return _numbers("features", layer.input_size, read.shape[-1])
    if isinstance(layer, nn.Embedding):
        if read.is_floating_point():
            return "takes whole numbers (ids) and was given floats"
        return (
            f"knows ids from 0 to {layer.num_embeddings - 1} and was given {int(read.max())}" if read.numel() else None
        )
    return None


def _numbers(what: str, own: int, given: int) -> str | None:
    return None if own == given else f"takes {own} {what} and was given {given}"

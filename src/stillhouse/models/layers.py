"""Where the layers of any network are: found by running it once on a few samples, so that nobody has to name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.calling import logits

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layer:
    """The end of one stage of a network.

    Attributes:
        path: the module whose output it is.
        shape: shape of one sample's output: (channels, height, width), (tokens, width) or (width,).
        activation: the activation module that ends the stage, whose input is the feature before it; None where the stage
            ends otherwise.
        norm: the batch norm of the same channels that ran last before that activation; None where there is none.
    """

    path: str
    shape: tuple[int, ...]
    activation: str | None = None
    norm: str | None = None


@dataclass(frozen=True)
class _Event:
    path: str
    module: nn.Module
    shape: tuple[int, ...]
    pointer: int
    leaf: bool


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Sigmoid, nn.Tanh)


def stages(module: nn.Module, batch: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The stages of a network, first to last.

    Of a convolutional network: the last map at each resolution at which it has layers with weights. Of a transformer: the
    blocks. Of other networks: every hidden layer with weights, after its activation.

    Args:
        module: the network.
        batch: a few samples.

    Raises:
        UserError: no hidden layer was seen.
    """
    events, out = _watched(module, batch)
    inner = [event for event in events if event.pointer != out.data_ptr() or event.shape != tuple(out.shape[1:])]
    found = _maps(inner)
    blocks = _blocks(module, inner)
    if len(blocks) > len(found):
        found = blocks
    if not found:
        found = _hidden(inner)
    if not found:
        raise UserError(f"{type(module).__name__} has no hidden layer to read; name its modules instead.")
    return tuple(found)


def named(module: nn.Module, batch: Mapping[str, Any], paths: Sequence[str]) -> tuple[Layer, ...]:
    """Layers that somebody named, as :func:`stages` describes them; paths are those of :class:`Taps`, resolved."""
    events, _ = _watched(module, batch)
    last = {event.path: event for event in events}
    missed = next((path for path in paths if path not in last), None)
    if missed is not None:
        raise UserError(f"{type(module).__name__} does not run its module {missed!r}, or it returns no tensor.")
    return tuple(_layer(last[path], events) for path in paths)


def classifier(module: nn.Module, batch: Mapping[str, Any]) -> str:
    """Path of the linear layer whose output is the network's; its input is the embedding.

    Raises:
        UserError: the network ends otherwise.
    """
    events, out = _watched(module, batch)
    for event in reversed(events):
        linear = isinstance(event.module, nn.Linear) or type(event.module).__name__.endswith("Linear")
        if linear and event.pointer == out.data_ptr():
            return event.path
    raise UserError(
        f"{type(module).__name__} does not end in a linear classifier, so its embedding cannot be found; name the module "
        "that reads it."
    )


def paired(student: Sequence[Layer], teacher: Sequence[Layer]) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """As many layers of both, spread evenly over the longer network; the last is paired with the last."""
    count = min(len(student), len(teacher))

    def spread(layers: Sequence[Layer]) -> tuple[Layer, ...]:
        return tuple(layers[-(-(i + 1) * len(layers) // count) - 1] for i in range(count))

    return spread(student), spread(teacher)


def _watched(module: nn.Module, batch: Mapping[str, Any]) -> tuple[list[_Event], Tensor]:
    """What every submodule put out, in the order in which they ended, and what the network did."""
    events: list[_Event] = []
    held: list[Tensor] = []
    handles = []

    def watch(path: str, sub: nn.Module) -> None:
        leaf = not any(True for _ in sub.children())

        def read(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output
            if isinstance(output, tuple | list):
                tensor = next((value for value in output if isinstance(value, Tensor)), None)
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                # Kept alive, so that no later tensor takes its place in memory.
                held.append(tensor)
                events.append(_Event(path, sub, tuple(tensor.shape[1:]), tensor.data_ptr(), leaf))

        handles.append(sub.register_forward_hook(read))

    modes = [(sub, sub.training) for sub in module.modules()]
    module.eval()
    try:
        for path, sub in module.named_modules():
            if path:
                watch(path, sub)
        with torch.no_grad():
            out = logits(module, batch)
    finally:
        for handle in handles:
            handle.remove()
        for sub, mode in modes:
            sub.training = mode
    return events, out


def _weighted(event: _Event) -> bool:
    return event.leaf and any(True for _ in event.module.parameters(recurse=False))


def _maps(events: Sequence[_Event]) -> list[Layer]:
    maps = [event for event in events if len(event.shape) == 3]
    sizes = list(dict.fromkeys(event.shape[1:] for event in maps if _weighted(event)))
    last = {event.shape[1:]: event for event in maps}
    return [_layer(last[size], events) for size in sizes if size != (1, 1)]


def _blocks(module: nn.Module, events: Sequence[_Event]) -> list[Layer]:
    tokens = {event.path: event for event in events if len(event.shape) == 2}
    best: list[_Event] = []
    for path, sub in module.named_modules():
        if isinstance(sub, nn.ModuleList | nn.Sequential):
            children = [f"{path}.{name}" if path else name for name, _ in sub.named_children()]
            found = [tokens[child] for child in children if child in tokens and not tokens[child].leaf]
            if len(found) > len(best) and len({event.shape for event in found}) == 1:
                best = found
    return [_layer(event, events) for event in best]


def _hidden(events: Sequence[_Event]) -> list[Layer]:
    flat = [event for event in events if len(event.shape) == 1 and event.leaf]
    found: list[_Event] = []
    for event in flat:
        if _weighted(event) and not isinstance(event.module, NORMS):
            found.append(event)
        elif found:
            found[-1] = event
    return [_layer(event, events) for event in found]


def _layer(event: _Event, events: Sequence[_Event]) -> Layer:
    """The event with the activation that made its output, and the batch norm before that."""
    at = next((i for i, e in enumerate(events) if e.leaf and e.pointer == event.pointer and _activates(e)), None)
    activation = None if at is None else events[at].path
    norm = None
    if at is not None:
        # Not further back than the activation before: its norm belongs to another feature.
        before = events[:at]
        start = max((i for i, e in enumerate(before) if _activates(e)), default=-1) + 1
        norms = [e for e in before[start:] if isinstance(e.module, NORMS) and e.shape[0] == event.shape[0]]
        # A shortcut's norm may run later than that of the branch, which stands beside the activation.
        beside = [e for e in norms if _parent(e) == _parent(events[at])]
        norm = (beside or norms)[-1].path if norms else None
    return Layer(event.path, event.shape, activation, norm)


def _parent(event: _Event) -> str:
    return event.path.rpartition(".")[0]


def _activates(event: _Event) -> bool:
    return isinstance(event.module, ACTIVATIONS)


def parameters_by_stage(module: nn.Module, batch: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The names of a network's parameters, divided at the ends of its :func:`stages`, in the order in which they run.

    The first stage also has the parameters that belong to no layer of their own, such as the positions of a transformer.

    Returns:
        The names of each stage, first to last; and of what comes after the last: the classifier, as a rule.
    """
    ends = [layer.path for layer in stages(module, batch)]
    events, _ = _watched(module, batch)
    place = {event.path: at for at, event in enumerate(events)}
    until = [place[path] for path in ends]
    names: list[list[str]] = [[] for _ in (*until, None)]
    for name, _ in module.named_parameters():
        at = place.get(name.rpartition(".")[0], -1)
        names[sum(at > end for end in until)].append(name)
    return names[:-1], names[-1]

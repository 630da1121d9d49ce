"""The parameters of a module as a whole: counted, fingerprinted, frozen, drawn anew."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters; tied ones count once.

    Args:
        module: any module.
        trainable: count only those that require a gradient.
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def fingerprint(module: nn.Module) -> str:
    """A hash of the content of all parameters and buffers: names, dtypes, shapes and bytes, in name order.

    Equal for equal content on any device; 32 hexadecimal digits.
    """
    named = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    tensors = sorted(named, key=lambda item: item[0])
    # Tied tensors are read once; hashing releases the interpreter lock, so large models are read by several threads.
    unique = {id(tensor): tensor for _, tensor in tensors}
    if sum(tensor.numel() for tensor in unique.values()) < 1_000_000:
        digests = dict(zip(unique, map(_digest, unique.values()), strict=True))
    else:
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(unique, pool.map(_digest, unique.values()), strict=True))
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(digests[id(tensor)])
    return total.hexdigest()[:32]


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def freeze(module: nn.Module) -> nn.Module:
    """Put ``module`` in eval mode and stop gradients to its parameters, in place; returned for chaining."""
    return module.eval().requires_grad_(False)


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw all parameters of ``module`` anew, in place, as its construction drew them; returned for chaining.

    Each submodule's ``reset_parameters`` is called, children before parents (batch-norm statistics start over with
    it). The networks of :mod:`stillhouse.models` then equal a newly built one under the same seed bit for bit on the
    CPU; a model of transformers is re-drawn from its config, also if it was pretrained.

    Args:
        module: the module; its parameters stay the same objects, on the same device.
        generator: where the draws come from, on the device of the parameters. None: torch's global generator.

    Raises:
        UserError: a submodule has parameters of its own and no ``reset_parameters``, or hides them behind a
            parametrization; or the generator is on another device.
    """
    if generator is not None and any(p.device.type != generator.device.type for p in module.parameters()):
        raise UserError(
            f"The generator is on {generator.device.type!r} and parameters of {type(module).__name__} are not; "
            f"make the generator on their device."
        )
    with _drawing_from(generator):
        _reset(module, "", set())
    return module


def _reset(module: nn.Module, path: str, seen: set[nn.Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    from_config = getattr(type(module), "_from_config", None)
    if from_config is not None:
        module.load_state_dict(from_config(copy.deepcopy(module.config)).state_dict())
        return
    shown = repr(path) if path else "The model"
    if parametrize.is_parametrized(module):
        raise UserError(f"{shown} is parametrized, so its weights cannot be drawn anew; remove the parametrization.")
    for name, child in module.named_children():
        _reset(child, f"{path}.{name}" if path else name, seen)
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()
    elif any(True for _ in module.parameters(recurse=False)):
        raise UserError(
            f"{shown} ({type(module).__name__}) has parameters and no reset_parameters(); "
            f"add that method so that they can be drawn anew."
        )


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global generator of the same device stand in for ``generator``, then be as it was."""
    if generator is None:
        yield
        return
    device = generator.device
    if device.type == "cpu":
        before = torch.get_rng_state()
        torch.set_rng_state(generator.get_state())
        try:
            yield
            generator.set_state(torch.get_rng_state())
        finally:
            torch.set_rng_state(before)
        return
    backend = torch.get_device_module(device)
    before = backend.get_rng_state(device)
    backend.set_rng_state(generator.get_state(), device)
    try:
        yield
        generator.set_state(backend.get_rng_state(device))
    finally:
        backend.set_rng_state(before, device)

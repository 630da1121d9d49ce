"""How an artefact is called: named tensors in, named tensors out, and the samples that both forms are compared on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.exporting.artefacts import WHOLE, Artefact, Samples, Sampling
from stillhouse.methods.generators.process import Process
from stillhouse.models import Autoencoder, MisfitError, arguments, as_logits, forward

Named = dict[str, Tensor]

BATCH_SIZES = (1, 3, 8)
"""Batches that are compared; a trace takes the middle one, as a batch of one may be taken for a constant."""

# A module's own code runs, and stops on whatever its author did not think of.
UNTRACEABLE = (MisfitError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)


class Entry(nn.Module):
    """A module with a signature: its inputs by name, a tuple of tensors as its output.

    Args:
        module: what is called.
        call: how: the module and its named inputs to named outputs.
        inputs: names of the inputs, which become the parameters of ``forward``.
    """

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Named], Named], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])

        def signed(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return tuple(call(self.module, signature.bind(*args, **kwargs).arguments).values())

        # Tracers name what goes in and out after the parameters that they find here.
        signed.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = signed


@dataclass(frozen=True)
class Called:
    """An artefact ready to be exported.

    Attributes:
        entry: the module with its signature, in evaluation mode.
        inputs: samples by input name, as many as the batches of :data:`BATCH_SIZES` take together.
        outputs: names of the outputs.
        growing: inputs whose second dimension is the length of a text.
        call: how a module is called with named inputs.
    """

    entry: Entry
    inputs: Named
    outputs: tuple[str, ...]
    growing: tuple[str, ...]
    call: Callable[[nn.Module, Named], Named]

    def batches(self) -> list[Named]:
        """The samples in batches of :data:`BATCH_SIZES`."""
        found, start = [], 0
        for size in BATCH_SIZES:
            found.append({name: value[start : start + size] for name, value in self.inputs.items()})
            start += size
        return found

    def shortened(self) -> Named:
        """A batch whose texts are cut to half their length."""
        return _halved(self.batches()[1], self.growing)

    def on(self, module: nn.Module, batch: Named) -> tuple[Tensor, ...]:
        """The outputs of a module in place of the artefact's own."""
        with torch.no_grad():
            return tuple(self.call(module, batch).values())

    def __call__(self, batch: Named) -> tuple[Tensor, ...]:
        """The outputs of PyTorch."""
        return self.on(self.entry.module, batch)


def called(artefact: Artefact, samples: Samples) -> Called:
    """How to call an artefact, tried on its samples.

    Raises:
        UserError: it cannot be called on them, or returns nothing that has a name.
    """
    count = sum(BATCH_SIZES)
    if artefact.sampling is not None and samples.given is None:
        conditions = _conditions(artefact.sampling.process, samples, count)
        if len(artefact.sampling.times) == 1:
            call, inputs = _generator(artefact.sampling, conditions, count)
        else:
            call, inputs = _returned, _network_inputs(artefact.module, artefact.sampling, conditions, count)
    elif isinstance(artefact.module, Autoencoder):
        batch = samples.batch(count, artefact.facts)
        name = next(iter(batch.inputs))
        call, inputs = _coded, {name: batch.inputs[name]}
    elif (
        samples.given is None and samples.data is None and artefact.facts is None and hasattr(artefact.module, "config")
    ):
        call, inputs = _returned, _configured(artefact.module, samples, count)
    else:
        batch = samples.batch(count, artefact.facts)
        call, inputs = _returned, arguments(artefact.module, batch)
    _fit_types(artefact.module, inputs)
    without_cache(artefact.module)
    entry = Entry(artefact.module, call, tuple(inputs)).eval()
    with torch.no_grad():
        try:
            outputs = call(artefact.module, inputs)
        except UNTRACEABLE as error:
            raise UserError(f"{artefact.name} cannot be called on its samples: {reason_of(error)}.") from error
    if len(next(iter(outputs.values()))) != count:
        raise UserError(
            f"{artefact.name} returned {len(next(iter(outputs.values())))} rows for {count} samples, so it has no batch "
            "dimension to export."
        )
    growing = _growing(call, artefact.module, inputs)
    if list(outputs) == ["output"] and _classifies(artefact, samples):
        outputs = {"logits": outputs["output"]}
    # In a graph every name is one value's: diffusers, too, calls what comes out of 'sample' so.
    names = tuple(f"out_{name}" if name in inputs else name for name in outputs)
    return Called(entry, {name: value.contiguous() for name, value in inputs.items()}, names, growing, call)


def _growing(call: Callable[[nn.Module, Named], Named], module: nn.Module, inputs: Named) -> tuple[str, ...]:
    """The inputs whose second dimension is a length that may vary: texts, where the module takes shorter ones."""
    texts = tuple(name for name, value in inputs.items() if name in WHOLE and value.ndim == 2)
    try:
        with torch.no_grad():
            call(module, _halved(inputs, texts))
    except UNTRACEABLE:
        return ()
    return texts


def _halved(batch: Named, texts: tuple[str, ...]) -> Named:
    return {n: v[:, : max(2, v.shape[1] // 2)] if n in texts else v for n, v in batch.items()}


def _returned(module: nn.Module, inputs: Named) -> Named:
    """What a module returns, by name: ``logits`` or ``sample`` where it says so, else all tensors that it names."""
    output: Any = forward(module, inputs)
    if isinstance(output, Tensor):
        return {"output": output}
    for name in ("logits", "sample"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return {name: found}
    named = output._asdict() if hasattr(output, "_asdict") else output
    if isinstance(named, Mapping):
        tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    return {"output": as_logits(output, of=type(module).__name__)}


def _classifies(artefact: Artefact, samples: Samples) -> bool:
    """Whether a module's plain output is logits, by the task of the data."""
    facts = samples.data.facts if samples.data is not None else artefact.facts
    return artefact.sampling is None and facts is not None and facts.task in ("classification", "language")


def _coded(module: nn.Module, inputs: Named) -> Named:
    """An autoencoder's reconstruction, its code, and the index of each stored value where it is quantised."""
    assert isinstance(module, Autoencoder)
    code = module.encode(next(iter(inputs.values())))
    indices = {} if code.indices is None else {"indices": code.indices}
    return {"logits": module.decode(code.z), "code": code.z, **indices}


def _generator(sampling: Sampling, conditions: Named, count: int) -> tuple[Callable[[nn.Module, Named], Named], Named]:
    """A one-step generator: noise, and what it is conditioned on, to samples."""
    process, times = sampling.process, sampling.times

    def call(module: nn.Module, inputs: Named) -> Named:
        noise = inputs["noise"]
        t = times.expand(noise.shape[0])
        x_t = process.schedule.start(noise, t)
        return {"sample": process.denoise(module, x_t, t, process.condition(inputs))}

    return call, {"noise": _noise(process, count), **conditions}


def _network_inputs(module: nn.Module, sampling: Sampling, conditions: Named, count: int) -> Named:
    """Inputs of a diffusion model's network by the names of its parameters: noisy samples, times, conditions."""
    schedule, times = sampling.process.schedule, sampling.times
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    t = times[torch.arange(count) % len(times)]
    x, time = schedule.network_inputs(schedule.start(_noise(sampling.process, count), t), t)
    if "labels" in conditions:
        conditions = {"class_labels" if "class_labels" in names else names[2]: conditions["labels"]}
    return {names[0]: x.float(), "timestep" if "timestep" in names else names[1]: time, **conditions}


def _noise(process: Process, count: int) -> Tensor:
    return torch.randn(count, *process.shape, generator=torch.Generator().manual_seed(0))


def _conditions(process: Process, samples: Samples, count: int) -> Named:
    """What a diffusion model is conditioned on: tensors of the data, or one class after the other."""
    if process.fields:
        batch = samples.batch(count, None)
        return {name: batch[name] for name in process.fields}
    samples.real = False
    return {"labels": torch.arange(count) % process.classes} if process.classes is not None else {}


def _configured(module: nn.Module, samples: Samples, count: int) -> Named:
    """Random inputs for a model of a library that is known by its config alone.

    Raises:
        UserError: the config does not say enough.
    """
    config: Any = module.config
    generator = torch.Generator().manual_seed(0)
    samples.real = False
    parameters = inspect.signature(type(module).forward).parameters
    if "input_ids" in parameters and getattr(config, "vocab_size", None):
        ids = torch.randint(config.vocab_size, (count, 16), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :8]
        return arguments(module, inputs)
    if "pixel_values" in parameters and getattr(config, "image_size", None):
        shape = (config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(count, *shape, generator=generator)}
    if "sample" in parameters and "timestep" in parameters and not getattr(config, "cross_attention_dim", None):
        side = config.sample_size
        shape = (config.in_channels, *(side if isinstance(side, list | tuple) else (side, side)))
        inputs = {"sample": torch.randn(count, *shape, generator=generator), "timestep": torch.linspace(0, 999, count)}
        if classes := getattr(config, "num_class_embeds", None):
            inputs["class_labels"] = torch.arange(count) % classes
        return inputs
    raise UserError(
        f"the config of {type(module).__name__} does not say what it is fed; in Python pass a batch of inputs as samples=."
    )


def _fit_types(module: nn.Module, inputs: Named) -> None:
    """Give the inputs the type of the module's weights where those are in half precision."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for name, value in inputs.items():
        if value.is_floating_point() and name not in ("timestep", "noise") and value.dtype != dtype:
            inputs[name] = value.to(dtype)


def without_cache(module: nn.Module) -> None:
    """Let a model of tokens return its logits alone, and no keys and values for the next call."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False


def reason_of(error: BaseException) -> str:
    """The first sentence that says something, of the error that all began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    advice = ("[", "#", "-")
    lines = [line.strip() for line in str(error).splitlines()]
    telling = next((line for line in lines if line and not line.startswith(advice)), type(error).__name__)
    return telling.rstrip(".:;")[:240]

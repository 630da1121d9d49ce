"""Calling any model on a batch, and reading the logits out of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.misfit import misfit

# Keys of a batch that describe samples and are not model inputs, for batches without an `inputs` of their own.
_NOT_INPUTS = frozenset({"labels", "index", "weight", "sources", "view"})
_DECODER_INPUTS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})

# (class, batch keys, whether labels are there) -> names passed by keyword, or one of the two below.
_PLANS: dict[tuple[type, tuple[str, ...], bool], tuple[str, ...]] = {}
_FIRST_POSITIONALLY: tuple[str, ...] = ("<first>",)
_WITH_SHIFTED_LABELS: tuple[str, ...] = ("<shifted labels>",)


def forward(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call ``module`` on the inputs of ``batch``.

    Inputs that the module's ``forward`` names are passed by keyword (``input_ids=..., attention_mask=...``); a module
    that names none of them gets the first input positionally. ``labels`` and ``index`` are never passed. An
    encoder-decoder of transformers whose batch has labels and no ``decoder_input_ids`` gets the labels shifted right.

    Raises:
        UserError: ``forward`` requires an argument that the batch does not have, or an encoder-decoder has nothing for its
            decoder to read.
        MisfitError: it does not take inputs of that form.
    """
    inputs, plan = _planned(module, batch)
    given = {} if plan is _FIRST_POSITIONALLY else arguments(module, batch)
    try:
        return module(next(iter(inputs.values()))) if plan is _FIRST_POSITIONALLY else module(**given)
    except (RuntimeError, ValueError, IndexError) as error:
        refused = misfit(module, given or dict([next(iter(inputs.items()))]), error)
        if refused is None:
            raise
        raise refused from error


def arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of ``batch`` that :func:`forward` passes to ``module``, by their names in the batch; errors as there."""
    inputs, plan = _planned(module, batch)
    if plan is _FIRST_POSITIONALLY:
        name = next(iter(inputs))
        return {name: inputs[name]}
    if plan is _WITH_SHIFTED_LABELS:
        shifted = unwrapped(module).prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return arguments(module, {**inputs, "decoder_input_ids": shifted})
    return {name: inputs[name] for name in plan}


def _planned(module: nn.Module, batch: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    inputs = getattr(batch, "inputs", None)
    if inputs is None:
        inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    inner = unwrapped(module)
    key = (type(inner), tuple(inputs), "labels" in batch)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(inner, *key)
    return inputs, plan


def unwrapped(module: nn.Module) -> Any:
    """The module itself: a compiled wrapper hides the signature and the config of the module inside."""
    wrapped = module._modules.get("_orig_mod")
    return module if wrapped is None else wrapped


def _plan(module: nn.Module, owner: type, keys: tuple[str, ...], labelled: bool) -> tuple[str, ...]:
    if not keys:
        raise UserError(f"The batch has no input for {owner.__name__}; it needs at least one such as 'pixel_values'.")
    if hasattr(module, "prepare_decoder_input_ids_from_labels") and not _DECODER_INPUTS & set(keys):
        if not labelled:
            raise UserError(
                f"{owner.__name__} is an encoder-decoder, whose batches need 'labels' or 'decoder_input_ids'; this one has "
                f"{', '.join(repr(key) for key in keys)}."
            )
        return _WITH_SHIFTED_LABELS
    _, *parameters = inspect.signature(owner.forward).parameters.values()  # type: ignore[attr-defined]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name in keys]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if named:
        missing = [name for name in required if name not in named]
    elif positional:
        missing = [name for name in required if name != positional[0].name]
    elif any(p.kind is p.VAR_KEYWORD for p in parameters):
        return keys
    elif not required:
        raise UserError(f"{owner.__name__}.forward takes no input; give it a parameter for {keys[0]!r}.")
    else:
        missing = required
    if missing:
        raise UserError(
            f"{owner.__name__}.forward requires {missing[0]!r}, which the batch does not have; "
            f"its inputs are {', '.join(repr(key) for key in keys)}."
        )
    return tuple(named) or _FIRST_POSITIONALLY


def logits(module: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, "batch *positions classes"]:
    """Call ``module`` on ``batch`` and return its logits, see :func:`forward` and :func:`as_logits`."""
    output = forward(module, batch)
    return output if isinstance(output, Tensor) else as_logits(output, of=type(module).__name__)


def embedding(module: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, "batch features"]:
    """Call ``module`` on ``batch`` and return one vector per sample, see :func:`as_embedding`."""
    return as_embedding(forward(module, batch), of=type(module).__name__)


def as_embedding(output: Any, *, of: str = "The model") -> Float[Tensor, "batch features"]:
    """One vector per sample in what a model returned.

    It is ``.pooler_output``, else the mean of ``.last_hidden_state`` over its positions, else what :func:`as_logits` finds;
    flattened.

    Args:
        output: what the model returned.
        of: name of the model, for the error.

    Raises:
        UserError: there is no such thing in it.
    """
    pooled = getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return pooled.flatten(1)
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        # Tokens (batch, positions, width), or maps (batch, width, height, width).
        return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(2).mean(2)
    return as_logits(output, of=of).flatten(1)


def as_logits(output: Any, *, of: str = "The model") -> Float[Tensor, "batch *positions classes"]:
    """The logits in what a model returned: the tensor itself, ``.logits``, ``["logits"]`` or a tuple's first element.

    Args:
        output: what the model returned.
        of: name of the model, for the error.

    Raises:
        UserError: there are no logits in it.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    what = sorted(output) if isinstance(output, Mapping) else type(output).__name__
    raise UserError(
        f"{of} returned {what}, in which there are no logits; return a tensor, an object with '.logits', or a tuple "
        f"that begins with the logits."
    )

"""Taps: the outputs (or inputs) of submodules, read by module path while a model runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.models.spec import sentence


class Taps:
    """Reads intermediate tensors of a model through forward hooks, by module path, without changing it.

    Set once before the stage (and before ``module.compile()``), a tap works until closed::

        with Taps(model, ["blocks.*.activation", "classifier"]) as taps:
            logits = model(images)
            features = taps.take()  # {"blocks.0.activation": ..., "blocks.1.activation": ..., "classifier": ...}

    What is taken carries the gradient of the forward pass that made it. A new forward pass of the model drops what was
    not taken, and :meth:`take` drops everything, so no graph outlives its step. Recomputations of gradient
    checkpointing, which run inside the backward pass, are not read.

    Where the model holds in-place modules (``nn.ReLU(inplace=True)``), tensors are copied as they are read, so that
    each path gives what it put out itself. A functional in-place change (``x += y``) cannot be foreseen from outside:
    it is noticed at :meth:`take` and refused; pass ``clone=True`` then.

    Args:
        module: the model.
        paths: module paths as in ``module.named_modules()`` (``""`` is the model itself), or patterns of them: ``*``,
            ``?`` and ``[...]`` match within one part between dots, ``**`` any number of parts. A path may name a list
            or dictionary of modules only through its entries.
        side: read what the submodule returns, or the first tensor that it is given.
        item: which element to read of a tuple or mapping: an index, a key, or None for the first tensor (``1`` is the
            attention of a transformers attention layer). On the input side, a position or a keyword.
        calls: a submodule that is called several times in one forward pass is read at its ``last`` call, or at
            ``all`` (see :meth:`take_all`).
        clone: copy what is read. None: exactly when the model holds in-place modules.

    Attributes:
        paths: the paths that are read, patterns resolved, in the order of the model's modules for each pattern.

    Raises:
        UserError: no module has that path.
    """

    def __init__(
        self,
        module: nn.Module,
        paths: str | Iterable[str],
        *,
        side: Literal["output", "input"] = "output",
        item: int | str | None = None,
        calls: Literal["last", "all"] = "last",
        clone: bool | None = None,
    ) -> None:
        self.paths = resolve_paths(module, [paths] if isinstance(paths, str) else paths)
        self.side, self.item, self.calls = side, item, calls
        self.clone = any(getattr(m, "inplace", False) for m in module.modules()) if clone is None else clone
        self._read: dict[str, list[tuple[Tensor, int | None]]] = {path: [] for path in self.paths}
        self._handles = [module.register_forward_pre_hook(self._start_hook(module), prepend=True)]
        for path in self.paths:
            target = module.get_submodule(path)
            if side == "output":
                self._handles.append(target.register_forward_hook(self._output_hook(path, target)))
            else:
                self._handles.append(target.register_forward_pre_hook(self._input_hook(path, target), with_kwargs=True))

    # A deep copy of the model (an average of its weights, say) carries the same hook functions; each therefore acts
    # for the module that it was set on and for no copy.

    def _start_hook(self, root: nn.Module) -> Any:
        def start(module: nn.Module, args: Any) -> None:
            if module is root:
                self.clear()

        return start

    def _output_hook(self, path: str, target: nn.Module) -> Any:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            if module is target:
                self._keep(path, output)

        return read

    def _input_hook(self, path: str, target: nn.Module) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is target:
                self._keep(path, kwargs if isinstance(self.item, str) else (*args, *kwargs.values()))

        return read

    def _keep(self, path: str, value: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # a backward pass is running: this forward is a recomputation
            return
        tensor = _tensor(value, self.item)
        if tensor is None:
            at = "" if self.item is None else f" at {self.item!r}"
            raise UserError(f"The {self.side} of {path!r} has no tensor{at}: it is {_describe(value)}.")
        kept: tuple[Tensor, int | None]
        if self.clone:
            kept = tensor.clone(), None
        else:
            tracked = not (torch.compiler.is_compiling() or tensor.is_inference())
            kept = tensor, tensor._version if tracked else None
        if self.calls == "last":
            self._read[path] = [kept]
        else:
            self._read[path].append(kept)

    def take(self) -> dict[str, Tensor]:
        """What was read since the model's last forward pass began, by path; then forget it.

        Of several calls, the last one counts.

        Raises:
            UserError: a path was not reached by the forward pass, or its tensor was changed in place afterwards.
        """
        return {path: tensors[-1] for path, tensors in self.take_all().items()}

    def take_all(self) -> dict[str, list[Tensor]]:
        """As :meth:`take`, with the tensors of all calls in order (one where ``calls`` is ``last``)."""
        read, taken = dict(self._read), {}
        self.clear()
        for path, kept in read.items():
            if not kept:
                raise UserError(
                    f"The tap {path!r} read nothing; run the model before taking, and tap only modules that it calls."
                )
            if any(version is not None and tensor._version != version for tensor, version in kept):
                raise UserError(
                    f"The {self.side} of {path!r} was changed in place after the tap read it; give Taps 'clone=True'."
                )
            taken[path] = [tensor for tensor, _ in kept]
        return taken

    def clear(self) -> None:
        """Forget what was read."""
        for path in self.paths:
            self._read[path] = []

    def close(self) -> None:
        """Remove the hooks and forget what was read."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resolve_paths(module: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """The module paths that match any of ``patterns`` (see :class:`Taps`), each once.

    Raises:
        UserError: a pattern matches no module; the nearest path is named.
    """
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern in names:
            found[pattern] = None
            continue
        matches = [name for name in names if _matcher(pattern).fullmatch(name)]
        if not matches:
            hint = nearest(pattern, names[1:])
            if not hint.startswith("did you mean"):
                first = ", ".join(map(repr, names[1:9]))
                hint = f"its first modules are {first}" if first else "it has no submodules"
            raise UserError(sentence(f"{type(module).__name__} has no module {pattern!r}; {hint}"))
        found.update(dict.fromkeys(matches))
    return tuple(found)


def _matcher(pattern: str) -> re.Pattern[str]:
    """A regular expression for a pattern in which ``*``, ``?`` and ``[...]`` stay within one part, ``**`` does not."""
    expression, position = "", 0
    for token in re.finditer(r"\*\*\.|\.?\*\*$|\*|\?|\[[^\]]+\]", pattern):
        expression += re.escape(pattern[position : token.start()])
        match text := token.group():
            case "**.":
                expression += r"(?:[^.]+\.)*"
            case ".**":
                expression += r"(?:\.[^.]+)+"
            case "**":
                expression += r".*"
            case "*":
                expression += r"[^.]*"
            case "?":
                expression += r"[^.]"
            case _:
                expression += text.replace("[!", "[^")
        position = token.end()
    return re.compile(expression + re.escape(pattern[position:]))


def _tensor(value: Any, item: int | str | None) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if item in (None, 0) else None
    if isinstance(value, Mapping):
        values = list(value.values())
        chosen = value.get(item) if isinstance(item, str) else None
    elif isinstance(value, (tuple, list)):
        values, chosen = list(value), None
    else:
        return getattr(value, item, None) if isinstance(item, str) else None
    if item is None:
        return next((v for v in values if isinstance(v, Tensor)), None)
    if isinstance(item, int):
        chosen = values[item] if -len(values) <= item < len(values) else None
    return chosen if isinstance(chosen, Tensor) else None


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping with " + ", ".join(map(repr, value))
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of " + ", ".join(type(v).__name__ for v in value)
    return f"a {type(value).__name__}"

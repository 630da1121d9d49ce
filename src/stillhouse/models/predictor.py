"""Teachers that are no PyTorch modules: fitted estimators in the manner of scikit-learn (forests, gradient boosting, ...)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PrivateAttr, field_serializer, model_validator
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import ModelSpec

FLOOR = 1e-6
"""The least probability that is passed on: a forest says 0 where none of its trees votes, whose logarithm is no number."""


def predicts(value: Any) -> bool:
    """Whether an object predicts as scikit-learn's estimators do."""
    return not isinstance(value, type | nn.Module) and (hasattr(value, "predict_proba") or hasattr(value, "predict"))


class Predictor(nn.Module):
    """A fitted estimator as a module: logarithms of ``predict_proba`` as logits, or what ``predict`` says of numbers.

    Args:
        estimator: the fitted estimator.
        facts: of the data: its classes say which column of the logits is which.

    Raises:
        UserError: it predicts no probabilities of classes, is not fitted, or knows classes that the data does not have.
    """

    digest: Tensor

    def __init__(self, estimator: Any, facts: Facts) -> None:
        super().__init__()
        self.estimator = estimator
        self.columns: list[int] | None = None
        self.outputs = 1
        name = type(estimator).__name__
        if facts.task == "classification":
            if not hasattr(estimator, "predict_proba"):
                raise UserError(f"{name} has no predict_proba, so it cannot teach a classifier; choose one that has.")
            if not hasattr(estimator, "classes_"):
                raise UserError(f"{name} is not fitted; call its fit first.")
            self.outputs = facts.num_classes or len(estimator.classes_)
            self.columns = [_place(label, facts, name, self.outputs) for label in estimator.classes_]
        self.register_buffer("digest", torch.frombuffer(bytearray(bytes.fromhex(hashed(estimator))), dtype=torch.uint8))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        """Logits of flattened inputs, without a graph."""
        rows = x.detach().flatten(1).cpu().numpy()
        if self.columns is None:
            values = np.asarray(self.estimator.predict(rows), dtype=np.float32).reshape(len(rows), -1)
            return torch.from_numpy(values).to(x.device)
        whole = np.full((len(rows), self.outputs), FLOOR, dtype=np.float32)
        whole[:, self.columns] = np.maximum(self.estimator.predict_proba(rows), FLOOR)
        return torch.from_numpy(whole).log().to(x.device)

    def extra_repr(self) -> str:
        """The estimator, and what it learned as a hash: two that differ are told apart by their text."""
        return f"{type(self.estimator).__name__}, {hashed(self.estimator)}"


def hashed(estimator: Any) -> str:
    """A hash of an estimator with all that it learned."""
    # In every installation of scikit-learn.
    found: str = importlib.import_module("joblib").hash(estimator)
    return found


def _place(label: Any, facts: Facts, name: str, outputs: int) -> int:
    if facts.class_names and str(label) in facts.class_names:
        return facts.class_names.index(str(label))
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < outputs:
        raise UserError(f"{name} predicts the class {label!r}, which the data does not have.")
    return number


class PredictorSpec(ModelSpec):
    """A fitted estimator given in Python; ``predict_proba`` of a classifier, ``predict`` of a regressor."""

    kind = "predictor"

    object: Any
    """The estimator."""

    _hash: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _passed_again(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("object"), str):
            raise ValueError(
                f"the model is the Python object {fields['object']!r}, and a recipe with it runs only with the object "
                f"passed again"
            )
        return fields

    def model_post_init(self, context: Any) -> None:
        self._hash = hashed(self.object)

    @field_serializer("object")
    def _name(self, value: Any) -> str:
        return f"{type(value).__module__}.{type(value).__qualname__}"

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, "object": self._name(self.object), "fingerprint": self._hash}

    def build(self, facts: Facts) -> nn.Module:
        return Predictor(self.object, facts)

"""A classifier whose logits are divided by their standard deviation: every sample is equally sure."""

from __future__ import annotations

from typing import Any, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from stillhouse.facts import Facts
from stillhouse.losses.logit_matching import standardize
from stillhouse.models.calling import logits
from stillhouse.models.spec import ModelSpec, origin, remember


class Standardized(nn.Module):
    """The same predictions as ``model``, with the logits centred and divided by their deviation over the classes.

    What a student of MIX-KD (arXiv 2211.03946) is trained to give probabilities by.

    Args:
        model: the classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if (built := origin(model)) is not None:
            spec, facts = built
            remember(self, StandardizedSpec(model=spec), facts)

    def forward(self, **inputs: Any) -> Float[Tensor, "batch classes"]:
        """The standardised logits."""
        return standardize(logits(self.model, inputs))


class StandardizedSpec(ModelSpec):
    """A classifier with standardised logits; text form ``standardized:MODEL``."""

    kind = "standardized"

    model: ModelSpec = Field()
    """The classifier."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError("'standardized' needs a model, as in 'standardized:cnn'")
        return cls(model=text)  # type: ignore[arg-type]

    def build(self, facts: Facts) -> nn.Module:
        return Standardized(self.model.build(facts))

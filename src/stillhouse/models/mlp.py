"""Multi-layer perceptron on flattened inputs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from stillhouse.facts import Facts
from stillhouse.models.spec import Activation, NetworkSpec, activation, classifier, numbers


class MLP(nn.Module):
    """Linear layers with an activation (and dropout) after each, then a linear classifier.

    Args:
        inputs: number of values of one sample.
        widths: widths of the hidden layers; empty for a linear model.
        outputs: size of the output; 0 returns the last hidden layer.
        activation_name: activation after each hidden layer.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
        activation_name: Activation = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        linear=nn.Linear(before, after),
                        activation=activation(activation_name),
                        dropout=nn.Dropout(dropout),
                    )
                )
                for before, after in pairwise(sizes)
            )
        )
        self.classifier = classifier(sizes[-1], outputs)

    def features(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch features"]:
        """The last hidden layer (the flattened input for a linear model)."""
        features: Tensor = self.blocks(x.flatten(1))
        return features

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class MLPSpec(NetworkSpec):
    """A multi-layer perceptron; text form ``mlp:256-256`` gives the widths."""

    kind = "mlp"

    widths: tuple[Annotated[int, Field(ge=1)], ...] = (256, 256)
    """Widths of the hidden layers; empty for a linear model."""
    activation: Activation = "relu"
    """Activation after each hidden layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a hidden unit."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls() if not text else cls(widths=tuple(numbers(text, "mlp:256-256")))

    def build(self, facts: Facts) -> MLP:
        inputs = math.prod(facts.input_shape)
        return MLP(inputs, self.widths, self.outputs(facts), self.activation, self.dropout)

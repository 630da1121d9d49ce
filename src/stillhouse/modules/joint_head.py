"""The head that tells class and view at once, and how all views of a sample become one prediction."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.modules.views import Views

WEIGHTS, DESCRIPTION = "joint.safetensors", "joint.json"


class JointHead(nn.Module):
    """A linear classifier over pairs of class and view: output ``i M + j`` is class i seen in view j (SLA, arXiv 1910.05872).

    The list of transformations belongs to it and is stored with it, as its outputs mean nothing with another.

    Args:
        features: width of the embedding that it reads.
        num_classes: number of classes N.
        views: the transformations, M of them.
        like: the classifier of one view. Its weights become those of view 0, so that with the identity alone this head is
            that classifier.
    """

    def __init__(self, features: int, num_classes: int, views: Views, like: nn.Module | None = None) -> None:
        super().__init__()
        self.num_classes, self.views = num_classes, views
        biased = getattr(like, "bias", None) is not None or like is None
        self.linear = nn.Linear(features, num_classes * views.count, bias=biased)
        weight, bias = getattr(like, "weight", None), getattr(like, "bias", None)
        if isinstance(weight, Tensor) and weight.shape == (num_classes, features):
            with torch.no_grad():
                self.linear.weight[:: views.count] = weight
                if isinstance(bias, Tensor):
                    self.linear.bias[:: views.count] = bias

    def forward(self, embedding: Float[Tensor, "rows features"]) -> Float[Tensor, "rows joint"]:
        """Scores of all pairs for each row."""
        scores: Tensor = self.linear(embedding)
        return scores

    @torch.no_grad()
    def write_first_view(self, classifier: nn.Linear) -> None:
        """Give a classifier of N outputs the weights with which this head tells the classes in view 0."""
        classifier.weight.copy_(self.linear.weight[:: self.views.count])
        if classifier.bias is not None:
            classifier.bias.copy_(self.linear.bias[:: self.views.count])

    def save(self, directory: Path) -> None:
        """Write weights and transformations into ``directory``."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.linear.state_dict().items()}
        save_file(tensors, directory / WEIGHTS)
        told = {"num_classes": self.num_classes, "transformations": self.views.dump()}
        (directory / DESCRIPTION).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, views: Views | None = None) -> JointHead:
        """The head that :meth:`save` wrote.

        Args:
            directory: where it is.
            views: the transformations that it is expected to have; needed where they were Python functions.

        Raises:
            UserError: it is missing or damaged, or was trained with other transformations.
        """
        place = Path(directory)
        try:
            told = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
            tensors = load_file(place / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{place} holds no joint head that can be read: {error}.") from None
        if views is not None and views.dump() != told["transformations"]:
            raise UserError(
                f"{place} was trained with the transformations {told['transformations']}, not {views.dump()}; its outputs mean "
                "nothing with others."
            )
        try:
            found = Views.parse(told["transformations"]) if views is None else views
        except ValueError as error:
            raise UserError(f"{place}: {error}.") from None
        outputs, features = tensors["weight"].shape
        if outputs != told["num_classes"] * found.count:
            raise UserError(
                f"{place} has {outputs} outputs, and {told['num_classes']} classes in {found.count} views are "
                f"{told['num_classes'] * found.count}."
            )
        head = cls(features, told["num_classes"], found)
        if "bias" not in tensors:
            head.linear.bias = None  # type: ignore[assignment]
        head.linear.load_state_dict(tensors)
        return head.eval()

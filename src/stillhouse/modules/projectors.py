"""Parts between student and teacher that are trained with the student and not shipped: regressors, connectors, heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import feature_maps


class Regressor(nn.Module):
    """A student's features brought to the shape of the teacher's (FitNets, arXiv 1412.6550).

    For maps a convolution, batch norm and ReLU, as in the public toolkits: 3x3 with stride 2 where the student's map is
    twice as large, transposed 4x4 with stride 2 where it is half as large, otherwise a kernel that the larger map is cut
    down by (1x1 at equal sizes). A map that is smaller in some other ratio is enlarged first. For tokens a linear layer
    per token (their number must agree), for vectors a linear layer.

    Args:
        student: shape of one sample's features of the student: (channels, height, width), (tokens, width) or (width,).
        teacher: that of the teacher's.
        relu: end in a ReLU; without one for features before the activation, or features of no ReLU network.

    Raises:
        UserError: shapes of different kinds, or tokens of different number.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], *, relu: bool = True) -> None:
        super().__init__()
        student, teacher = tuple(student), tuple(teacher)
        if len(student) != len(teacher) or len(student) not in (1, 2, 3):
            raise UserError(
                f"A regressor leads from maps to maps, tokens to tokens or vectors to vectors, not from features of shape "
                f"{student} to {teacher}."
            )
        if len(student) == 2 and student[0] != teacher[0]:
            raise UserError(
                f"A regressor keeps the number of tokens, but the student has {student[0]} and the teacher {teacher[0]}."
            )
        self.enlarged: tuple[int, int] | None = None
        last: list[nn.Module] = [nn.ReLU()] if relu else []
        if len(student) == 3:
            self.layers = nn.Sequential(self._convolution(student, teacher), nn.BatchNorm2d(teacher[0]), *last)
        else:
            self.layers = nn.Sequential(nn.Linear(student[-1], teacher[-1]), *last)

    def _convolution(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
        (channels, *size), (wanted, *target) = student, teacher
        if size == [2 * side for side in target]:
            return nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
        if target == [2 * side for side in size]:
            return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
        if any(a < b for a, b in zip(size, target, strict=True)):
            self.enlarged = (max(size[0], target[0]), max(size[1], target[1]))
            size = list(self.enlarged)
        return nn.Conv2d(channels, wanted, (1 + size[0] - target[0], 1 + size[1] - target[1]))

    def forward(self, features: Float[Tensor, "batch *student"]) -> Float[Tensor, "batch *teacher"]:
        """The student's features in the teacher's shape."""
        if self.enlarged is not None:
            features = F.interpolate(features, self.enlarged, mode="nearest")
        out: Tensor = self.layers(features)
        return out


class Connector(nn.Module):
    """A 1x1 convolution without bias and a batch norm, from the student's channels to the teacher's (AB, OFD).

    Knowledge Transfer via Distillation of Activation Boundaries (arXiv 1811.03233) and A Comprehensive Overhaul of Feature
    Distillation (arXiv 1904.01866); initialised as there, normal with standard deviation sqrt(2 / channels out). The
    student's side of losses on features before the activation. Vectors and tokens count as maps.

    Args:
        student_channels: channels of the student.
        teacher_channels: channels of the teacher.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels)
        nn.init.normal_(self.convolution.weight, std=math.sqrt(2 / teacher_channels))

    def forward(self, features: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch teacher height width"]:
        """Maps with the teacher's channels."""
        out: Tensor = self.norm(self.convolution(feature_maps(features)))
        return out


class VariationalRegressor(nn.Module):
    """Predicts the teacher's features from the student's: a mean for each value, a variance for each channel (VID).

    Variational Information Distillation (arXiv 1904.05835): three 1x1 convolutions without bias with ReLUs between for the
    mean; the variance is a softplus of one number per channel, plus ``eps``. Its loss is
    :func:`~stillhouse.losses.feature_matching.variational_information`.

    Args:
        student_channels: channels of the student.
        teacher_channels: channels of the teacher.
        hidden: channels between; the teacher's by default, as in the public toolkits.
        variance: the variance at the start, 5 in the authors' code.
        eps: the least variance, 1e-5 in the authors' code.

    Raises:
        UserError: the variance is not above ``eps``, or ``eps`` not above 0.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        hidden: int | None = None,
        variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not variance > eps > 0:
            raise UserError(f"A variational regressor's variance ({variance}) is above eps ({eps}), and eps above 0.")
        hidden = teacher_channels if hidden is None else hidden
        self.eps = eps
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, teacher_channels, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - eps))))

    def forward(
        self, features: Float[Tensor, "batch *shape"]
    ) -> tuple[Float[Tensor, "batch teacher height width"], Float[Tensor, " teacher"]]:
        """Mean and variance of the teacher's features, given the student's (maps; tokens and vectors count as such)."""
        return self.mean(feature_maps(features)), F.softplus(self.log_scale) + self.eps


class MaskedGenerator(nn.Module):
    """Makes the teacher's features from the student's, part of which is masked (MGD, arXiv 2205.01529).

    A 1x1 convolution where the channels differ, a random mask, then the generation block: 3x3 convolution, ReLU, 3x3
    convolution. Its loss is :func:`~stillhouse.losses.feature_matching.masked_generation`.

    Args:
        student_channels: channels of the student.
        teacher_channels: channels of the teacher.
        ratio: the probability that a position (or channel) is masked; the official classification recipe has 0.15.
        mask: what is masked as a whole: positions of the map, as the paper describes, or channels, as the official
            classification code does.

    Raises:
        UserError: a ratio outside 0 to 1 (1 excluded), or an unknown mask.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        ratio: float = 0.15,
        mask: Literal["positions", "channels"] = "positions",
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise UserError(f"A masked generator's ratio lies between 0 and 1, not {ratio}.")
        if mask not in ("positions", "channels"):
            raise UserError(f"A masked generator masks 'positions' or 'channels', not {mask!r}.")
        self.ratio, self.mask = ratio, mask
        same = student_channels == teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(
        self,
        features: Float[Tensor, "batch *shape"],
        *,
        kept: Bool[Tensor, "batch channels height width"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch teacher height width"]:
        """Generated features.

        Args:
            features: the student's (maps; tokens and vectors count as such).
            kept: what is not masked, of a shape that broadcasts to the teacher's maps; drawn when not given.
            generator: source of the mask, torch's global one by default.
        """
        maps = self.align(feature_maps(features))
        if kept is None:
            batch, channels, height, width = maps.shape
            shape = (batch, channels, 1, 1) if self.mask == "channels" else (batch, 1, height, width)
            kept = torch.rand(shape, device=maps.device, generator=generator) >= self.ratio
        out: Tensor = self.generation(maps * kept)
        return out


class LinearProjector(nn.Module):
    """Flattened features through a linear layer, to unit length if asked.

    The embedding of CRD (arXiv 1910.10699: width 128, unit length, one for each side) and of CC in RepDistiller (width 128,
    no normalisation).

    Args:
        inputs: width of the flattened features.
        width: width of the embedding.
        normalize: bring embeddings to unit length.
    """

    def __init__(self, inputs: int, width: int = 128, *, normalize: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.normalize = normalize

    def forward(self, features: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch width"]:
        """The embeddings, in float32 where they are normalised."""
        out: Tensor = self.linear(features.flatten(1))
        if not self.normalize:
            return out
        return F.normalize(out if out.dtype == torch.float64 else out.float(), dim=1)


class EmbeddingProjector(nn.Module):
    """The student's embedding in the teacher's width: batch norm, dropout, linear layer (ND loss, arXiv 2305.17007).

    The classifier goes on reading the raw embedding. Biases start at 0 and the norm's scale at 1.

    Args:
        student_width: width of the student's embedding.
        teacher_width: that of the teacher's.
        dropout: rate of the dropout, 0.5 in the official code.

    Raises:
        UserError: the rate is outside 0 to 1.
    """

    def __init__(self, student_width: int, teacher_width: int, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"An embedding projector's dropout lies between 0 and 1, not {dropout}.")
        linear = nn.Linear(student_width, teacher_width)
        nn.init.zeros_(linear.bias)
        self.layers = nn.Sequential(nn.BatchNorm1d(student_width), nn.Dropout(dropout), linear)

    def forward(self, embedding: Float[Tensor, "batch student"]) -> Float[Tensor, "batch teacher"]:
        """The projected embedding."""
        out: Tensor = self.layers(embedding)
        return out


class AuxiliaryHead(nn.Module):
    """The second head of dual-head distillation (DHKD, arXiv 2411.08937); thrown away after training.

    Args:
        width: width of the student's embedding.
        num_classes: number of classes.
        nonlinear: linear, dropout, batch norm, ReLU, linear, for networks of different families; a single linear layer
            otherwise.
        hidden: width between, 200 in the official code.
        dropout: rate of the dropout, 0.1 in the official code.
    """

    def __init__(
        self, width: int, num_classes: int, *, nonlinear: bool = False, hidden: int = 200, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.Dropout(dropout),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
        if not nonlinear:
            self.layers = nn.Sequential(nn.Linear(width, num_classes))

    def forward(self, embedding: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """The auxiliary logits."""
        out: Tensor = self.layers(embedding)
        return out


class ProjectionHead(nn.Sequential):
    """Linear layers, each but the last with batch norm and ReLU, none with a bias (Barlow Twins, arXiv 2103.03230).

    It lies between a representation and a self-supervised loss, and is thrown away after training.

    Args:
        width: width of the representation.
        layers: widths of the layers' outputs, three of 8192 in the official code.

    Raises:
        UserError: no layer.
    """

    def __init__(self, width: int, layers: Sequence[int]) -> None:
        if not layers:
            raise UserError("A projection head has at least 1 layer.")
        parts: list[nn.Module] = []
        for before, after in pairwise((width, *layers)):
            parts += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        super().__init__(*parts[:-2])

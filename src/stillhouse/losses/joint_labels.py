"""Joint labels of class and view: self-supervised label augmentation (SLA, arXiv 1910.05872) and its distillation.

M views of each image are M rows, the views of one image one after the other: row ``b M + j`` is view j of image b, and view 0
is the image itself. The joint class of class i and view j is ``i M + j``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.losses.divergences import cross_entropy, kl


def joint_labels(labels: Int[Tensor, " batch"], num_views: int) -> Int[Tensor, " rows"]:
    """Labels of class and view for every view of every image: ``y M + j``.

    Args:
        labels: classes of the images.
        num_views: views M of each.

    Raises:
        UserError: no views, or labels that are not one integer per image.

    >>> joint_labels(torch.tensor([2, 0]), 3).tolist()
    [6, 7, 8, 0, 1, 2]
    """
    if num_views < 1:
        raise UserError(f"joint_labels: num_views is at least 1, not {num_views}.")
    if labels.is_floating_point() or labels.dim() != 1:
        raise UserError(f"joint_labels: labels are one class index per image, not of shape {tuple(labels.shape)}.")
    return (labels[:, None] * num_views + torch.arange(num_views, device=labels.device)).flatten()


def joint_cross_entropy(
    joint_logits: Float[Tensor, "rows joint"],
    labels: Int[Tensor, " batch"],
    num_views: int,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Cross-entropy over the joint classes, averaged over images and averaged or summed over views: L_SLA.

    Args:
        joint_logits: scores of all joint classes for every view of every image.
        labels: classes of the images.
        num_views: views M of each.
        reduction: over the views of an image; ``"sum"`` is the released code's "large loss", M times the mean, which it
            uses on ImageNet and iNaturalist.

    Raises:
        UserError: shapes that do not match.

    >>> round(joint_cross_entropy(torch.zeros(4, 6), torch.tensor([0, 2]), 2).exp().item(), 4)
    6.0
    """
    _, batch, _ = _checked("joint_cross_entropy", joint_logits, num_views)
    if len(labels) != batch:
        raise UserError(
            f"joint_cross_entropy: {len(joint_logits)} rows are {batch} images of {num_views} views, but there are "
            f"{len(labels)} labels."
        )
    if reduction not in ("mean", "sum"):
        raise UserError(f"joint_cross_entropy: reduction is 'mean' or 'sum' over views, not {reduction!r}.")
    loss = cross_entropy(joint_logits, joint_labels(labels, num_views))
    return loss * num_views if reduction == "sum" else loss


def matched_logits(joint_logits: Float[Tensor, "rows joint"], num_views: int) -> Float[Tensor, "batch classes"]:
    """One prediction from all views of an image: the mean of the logits in which class scores of view j meet view j.

    ``a_i = mean_j s_j[i, j]`` : logits are averaged, not probabilities.

    Args:
        joint_logits: scores of all joint classes for every view of every image.
        num_views: views M of each.

    Raises:
        UserError: rows or joint classes that are no multiple of ``num_views``.

    >>> matched_logits(torch.tensor([[1.0, 9.0, 2.0, 9.0], [9.0, 3.0, 9.0, 6.0]]), 2).tolist()
    [[2.0, 4.0]]
    """
    wide, batch, classes = _checked("matched_logits", joint_logits, num_views)
    return wide.view(batch, num_views, classes, num_views).diagonal(dim1=1, dim2=3).mean(-1)


def first_view_logits(joint_logits: Float[Tensor, "rows joint"], num_views: int) -> Float[Tensor, "batch classes"]:
    """Logits from the unchanged image alone, restricted to the joint classes of view 0 (single inference).

    Args:
        joint_logits: scores of all joint classes for every view of every image.
        num_views: views M of each.

    Raises:
        UserError: rows or joint classes that are no multiple of ``num_views``.

    >>> first_view_logits(torch.tensor([[1.0, 9.0, 2.0, 9.0], [9.0, 3.0, 9.0, 6.0]]), 2).tolist()
    [[1.0, 2.0]]
    """
    wide, batch, classes = _checked("first_view_logits", joint_logits, num_views)
    return wide.view(batch, num_views, classes, num_views)[:, 0, :, 0]


def aggregation_distillation(
    single_logits: Float[Tensor, "batch classes"],
    joint_logits: Float[Tensor, "rows joint"],
    num_views: int,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Teach a head that sees one view what all views say together: ``T^2 KL(softmax(a / T) || softmax(u / T))``.

    The last term of SLA+SD; no gradient reaches the joint head.

    Args:
        single_logits: logits of the second head on the unchanged images.
        joint_logits: scores of all joint classes for every view of every image.
        num_views: views M of each.
        temperature: softmax temperature, 1 in the released code.

    Raises:
        UserError: shapes that do not match.

    >>> joint = torch.tensor([[1.0, 9.0, 2.0, 9.0], [9.0, 3.0, 9.0, 6.0]])
    >>> aggregation_distillation(torch.tensor([[1.0, 3.0]]), joint, 2).item()
    0.0
    """
    return kl(single_logits, matched_logits(joint_logits.detach(), num_views), temperature)


def _checked(where: str, joint_logits: Tensor, num_views: int) -> tuple[Tensor, int, int]:
    if num_views < 1:
        raise UserError(f"{where}: num_views is at least 1, not {num_views}.")
    if joint_logits.dim() != 2 or any(size % num_views for size in joint_logits.shape):
        raise UserError(
            f"{where}: joint_logits are (images x {num_views} views, classes x {num_views}), which the shape "
            f"{tuple(joint_logits.shape)} is not."
        )
    rows, joint = joint_logits.shape
    wide = joint_logits if joint_logits.dtype == torch.float64 else joint_logits.float()
    return wide, rows // num_views, joint // num_views

"""Whether two embeddings of the same items agree on who is near whom: distances, neighbours, retrieval."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError

Items = Float[Tensor, "items width"]


def distance_correlation(first: Items, second: Items) -> Float[Tensor, ""]:
    """Spearman's correlation between all pairwise Euclidean distances of one embedding and those of another, in [-1, 1].

    Widths may differ. Ties share their mean rank.

    >>> points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> round(distance_correlation(points, 2 * points).item(), 6)
    1.0

    Raises:
        UserError: the embeddings are not of the same items, or of fewer than three.
    """
    _check(first, second, at_least=3)
    above = torch.triu_indices(len(first), len(first), offset=1)
    ranks = [_ranks(torch.cdist(x.double(), x.double())[above[0], above[1]]) for x in (first, second)]
    one, other = (rank - rank.mean() for rank in ranks)
    lengths = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    correlation: Tensor = (one @ other) / lengths.clamp_min(1e-12)
    return correlation


def neighbour_overlap(first: Items, second: Items, k: int = 10) -> Float[Tensor, ""]:
    """Share of the k nearest neighbours of an item in one embedding that are also among those in the other, in [0, 1].

    >>> points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> neighbour_overlap(points, -points, k=2).item()
    1.0

    Raises:
        UserError: the embeddings are not of the same items, or there are not more than k.
    """
    _check(first, second, at_least=2)
    if not 1 <= k < len(first):
        raise UserError(f"Among {len(first)} items each has 1 to {len(first) - 1} neighbours, not {k}.")
    near = [
        torch.zeros(len(first), len(first), dtype=torch.bool).scatter_(1, _nearest(x, k), True) for x in (first, second)
    ]
    return (near[0] & near[1]).double().sum() / (k * len(first))


def retrieval_rank1(queries: Items, items: Items) -> Float[Tensor, ""]:
    """Share of queries whose most similar item, by cosine, is the one at the same place, in [0, 1]; chance is one in N.

    >>> retrieval_rank1(torch.eye(3), torch.eye(3) + 0.1).item()
    1.0

    Raises:
        UserError: there are not as many queries of the same width as items.
    """
    if queries.shape != items.shape or queries.dim() != 2 or not len(items):
        raise UserError(
            f"Queries and items are equally many and wide, not {tuple(queries.shape)} and {tuple(items.shape)}; project one "
            "side first."
        )
    one, other = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, items))
    return ((one @ other.T).argmax(1) == torch.arange(len(items), device=items.device)).double().mean()


def _nearest(items: Tensor, k: int) -> Int[Tensor, "items k"]:
    distances = torch.cdist(items.double(), items.double()).fill_diagonal_(float("inf"))
    return distances.topk(k, largest=False).indices.cpu()


def _ranks(values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    sizes: Tensor = counts.double()
    return (sizes.cumsum(0) - (sizes - 1) / 2)[place]


def _check(first: Tensor, second: Tensor, at_least: int) -> None:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or len(first) < at_least:
        raise UserError(
            f"Two embeddings of the same items, at least {at_least}, are (items, width) each, not {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )

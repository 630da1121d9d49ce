"""Agreement of two embeddings on who is near whom, against SciPy and scikit-learn."""

import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors

from stillhouse.errors import UserError
from stillhouse.metrics import distance_correlation, neighbour_overlap, retrieval_rank1


@pytest.fixture
def pair():
    torch.manual_seed(0)
    one = torch.randn(40, 6)
    return one, torch.cat([one[:, :3] + 0.5 * torch.randn(40, 3), torch.randn(40, 1)], 1)


def test_distances_correlate_as_scipy_says(pair):
    expected = spearmanr(pdist(pair[0].double()), pdist(pair[1].double())).statistic
    assert distance_correlation(*pair).item() == pytest.approx(expected, abs=1e-12)
    ties = torch.randint(3, (30, 2)).float()
    expected = spearmanr(pdist(ties.double()), pdist(pair[1][:30].double())).statistic
    assert distance_correlation(ties, pair[1][:30]).item() == pytest.approx(expected, abs=1e-12)


def test_neighbours_are_scikit_learns(pair):
    near = [NearestNeighbors(n_neighbors=7).fit(x).kneighbors(return_distance=False) for x in pair]
    expected = sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True)) / (7 * 40)
    assert neighbour_overlap(*pair, k=7).item() == pytest.approx(expected)
    assert neighbour_overlap(pair[0], 3 * pair[0] @ torch.linalg.qr(torch.randn(6, 6)).Q, k=7).item() == 1.0


def test_retrieval_counts_the_right_places():
    items = torch.eye(4)
    queries = items[[0, 1, 3, 2]] * 5
    assert retrieval_rank1(queries, items).item() == 0.5


def test_embeddings_of_other_items_are_refused(pair):
    with pytest.raises(UserError, match="Two embeddings of the same items"):
        distance_correlation(pair[0], pair[1][:-1])
    with pytest.raises(UserError, match="1 to 39 neighbours, not 40"):
        neighbour_overlap(*pair, k=40)
    with pytest.raises(UserError, match="project one side first"):
        retrieval_rank1(*pair)

"""Losses on relations: by their definitions, what is free (scale, rotation, order), and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.relations import (
    contextual_similarity,
    correlation_congruence,
    local_preserving,
    neighbour_graph,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=7))[0]


STUDENT, TEACHER = random(7, 5), random(7, 9, seed=1)
LOSSES = {
    "sp": similarity_preserving,
    "pkt": pkt,
    "pkt, code": lambda s, t: pkt(s, t, variant="code"),
    "rkd distance": rkd_distance,
    "rkd angle": rkd_angle,
    "rkd angle, in chunks": lambda s, t: rkd_angle(s, t, chunk=3),
    "cc": correlation_congruence,
    "cc, bilinear": lambda s, t: correlation_congruence(s, t, kernel="bilinear"),
    "trg local": lambda s, t: local_preserving(s, t, k=3),
    "trg local, teacher's": lambda s, t: local_preserving(s, t, k=3, neighbours="teacher", direction="teacher"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_zero_with_zero_gradient_where_both_agree_and_positive_elsewhere(name):
    student = STUDENT.clone().requires_grad_()
    loss = LOSSES[name](student, STUDENT)
    assert abs(loss.item()) < 1e-9
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-6
    assert LOSSES[name](STUDENT, TEACHER) > 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_scale_and_rotation_of_either_side_are_free_and_samples_have_no_order(name):
    loss = LOSSES[name](STUDENT, TEACHER)
    close = {"rtol": 1e-5, "atol": 1e-9}  # PKT's guards are no exact invariants
    torch.testing.assert_close(LOSSES[name](5 * STUDENT @ rotation(5), TEACHER), loss, **close)
    torch.testing.assert_close(LOSSES[name](STUDENT, 0.2 * TEACHER @ rotation(9)), loss, **close)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    torch.testing.assert_close(LOSSES[name](STUDENT[order], TEACHER[order]), loss, **close)
    assert (LOSSES[name](STUDENT[order], TEACHER) - loss).abs() > 1e-7, "samples must be paired"


@pytest.mark.parametrize("name", ["rkd distance", "rkd angle"])
def test_a_shift_is_free_too(name):
    torch.testing.assert_close(LOSSES[name](STUDENT + 3, TEACHER), LOSSES[name](STUDENT, TEACHER))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, TEACHER), student)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_are_computed_in_single(name):
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    expected = LOSSES[name](student.float(), teacher.float())
    torch.testing.assert_close(LOSSES[name](student, teacher), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](student.float(), teacher.float()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if "trg" not in name])
def test_maps_count_as_flat_vectors_and_batches_must_agree(name):
    maps = random(7, 2, 3, 2)
    torch.testing.assert_close(LOSSES[name](maps, TEACHER), LOSSES[name](maps.flatten(1), TEACHER))
    with pytest.raises(UserError, match=r"\(7, 5\) and \(6, 9\)"):
        LOSSES[name](STUDENT, TEACHER[:6])


@pytest.mark.parametrize("name", LOSSES)
def test_samples_that_coincide_do_no_harm(name):
    same = torch.ones(7, 5, requires_grad=True)
    loss = LOSSES[name](same, TEACHER.float())
    assert loss.isfinite()
    assert torch.autograd.grad(loss, same)[0].isfinite().all()


# By definition ------------------------------------------------------------------------------------------------------------


def test_similarity_preserving_by_its_definition():
    def similarity(x):
        gram = x @ x.T
        return gram / gram.norm(dim=1, keepdim=True)

    expected = (similarity(STUDENT) - similarity(TEACHER)).norm() ** 2 / 49
    torch.testing.assert_close(similarity_preserving(STUDENT, TEACHER), expected)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_pkt_by_its_definition(variant):
    def conditional(x):
        kernel = (F.cosine_similarity(x[:, None], x[None], dim=2) + 1) / 2
        if variant == "paper":
            kernel = kernel - kernel.diag().diag()
        return kernel / kernel.sum(1, keepdim=True)

    p, q = conditional(TEACHER), conditional(STUDENT)
    expected = torch.special.xlogy(p, p / q.masked_fill(p == 0, 1)).sum() / 49
    torch.testing.assert_close(pkt(STUDENT, TEACHER, variant=variant), expected, rtol=1e-4, atol=0)


def test_pkt_needs_samples_to_compare():
    with pytest.raises(UserError, match="2 samples have no probabilities"):
        pkt(STUDENT[:2], TEACHER[:2])
    assert pkt(STUDENT[:2], TEACHER[:2], variant="code") > 0
    with pytest.raises(UserError, match="there is no variant 'papre'; did you mean 'paper'"):
        pkt(STUDENT, TEACHER, variant="papre")


def test_rkd_by_loops_over_pairs_and_triples():
    def relative(x):
        distances = (x[:, None] - x[None]).norm(dim=2)
        return distances / (distances.sum() / 42)

    torch.testing.assert_close(rkd_distance(STUDENT, TEACHER), F.smooth_l1_loss(relative(STUDENT), relative(TEACHER)))

    def cosine(x, i, j, k):
        return F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)

    triples = [(i, j, k) for i in range(7) for j in range(7) for k in range(7) if i not in (j, k)]
    errors = [F.smooth_l1_loss(cosine(STUDENT, *at), cosine(TEACHER, *at)) for at in triples]
    torch.testing.assert_close(rkd_angle(STUDENT, TEACHER), sum(errors) / 343)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_chunks_of_angles_add_up_with_their_gradient(chunk):
    whole, parts = (STUDENT.clone().requires_grad_() for _ in range(2))
    expected, loss = rkd_angle(whole, TEACHER), rkd_angle(parts, TEACHER, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, parts), torch.autograd.grad(expected, whole))
    with pytest.raises(UserError, match="chunk is a number of samples of at least 1"):
        rkd_angle(STUDENT, TEACHER, chunk=0)


def test_correlation_congruence_tends_to_the_gaussian():
    def gaussian(x):
        x = F.normalize(x)
        return torch.exp(-0.4 * (x[:, None] - x[None]).square().sum(2))

    expected = (gaussian(STUDENT) - gaussian(TEACHER)).square().sum() / 49
    torch.testing.assert_close(correlation_congruence(STUDENT, TEACHER, order=12), expected)
    second = correlation_congruence(STUDENT, TEACHER)
    assert 0.5 < second / expected < 1.5
    cosines = [F.normalize(x) @ F.normalize(x).T for x in (STUDENT, TEACHER)]
    series = [math.exp(-0.8) * (1 + 0.8 * c + 0.32 * c**2) for c in cosines]
    torch.testing.assert_close(second, F.mse_loss(*series))


def test_the_other_form_of_correlation_congruence_compares_neighbours_in_the_batch():
    student, teacher = STUDENT, TEACHER[:, :5]
    apart = (student - teacher).abs()
    expected = sum(apart[i] @ apart[i + 1] for i in range(6)) / 6
    torch.testing.assert_close(correlation_congruence(student, teacher, variant="code"), expected)
    with pytest.raises(UserError, match=r"embeddings of one shape and at least 2 samples, not \(7, 5\) and \(7, 9\)"):
        correlation_congruence(STUDENT, TEACHER, variant="code")
    with pytest.raises(UserError, match="gamma is above 0 and order at least 1, not 0 and 2"):
        correlation_congruence(STUDENT, TEACHER, gamma=0)


# Token graphs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 11])
def test_neighbours_are_scikit_learns(k):
    tokens = random(12, 3)
    weights, near = neighbour_graph(tokens, k, 0.7, scale="none")
    expected = NearestNeighbors(n_neighbors=k).fit(tokens.numpy()).kneighbors_graph(mode="distance").toarray()
    expected = torch.from_numpy(expected)
    assert torch.equal(weights > 0, expected > 0)
    torch.testing.assert_close(weights, torch.where(expected > 0, (-expected.square() / 1.4).exp(), 0.0))
    assert weights.diag().count_nonzero() == 0
    assert near.shape == (12, k)


def test_ways_to_scale_tokens():
    tokens = random(12, 3)
    for scale in ("norm", "distance"):
        a, b = (neighbour_graph(factor * tokens, 4, scale=scale)[0] for factor in (1, 9))
        torch.testing.assert_close(a, b)
    distances = torch.cdist(tokens, tokens)
    mean = distances.sum() / (12 * 11)
    weights, near = neighbour_graph(tokens, 4, 0.5, scale="distance")
    torch.testing.assert_close(weights.gather(1, near), (-((distances.gather(1, near) / mean) ** 2)).exp())
    weights, near = neighbour_graph(tokens, 3, "median", scale="none")
    width = distances.gather(1, near).square().median()
    torch.testing.assert_close(weights.gather(1, near), (-(distances.gather(1, near) ** 2) / (2 * width)).exp())


def test_near_tokens_far_from_the_origin_are_told_apart():
    tokens = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 1000
    _, near = neighbour_graph(tokens, 3, scale="none")
    exact = torch.cdist(tokens.double(), tokens.double()).fill_diagonal_(math.inf).topk(3, largest=False).indices
    assert torch.equal(near, exact)


@pytest.mark.parametrize("neighbours", ["own", "teacher"])
def test_as_printed_a_row_weighs_the_nodes_that_have_it_among_their_nearest(neighbours):
    theirs, near = neighbour_graph(TEACHER, 2)
    mine, own = neighbour_graph(STUDENT, 2, neighbours=near if neighbours == "teacher" else None)
    for graph, columns in ((theirs, near), (mine, own)):
        among = torch.zeros(len(graph), len(graph), dtype=torch.bool).scatter(1, columns, True)
        assert torch.equal(graph.T > 0, among.T)
    p, q = mine.T.log_softmax(1), theirs.T.log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean()
    found = local_preserving(STUDENT, TEACHER, 2, nearness="column", neighbours=neighbours)
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, local_preserving(STUDENT, TEACHER, 2, neighbours=neighbours))
    assert local_preserving(TEACHER, TEACHER, 2, nearness="column").abs() < 1e-7
    with pytest.raises(UserError, match="no nearness 'rows'"):
        local_preserving(STUDENT, TEACHER, 2, nearness="rows")


@pytest.mark.parametrize("direction", ["student", "teacher"])
def test_local_preserving_is_a_divergence_of_whole_rows(direction):
    (a, _), (b, near) = (neighbour_graph(x, 3) for x in (STUDENT, TEACHER))
    p, q = ((x / 0.5).softmax(1) for x in (a, b))
    if direction == "teacher":
        p, q = q, p
    expected = (p * (p / q).log()).sum(1).mean()
    found = local_preserving(STUDENT, TEACHER, 3, temperature=0.5, direction=direction)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        local_preserving(STUDENT, TEACHER, 3, temperature=0.5, direction=direction, chunk=2), expected
    )
    shared, _ = neighbour_graph(STUDENT, 3, neighbours=near)
    assert torch.equal(shared > 0, b > 0)


def test_contextual_similarity_by_its_definition():
    student, teacher = random(2, 4, 5), random(2, 4, 9, seed=1)
    rows = []
    for b in range(2):
        both = [(x[b] @ x[b].T / math.sqrt(x.shape[2])).softmax(1) for x in (student, teacher)]
        rows.append((both[0] - both[1]).square().mean())
    torch.testing.assert_close(contextual_similarity(student, teacher), sum(rows) / 2)
    torch.testing.assert_close(contextual_similarity(student @ rotation(5), student), torch.zeros((), dtype=DOUBLE))
    with pytest.raises(UserError, match=r"not \(2, 4, 5\) and \(2, 3, 9\)"):
        contextual_similarity(student, teacher[:, :3])


def test_graphs_that_cannot_be():
    for k in (0, 7):
        with pytest.raises(UserError, match=f"k lies between 1 and 6, the number of other tokens, not {k}"):
            neighbour_graph(STUDENT, k)
    with pytest.raises(UserError, match="sigma is a number above 0 or 'median', not 'mean'"):
        neighbour_graph(STUDENT, 2, "mean")
    with pytest.raises(UserError, match="there is no scale 'norms'"):
        neighbour_graph(STUDENT, 2, scale="norms")
    with pytest.raises(UserError, match="as many on both sides"):
        local_preserving(STUDENT, TEACHER[:5], 2)
    with pytest.raises(UserError, match="there is no direction 'both'"):
        local_preserving(STUDENT, TEACHER, 2, direction="both")

"""Losses on features: closed forms, what is free (scale, order, rotation), and what each refuses."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import (
    activation_boundary,
    aligned,
    attention_transfer,
    batch_norm_margins,
    boundary_disagreement,
    direction,
    factor_transfer,
    feature_maps,
    fsp,
    fsp_matrix,
    hierarchical_context,
    hint,
    kdsvd,
    masked_generation,
    neuron_selectivity,
    norm_direction,
    norm_growth,
    overhaul,
    variational_information,
)

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def layers(student: Tensor, teacher: Tensor, loss):
    """A loss between layers as one of a pair of features: the layer above is a function of them."""
    above = [F.avg_pool2d(side, 2).repeat(1, 2, 1, 1).sin() for side in (student, teacher)]
    return loss([student, above[0]], [teacher, above[1]])


STUDENT, TEACHER = random(3, 6, 4, 4), random(3, 6, 4, 4, seed=1)
MARGINS = torch.full((6,), -100.0, dtype=DOUBLE)
LOSSES = {
    "hint": hint,
    "attention": attention_transfer,
    "attention, paper": lambda s, t: attention_transfer(s, t, variant="paper"),
    "factor": factor_transfer,
    "factor, code": lambda s, t: factor_transfer(s, t, variant="code"),
    "factor, p = 2": lambda s, t: factor_transfer(s, t, p=2),
    "overhaul": lambda s, t: overhaul(s, t.abs(), MARGINS),
    "hierarchical context": hierarchical_context,
    "masked generation": masked_generation,
    "neuron selectivity": neuron_selectivity,
    "fsp": lambda s, t: layers(s, t, fsp),
    "kdsvd": lambda s, t: layers(s, t, kdsvd),
}


@pytest.mark.parametrize("name", LOSSES)
def test_zero_with_zero_gradient_where_both_agree_and_positive_elsewhere(name):
    teacher = TEACHER.abs() if name == "overhaul" else TEACHER
    student = teacher.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    assert abs(loss.item()) < 1e-12
    assert gradient(loss, student).abs().max() < 1e-9
    assert LOSSES[name](STUDENT, TEACHER) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_samples_may_stand_in_any_order(name):
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(LOSSES[name](STUDENT[order], TEACHER[order]), LOSSES[name](STUDENT, TEACHER))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "kdsvd"])
def test_gradients_are_those_of_finite_differences(name):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, TEACHER), student)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_are_computed_in_single(name):
    student, teacher = STUDENT.float(), TEACHER.float()
    if name not in ("fsp", "kdsvd"):
        half = LOSSES[name](student.bfloat16(), teacher.bfloat16())
        assert half.dtype == torch.float32 or name == "overhaul"
        torch.testing.assert_close(
            half, LOSSES[name](student.bfloat16().float(), teacher.bfloat16().float()).to(half.dtype)
        )
    expected = LOSSES[name](student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](student, teacher), expected, rtol=1e-6, atol=0)


SCALE_FREE = ["attention", "attention, paper", "factor", "factor, code", "neuron selectivity"]


@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_scale_of_either_side_is_free(name):
    loss = LOSSES[name](STUDENT, TEACHER)
    torch.testing.assert_close(LOSSES[name](7 * STUDENT, TEACHER), loss)
    torch.testing.assert_close(LOSSES[name](STUDENT, 0.1 * TEACHER), loss)


@pytest.mark.parametrize("name", ["attention", "attention, paper", "factor, code", "neuron selectivity"])
def test_channels_have_no_order_and_may_differ_in_number(name):
    loss = LOSSES[name](STUDENT, TEACHER)
    torch.testing.assert_close(LOSSES[name](STUDENT.flip(1), TEACHER), loss)
    assert LOSSES[name](STUDENT[:, :4], TEACHER).isfinite()
    # Doubling all channels changes no distribution over them.
    torch.testing.assert_close(LOSSES[name](torch.cat([STUDENT, STUDENT], 1), TEACHER), loss)


def test_maps_of_tokens_and_vectors():
    tokens = random(2, 16, 5)
    maps = feature_maps(tokens)
    assert maps.shape == (2, 5, 4, 4)
    assert torch.equal(maps[1, :, 2, 3], tokens[1, 11])
    assert torch.equal(feature_maps(random(2, 17, 5), skip=1).flatten(2).mT, random(2, 17, 5)[:, 1:])
    assert feature_maps(random(2, 7, 5)).shape == (2, 5, 7, 1)
    assert feature_maps(random(2, 5)).shape == (2, 5, 1, 1)
    with pytest.raises(UserError, match=r"not of shape \(3,\)"):
        feature_maps(random(3))
    with pytest.raises(UserError, match="No token is left of 4 after leaving out 4"):
        feature_maps(random(2, 4, 5), skip=4)


def test_maps_meet_at_the_smaller_size_in_each_direction():
    student, teacher = aligned(random(2, 3, 8, 4), random(2, 5, 4, 6))
    assert student.shape == (2, 3, 4, 4)
    assert teacher.shape == (2, 5, 4, 4)
    torch.testing.assert_close(student, F.avg_pool2d(random(2, 3, 8, 4), (2, 1)))
    torch.testing.assert_close(attention_transfer(random(2, 3, 8, 8), random(2, 3, 8, 8)).item(), 0.0)
    with pytest.raises(UserError, match="2 samples meet 3"):
        aligned(random(2, 3, 8, 8), random(3, 3, 8, 8))


# One by one ---------------------------------------------------------------------------------------------------------------


def test_attention_transfer_by_its_definition():
    def attention(x):
        flat = x.square().sum(1).flatten(1)
        return flat / flat.norm(dim=1, keepdim=True)

    difference = attention(STUDENT) - attention(TEACHER)
    torch.testing.assert_close(attention_transfer(STUDENT, TEACHER), difference.square().mean())
    torch.testing.assert_close(attention_transfer(STUDENT, TEACHER, variant="paper"), difference.norm(dim=1).mean() / 2)
    with pytest.raises(UserError, match="maps of one position have no attention"):
        attention_transfer(random(2, 5), random(2, 7))
    with pytest.raises(UserError, match="variant is 'paper' or 'code', not 'mine'"):
        attention_transfer(STUDENT, TEACHER, variant="mine")


def test_factor_transfer_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 5.0]])
    # (.6, .8) against (0, 1) and (1, 0) against (0, 1)
    assert factor_transfer(student, teacher).item() == pytest.approx((0.6 + 0.2 + 1 + 1) / 4)
    assert factor_transfer(student, teacher, p=2).item() == pytest.approx((0.36 + 0.04 + 1 + 1) / 4)
    with pytest.raises(UserError, match="6 channels and the teacher's 4; the translator must give as many"):
        factor_transfer(STUDENT, TEACHER[:, :4])
    with pytest.raises(UserError, match=r"p is at least 1, not 0\.5"):
        factor_transfer(STUDENT, TEACHER, p=0.5)


def test_variational_information_is_a_gaussian_likelihood():
    variance = random(6).square() + 0.1
    normal = torch.distributions.Normal(STUDENT, variance.sqrt()[:, None, None])
    expected = -normal.log_prob(TEACHER).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(variational_information(STUDENT, variance, TEACHER), expected)
    # At a given error, the best variance is the mean squared error of the channel.
    best = (STUDENT - TEACHER).square().mean((0, 2, 3)).requires_grad_()
    assert gradient(variational_information(STUDENT, best, TEACHER), best).abs().max() < 1e-12
    with pytest.raises(UserError, match=r"the teacher has 6 channels, but the prediction has 6 and the variance"):
        variational_information(STUDENT, variance[:3], TEACHER)


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (2.0, 1.0), (-0.5, -3.0), (0.3, 0.8), (1.0, -30.0)])
def test_margins_are_means_of_truncated_normals(weight, bias):
    found = batch_norm_margins(torch.tensor([weight], dtype=DOUBLE), torch.tensor([bias], dtype=DOUBLE))
    expected = stats.truncnorm.mean(-math.inf, -bias / abs(weight), loc=bias, scale=abs(weight))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_margins_of_channels_that_are_hardly_ever_negative():
    weight, bias = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.5, 60.0, 2.0, -2.0])
    paper = batch_norm_margins(weight, bias)
    assert paper.dtype == torch.float32
    assert paper[0].item() == pytest.approx(stats.truncnorm.mean(-math.inf, -3.5, loc=3.5), rel=1e-5)
    assert -0.02 < paper[1] <= 0, "far out in the tail, about -weight^2 / bias"
    assert paper[2:].tolist() == [0.0, -2.0]
    assert batch_norm_margins(weight, bias, variant="code").tolist() == [-3.0, -3.0, 0.0, -2.0]
    with pytest.raises(UserError, match="one number per channel"):
        batch_norm_margins(weight, bias[:2])


def test_overhaul_lets_the_student_be_where_the_target_is_not_positive():
    margins = torch.full((1,), -1.0)
    student = torch.tensor([[-4.0], [0.5], [-0.7], [3.0]])
    cases = {
        -5.0: [0.0, 2.25, 0.09, 16.0],  # far negative: the margin is the target
        -0.5: [0.0, 1.0, 0.0, 12.25],  # between margin and 0
        2.0: [36.0, 2.25, 7.29, 1.0],  # positive: both ways
    }
    for target, expected in cases.items():
        rows = [overhaul(s[None], torch.full((1, 1), target), margins).item() for s in student]
        assert rows == pytest.approx(expected)
    with pytest.raises(UserError, match="the teacher has 6 channels, but the student has 4"):
        overhaul(STUDENT[:, :4], TEACHER, margins)


def test_activation_boundary_by_hand():
    student = torch.tensor([[0.5, -2.0, 3.0, -0.5]], requires_grad=True)
    teacher = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    loss = activation_boundary(student, teacher)
    assert loss.item() == pytest.approx(1.5**2 + 0 + 0 + 1.5**2)
    assert gradient(loss, student).tolist() == [[3.0, 0.0, 0.0, -3.0]]
    assert boundary_disagreement(student, teacher).item() == 0.5
    assert activation_boundary(student, teacher, margin=2.0).item() == pytest.approx(2.5**2 + 0 + 0 + 2.5**2)
    with pytest.raises(UserError, match="margin is above 0, not 0"):
        activation_boundary(student, teacher, margin=0)
    with pytest.raises(UserError, match=r"\(1, 4\) and the teacher's \(1, 3\)"):
        activation_boundary(student, teacher[:, :3])


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (4, 4), (3, 3), (1, 1), (12, 6)])
def test_hierarchical_context_by_its_definition(size):
    student, teacher = random(2, 3, *size), random(2, 3, *size, seed=1)
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < min(size):
            weight /= 2
            loss = loss + weight * F.mse_loss(*(F.adaptive_avg_pool2d(x, level) for x in (student, teacher)))
            total += weight
    torch.testing.assert_close(hierarchical_context(student, teacher), loss / total)


def test_both_forms_of_neuron_selectivity_agree():
    student, teacher = random(2, 9, 3, 3), random(2, 5, 3, 3, seed=1)

    def kernel(a, b):
        return (a[:, :, None] * b[:, None]).sum(-1).square().mean((1, 2))

    a, b = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    expected = (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean()
    torch.testing.assert_close(neuron_selectivity(student, teacher), expected)  # 81 > 45: by channels
    wide = neuron_selectivity(student.repeat(1, 2, 1, 1), teacher)  # 81 <= 90: by positions
    torch.testing.assert_close(wide, expected)


def test_fsp_matrix_and_its_pooling():
    lower, upper = random(2, 3, 8, 8), random(2, 5, 4, 4, seed=1)
    largest = F.max_pool2d(lower, 2)
    expected = torch.einsum("bihw,bjhw->bij", largest, upper) / 16
    torch.testing.assert_close(fsp_matrix(lower, upper), expected)
    torch.testing.assert_close(
        fsp_matrix(lower, upper, pool="mean"), torch.einsum("bihw,bjhw->bij", F.avg_pool2d(lower, 2), upper) / 16
    )
    three = [lower, upper, random(2, 4, 4, 4, seed=2)]
    other = [-lower, upper, three[2]]
    expected = (fsp_matrix(lower, upper) - fsp_matrix(-lower, upper)).square().mean()
    torch.testing.assert_close(fsp(three, other), expected)  # the second pair of layers agrees


@pytest.mark.parametrize("loss", [fsp, kdsvd])
def test_relations_between_layers_need_layers_that_fit(loss):
    with pytest.raises(UserError, match="at least 2 layers and as many of both networks, not 1 of the student"):
        loss([STUDENT], [TEACHER])
    with pytest.raises(UserError, match="layer 1 has 4 channels in the student and 6 in the teacher"):
        loss([STUDENT, STUDENT[:, :4]], [TEACHER, TEACHER])


# Singular vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "k"), [((5, 4, 4), 1), ((5, 4, 4), 3), ((20, 3, 3), 2), ((9, 3, 3), 5)])
def test_singular_vectors_pass_on_the_gradient_of_the_decomposition(shape, k):
    student, teacher = [random(2, *shape, seed=i) for i in (0, 1)], [random(2, *shape, seed=i) for i in (2, 3)]
    mine = [x.clone().requires_grad_() for x in student]
    found = torch.autograd.grad(kdsvd(mine, teacher, k), mine)
    for at in range(2):
        for place in [(0, 0, 0, 0), (1, 3, 2, 1), (0, 4, 1, 2)]:
            step = torch.zeros_like(student[at])
            step[place] = 1e-5
            moved = [
                kdsvd([x + sign * step if i == at else x for i, x in enumerate(student)], teacher, k)
                for sign in (1, -1)
            ]
            torch.testing.assert_close(found[at][place], (moved[0] - moved[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def test_kdsvd_by_hand():
    def maps(rows):  # positions x channels
        return torch.tensor(rows, dtype=DOUBLE).T[None, :, :, None]

    # Right singular vectors (1, 0) and (0, 1); of the teacher's rank one maps (0.8, 0.6) and (0.6, -0.8).
    student = [maps([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), maps([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])]
    teacher = [maps([[0.8, 0.6], [1.6, 1.2], [0.0, 0.0]]), maps([[0.0, 0.0], [0.6, -0.8], [0.0, 0.0]])]

    def kernel(upper, lower):
        return torch.exp(-((torch.tensor(upper)[:, None] - torch.tensor(lower)[None]) ** 2) / 8)

    # Nearest to the teacher's: the first vector below, minus the second above. A global sign of a pair is free.
    found = kdsvd(student, teacher).item()
    signs = [(a, b) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    candidates = [
        (kernel([0.0, -b], [a, 0.0]) - kernel([0.6 * b, -0.8 * b], [0.8 * a, 0.6 * a])).square().sum().item()
        for a, b in signs
    ]
    assert min(abs(found - value) for value in candidates) < 1e-6
    assert kdsvd([-student[0], student[1]], student) < 1e-12, "signs are aligned"


def test_dead_maps_and_equal_singular_values_do_no_harm():
    dead = torch.zeros(2, 4, 3, 3)
    dead[1] = torch.randn(4, 3, 3)
    student = [dead.requires_grad_(), torch.eye(4).repeat(2, 1, 1)[..., None].requires_grad_()]
    teacher = [torch.rand(2, 4, 3, 3), torch.rand(2, 4, 4, 1)]
    loss = kdsvd(student, teacher)
    assert loss.isfinite()
    assert all(part.isfinite().all() for part in torch.autograd.grad(loss, student))
    with pytest.raises(UserError, match="k is between 1 and 4, the smallest rank among these layers, not 5"):
        kdsvd(student, teacher, k=5)


# Norm and direction -------------------------------------------------------------------------------------------------------


def test_norm_direction_is_a_loop_over_samples():
    z, f, towards = random(8, 5), random(8, 5, seed=1), random(8, 5, seed=2)
    expected = sum(
        1 - torch.dot(a, e / e.norm()) / max(a.norm(), b.norm()) for a, b, e in zip(z, f, towards, strict=True)
    )
    torch.testing.assert_close(norm_direction(z, f, towards), expected / 8)
    torch.testing.assert_close(norm_direction(z, f, 9 * towards), expected / 8)
    assert torch.autograd.gradcheck(norm_direction, (z.requires_grad_(), f, towards))


def test_a_short_embedding_is_pulled_and_a_long_one_turned():
    towards, teacher = torch.tensor([[3.0, 4.0]], dtype=DOUBLE), torch.tensor([[0.0, 2.0]], dtype=DOUBLE)
    short = torch.tensor([[0.5, -0.7]], dtype=DOUBLE, requires_grad=True)
    pull = gradient(norm_direction(short, teacher, towards), short)
    torch.testing.assert_close(pull, torch.tensor([[-0.6, -0.8]], dtype=DOUBLE) / 2)
    long = torch.tensor([[5.0, -1.0]], dtype=DOUBLE, requires_grad=True)
    loss = norm_direction(long, teacher, towards)
    torch.testing.assert_close(loss, direction(long, towards))
    assert (gradient(loss, long) * long).sum().abs() < 1e-12
    unit = towards / 5
    at = [norm_direction(length * unit, teacher, towards).item() for length in (2.0, 9.0, -1.0, -5.0)]
    assert at == pytest.approx([0.0, 0.0, 1.5, 2.0])


def test_norm_growth_pulls_each_embedding_outwards_alike():
    z = random(4, 3).requires_grad_()
    loss = norm_growth(z, step=0.5)
    assert loss.item() == pytest.approx(0.25)
    torch.testing.assert_close(gradient(loss, z), -z.detach() / z.detach().norm(dim=1, keepdim=True) / 4)


def test_embeddings_of_zero_length_do_no_harm():
    z = torch.zeros(2, 3, requires_grad=True)
    for loss in (
        norm_direction(z, torch.zeros(2, 3), torch.ones(2, 3)),
        norm_growth(z),
        direction(z, torch.ones(2, 3)),
    ):
        assert loss.isfinite()
        assert gradient(loss, z).isfinite().all()
    with pytest.raises(UserError, match=r"\(2, 3\) and the teacher's \(2, 4\)"):
        norm_direction(z, torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(UserError, match=r"embeddings are \(batch, width\)"):
        norm_direction(*[torch.zeros(2, 3, 1, 1)] * 3)

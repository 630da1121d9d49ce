"""Sinkhorn scaling and distance: closed forms, POT, the unrolled rounds they stand for, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ot
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.errors import UserError
from stillhouse.losses.divergences import total_variation
from stillhouse.losses.transport import pairwise_l1, row_error, select_positions, sinkhorn, sinkhorn_distance

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def costs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """L1 distances of random predictions, in [0, 2]."""
    student, teacher = (3 * random(n, 6, seed=seed + k) for k, n in enumerate((rows, columns)))
    return torch.cdist(student.softmax(-1), teacher.softmax(-1), p=1)


def hard_costs(kind: str, size: int = 40) -> Tensor:
    """Costs in [0, 2] whose scaling travels far: prices rise over many rounds."""
    cost = 2 * torch.rand(size, size, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    if kind == "outlying row":
        cost[3] = 2.0
        cost[3, 5] = 1.9
    elif kind == "outlying column":
        cost[:, 3] = 2.0
        cost[5, 3] = 1.9
    elif kind == "crowded column":
        cost[:, 1:] = 1 + cost[:, 1:] / 2
        cost[:, 0] = 0.0
    elif kind == "chain":
        position = torch.linspace(0, 2, size, dtype=DOUBLE)
        cost = (position[:, None] - position.square() / 2).abs()
    return cost


def plain(cost: Tensor, epsilon: float, rounds: int) -> Tensor:
    plan = torch.exp(-cost / epsilon)
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def in_logs(
    cost: Tensor, epsilon: float, rounds: int, row_marginal: Tensor | float = 1.0, column_marginal: Tensor | float = 1.0
) -> Tensor:
    log_plan = -cost / epsilon
    log_rows, log_columns = (torch.as_tensor(m, dtype=cost.dtype).log() for m in (row_marginal, column_marginal))
    for _ in range(rounds):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + log_rows.reshape(-1, 1)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + log_columns
    return log_plan.exp()


def value_and_gradient(function: Callable[[Tensor], Tensor], at: Tensor, seed: int = 9) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    value = function(at)
    (grad,) = torch.autograd.grad((value * random(*value.shape, seed=seed).to(value)).sum(), at)
    return value.detach(), grad


def test_one_sample_is_twice_the_total_variation() -> None:
    student, teacher = random(1, 5, seed=1), random(1, 5, seed=2)
    assert sinkhorn(costs(1, 1), 0.1, 20).tolist() == [[1.0]]
    expected = 2 * total_variation(student, teacher, 2.0)
    torch.testing.assert_close(sinkhorn_distance(student, teacher), expected)
    torch.testing.assert_close(sinkhorn_distance(student, teacher, form="sample"), expected)


def test_two_samples_converge_to_the_closed_form() -> None:
    cost = costs(2, 2) / 4
    kernel = torch.exp(-cost / 0.1)
    odds = (kernel[0, 0] * kernel[1, 1] / (kernel[0, 1] * kernel[1, 0])).sqrt()
    a = odds / (1 + odds)
    expected = torch.stack([torch.stack([a, 1 - a]), torch.stack([1 - a, a])])
    torch.testing.assert_close(sinkhorn(cost, 0.1, 2000), expected)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_equals_pot(size: int) -> None:
    cost = costs(size, size) / 2
    mass = torch.full((size,), 1 / size, dtype=DOUBLE)
    expected = size * ot.sinkhorn(mass, mass, cost, reg=0.1, numItermax=20_000, stopThr=1e-12)
    torch.testing.assert_close(sinkhorn(cost, 0.1, 5000), expected, rtol=0, atol=1e-6)


def test_equals_pot_with_marginals_of_different_sizes() -> None:
    cost = costs(5, 8)
    rows, columns = torch.rand(5, dtype=DOUBLE) + 0.1, torch.rand(8, dtype=DOUBLE) + 0.1
    columns *= rows.sum() / columns.sum()
    expected = ot.sinkhorn(rows, columns, cost, reg=0.1, numItermax=20_000, stopThr=1e-12)
    plan = sinkhorn(cost, 0.1, 5000, row_marginal=rows, column_marginal=columns)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_equals_the_plain_and_the_logarithmic_form(rounds: int) -> None:
    cost = costs(12, 12)
    plan, grad = value_and_gradient(lambda w: sinkhorn(w, 0.1, rounds), cost)
    for form in (plain, in_logs):
        expected, expected_grad = value_and_gradient(lambda w, form=form: form(w, 0.1, rounds), cost)
        torch.testing.assert_close(plan, expected, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


KINDS = ["random", "outlying row", "outlying column", "crowded column", "chain"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("epsilon", "rounds"), [(0.1, 20), (0.015, 20), (0.005, 60), (0.001, 1), (0.001, 60)])
def test_equals_the_logarithmic_form_where_the_kernel_underflows(kind: str, epsilon: float, rounds: int) -> None:
    cost = hard_costs(kind)
    expected, expected_grad = value_and_gradient(lambda w: in_logs(w, epsilon, rounds), cost)
    plan, grad = value_and_gradient(lambda w: sinkhorn(w, epsilon, rounds), cost)
    scale = float(expected_grad.abs().max())
    torch.testing.assert_close(plan, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9 * scale)
    # a float32 cost is itself known to 1e-7, in units of epsilon: the error that this makes is the yardstick
    single = cost.float()
    expected, expected_grad = value_and_gradient(lambda w: in_logs(w, epsilon, rounds), single.double())
    plan, grad = value_and_gradient(lambda w: sinkhorn(w, epsilon, rounds), single)
    unit = 2 / epsilon * torch.finfo(torch.float32).eps * math.sqrt(rounds)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.double(), expected, rtol=0, atol=unit)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=unit / epsilon)
    torch.testing.assert_close(plan.sum(0), torch.ones(len(cost)), rtol=0, atol=1e-6)


def test_the_plain_form_would_fail_there() -> None:
    assert plain(hard_costs("outlying column").float(), 0.005, 20).isnan().any()
    assert not sinkhorn(hard_costs("outlying column").float(), 0.005, 20).isnan().any()


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_columns_hold_their_mass_after_every_round(epsilon: float, dtype: torch.dtype) -> None:
    cost = costs(16, 16).to(dtype)
    errors = []
    for rounds in range(1, 26):
        plan = sinkhorn(cost, epsilon, rounds)
        torch.testing.assert_close(plan.sum(0), torch.ones(16, dtype=dtype), rtol=0, atol=1e-6)
        assert plan.sum().item() == pytest.approx(16)
        errors.append(row_error(plan).item())
    assert errors[-1] < errors[0]
    assert row_error(sinkhorn(cost, 0.1, 1000)) < 1e-5


@pytest.mark.parametrize("epsilon", [0.1, 0.004])
def test_marginals_order_and_rectangles(epsilon: float) -> None:
    cost = costs(5, 8)
    even = sinkhorn(cost, epsilon, 3)
    torch.testing.assert_close(even.sum(0), torch.full((8,), 5 / 8, dtype=DOUBLE))
    torch.testing.assert_close(even, in_logs(cost, epsilon, 3, 1.0, 5 / 8))
    rows = torch.tensor([1.0, 2.0, 0.5, 0.25, 0.25], dtype=DOUBLE)
    columns = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.2], dtype=DOUBLE)
    expected, expected_grad = value_and_gradient(lambda w: in_logs(w, epsilon, 7, rows, columns), cost)
    plan, grad = value_and_gradient(lambda w: sinkhorn(w, epsilon, 7, row_marginal=rows, column_marginal=columns), cost)
    torch.testing.assert_close(plan, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(row_error(plan, rows), (plan.sum(1) - rows).abs().max())
    first = sinkhorn(cost, epsilon, 7, row_marginal=rows, column_marginal=columns, order="columns_first")
    torch.testing.assert_close(first, in_logs(cost.t(), epsilon, 7, columns, rows).t())
    torch.testing.assert_close(first.sum(1), rows)
    only_rows = sinkhorn(cost, epsilon, 400, row_marginal=rows)
    torch.testing.assert_close(only_rows.sum(0), torch.full((8,), 0.5, dtype=DOUBLE))
    only_columns = sinkhorn(cost, epsilon, 3, column_marginal=columns, order="columns_first")
    torch.testing.assert_close(only_columns.sum(1), torch.full((5,), 0.8, dtype=DOUBLE))


def test_what_constants_in_the_cost_change() -> None:
    cost = costs(6, 6) / 2
    plan = sinkhorn(cost, 0.1, 3)
    torch.testing.assert_close(sinkhorn(cost + 50.0, 0.1, 3), plan)
    torch.testing.assert_close(sinkhorn(cost + random(6, 1), 0.1, 3), plan)
    assert (sinkhorn(cost + random(1, 6), 0.1, 3) - plan).abs().max() > 1e-3
    torch.testing.assert_close(sinkhorn(cost + random(1, 6), 0.1, 3000), sinkhorn(cost, 0.1, 3000))


@pytest.mark.parametrize(("dtype", "epsilon"), [(DOUBLE, 0.1), (torch.float32, 0.05)])
def test_tolerance_stops_early_and_keeps_it(dtype: torch.dtype, epsilon: float) -> None:
    cost = hard_costs("random", 10).to(dtype)
    needed = next(n for n in range(1, 2000) if row_error(sinkhorn(cost, epsilon, n)) <= 1e-4)
    plan = sinkhorn(cost, epsilon, 100_000, tolerance=1e-4)
    assert row_error(plan) <= 1e-4
    tried = range(needed, needed + 12)
    assert any(torch.allclose(plan, sinkhorn(cost, epsilon, n), rtol=1e-12, atol=0) for n in tried)
    assert needed > 10
    torch.testing.assert_close(sinkhorn(cost, epsilon, 25, tolerance=1e-15), sinkhorn(cost, epsilon, 25))


@pytest.mark.parametrize(
    ("shape", "epsilon", "options"),
    [
        ((4, 4), 0.3, {}),
        ((4, 3), 0.3, {}),
        ((3, 5), 0.3, {"order": "columns_first"}),
        ((4, 4), 0.01, {}),
        ((4, 4), 0.3, {"row_marginal": torch.tensor([0.5, 1.0, 1.5, 1.0]), "column_marginal": torch.ones(4)}),
        ((4, 4), 0.3, {"tolerance": 1e-12}),
    ],
)
@pytest.mark.parametrize("rounds", [1, 2, 13])
def test_gradcheck_of_the_plan(shape: tuple[int, int], epsilon: float, options: dict[str, Any], rounds: int) -> None:
    cost = (epsilon * 3 * torch.rand(*shape, dtype=DOUBLE)).requires_grad_()
    far = 190 * epsilon * torch.eye(*shape, dtype=DOUBLE)  # beyond what is scaled without absorption
    for offset in (torch.zeros_like(far), far):

        def plan(w: Tensor, offset: Tensor = offset) -> Tensor:
            return sinkhorn(w + offset, epsilon, rounds, **options)

        assert torch.autograd.gradcheck(plan, (cost,), eps=1e-6 * epsilon, atol=1e-5)
        if rounds < 13:
            assert torch.autograd.gradgradcheck(plan, (cost,), eps=1e-6 * epsilon, atol=1e-3, rtol=1e-3)


def test_memory_kept_for_the_backward() -> None:
    cost = costs(64, 64).requires_grad_()

    def kept(epsilon: float, rounds: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            sinkhorn(cost, epsilon, rounds)
        return sum(sizes)

    for epsilon in (0.1, 0.002):
        vectors = kept(epsilon, 50) - kept(epsilon, 10)
        assert vectors <= 40 * 4 * 64
        assert kept(epsilon, 10) <= 3 * 64**2 + 10 * 4 * 64 + 8 * 64


# --- costs ---


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
def test_pairwise_l1_equals_brute_force(chunk: int | None) -> None:
    student, teacher = random(5, 11, seed=1), random(7, 11, seed=2)

    def brute(p: Tensor) -> Tensor:
        return (p[:, None] - teacher[None]).abs().sum(-1)

    cost, grad = value_and_gradient(lambda p: pairwise_l1(p, teacher, chunk), student)
    expected, expected_grad = value_and_gradient(brute, student)
    torch.testing.assert_close(cost, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_pairwise_l1_at_equal_points_and_strides() -> None:
    probs = random(6, 4).softmax(-1)
    cost, grad = value_and_gradient(lambda p: pairwise_l1(p, probs), probs, seed=3)
    assert cost.diagonal().abs().max() == 0
    assert grad.isfinite().all()
    torch.testing.assert_close(cost, cost.t())
    wide = random(4, 12, seed=1)
    torch.testing.assert_close(pairwise_l1(wide.t(), wide.t()[::2]), torch.cdist(wide.t(), wide.t()[::2], p=1))
    assert pairwise_l1(probs.half(), probs.half()).dtype == torch.float32


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, Tensor))])
        return out


def test_pairwise_l1_never_holds_all_differences() -> None:
    size, vocabulary = 64, 3000
    student, teacher = random(size, vocabulary, dtype=torch.float32).requires_grad_(), random(size, vocabulary).float()
    with Largest() as largest:
        pairwise_l1(student, teacher).sum().backward()
    assert largest.elements <= size * vocabulary
    with Largest() as largest:
        pairwise_l1(student, teacher, chunk=10).sum().backward()
    assert largest.elements <= size * vocabulary


# --- distance ---


def reference(
    student: Tensor, teacher: Tensor, temperature: float = 2.0, epsilon: float = 0.1, rounds: int = 20
) -> Tensor:
    """SinKD as its paper writes it, every step in plain torch."""
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    cost = (p[:, None] - q[None]).abs().sum(-1)
    return (plain(cost, epsilon, rounds) * cost).sum()


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (2, 2), (16, 10), (33, 200)])
def test_distance_equals_the_reference(batch: int, classes: int) -> None:
    student, teacher = 3 * random(batch, classes, seed=1), 3 * random(batch, classes, seed=2)
    for options in ({}, {"temperature": 1.0, "epsilon": 0.2, "rounds": 5}):
        expected, expected_grad = value_and_gradient(lambda s, o=options: reference(s, teacher, **o), student)
        ours = {"num_iterations" if k == "rounds" else k: v for k, v in options.items()}
        for chunk in (None, 7):
            value, grad = value_and_gradient(
                lambda s, o=ours, c=chunk: sinkhorn_distance(s, teacher, reduction="sum", chunk=c, **o), student
            )
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)
        mean, mean_grad = value_and_gradient(lambda s, o=ours: sinkhorn_distance(s, teacher, **o), student)
        torch.testing.assert_close(mean, expected / batch)
        torch.testing.assert_close(mean_grad, expected_grad / batch, rtol=1e-6, atol=1e-9)


def test_gradcheck_of_the_distance() -> None:
    student, teacher = random(4, 3, seed=1).requires_grad_(), random(4, 3, seed=2)
    for options in ({}, {"epsilon": 0.01}, {"form": "sample"}, {"reduction": "sum", "chunk": 2}):
        assert torch.autograd.gradcheck(lambda s, o=options: sinkhorn_distance(s, teacher, **o), (student,))


def test_second_derivative_of_the_distance() -> None:
    student, teacher = random(4, 3, seed=1), random(4, 3, seed=2)

    def second_order(function: Callable[[Tensor], Tensor]) -> Tensor:
        at = student.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(at), at, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), at)[0]

    ours = second_order(lambda s: sinkhorn_distance(s, teacher, reduction="sum"))
    torch.testing.assert_close(ours, second_order(lambda s: reference(s, teacher)))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random(4, 3, seed=1).requires_grad_(), random(4, 3, seed=2).requires_grad_()
    for form in ("batch", "sample"):
        sinkhorn_distance(student, teacher, form=form).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_permuting_the_teachers_batch_permutes_columns_only() -> None:
    student, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    p, q = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    plan = sinkhorn(pairwise_l1(p, q), 0.1, 20)
    torch.testing.assert_close(sinkhorn(pairwise_l1(p, q[order]), 0.1, 20), plan[:, order])
    torch.testing.assert_close(sinkhorn_distance(student, teacher[order]), sinkhorn_distance(student, teacher))
    assert not torch.isclose(
        sinkhorn_distance(student, teacher[order], form="sample"), sinkhorn_distance(student, teacher, form="sample")
    )


def test_unchanged_by_a_constant_in_a_row_of_logits() -> None:
    student, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
    value, grad = value_and_gradient(lambda s: sinkhorn_distance(s, teacher), student)
    shifted, shifted_grad = value_and_gradient(
        lambda s: sinkhorn_distance(s + 40 * random(6, 1, seed=3), teacher - 7.0), student
    )
    torch.testing.assert_close(shifted, value)
    torch.testing.assert_close(shifted_grad, grad)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6, dtype=DOUBLE))


def test_the_gradient_through_the_plan_is_a_choice() -> None:
    student, teacher = 3 * random(8, 4, seed=1), 3 * random(8, 4, seed=2)
    p = (student / 2).softmax(-1)
    plan = sinkhorn(pairwise_l1(p, (teacher / 2).softmax(-1)), 0.1, 20)

    def fixed_plan(s: Tensor) -> Tensor:
        return (plan * pairwise_l1((s / 2).softmax(-1), (teacher / 2).softmax(-1))).sum() / 8

    value, full = value_and_gradient(lambda s: sinkhorn_distance(s, teacher), student)
    detached_value, detached = value_and_gradient(lambda s: sinkhorn_distance(s, teacher, plan_grad=False), student)
    _, expected = value_and_gradient(fixed_plan, student)
    torch.testing.assert_close(detached_value, value)
    torch.testing.assert_close(detached, expected)
    assert (full - detached).abs().max() > 0.01 * full.abs().max()


def test_the_sample_form() -> None:
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2)
    rows = 2 * total_variation(student, teacher, 2.0, reduction="none")
    torch.testing.assert_close(sinkhorn_distance(student, teacher, form="sample"), rows.mean())
    torch.testing.assert_close(sinkhorn_distance(student, teacher, form="sample", reduction="sum"), rows.sum())


def test_a_large_epsilon_matches_means_and_a_small_one_pairs() -> None:
    student, teacher = 3 * random(8, 5, seed=1), 3 * random(8, 5, seed=2)
    cost = pairwise_l1((student / 2).softmax(-1), (teacher / 2).softmax(-1))
    torch.testing.assert_close(sinkhorn_distance(student, teacher, epsilon=1e6), cost.mean(), rtol=1e-5, atol=0)
    best = ot.emd2([], [], cost.numpy())
    sharp = sinkhorn_distance(student, teacher, epsilon=1e-3, num_iterations=3000)
    assert sharp.item() == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_half_precision_and_autocast(dtype: torch.dtype, epsilon: float) -> None:
    student = (3 * random(16, 10, seed=1)).to(dtype).requires_grad_()
    teacher = (3 * random(16, 10, seed=2)).to(dtype)
    expected, expected_grad = value_and_gradient(
        lambda s: sinkhorn_distance(s, teacher.double(), epsilon=epsilon), student.detach().double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sinkhorn_distance(student, teacher, epsilon=epsilon)
        value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert student.grad is not None
    error = (student.grad.double() * random(seed=9) - expected_grad).abs().max()
    assert error < 0.01 * expected_grad.abs().max()


def test_minimising_it_matches_the_batches_as_sets() -> None:
    student, teacher = random(8, 4, seed=1).requires_grad_(), 2 * random(8, 4, seed=2)
    optimizer = torch.optim.Adam([student], lr=0.05)
    start = sinkhorn_distance(student, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        sinkhorn_distance(student, teacher).backward()
        optimizer.step()
    assert sinkhorn_distance(student, teacher).item() < 0.2 * start


# --- positions ---


def test_select_positions_keeps_what_is_labelled() -> None:
    student, teacher = random(3, 4, 6, seed=1).requires_grad_(), random(3, 4, 6, seed=2)
    labels = torch.full((3, 4), -100)
    labels[0, 1] = labels[2, 0] = labels[2, 3] = 5
    s, t = select_positions(student, teacher, labels)
    assert s.tolist() == [student[0, 1].tolist(), student[2, 0].tolist(), student[2, 3].tolist()]
    assert t.tolist() == [teacher[0, 1].tolist(), teacher[2, 0].tolist(), teacher[2, 3].tolist()]
    sinkhorn_distance(s, t).backward()
    assert student.grad is not None
    assert (student.grad.abs().sum(-1) > 0).tolist() == (labels != -100).tolist()
    everything, _ = select_positions(student, teacher, labels, ignore_index=7)
    assert everything.shape == (12, 6)


def test_select_positions_draws_uniformly_without_replacement() -> None:
    logits = torch.arange(10.0)[:, None].repeat(1, 2)
    labels = torch.zeros(10, dtype=torch.long)
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        chosen, teachers = select_positions(logits, logits, labels, max_positions=3, generator=generator)
        positions = chosen[:, 0].long()
        assert positions.unique().tolist() == positions.tolist()
        assert torch.equal(chosen, teachers)
        counts[positions] += 1
    assert counts.sum() == 6000
    assert (counts / 2000 - 0.3).abs().max() < 0.05
    torch.manual_seed(3)
    first, _ = select_positions(logits, logits, labels, max_positions=3)
    torch.manual_seed(3)
    again, _ = select_positions(logits, logits, labels, max_positions=3)
    assert torch.equal(first, again)
    everything, _ = select_positions(logits, logits, labels, max_positions=None)
    assert torch.equal(everything, logits)


# --- what is refused ---


def test_shapes_as_annotated() -> None:
    student, teacher, labels = random(2, 3, 5, seed=1), random(2, 3, 5, seed=2), torch.ones(2, 3, dtype=torch.long)
    check = jaxtyped(typechecker=beartype)
    s, t = check(select_positions)(student, teacher, labels)
    cost = check(pairwise_l1)(s.softmax(-1), t.softmax(-1))
    plan = check(sinkhorn)(cost, 0.1, 5, row_marginal=torch.ones(6))
    assert check(row_error)(plan, torch.ones(6)).shape == ()
    assert check(sinkhorn_distance)(s, t).shape == ()


def nan_logits() -> Tensor:
    logits = random(4, 5)
    logits[1, 2] = math.nan
    logits[3, 3] = math.inf
    return logits


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda s: sinkhorn_distance(s, s[:, :3]),
            "student_logits has 5 classes but teacher_logits has 3; crop or map",
        ),
        (lambda s: sinkhorn_distance(s, s[:2]), r"their shapes are \(4, 5\) and \(2, 5\)."),
        (lambda s: sinkhorn_distance(s[:, :1], s[:, :1]), "student_logits has 1 class, but at least 2 are needed"),
        (lambda s: sinkhorn_distance(s, s, epsilon=0.0), "sinkhorn_distance: epsilon is above 0, not 0.0."),
        (lambda s: sinkhorn_distance(s, s, epsilon=math.nan), "sinkhorn_distance: epsilon is above 0, not nan."),
        (lambda s: sinkhorn_distance(s, s, num_iterations=0), "num_iterations is at least 1, not 0."),
        (lambda s: sinkhorn_distance(s, s, temperature=-1.0), "temperature is above 0, not -1.0."),
        (lambda s: sinkhorn_distance(s, nan_logits()), "teacher_logits has 2 NaN or infinite values of 20."),
        (lambda s: sinkhorn_distance(nan_logits(), s), "student_logits has 2 NaN or infinite values of 20."),
        (
            lambda s: sinkhorn_distance(nan_logits(), s, form="sample"),
            "student_logits has 2 NaN or infinite values of 20",
        ),
        (lambda s: sinkhorn_distance(s, s, form="pair"), "form is 'batch' or 'sample', not 'pair'."),
        (lambda s: sinkhorn_distance(s, s, reduction="none"), "reduction is 'mean' or 'sum', not 'none'."),
        (
            lambda s: sinkhorn_distance(s[None], s[None]),
            r"needs the shape \(batch, classes\), not \(1, 4, 5\); select_p",
        ),
        (lambda s: sinkhorn_distance(s[:0], s[:0]), r"at least one, but their shapes are \(0, 5\) and \(0, 5\)."),
        (lambda s: pairwise_l1(s, s[:, :2]), "student_probs has 5 classes but teacher_probs has 2"),
        (lambda s: pairwise_l1(s[0], s), r"student_probs needs the shape \(samples, classes\), not \(5,\)."),
        (lambda s: pairwise_l1(s, s, chunk=0), "chunk is a number of classes of at least 1, not 0."),
        (lambda s: sinkhorn(s, -1.0, 5), "sinkhorn: epsilon is above 0, not -1.0."),
        (lambda s: sinkhorn(s, 0.1, 0), "sinkhorn: num_iterations is at least 1, not 0."),
        (lambda s: sinkhorn(s, 0.1, 5, tolerance=0.0), "sinkhorn: tolerance is above 0, not 0.0."),
        (lambda s: sinkhorn(s[0], 0.1, 5), r"cost is a non-empty matrix \(rows, columns\), not of shape \(5,\)."),
        (lambda s: sinkhorn(s, 0.1, 5, order="both"), "order is 'rows_first' or 'columns_first', not 'both'."),
        (
            lambda s: sinkhorn(s, 0.1, 5, row_marginal=torch.ones(5)),
            r"row_marginal has the shape \(5,\), but the cost ne",
        ),
        (
            lambda s: sinkhorn(s, 0.1, 5, row_marginal=torch.ones(4), column_marginal=torch.ones(5)),
            "row_marginal sums to 4 and column_marginal to 5; make them equal.",
        ),
        (
            lambda s: sinkhorn(s, 0.1, 5, row_marginal=torch.arange(4.0)),
            "above 0 everywhere, but its smallest value is 0.0",
        ),
        (
            lambda s: sinkhorn(s, 0.1, 5, row_marginal=torch.ones(4, requires_grad=True)),
            r"row_marginal is a constant and gets no gradient; pass row_marginal.detach\(\).",
        ),
        (
            lambda s: select_positions(s, s, torch.full((4,), -100)),
            r"labels has 0 valid positions of 4 \(all are ignore_index = -100\), but at least 1 is needed.",
        ),
        (
            lambda s: select_positions(s, s[:, :2], torch.ones(4).long()),
            "student_logits has 5 classes but teacher_logits",
        ),
        (
            lambda s: select_positions(s, s[:2], torch.ones(4).long()),
            r"teacher_logits has the positions \(2,\), but labels has \(4,\).",
        ),
        (
            lambda s: select_positions(s, s, torch.ones(4).long(), max_positions=0),
            "max_positions is at least 1, not 0.",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(random(4, 5))

"""Divergences against closed forms, brute force, torch's own losses, and themselves under padding, weights, chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.errors import UserError
from stillhouse.losses.divergences import (
    DIVERGENCES,
    annealed_temperature,
    cross_entropy,
    js,
    kl,
    reverse_kl,
    soft_cross_entropy,
    total_variation,
)

PAIRED = {**DIVERGENCES, "soft_cross_entropy": soft_cross_entropy}
paired = pytest.mark.parametrize("loss", PAIRED.values(), ids=PAIRED.keys())


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return logits(*shape, seed=1, dtype=dtype).requires_grad_(), logits(*shape, seed=2, dtype=dtype)


def brute_force(name: str, student: Tensor, teacher: Tensor, temperature: float, beta: float = 0.5) -> float:
    """Mean over rows, class by class, with Python floats and without the squared temperature."""
    rows = []
    for s, t in zip(
        (student / temperature).softmax(-1).tolist(), (teacher / temperature).softmax(-1).tolist(), strict=True
    ):
        mixture = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
        rows.append(
            {
                "kl": sum(b * math.log(b / a) for a, b in zip(s, t, strict=True)),
                "reverse_kl": sum(a * math.log(a / b) for a, b in zip(s, t, strict=True)),
                "js": sum(
                    beta * b * math.log(b / m) + (1 - beta) * a * math.log(a / m)
                    for a, b, m in zip(s, t, mixture, strict=True)
                ),
                "tv": sum(abs(a - b) for a, b in zip(s, t, strict=True)) / 2,
                "soft_cross_entropy": -sum(b * math.log(a) for a, b in zip(s, t, strict=True)),
            }[name]
        )
    return sum(rows) / len(rows)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_brute_force(name: str, temperature: float) -> None:
    student, teacher = logits(5, 7, seed=1), logits(5, 7, seed=2)
    expected = brute_force(name, student, teacher, temperature)
    value = PAIRED[name](student, teacher, temperature, scale_by_temperature_squared=False)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    scaled = PAIRED[name](student, teacher, temperature, scale_by_temperature_squared=True)
    assert scaled.item() == pytest.approx(expected * temperature**2, rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_js_equals_brute_force_and_beta_weighs_the_teacher(beta: float) -> None:
    student, teacher = logits(5, 7, seed=1), logits(5, 7, seed=2)
    assert js(student, teacher, beta=beta).item() == pytest.approx(
        brute_force("js", student, teacher, 1.0, beta), rel=1e-12
    )
    torch.testing.assert_close(js(student, teacher, beta=beta), js(teacher, student, beta=1 - beta))


def test_js_tends_to_the_two_kl() -> None:
    student, teacher = logits(5, 7, seed=1), logits(5, 7, seed=2)
    tiny = 1e-7
    torch.testing.assert_close(js(student, teacher, beta=tiny) / tiny, kl(student, teacher), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        js(student, teacher, beta=1 - tiny) / tiny, reverse_kl(student, teacher), rtol=1e-5, atol=0
    )


def test_kl_equals_torch() -> None:
    student, teacher = pair(6, 9)
    for temperature in (1.0, 4.0):
        log_s, log_t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
        torch.testing.assert_close(kl(student, teacher, temperature), expected)
        expected = F.kl_div(log_t, log_s, reduction="batchmean", log_target=True) * temperature**2
        torch.testing.assert_close(reverse_kl(student, teacher, temperature), expected)


def test_gradient_of_kl_is_the_difference_of_probabilities_times_the_temperature() -> None:
    student, teacher = pair(6, 9)
    temperature = 3.0
    (grad,) = torch.autograd.grad(kl(student, teacher, temperature, reduction="sum"), student)
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(grad, temperature * (p - q))


def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy() -> None:
    student, teacher = pair(6, 9)
    q = (teacher / 2).softmax(-1)
    entropy = -(q * q.log()).sum(-1).mean()
    difference = soft_cross_entropy(student, teacher, 2.0) - kl(
        student, teacher, 2.0, scale_by_temperature_squared=False
    )
    torch.testing.assert_close(difference, entropy)


@paired
def test_unchanged_by_a_constant_in_a_row(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(4, 5)
    shift = logits(4, 1, seed=3, scale=10)
    torch.testing.assert_close(loss(student + shift, teacher - shift, 2.0), loss(student, teacher, 2.0))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_equality_with_zero_gradient_and_bounded(name: str) -> None:
    student, teacher = pair(50, 6)
    same = teacher.clone().requires_grad_()
    value = DIVERGENCES[name](same, teacher)
    (grad,) = torch.autograd.grad(value, same)
    assert abs(value.item()) < 1e-14
    assert grad.abs().max() < 1e-14
    rows = DIVERGENCES[name](5 * student, 5 * teacher, reduction="none")
    bound = {"js": math.log(2), "tv": 1.0}.get(name, math.inf)
    assert rows.min() > 0
    assert rows.max() <= bound


@paired
def test_gradcheck(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(3, 4)
    teacher.requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    for chunk in (None, 2):

        def value(s: Tensor, t: Tensor, tau: Tensor, w: Tensor, chunk: int | None = chunk) -> Tensor:
            return loss(s, t, tau, weight=w, scale_by_temperature_squared=True, chunk=chunk)

        assert torch.autograd.gradcheck(value, (student, teacher, temperature, weight))
        if loss is not total_variation:  # whose second derivative jumps
            assert torch.autograd.gradgradcheck(value, (student, teacher, temperature, weight))


def test_cross_entropy_equals_torch() -> None:
    student, _ = pair(4, 3, 5)
    labels = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0))
    labels[1, 2] = labels[3, 0] = -100
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(cross_entropy(student, labels), expected)
    soft = logits(4, 3, 5, seed=5).softmax(-1)
    expected = F.cross_entropy(student.flatten(0, 1), soft.flatten(0, 1))
    torch.testing.assert_close(cross_entropy(student, soft), expected)
    one_hot = F.one_hot(labels.clamp_min(0), 5).double()
    torch.testing.assert_close(cross_entropy(student, one_hot, mask=labels >= 0), cross_entropy(student, labels))
    torch.testing.assert_close(cross_entropy(student, labels.int()), cross_entropy(student, labels))


def test_soft_labels_can_be_learned_from_exact_zero() -> None:
    student = logits(3, 4)
    labels = torch.eye(4, dtype=torch.float64)[:3].requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(student, labels, reduction="sum"), labels)
    torch.testing.assert_close(grad, -student.log_softmax(-1))


def variants(loss: Callable[..., Tensor], student: Tensor, other: Tensor, **options: Any) -> Tensor:
    return cross_entropy(student, other, **options) if loss is cross_entropy else loss(student, other, 2.0, **options)


EVERY = {**PAIRED, "hard": cross_entropy, "soft": cross_entropy}


def case(
    name: str, *rows: int, classes: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    student, other = pair(*rows, classes, dtype=dtype)
    if name == "hard":
        other = other.argmax(-1)
    if name == "soft":
        other = other.softmax(-1)
    return EVERY[name], student, other


@pytest.mark.parametrize("name", EVERY)
def test_a_mask_equals_leaving_rows_out_whatever_lies_there(name: str) -> None:
    loss, student, other = case(name, 4, 3)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]])
    expected = variants(loss, student[mask.bool()], other[mask.bool()])
    (expected_grad,) = torch.autograd.grad(expected, student)
    with torch.no_grad():
        student[~mask.bool()] = float("nan")
        other[~mask.bool()] = float("nan") if other.is_floating_point() else 10**6
    for chunk in (None, 5):
        value = variants(loss, student, other, mask=mask, chunk=chunk)
        torch.testing.assert_close(value, expected)
        (grad,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(grad, expected_grad)
        assert (grad[~mask.bool()] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_padding_changes_nothing(name: str) -> None:
    loss, student, other = case(name, 4, 3)
    mask = torch.ones(4, 3, dtype=torch.long)
    longer = F.pad(student, (0, 0, 0, 2), value=7.0)
    other_longer = F.pad(other, (0, 0, 0, 2)) if other.is_floating_point() else F.pad(other, (0, 2))
    value = variants(loss, longer, other_longer, mask=F.pad(mask, (0, 2)))
    torch.testing.assert_close(value, variants(loss, student, other, mask=mask))
    torch.testing.assert_close(value, variants(loss, student, other))


@pytest.mark.parametrize("name", EVERY)
def test_whole_weights_are_repeated_rows_and_their_scale_does_not_matter(name: str) -> None:
    loss, student, other = case(name, 4)
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0])
    repeats = weight.long()
    expected = variants(loss, student.repeat_interleave(repeats, 0), other.repeat_interleave(repeats, 0))
    torch.testing.assert_close(variants(loss, student, other, weight=weight), expected)
    torch.testing.assert_close(variants(loss, student, other, weight=0.01 * weight), expected)
    mask = torch.tensor([True, True, True, False])
    rows = variants(loss, student, other, reduction="none")
    masked = variants(loss, student, other, weight=weight, mask=mask)
    torch.testing.assert_close(masked, (rows[0] + 3 * rows[1]) / 4)
    torch.testing.assert_close(variants(loss, student, other, weight=weight, reduction="none"), rows * weight)
    torch.testing.assert_close(variants(loss, student, other, weight=weight, reduction="sum"), (rows * weight).sum())


@pytest.mark.parametrize("name", EVERY)
def test_without_rows_that_count_the_mean_is_zero(name: str) -> None:
    loss, student, other = case(name, 4)
    for options in ({"mask": torch.zeros(4, dtype=torch.bool)}, {"weight": torch.zeros(4)}):
        value = variants(loss, student, other, **options)
        (grad,) = torch.autograd.grad(value, student)
        assert value.item() == 0
        assert (grad == 0).all()


@paired
def test_a_temperature_per_row(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(2, 3, 5)
    temperature = torch.tensor([[1.0, 2.0, 4.0], [0.5, 1.0, 8.0]])
    rows = loss(student, teacher, temperature, reduction="none")
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        i, j = at
        torch.testing.assert_close(rows[i, j], loss(student[i, j], teacher[i, j], temperature[i, j].item()))
    torch.testing.assert_close(loss(student, teacher, torch.tensor(3.0)), loss(student, teacher, 3.0))


class Largest(TorchDispatchMode):
    """The most elements of a float32 tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(name: str, chunk: int) -> None:
    loss, student, other = case(name, 3, 6)
    teaches = other.is_floating_point()
    other.requires_grad_(teaches)
    inputs = (student, other) if teaches else (student,)
    shifted, target = student[:, :-1], other[:, 1:]
    whole = variants(loss, shifted, target)
    chunked = variants(loss, shifted, target, chunk=chunk)
    torch.testing.assert_close(chunked, whole)
    for a, b in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(a, b)


@paired
def test_chunks_of_logits_that_depend_on_each_other(loss: Callable[..., Tensor]) -> None:
    def second_order(chunk: int | None) -> tuple[Tensor, Tensor]:
        student, _ = pair(3, 5)
        value = loss(student, student.square().sin(), 2.0, chunk=chunk)
        (grad,) = torch.autograd.grad(value, student, create_graph=True)
        return grad.detach(), torch.autograd.grad(grad.square().sum(), student)[0]

    for chunked, whole in zip(second_order(2), second_order(None), strict=True):
        torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("name", EVERY)
def test_chunks_keep_half_precision_logits_half(name: str) -> None:
    loss, student, other = case(name, 4, 16, classes=40, dtype=torch.bfloat16)
    shifted, target = student[:, :-1], other[:, 1:]
    mask = torch.ones(4, 15, dtype=torch.bool)
    with Largest() as largest:
        value = variants(loss, shifted, target, mask=mask, chunk=8)
        value.backward()
    assert value.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    assert largest.elements <= 8 * 40
    with Largest() as largest:
        variants(loss, shifted, target, mask=mask).backward()
    assert largest.elements >= 60 * 40


@pytest.mark.parametrize("name", EVERY)
def test_float32_inside(name: str) -> None:
    loss, student, other = case(name, 8, classes=50)
    reference = variants(loss, student, other)
    assert reference.dtype == torch.float64
    small_other = other.bfloat16() if other.is_floating_point() else other
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = variants(loss, student.bfloat16(), small_other)
        chunked = variants(loss, student.bfloat16(), small_other, chunk=3)
    wide_other = small_other.double() if other.is_floating_point() else other
    expected = variants(loss, student.bfloat16().double(), wide_other)
    assert value.dtype == chunked.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked, value)


@paired
def test_classes_absent_on_both_sides(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(4, 5)
    absent = torch.tensor([False, True, False, True, False])
    expected = loss(student[:, ~absent], teacher[:, ~absent], 2.0)
    student = student.detach().masked_fill(absent, -math.inf).requires_grad_()
    teacher = teacher.masked_fill(absent, -math.inf).requires_grad_()
    value = loss(student, teacher, 2.0)
    torch.testing.assert_close(value, expected)
    value.backward()
    for tensor in (student, teacher):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_mass_where_the_student_has_none_is_infinite() -> None:
    student = torch.tensor([[0.0, -math.inf, 1.0]])
    assert cross_entropy(student, torch.tensor([[0.5, 0.5, 0.0]])).item() == math.inf
    assert cross_entropy(student, torch.tensor([1])).item() == math.inf
    assert kl(student, torch.zeros(1, 3)).item() == math.inf
    assert reverse_kl(torch.zeros(1, 3), student).item() == math.inf
    assert js(student, torch.zeros(1, 3)).isfinite()


def test_confident_predictions_stay_finite() -> None:
    student = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-500.0, 500.0, 0.0]])
    for loss in PAIRED.values():
        value = loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert grad.isfinite().all()
    assert kl(student, teacher).item() == pytest.approx(1000.0)
    assert js(student, teacher).item() == pytest.approx(math.log(2))
    assert total_variation(student, teacher).item() == 1.0


def test_gradients_go_where_they_are_wanted() -> None:
    student, teacher = pair(4, 5)
    for chunk in (None, 2):
        student.grad = None
        kl(student, teacher, chunk=chunk).backward()
        assert student.grad is not None
        assert teacher.grad is None
        mutual = teacher.clone().requires_grad_()
        kl(student.detach(), mutual, chunk=chunk).backward()
        assert mutual.grad is not None


def test_annealed_temperature() -> None:
    epochs = 5
    values = [annealed_temperature(3.0, epoch / (epochs - 1)) for epoch in range(epochs)]
    assert values == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert float(annealed_temperature(3.0, torch.tensor(0.5))) == 2.0


def test_names() -> None:
    assert dict(DIVERGENCES) == {"kl": kl, "reverse_kl": reverse_kl, "js": js, "tv": total_variation}


def test_shapes_as_annotated() -> None:
    student, teacher = pair(2, 3, 5)
    mask, weight = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    for name in PAIRED:
        checked = jaxtyped(typechecker=beartype)(PAIRED[name])
        assert checked(student, teacher, 2.0, mask=mask, weight=weight).shape == ()
        assert checked(student, teacher, torch.ones(2, 3), reduction="none").shape == (2, 3)
    checked = jaxtyped(typechecker=beartype)(cross_entropy)
    assert checked(student, teacher.argmax(-1), mask=mask.bool()).shape == ()
    assert checked(student, teacher.softmax(-1), reduction="none").shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: kl(s, s[:, :3]), "kl: student_logits has 5 classes but teacher_logits has 3; crop"),
        (lambda s: js(s, s[:2]), r"js: student_logits has the shape \(4, 5\) but teacher_logits has \(2, 5\)."),
        (lambda s: kl(s, s, 0.0), "kl: temperature is above 0, not 0.0."),
        (lambda s: kl(s, s, float("nan")), "kl: temperature is above 0, not nan."),
        (lambda s: kl(s, s, torch.tensor([1.0, 2, 0, 1])), "temperature is above 0 everywhere, but goes down to 0.0."),
        (lambda s: kl(s, s, torch.ones(3)), r"temperature has the shape \(3,\), but the logits have the rows \(4,\)."),
        (lambda s: kl(s, s, mask=torch.ones(3)), r"mask has the shape \(3,\), but the logits have the rows \(4,\)."),
        (lambda s: kl(s, s, weight=torch.ones(4, 1)), r"weight has the shape \(4, 1\), but the logits have the rows"),
        (lambda s: kl(s, s, reduction="batchmean"), "reduction is 'mean', 'sum' or 'none', not 'batchmean'."),
        (lambda s: kl(s, s, chunk=0), "chunk is a number of rows of at least 1, not 0."),
        (lambda s: kl(s[:0], s[:0]), r"student_logits is empty, of shape \(0, 5\)."),
        (lambda s: js(s, s, beta=1.0), "beta lies between 0 and 1, not 1.0; for the limits use kl and reverse_kl."),
        (
            lambda s: cross_entropy(s, torch.tensor([0, 1, 5, 2])),
            "labels holds 5, but student_logits has 5 classes, 0 to 4",
        ),
        (lambda s: cross_entropy(s, torch.tensor([0, -1, 2, 2])), "labels holds -1, but student_logits has 5 classes"),
        (
            lambda s: cross_entropy(s, torch.zeros(4, 5).long()),
            r"labels has the shape \(4, 5\), but student_logits has",
        ),
        (lambda s: cross_entropy(s, torch.rand(4)), "student_logits has 5 classes but labels has 4; crop"),
        (lambda s: annealed_temperature(0.0, 0.5), "annealed_temperature: start is above 0, not 0.0."),
        (lambda s: annealed_temperature(2.0, 1.5), "progress lies between 0 and 1, not 1.5."),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(logits(4, 5))

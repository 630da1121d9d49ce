"""The memory of CRD: the loss by its definition, who is drawn, how the banks move, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.modules.memory import ContrastiveMemory

SAMPLES, WIDTH, NEGATIVES = 60, 6, 9


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def labels() -> Tensor:
    return torch.arange(SAMPLES) % 4


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)))


def memory(**options) -> ContrastiveMemory:
    return ContrastiveMemory(SAMPLES, WIDTH, negatives=NEGATIVES, **options)


INDEX = torch.tensor([5, 0, 59, 17])


def test_the_loss_is_that_of_each_side_against_the_others_bank():
    memory_ = memory(temperature=0.3)
    student, teacher = unit(4, 1), unit(4, 2)
    candidates = memory_.draw(INDEX)
    expected = 0.0
    for anchor, bank in ((student, memory_.teacher), (teacher, memory_.student)):
        h = torch.stack([(bank[candidates[i]] @ anchor[i] / 0.3).exp() for i in range(4)])
        h = h / (h.mean() * SAMPLES)
        real = h / (h + NEGATIVES / SAMPLES)
        expected -= (real[:, 0].log().sum() + (1 - real[:, 1:]).log().sum()) / 4
    torch.testing.assert_close(memory_(student, teacher, INDEX, candidates), expected)


@pytest.mark.parametrize("samples", [60, 3000])
def test_both_ways_to_the_scores_agree(samples, monkeypatch):
    memory_ = ContrastiveMemory(samples, WIDTH, negatives=20)
    anchors = unit(4, 1).requires_grad_()
    candidates = memory_.draw(INDEX)
    found = memory_._scores(anchors, memory_.student, candidates)
    torch.testing.assert_close(found, torch.einsum("bkd,bd->bk", memory_.student[candidates], anchors) / 0.07)
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weights).sum(), anchors)
    torch.testing.assert_close(gradient, torch.einsum("bkd,bk->bd", memory_.student[candidates], weights) / 0.07)


def test_the_constants_are_those_of_the_first_batch():
    memory_ = memory()
    assert memory_.log_normalizers.isnan().all()
    with torch.no_grad():
        memory_(unit(4, 1), unit(4, 2), INDEX)
    assert memory_.log_normalizers.isnan().all(), "looking does not count"
    memory_(unit(4, 1), unit(4, 2), INDEX)
    first = memory_.log_normalizers.clone()
    assert first.isfinite().all()
    memory_(unit(4, 3), unit(4, 4), INDEX)
    assert torch.equal(memory_.log_normalizers, first)


def test_banks_move_once_per_step_towards_what_was_seen():
    memory_ = memory(momentum=0.75)
    before = memory_.student.clone(), memory_.teacher.clone()
    student, teacher = unit(4, 1).requires_grad_(), unit(4, 2)
    memory_(student, teacher, INDEX).backward()
    assert torch.equal(memory_.student, before[0]), "not before the step"
    memory_.after_step()
    for bank, was, seen in zip((memory_.student, memory_.teacher), before, (student.detach(), teacher), strict=True):
        torch.testing.assert_close(bank[INDEX], F.normalize(0.75 * was[INDEX] + 0.25 * seen))
        others = torch.ones(SAMPLES, dtype=torch.bool).scatter(0, INDEX, False)
        assert torch.equal(bank[others], was[others])
    moved = memory_.student.clone()
    memory_.after_step()
    assert torch.equal(memory_.student, moved), "what was seen is forgotten"
    assert not memory_.student.requires_grad


def test_evaluation_leaves_no_trace():
    memory_ = memory().eval()
    before = copy.deepcopy(memory_.state_dict())
    memory_(unit(4, 1), unit(4, 2), INDEX)
    memory_.after_step()
    for name, tensor in memory_.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True)


def test_two_batches_of_one_step_and_the_samples_of_other_processes():
    class Run:
        """Gathers what this process has and the same of a second one, whose samples stand one further."""

        def gather(self, x: Tensor) -> Tensor:
            return torch.cat([x, x if x.is_floating_point() else x + 1])

    memory_ = memory()
    was = memory_.student.clone()
    memory_(unit(2, 1), unit(2, 2), torch.tensor([5, 0]))
    memory_(unit(2, 3), unit(2, 4), torch.tensor([39, 17]))
    memory_.after_step(Run())
    assert (memory_.student != was).any(1).nonzero().flatten().tolist() == [0, 1, 5, 6, 17, 18, 39, 40]


@pytest.mark.parametrize("replacement", [True, False])
def test_negatives_come_evenly_from_the_other_classes(replacement):
    memory_ = memory(labels=labels(), replacement=replacement)
    index = torch.tensor([6]).repeat(3000)
    drawn = memory_.draw(index)
    assert drawn.shape == (3000, 1 + NEGATIVES)
    assert (drawn[:, 0] == 6).all()
    counts = drawn[:, 1:].flatten().bincount(minlength=SAMPLES)
    assert counts[labels() == 2].sum() == 0
    expected = 3000 * NEGATIVES / 45
    assert ((counts[labels() != 2] - expected).abs() < 5 * math.sqrt(expected)).all()
    distinct = all(len(row.unique()) == NEGATIVES for row in drawn[:50, 1:])
    assert distinct != replacement


def test_without_labels_all_others_may_be_negatives():
    drawn = memory().draw(torch.tensor([6]).repeat(3000))[:, 1:]
    assert sorted(drawn.unique().tolist()) == [i for i in range(SAMPLES) if i != 6]


def test_relaxed_positives_are_any_of_the_class():
    memory_ = memory(labels=labels(), mode="relax")
    positives = memory_.draw(torch.tensor([6]).repeat(500))[:, 0]
    assert sorted(positives.unique().tolist()) == [i for i in range(SAMPLES) if i % 4 == 2]


def test_the_source_of_draws_can_be_given():
    memory_ = memory(labels=labels())
    first, second = (
        memory_.draw(INDEX, lambda high, *shape: torch.randint(high, shape, generator=torch.Generator().manual_seed(5)))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, memory_.draw(INDEX))


def test_state_travels():
    memory_ = memory(labels=labels())
    memory_(unit(4, 1), unit(4, 2), INDEX)
    memory_.after_step()
    other = memory(labels=labels())
    other.load_state_dict(memory_.state_dict())
    assert set(memory_.state_dict()) == {"student", "teacher", "log_normalizers"}
    candidates = memory_.draw(INDEX)
    given = unit(4, 3), unit(4, 4), INDEX, candidates
    assert torch.equal(memory_(*given), other(*given))


def test_learning_brings_a_pair_together():
    memory_ = ContrastiveMemory(16, 8, negatives=12)
    teacher = F.normalize(torch.randn(16, 8))
    free = torch.randn(16, 8, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(80):
        student = F.normalize(free)
        loss = memory_(student, teacher, torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory_.after_step()
    ranks = (F.normalize(free) @ teacher.T).argmax(1)
    assert (ranks == torch.arange(16)).float().mean() > 0.9


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(UserError, match="at least 2 samples of width 1"):
        ContrastiveMemory(1, 4)
    with pytest.raises(UserError, match=r"momentum between 0 and 1, not 0\.07 and 1\.0"):
        memory(momentum=1.0)
    with pytest.raises(UserError, match="mode is 'exact' or 'relax', not 'loose'"):
        memory(mode="loose")
    with pytest.raises(UserError, match="needs labels for it"):
        memory(mode="relax")
    with pytest.raises(UserError, match=r"one class per sample \(60\), 0 or more, not of shape \(59,\)"):
        memory(labels=labels()[:-1])
    with pytest.raises(UserError, match="All samples have one class"):
        memory(labels=torch.zeros(SAMPLES))
    with pytest.raises(UserError, match="there are 45 negatives at most, not 46"):
        ContrastiveMemory(SAMPLES, WIDTH, labels=labels(), negatives=46, replacement=False)
    with pytest.raises(UserError, match=r"embeddings of shape \(4, 6\), not \(4, 6\) and \(4, 5\)"):
        memory()(unit(4, 1), unit(4, 2)[:, :5], INDEX)

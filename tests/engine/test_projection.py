"""Terms that may not oppose others: the algebra, and what a stage does with it."""

import pytest
import torch
from torch import nn

from stillhouse.engine import Projection, Stage, Update, sgd
from stillhouse.engine.projection import project, without_opposition
from stillhouse.errors import UserError


def test_nothing_opposes_afterwards_and_only_what_did_is_changed():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        g = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
        h = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
        before = sum(float((a * b).sum()) for a, b in zip(g, h, strict=True))
        after = without_opposition(g, h)
        dot = sum(float((a * b).sum()) for a, b in zip(g, after, strict=True))
        if before >= 0:
            assert all(torch.equal(a, b) for a, b in zip(h, after, strict=True))
        else:
            assert abs(dot) < 1e-5


def test_a_missing_gradient_counts_as_zero():
    g, h = [torch.tensor([1.0]), torch.tensor([2.0]), None], [torch.tensor([-5.0]), None, torch.tensor([7.0])]
    first, second, third = without_opposition(g, h)
    # The dot product is that of the first alone, and the length of g that of both: h - (-5 / 5) g.
    assert first.item() == pytest.approx(-4.0)
    assert second.item() == pytest.approx(2.0)
    assert third.item() == 7.0
    assert without_opposition([None], [torch.ones(1)]) == [torch.ones(1)]


def gradients(scope, terms, projection):
    w, v = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    values = {name: function(w, v) for name, function in terms.items()}
    ids = {id({"w": w, "v": v}[name]) for name in scope}
    project(projection, ids, values, [w, v], lambda parameters: None)
    return w.grad, v.grad


def test_the_terms_named_in_neither_are_added_as_they_are():
    terms = {
        "ce": lambda w, v: w[0] + 0 * w[1],
        "logit": lambda w, v: -2 * w[0] + w[1] + v[0],
        "other": lambda w, v: -10 * w[0] + v[0],
    }
    w, v = gradients(("w", "v"), terms, Projection(terms=("logit",), onto=("ce",)))
    assert w.tolist() == [1 + 0 - 10, 1]
    assert v.tolist() == [2]
    # Without the others they are summed as ever.
    w, _ = gradients(("w", "v"), terms, Projection(terms=("absent",), onto=("ce",)))
    assert w.tolist() == [1 - 2 - 10, 1]


def test_what_lies_outside_the_scope_is_left_alone():
    terms = {"ce": lambda w, v: w[0] + v[0], "logit": lambda w, v: -2 * w[0] - 3 * v[0]}
    w, v = gradients(("w",), terms, Projection(terms=("logit",), onto=("ce",)))
    assert w.tolist() == [1, 0]
    assert v.tolist() == [1 - 3]


def test_it_goes_with_whole_steps_only():
    update = Update(lambda m, batch, run: {}, {"net": sgd(0.1)}, name="loss", projection=Projection(("a",), ("b",)))
    with pytest.raises(UserError, match="'loss' projects the gradients of its terms"):
        Stage("s", {"net": nn.Linear(1, 1)}, [update], steps=1, accumulate=2)

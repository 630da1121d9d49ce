"""Transformations as labels: the registry, its algebra, and what it refuses."""

import doctest
from itertools import product

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules import views as module
from stillhouse.modules.views import Views
from stillhouse.spec import Spec

IMAGES = torch.randn(5, 3, 6, 6)


def turned(x):
    return x.flip(-1)


def kept(x):
    return x


OWN = [kept, turned]
UNSORTED = [turned, kept]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("rotation", 4),
        ("rotation2", 2),
        ("colors", 6),
        ("colors:cyclic", 3),
        ("rotation*colors:cyclic", 12),
        ("rotation*colors", 24),
        ("rotation2*colors:cyclic", 6),
        ("reverse", 2),
        ("segments:3", 3),
    ],
)
def test_the_lists_have_their_length_and_begin_with_the_identity(text, count):
    views = Views.parse(text)
    inputs = torch.randn(5, 7) if text.startswith("segments") else IMAGES
    views.check(inputs)
    assert views.count == count
    rows = views.expand(inputs)
    assert rows.shape == (5 * count, *inputs.shape[1:])
    assert torch.equal(rows[::count], inputs)
    seen = [view(inputs) for view in views.transforms]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), "views differ"
    for j, view in enumerate(views.transforms):
        assert torch.equal(rows[j::count], view(inputs))
    assert Views.parse(views.dump()).dump() == views.dump()


def test_four_quarter_turns_are_the_identity_and_two_a_half_turn():
    turn = Views.parse("rotation").transforms[1]
    assert torch.equal(turn(turn(turn(turn(IMAGES)))), IMAGES)
    assert torch.equal(turn(turn(IMAGES)), Views.parse("rotation2").transforms[1](IMAGES))
    assert torch.equal(turn(IMAGES), torch.rot90(IMAGES, 1, (2, 3)))


@pytest.mark.parametrize("text", ["colors", "colors:cyclic", "rotation"])
def test_they_form_a_group(text):
    views = Views.parse(text).transforms
    seen = [view(IMAGES) for view in views]
    for first, second in product(views, views):
        assert sum(torch.equal(second(first(IMAGES)), one) for one in seen) == 1


def test_a_product_counts_the_second_list_faster():
    views = Views.parse("rotation*colors:cyclic").transforms
    turns, colors = Views.parse("rotation").transforms, Views.parse("colors:cyclic").transforms
    for (i, turn), (j, color) in product(enumerate(turns), enumerate(colors)):
        assert torch.equal(views[3 * i + j](IMAGES), color(turn(IMAGES)))


def test_series_and_sequences():
    series = torch.arange(2 * 2 * 4).view(2, 2, 4)
    assert Views.parse("reverse").expand(series)[1].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    swapped = Views.parse({"kind": "channels", "orders": [[0, 1], [1, 0]]}).expand(series)
    assert swapped[1].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    cut = Views.parse("segments:3").expand(tokens).tolist()
    assert cut == [[1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 1, 2, 7], [5, 6, 1, 2, 3, 4, 7]]


def test_functions_of_ones_own():
    for views in (Views.parse([kept, turned]), Views.parse(f"{__name__}:OWN")):
        views.check(IMAGES)
        assert torch.equal(views.expand(IMAGES)[1::2], IMAGES.flip(-1))
    assert Views.parse([kept, turned]).dump() == {
        "kind": "functions",
        "functions": [f"{__name__}.kept", f"{__name__}.turned"],
    }
    with pytest.raises(UserError, match="could not be imported"):
        Views.parse("nowhere.to_be:FOUND").check(IMAGES)
    with pytest.raises(UserError, match="is no list of functions"):
        Views.parse(f"{__name__}:IMAGES").check(IMAGES)


@pytest.mark.parametrize(
    ("views", "inputs", "sentence"),
    [
        ("rotation", torch.randn(2, 3, 6, 4), "A quarter turn needs square images, not 6 x 4; use 'rotation2'"),
        ("rotation", torch.randn(2, 6), "Rotations are of images"),
        ("colors", torch.randn(2, 1, 6, 6), "Orders of 3 channels need inputs with 3, not 1"),
        ("segments:9", torch.randn(2, 6), "6 positions are fewer than 9 segments"),
        ([turned, kept], IMAGES, "first transformation of the functions that were given changes its input"),
        (f"{__name__}:UNSORTED", IMAGES, "list the identity first"),
        ({"kind": "rotation", "turns": [1, 0]}, IMAGES, "rotation by 90, 0 degrees changes its input"),
        ({"kind": "channels", "orders": [[1, 0, 2], [0, 1, 2]]}, IMAGES, "list the identity first"),
        ([kept, lambda x: x[..., :-1]], IMAGES, "views keep the shape"),
    ],
)
def test_what_does_not_fit_is_refused(views, inputs, sentence):
    with pytest.raises(UserError, match=sentence):
        Views.parse(views).check(inputs)


def test_half_turns_take_any_shape():
    Views.parse("rotation2").check(torch.randn(2, 3, 6, 4))


class Holder(Spec):
    views: Views


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("rotaton", "did you mean 'rotation'"),
        ("colors:all", "'colors' takes nothing or 'cyclic'"),
        ([], "a list of transformations is text"),
        ({"kind": "rotation", "turns": []}, "at least 1 item"),
        ({"kind": "channels", "orders": [[0, 0]]}, "no order of 2 channels"),
        ({"kind": "channels", "orders": [[0, 1], [0, 1]]}, "same order"),
        ({"kind": "functions", "functions": ["a.b"]}, "pass them again"),
    ],
)
def test_lists_that_are_none(value, reason):
    with pytest.raises(ValueError, match=reason):
        Holder(views=value)


def test_the_examples_run():
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0

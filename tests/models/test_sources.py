"""Models of one's own: by import path and as objects (files are tested with the storage)."""

import copy
import hashlib
import sys

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, fingerprint, origin
from stillhouse.spec import Spec, read

FACTS = Facts({"pixel_values": (1, 8, 8)}, 3)


class Recipe(Spec):
    model: ModelSpec


MODULE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, width=4, *, bias=True):
        super().__init__()
        self.layer = nn.Linear(2, width, bias=bias)

class Holder:
    Inner = Small

def sized(facts, extra=0):
    return nn.Linear(facts.input_shape[-1], facts.num_classes + extra)

def any_arguments(**kwargs):
    return Small(**kwargs)

def needs(width):
    return Small(width)

def wrong():
    return "text"

def frozen():
    return Small().eval()

made = Small()
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_nets", "own_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("own_nets:Small", (4, 2)),
        ("import:own_nets:Small", (4, 2)),
        ({"kind": "import", "path": "own_nets:Small", "arguments": {"width": 7, "bias": False}}, (7, 2)),
        ("own_nets:Holder.Inner", (4, 2)),
        ({"kind": "import", "path": "own_nets:any_arguments", "arguments": {"width": 5}}, (5, 2)),
        ("own_nets:frozen", (4, 2)),
    ],
    ids=str,
)
def test_a_class_or_function_by_path(own, spec, shape):
    model = read(Recipe, {"model": spec}).model
    built = model.build(FACTS)
    assert built.layer.weight.shape == shape
    assert built.training
    assert ModelSpec.parse(model.dump()) == model
    assert origin(built) == (model, FACTS)


def test_a_function_that_asks_for_facts_gets_them(own):
    assert ModelSpec.parse("own_nets:sized").build(FACTS).weight.shape == (3, 8)
    spec = {"kind": "import", "path": "own_nets:sized", "arguments": {"extra": 2}}
    assert ModelSpec.parse(spec).build(FACTS).weight.shape == (5, 8)


def test_torch_s_own_classes():
    spec = {"kind": "import", "path": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 3}}
    torch.manual_seed(0)
    built = ModelSpec.parse(spec).build(FACTS)
    torch.manual_seed(0)
    assert fingerprint(built) == fingerprint(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_netz:Small", "The model 'own_netz:Small' cannot be imported: it is not on the Python path."),
        ("own_nets.sub:Small", "The model 'own_nets.sub:Small' cannot be imported: "),
        ("own_broken:Small", "cannot be imported: No module named 'not_installed_anywhere'."),
        ("own_nets:Smal", "'own_nets:Smal': 'own_nets' has no 'Smal'; did you mean 'Small'?"),
        ("own_nets:Holder.Iner", "'Holder' has no 'Iner'; did you mean 'Inner'?"),
        ("own_nets:needs", "'own_nets:needs' requires 'width'; give it in 'arguments' of the model."),
        (
            {"kind": "import", "path": "own_nets:needs", "arguments": {"widht": 1, "width": 2}},
            "'own_nets:needs' takes no argument 'widht'; did you mean 'width'?",
        ),
        ("own_nets:wrong", "'own_nets:wrong' made a str, not a torch.nn.Module."),
        ("own_nets:made", "'own_nets:made' is a module already made; name the class or function that makes it."),
        ("own_nets:number", "'own_nets:number' is a int; name a class or function that makes a module."),
        ("own nets:Small", "model.path: expected an import path such as"),
        ("file", "model: 'file' needs a path, as in 'file:runs/teacher/model'."),
        (3, "model: a model is text, a mapping with 'kind', or a torch.nn.Module, not a int."),
        (nn.Linear, "model: a model is a module, not the class Linear; call it, or write 'pkg.mod:Name'."),
    ],
    ids=str,
)
def test_one_sentence_for_what_is_wrong(own, spec, message):
    with pytest.raises(UserError) as caught:
        read(Recipe, {"model": spec}).model.build(FACTS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_is_dumped_by_name_and_fingerprint():
    module = nn.Linear(2, 3)
    recipe = read(Recipe, {"model": module})
    print_ = f"{fingerprint(module)}-{hashlib.sha256(repr(module).encode()).hexdigest()[:16]}"
    expected = {"kind": "object", "object": "torch.nn.modules.linear.Linear", "fingerprint": print_}
    assert recipe.model.dump() == expected
    assert recipe.dump() == {"model": expected}
    other = read(Recipe, {"model": copy.deepcopy(module)})
    assert other.digest() == recipe.digest()
    assert read(Recipe, {"model": nn.Linear(2, 3)}).digest() != recipe.digest()


def test_equal_weights_in_another_architecture_are_another_object():
    linear = nn.Linear(2, 3)
    models = [
        nn.Sequential(linear, nn.ReLU()),
        nn.Sequential(linear, nn.GELU()),
        nn.Sequential(linear, nn.Dropout(0.1)),
    ]
    assert len({fingerprint(model) for model in models}) == 1, "the weights alone do not tell them apart"
    assert len({read(Recipe, {"model": model}).digest() for model in models}) == 3


def test_a_dumped_object_is_not_read_back_without_the_object():
    dump = read(Recipe, {"model": nn.Linear(2, 3)}).dump()
    with pytest.raises(UserError) as caught:
        read(Recipe, dump)
    assert str(caught.value) == (
        "model: the model is the Python object 'torch.nn.modules.linear.Linear', and a recipe with it runs only with "
        "the object passed again."
    )


def test_every_build_of_an_object_starts_from_the_weights_that_were_given():
    module = nn.Linear(2, 3)
    spec = ModelSpec.parse(module)
    first = spec.build(FACTS)
    with torch.no_grad():
        first.weight.add_(1)
    assert first is not module
    assert fingerprint(spec.build(FACTS)) == fingerprint(module)
    assert spec.dump()["fingerprint"].startswith(fingerprint(module) + "-")


def test_an_object_is_handed_out_itself_on_request():
    module = nn.Linear(2, 3)
    assert ModelSpec.parse({"kind": "object", "object": module, "copy_on_build": False}).build(FACTS) is module


def test_a_copy_of_a_built_model_keeps_its_origin():
    spec = ModelSpec.parse("mlp:4")
    copied = ModelSpec.parse(spec.build(FACTS)).build(FACTS)
    assert origin(copied) == (spec, FACTS)
    assert origin(ModelSpec.parse(nn.Linear(2, 3)).build(FACTS)) is None


def test_an_object_that_cannot_be_copied_is_named():
    module = nn.Linear(2, 3)
    module.cache = module.weight * 2
    with pytest.raises(UserError, match=r"The module 'torch\.nn\.modules\.linear\.Linear' cannot be copied"):
        ModelSpec.parse(module).build(FACTS)

"""Taps: what they read, that they keep no graph alive, and that the model is as before."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, Taps, resolve_paths

IMAGES = torch.randn(2, 1, 8, 8)


def convnet():
    torch.manual_seed(0)
    spec = ModelSpec.parse({"kind": "convnet", "width": 4, "depth": 3})
    return spec.build(Facts({"pixel_values": (1, 8, 8)}, 3))


class Residual(nn.Module):
    """In-place activations and additions, as torchvision's ResNets have them."""

    def __init__(self, inplace=True, functional=False):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.activation = nn.ReLU(inplace=inplace)
        self.functional = functional

    def forward(self, x):
        hidden = self.first(x)
        hidden = self.activation(hidden)
        out = self.second(hidden)
        if self.functional:
            out += 1
        return self.activation(out)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_reads_outputs_by_path_and_pattern_in_order():
    model = convnet()
    with Taps(model, ["blocks.*.activation", "classifier", "blocks.0.conv"]) as taps:
        assert taps.paths == (
            "blocks.0.activation",
            "blocks.1.activation",
            "blocks.2.activation",
            "classifier",
            "blocks.0.conv",
        )
        logits = model(IMAGES)
        read = taps.take()
    assert tuple(read) == taps.paths
    assert read["classifier"] is logits
    torch.testing.assert_close(read["blocks.0.conv"], model.blocks[0].conv(IMAGES))
    torch.testing.assert_close(read["blocks.0.activation"], model.blocks[0].norm(read["blocks.0.conv"]).relu())


def test_reads_inputs():
    model = convnet()
    with Taps(model, ["classifier", ""], side="input") as taps:
        model(IMAGES)
        read = taps.take()
    torch.testing.assert_close(read["classifier"], model.features(IMAGES))
    assert read[""] is IMAGES


def test_the_root_is_the_empty_path():
    model = convnet()
    with Taps(model, "") as taps:
        logits = model(IMAGES)
        assert taps.take()[""] is logits


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("blocks.*", 3),
        ("blocks.?.conv", 3),
        ("blocks.[01].conv", 2),
        ("blocks.[!0].conv", 2),
        ("**.conv", 3),
        ("blocks.**", 15),
        ("**", 18),
        ("bl*.1.*v", 1),
        ("classifier", 1),
    ],
)
def test_patterns_stay_within_a_part_unless_doubled(pattern, count):
    assert len(resolve_paths(convnet(), [pattern])) == count


def test_a_dot_in_a_pattern_is_a_dot():
    with pytest.raises(UserError):
        resolve_paths(convnet(), ["blocks?0"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.0.activatoin", "ConvNet has no module 'blocks.0.activatoin'; did you mean 'blocks.0.activation'?"),
        ("blocks.*.relu", "ConvNet has no module 'blocks.*.relu'; "),
        ("xyz", "ConvNet has no module 'xyz'; its first modules are 'blocks', 'blocks.0', 'blocks.0.conv'"),
    ],
)
def test_a_path_that_is_none_is_named_with_the_nearest(pattern, message):
    with pytest.raises(UserError) as caught:
        Taps(convnet(), pattern)
    assert str(caught.value).startswith(message)


def test_gradients_flow_through_what_is_read():
    model = convnet()
    with Taps(model, "blocks.1.activation") as taps:
        model(IMAGES)
        taps.take()["blocks.1.activation"].sum().backward()
    assert model.blocks[1].conv.weight.grad is not None
    assert model.blocks[2].conv.weight.grad is None
    with Taps(model, "blocks.1.activation") as taps, torch.no_grad():
        model(IMAGES)
        assert not taps.take()["blocks.1.activation"].requires_grad


def test_no_graph_outlives_take():
    model = convnet()
    taps = Taps(model, "blocks.*.activation")
    images = IMAGES.clone().requires_grad_()
    loss = model(images).sum()
    in_graph = weakref.ref(images)
    del images
    gc.collect()
    assert in_graph() is not None, "the loss holds its graph, and that its input"
    tensors = [weakref.ref(tensor) for tensor in taps.take().values()]
    del loss
    gc.collect()
    assert in_graph() is None
    assert [tensor() for tensor in tensors] == [None, None, None]


def test_what_was_not_taken_goes_with_the_next_forward_pass():
    model = convnet()
    taps = Taps(model, "blocks.0.activation", calls="all")
    model(IMAGES)
    old = weakref.ref(taps._read["blocks.0.activation"][0][0])
    model(IMAGES)
    gc.collect()
    assert old() is None
    assert len(taps.take_all()["blocks.0.activation"]) == 1


def test_closing_removes_every_hook_and_what_was_read():
    model = convnet()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with Taps(model, "blocks.*") as taps:
        assert hooks() == 4
        model(IMAGES)
    assert hooks() == 0
    with pytest.raises(UserError, match="read nothing"):
        taps.take()
    taps.close()


def test_the_model_computes_the_same_with_taps_set():
    model = convnet()
    before = model(IMAGES)
    with Taps(model, ["**"]), Taps(model, ["**"], side="input"):
        assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("side", ["output", "input"])
def test_in_place_modules_do_not_change_what_was_read(side):
    torch.manual_seed(0)
    model, plain = Residual(inplace=True), Residual(inplace=False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 3)
    paths = ["first", "second", "activation"]
    with Taps(model, paths, side=side) as taps, Taps(plain, paths, side=side) as expected:
        model(x)
        plain(x)
        read, wanted = taps.take(), expected.take()
    for path in wanted:
        torch.testing.assert_close(read[path], wanted[path])
    assert (read["activation" if side == "input" else "first"] < 0).any(), "read before the activation"
    read["second"].sum().backward()
    assert model.first.weight.grad is not None


def test_without_in_place_modules_nothing_is_copied():
    model = convnet()
    with Taps(model, "classifier") as taps:
        assert model(IMAGES) is taps.take()["classifier"]


def test_a_functional_in_place_change_is_refused_and_clone_helps():
    model = Residual(inplace=False, functional=True)
    x = torch.randn(5, 3)
    with Taps(model, "second") as taps:
        model(x)
        with pytest.raises(UserError, match=r"The output of 'second' was changed in place .* 'clone=True'"):
            taps.take()
    with Taps(model, "second", clone=True) as taps:
        model(x)
        torch.testing.assert_close(taps.take()["second"], model.second(model.activation(model.first(x))))


def test_several_calls_give_the_last_or_all():
    model = Shared()
    x = torch.randn(2, 3)
    with Taps(model, "layer") as last, Taps(model, "layer", calls="all") as every:
        model(x)
        final, calls = last.take()["layer"], every.take_all()["layer"]
    assert len(calls) == 2
    torch.testing.assert_close(calls[0], model.layer(x))
    assert torch.equal(calls[1], final)


def test_a_module_that_is_not_called_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    with Taps(model, ["used", "idle"]) as taps:
        model(torch.zeros(1, 3))
        with pytest.raises(UserError, match="The tap 'idle' read nothing"):
            taps.take()


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.inner = nn.Identity()
        self.output = output

    def forward(self, x, scale=None):
        return self.inner(self.output)


FIRST, SECOND = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("output", "item", "expected"),
    [
        ((FIRST, SECOND), None, FIRST),
        ((None, SECOND), None, SECOND),
        ([FIRST, SECOND], 1, SECOND),
        ((FIRST, SECOND), -1, SECOND),
        ({"a": FIRST, "b": SECOND}, "b", SECOND),
        ({"a": FIRST, "b": SECOND}, 1, SECOND),
        (FIRST, 0, FIRST),
    ],
)
def test_an_item_of_a_tuple_or_mapping(output, item, expected):
    model = Returns(output)
    with Taps(model, "inner", item=item) as taps:
        model(FIRST)
        assert taps.take()["inner"] is expected


@pytest.mark.parametrize(
    ("output", "item", "message"),
    [
        ((FIRST,), 1, "The output of 'inner' has no tensor at 1: it is a tuple of Tensor."),
        ((FIRST, None), 1, "The output of 'inner' has no tensor at 1: it is a tuple of Tensor, NoneType."),
        ({"a": FIRST}, "b", "The output of 'inner' has no tensor at 'b': it is a mapping with 'a'."),
        ("text", None, "The output of 'inner' has no tensor: it is a str."),
    ],
)
def test_an_item_that_is_no_tensor_is_named(output, item, message):
    model = Returns(output)
    with Taps(model, "inner", item=item), pytest.raises(UserError) as caught:
        model(FIRST)
    assert str(caught.value) == message


def test_inputs_by_keyword():
    model = Returns(FIRST)
    with Taps(model, "", side="input", item="scale") as taps:
        model(FIRST, scale=SECOND)
        assert taps.take()[""] is SECOND


def test_a_copy_of_the_model_does_not_write_into_its_taps():
    model = convnet()
    with Taps(model, "classifier") as taps:
        average = copy.deepcopy(model)
        logits = model(IMAGES)
        average(IMAGES + 1)
        assert taps.take()["classifier"] is logits


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_in_the_backward_pass_is_not_read(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(checkpoint(self.layer, x, use_reentrant=use_reentrant))

    model = Checkpointed()
    taps = Taps(model, "layer")
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    taps.take()
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    taps.clear()
    out = model(torch.randn(2, 3, requires_grad=True)).sum()
    taps.take()
    out.backward()
    with pytest.raises(UserError, match="read nothing"):
        taps.take()


def test_taps_work_in_a_compiled_model():
    model = convnet()
    expected = model.blocks[0](IMAGES)
    taps = Taps(model, "blocks.0")
    model.compile(backend="eager")
    for _ in range(2):
        model(IMAGES)
        read = taps.take()["blocks.0"]
        torch.testing.assert_close(read, expected)
    read.sum().backward()
    assert model.blocks[0].conv.weight.grad is not None


def test_taps_work_under_inference_mode_and_functional_call():
    model = convnet()
    with Taps(model, "classifier") as taps:
        with torch.inference_mode():
            model(IMAGES)
            assert taps.take()["classifier"].shape == (2, 3)
        weights = {name: parameter + 1 for name, parameter in model.named_parameters()}
        logits = torch.func.functional_call(model, weights, (IMAGES,))
        assert taps.take()["classifier"] is logits


def test_hidden_states_projections_and_attention_of_transformers():
    config = {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    spec = {"kind": "hf", "config": {**config, "intermediate_size": 8}, "overrides": {"attn_implementation": "eager"}}
    model = ModelSpec.parse(spec).build(Facts({"input_ids": (6,)}, 3)).eval()
    ids = torch.randint(0, 20, (2, 6))
    paths = ["bert.encoder.layer.*", "bert.encoder.layer.0.attention.self.query"]
    with Taps(model, paths) as hidden, Taps(model, "bert.encoder.layer.*.attention.self", item=1) as attention:
        outputs = model(ids, output_hidden_states=True, output_attentions=True)
        states, maps = hidden.take(), attention.take()
    for layer in range(2):
        assert torch.equal(states[f"bert.encoder.layer.{layer}"], outputs.hidden_states[layer + 1])
        assert torch.equal(maps[f"bert.encoder.layer.{layer}.attention.self"], outputs.attentions[layer])
    query = model.bert.encoder.layer[0].attention.self.query(outputs.hidden_states[0])
    torch.testing.assert_close(states["bert.encoder.layer.0.attention.self.query"], query)

"""Stages, embeddings and what ends them, found in networks of every kind by running them once."""

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec
from stillhouse.models.layers import classifier, named, paired, parameters_by_stage, stages

IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32)}
FACTS = Facts(inputs={"pixel_values": (3, 32, 32)}, num_classes=10, task="classification")


def build(spec):
    return ModelSpec.parse(spec).build(FACTS)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("resnet:8", [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ({"kind": "wrn", "depth": 10, "widen_factor": 1}, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ({"kind": "imagenet-resnet", "depth": 18}, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
        ({"kind": "cnn", "channels": [4, 6, 8]}, [(4, 16, 16), (8, 8, 8)]),
        ({"kind": "convnet", "width": 4}, [(4, 32, 32), (4, 16, 16), (4, 8, 8)]),
        ({"kind": "vit", "patch": 8, "dim": 12, "depth": 2, "heads": 2}, [(17, 12), (17, 12)]),
        ("mlp:6-5", [(6,), (5,)]),
    ],
    ids=str,
)
def test_the_stages_of_the_networks_here(spec, shapes):
    model = build(spec)
    found = stages(model, IMAGES)
    assert [layer.shape for layer in found] == shapes
    for layer in found:
        read = []
        handle = model.get_submodule(layer.path).register_forward_hook(lambda *args, read=read: read.append(args[-1]))
        model(IMAGES["pixel_values"])
        handle.remove()
        assert tuple(read[-1].shape[1:]) == layer.shape
    assert classifier(model, IMAGES) == "classifier"


def test_what_ends_a_stage():
    last = stages(build("resnet:8"), IMAGES)[-1]
    assert (last.path, last.activation, last.norm) == ("stages", "stages.2.0.activation2", "stages.2.0.norm2")
    # A norm without running statistics, and a stage that ends in a sum, have none of these.
    assert stages(build({"kind": "convnet", "width": 4}), IMAGES)[0].norm is None
    assert stages(build({"kind": "vit", "patch": 8, "dim": 12, "depth": 1, "heads": 2}), IMAGES)[0].activation is None


def test_a_network_of_somebody_else():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"a": nn.Conv2d(3, 5, 3, 2, 1), "b": nn.Conv2d(5, 7, 3, 2, 1)})
            self.bn = nn.BatchNorm2d(7)
            self.act = nn.ReLU(inplace=True)
            self.fc = nn.Linear(7, 4)

        def forward(self, x):
            x = self.act(self.bn(self.body["b"](torch.relu(self.body["a"](x)))))
            return self.fc(x.mean((2, 3)))

    model = Theirs().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = stages(model, IMAGES)
    assert [(layer.path, layer.shape) for layer in found] == [("body.a", (5, 16, 16)), ("act", (7, 8, 8))]
    assert (found[1].activation, found[1].norm) == ("act", "bn")
    assert classifier(model, IMAGES) == "fc"
    assert model.training
    assert model.bn.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_transformers_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    assert [layer.path for layer in stages(model, batch)] == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert classifier(model, batch) == "classifier"


def test_layers_are_paired_from_the_end():
    short, long = stages(build("mlp:3-3"), IMAGES), stages(build("mlp:3-3-3-3-3"), IMAGES)
    ours, theirs = paired(short, long)
    assert ours == short
    assert [long.index(layer) for layer in theirs] == [2, 4]
    assert paired(long, long) == (long, long)


def test_named_layers_and_what_cannot_be_found():
    model = build("resnet:8")
    assert [layer.shape for layer in named(model, IMAGES, ["stages.1", "stem"])] == [(32, 16, 16), (16, 32, 32)]
    with pytest.raises(UserError, match="does not run its module 'classifier-x'"):
        named(model, IMAGES, ["classifier-x"])
    with pytest.raises(UserError, match="does not end in a linear classifier"):
        classifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU()), IMAGES)
    with pytest.raises(UserError, match="has no hidden layer to read"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), IMAGES)


def test_parameters_belong_to_the_stage_in_which_they_run():
    model = build("resnet:8")
    groups, rest = parameters_by_stage(model, IMAGES)
    assert [len(names) for names in groups] == [9, 9, 9]
    assert {name.partition(".")[0] for name in groups[0]} == {"stem", "stages"}
    assert all(name.startswith("stages.1.") for name in groups[1])
    assert rest == ["classifier.weight", "classifier.bias"]
    assert sorted([*groups[0], *groups[1], *groups[2], *rest]) == sorted(name for name, _ in model.named_parameters())
    groups, rest = parameters_by_stage(build({"kind": "vit", "patch": 8, "dim": 12, "depth": 2, "heads": 2}), IMAGES)
    assert len(groups) == 2
    assert any("." not in name for name in groups[0]), (
        "what belongs to no layer, such as positions, counts to the first"
    )
    assert "classifier.weight" in rest

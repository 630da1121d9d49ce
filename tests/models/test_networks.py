"""The networks that come with stillhouse: shapes, published sizes, text forms, errors, drawing anew."""

import pytest
import torch

from stillhouse import memory
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, Taps, count_parameters, fingerprint, initialise
from stillhouse.spec import Spec, read


class Recipe(Spec):
    model: ModelSpec


def facts(*shape, classes=10, task="classification"):
    return Facts({"pixel_values": shape}, classes, task)


def build(spec, known):
    return read(Recipe, {"model": spec}).model.build(known)


CIFAR10, CIFAR100, IMAGENET = facts(3, 32, 32), facts(3, 32, 32, classes=100), facts(3, 224, 224, classes=1000)

EVERY = [
    "mlp",
    "mlp:16-8",
    {"kind": "mlp", "widths": [], "activation": "gelu"},
    "convnet",
    {"kind": "convnet", "width": [8, 16, 8], "norm": "batch", "pooling": "max", "activation": "sigmoid"},
    {"kind": "convnet", "width": 8, "norm": "group"},
    {"kind": "convnet", "width": 8, "norm": "layer", "pooling": "none"},
    {"kind": "convnet", "width": 8, "norm": "none"},
    "cnn",
    {"kind": "cnn", "channels": [4, 8], "strides": [1, 2], "norm": "layer"},
    "resnet:8",
    {"kind": "resnet", "depth": 8, "shortcut": "pad", "widths": [4, 8, 16]},
    {"kind": "imagenet-resnet", "depth": 18, "width": 8},
    {"kind": "imagenet-resnet", "depth": 50, "width": 8, "stem": "imagenet"},
    "wrn:10-1",
    {"kind": "wrn", "depth": 10, "widen_factor": 2, "dropout": 0.3},
    {"kind": "vit", "dim": 24, "depth": 2},
    {"kind": "vit", "dim": 24, "depth": 1, "pooling": "mean", "dropout": 0.1},
]


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
def test_every_network_fits_every_image_and_learns(spec, shape):
    network = build(spec, facts(*shape))
    assert network.training
    images = torch.randn(3, *shape)
    outputs = network(images)
    assert outputs.shape == (3, 10)
    assert torch.isfinite(outputs).all()
    outputs.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.eval()
    assert torch.equal(network.classifier(network.features(images)), network(images))


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_network_drawn_anew_equals_a_new_one_under_the_same_seed(spec):
    network = build(spec, facts(1, 28, 28))
    network(torch.randn(4, 1, 28, 28)).sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    held = list(network.parameters())
    torch.manual_seed(7)
    new = build(spec, facts(1, 28, 28))
    after = torch.rand(())
    torch.manual_seed(7)
    assert initialise(network) is network
    assert torch.rand(()) == after, "the same number of draws"
    assert fingerprint(network) == fingerprint(new)
    assert all(now is before for now, before in zip(network.parameters(), held, strict=True))
    torch.manual_seed(8)
    assert fingerprint(build(spec, facts(1, 28, 28))) != fingerprint(new)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_spec_reads_its_own_dump(spec):
    model = ModelSpec.parse(spec)
    assert ModelSpec.parse(model.dump()) == model
    assert ModelSpec.parse(model.dump()).digest() == model.digest()


# Sizes as printed in the papers or by the implementations that the distillation literature compares on.
@pytest.mark.parametrize(
    ("spec", "known", "size"),
    [
        ("convnet", CIFAR10, 320_010),
        ("convnet", CIFAR100, 504_420),
        ("convnet", facts(1, 28, 28), 317_706),
        ("convnet:4", facts(3, 64, 64, classes=200), 857_160),
        ({"kind": "resnet", "depth": 20, "shortcut": "pad"}, CIFAR10, 269_722),
        ({"kind": "resnet", "depth": 110, "shortcut": "pad"}, CIFAR10, 1_727_962),
        ("resnet:20", CIFAR100, 278_324),
        ("resnet:32", CIFAR100, 472_756),
        ("resnet:56", CIFAR100, 861_620),
        ("resnet:110", CIFAR100, 1_736_564),
        ({"kind": "resnet", "depth": 8, "widths": [64, 128, 256], "stem_width": 32}, CIFAR100, 1_233_540),
        ({"kind": "resnet", "depth": 32, "widths": [64, 128, 256], "stem_width": 32}, CIFAR100, 7_433_860),
        ("wrn:16-2", CIFAR100, 703_284),
        ("wrn:40-1", CIFAR100, 569_780),
        ("wrn:40-2", CIFAR100, 2_255_156),
        ("wrn:28-10", CIFAR10, 36_479_194),
        ("imagenet-resnet:18", CIFAR10, 11_173_962),
        ("imagenet-resnet:50", CIFAR10, 23_520_842),
        ("imagenet-resnet:18", IMAGENET, 11_689_512),
        ("imagenet-resnet:34", IMAGENET, 21_797_672),
        ("imagenet-resnet:50", IMAGENET, 25_557_032),
        ("imagenet-resnet:101", IMAGENET, 44_549_160),
        ("imagenet-resnet:152", IMAGENET, 60_192_808),
        ({"kind": "vit", "patch": 16, "depth": 12}, IMAGENET, 5_717_416),
    ],
    ids=str,
)
def test_published_sizes(spec, known, size):
    with torch.device("meta"):
        assert count_parameters(build(spec, known)) == size


def test_the_convnet_sees_28_pixels_as_32_and_halves_them():
    network = build("convnet", facts(1, 28, 28))
    with Taps(network, ["blocks.0.conv", "blocks.*.pool"]) as taps:
        network(torch.zeros(2, 1, 28, 28))
        sizes = {path: tuple(tensor.shape[1:]) for path, tensor in taps.take().items()}
    assert sizes == {
        "blocks.0.conv": (128, 32, 32),
        "blocks.0.pool": (128, 16, 16),
        "blocks.1.pool": (128, 8, 8),
        "blocks.2.pool": (128, 4, 4),
    }
    assert network.features(torch.zeros(2, 1, 28, 28)).shape == (2, 2048)


def test_convnet_block_is_conv_norm_relu_pool():
    network = build({"kind": "convnet", "width": 4, "depth": 1}, facts(3, 8, 8)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.double)
    maps = torch.nn.functional.conv2d(images, network.blocks[0].conv.weight, network.blocks[0].conv.bias, padding=1)
    normal = (maps - maps.mean((2, 3), keepdim=True)) / (maps.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = normal.relu().unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(network.features(images), expected.flatten(1))


def test_the_padded_shortcut_keeps_positions_and_adds_zeros():
    network = build({"kind": "resnet", "depth": 8, "shortcut": "pad", "widths": [4, 8, 16]}, facts(3, 8, 8))
    maps = torch.randn(1, 4, 8, 8)
    shorter = network.stages[1][0].shortcut(maps)
    assert shorter.shape == (1, 8, 4, 4)
    assert torch.equal(shorter[:, 2:6], maps[:, :, ::2, ::2])
    assert shorter[:, :2].abs().sum() == shorter[:, 6:].abs().sum() == 0


def test_a_wide_block_activates_first_and_projects_what_is_activated():
    block = build("wrn:10-2", facts(3, 8, 8)).eval().stages[0][0]
    maps = torch.randn(2, 16, 8, 8)
    active = block.norm1(maps).relu()
    branch = block.conv2(block.norm2(block.conv1(active)).relu())
    torch.testing.assert_close(block(maps), branch + block.shortcut(active))


def test_vit_equals_a_plain_transformer_encoder():
    network = build({"kind": "vit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}, facts(1, 8, 8)).eval()
    block = network.blocks[0]
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        parts = (block.attention.query, block.attention.key, block.attention.value)
        layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        layer.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
        layer.linear1.load_state_dict(block.mlp.up.state_dict())
        layer.linear2.load_state_dict(block.mlp.down.state_dict())
    tokens = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(tokens), layer(tokens))


@pytest.mark.parametrize(("known", "size"), [(facts(1, 8, 8, classes=None, task="regression"), 1), (CIFAR10, 10)])
def test_the_output_follows_the_task(known, size):
    assert build("mlp:4", known)(torch.zeros(2, *known.input_shape)).shape == (2, size)


def test_no_outputs_give_the_features():
    network = build({"kind": "cnn", "num_outputs": 0}, facts(1, 8, 8, classes=None, task="unlabelled"))
    assert network.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 128)


def test_mlp_takes_vectors():
    assert build("mlp:4", Facts({"features": (7,)}, 3))(torch.zeros(2, 7)).shape == (2, 3)


@pytest.mark.parametrize(
    ("spec", "known", "message"),
    [
        ("convnt", CIFAR10, "model: there is no model 'convnt'; did you mean 'convnet'?"),
        ({"kind": "convnet", "widht": 3}, CIFAR10, "model.widht: there is no such field; did you mean 'width'?"),
        ({"kind": "convnet", "depth": 0}, CIFAR10, "model.depth: expected at least 1, not 0."),
        ("mlp:3x4", CIFAR10, "model: '3x4' is not whole numbers joined by '-'; write it as in 'mlp:256-256'."),
        ("convnet:deep", CIFAR10, "model: 'deep' is not a depth; write it as in 'convnet:4'."),
        ("wrn:16", CIFAR10, "model: '16' is not a depth and a widen factor; write it as in 'wrn:16-2'."),
        (
            "resnet:18",
            CIFAR10,
            "'depth' is 6n + 2, so 14 or 20, not 18; 18, 34, 50, 101 and 152 are depths of the kind 'imagenet-resnet'.",
        ),
        ("resnet:20-2", CIFAR10, "model: '20-2' is not a depth; write it as in 'resnet:20'."),
        ("wrn:17-2", CIFAR10, "'depth' is 6n + 4, so 16 or 22, not 17."),
        ("imagenet-resnet:20", CIFAR10, "the depth of 'imagenet-resnet' is one of 18, 34, 50, 101, 152, not 20."),
        ({"kind": "cnn", "channels": [1, 2], "strides": [1]}, CIFAR10, "'strides' lists 1 blocks and 'channels' 2."),
        ({"kind": "cnn", "channels": [6], "norm": "group"}, CIFAR10, "every channel count must be a multiple of 4."),
        ({"kind": "convnet", "width": [8]}, CIFAR10, "'width' lists 1 blocks and 'depth' is 3; make them agree."),
        ({"kind": "vit", "dim": 10, "heads": 3}, CIFAR10, "'heads' (3) must divide 'dim' (10)."),
        (
            {"kind": "resnet", "shortcut": "pad", "widths": [8, 4, 4]},
            CIFAR10,
            "shortcut 'pad' adds channels: 'stem_width' and 'widths' may not decrease.",
        ),
        (
            "convnet:4",
            facts(1, 8, 8),
            "The model 'convnet' of depth 4 halves images of 8x8 to nothing; a depth of at most 3 fits, or pooling 'none'.",
        ),
        ("vit", facts(1, 30, 30), "patches of 4 pixels, which must divide their sides; these are 30x30."),
        ("cnn", Facts({"features": (7,)}, 3), "not inputs of shape (7,); use 'mlp' for vectors."),
        ("mlp", Facts({"features": (7,)}, None, "unlabelled"), "the data has no classes; set 'num_outputs'"),
    ],
    ids=str,
)
def test_one_sentence_for_what_is_wrong(spec, known, message):
    with pytest.raises(UserError) as caught:
        build(spec, known)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"kind": "mlp", "widths": [10**12]}, "The model 'mlp' would take more than the "),
        ({"kind": "mlp", "widths": [10**6, 10**7]}, "The model 'mlp' would take more than the "),
        ({"kind": "mlp", "widths": [10**30]}, "The model 'mlp' would take more than the "),
        ({"kind": "cnn", "channels": [10**9]}, "The model 'cnn' would take more than the "),
        ({"kind": "unet", "width": 8 * 10**9}, "The model 'unet' would take more than the "),
        ({"kind": "vit", "dim": 9, "mlp_ratio": 1e308}, "The model 'vit' has sizes that no memory holds"),
        ({"kind": "vit", "depth": 10**12}, "model.depth: expected at most 1000, not 1000000000000."),
        ({"kind": "convnet", "depth": 10**12}, "model.depth: expected at most 1000, not 1000000000000."),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_allocated(spec, sentence):
    with pytest.raises(UserError) as caught:
        build(spec, CIFAR10)
    assert str(caught.value).startswith(sentence)


def test_a_network_of_too_many_tensors_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "TENSORS", 50)
    with pytest.raises(UserError, match="would have more than 50 tensors; make it less deep"):
        build("resnet:56", CIFAR10)

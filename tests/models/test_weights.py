"""Parameters as a whole: counted, fingerprinted, frozen, drawn anew."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, count_parameters, fingerprint, freeze, initialise


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def convnet():
    spec = ModelSpec.parse({"kind": "convnet", "width": 4, "norm": "batch"})
    return spec.build(Facts({"pixel_values": (1, 8, 8)}, 3))


def test_tied_parameters_count_once():
    assert count_parameters(Tied()) == 15


def test_trainable_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 11
    assert count_parameters(model, trainable=True) == 3


def test_a_fingerprint_is_of_the_content():
    model = convnet()
    mark = fingerprint(model)
    assert len(mark) == 32
    assert fingerprint(copy.deepcopy(model)) == mark
    assert fingerprint(model.eval().requires_grad_(False)) == mark
    assert fingerprint(model.to(memory_format=torch.channels_last)) == mark


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.classifier.weight.data[0, 0].add_(1e-6),
        lambda m: m.blocks[0].norm.running_mean[0].add_(1e-6),
        lambda m: m.blocks[0].norm.num_batches_tracked.add_(1),
        lambda m: m.half(),
        lambda m: m.classifier.register_buffer("extra", torch.zeros(1)),
        lambda m: setattr(m.classifier, "weight", nn.Parameter(m.classifier.weight.T.contiguous().view(3, -1))),
    ],
    ids=["weight", "buffer", "integer", "dtype", "name", "order"],
)
def test_any_change_changes_the_fingerprint(change):
    model = convnet()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_the_shape_is_part_of_the_fingerprint():
    one, other = nn.Module(), nn.Module()
    one.register_buffer("x", torch.arange(6.0).view(2, 3))
    other.register_buffer("x", torch.arange(6.0).view(3, 2))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64])
def test_every_dtype_has_a_fingerprint(dtype):
    module = nn.Module()
    module.register_buffer("x", torch.ones(3).to(dtype))
    module.register_buffer("scalar", torch.ones(()).to(dtype))
    module.register_buffer("empty", torch.ones(0).to(dtype))
    assert fingerprint(module) == fingerprint(copy.deepcopy(module))


def test_large_and_small_modules_are_fingerprinted_alike():
    # One million values and more are read by several threads; the result must not know.
    large = nn.Linear(1000, 1001)
    assert fingerprint(large) == fingerprint(copy.deepcopy(large))
    before = fingerprint(large)
    with torch.no_grad():
        large.bias[-1] += 1
    assert fingerprint(large) != before


def test_frozen_modules_are_in_eval_mode_and_without_gradients():
    model = convnet()
    assert freeze(model) is model
    assert not any(m.training for m in model.modules())
    assert count_parameters(model, trainable=True) == 0


def test_a_generator_of_ones_own_is_drawn_from_and_the_global_one_is_not():
    model, other = convnet(), convnet()
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    initialise(model, generator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first = fingerprint(initialise(other))
    assert fingerprint(model) == first
    assert fingerprint(initialise(other)) == fingerprint(initialise(model, generator)), "it goes on"
    assert fingerprint(model) != first


def test_batch_statistics_start_over():
    model = convnet()
    model(torch.randn(4, 1, 8, 8))
    assert model.blocks[0].norm.num_batches_tracked == 1
    initialise(model)
    assert model.blocks[0].norm.num_batches_tracked == 0
    assert model.blocks[0].norm.running_mean.abs().sum() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.LSTM(3, 4, num_layers=2),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.PReLU(), nn.Flatten(), nn.Bilinear(3, 3, 2)),
        lambda: nn.Embedding(5, 3, padding_idx=0),
    ],
    ids=["attention", "lstm", "encoder", "mixed", "embedding"],
)
def test_torch_modules_are_drawn_as_at_construction(make):
    torch.manual_seed(5)
    new = make()
    torch.manual_seed(6)
    module = make()
    torch.manual_seed(5)
    assert fingerprint(initialise(module)) == fingerprint(new)


def test_a_model_of_transformers_is_drawn_from_its_config():
    config = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    spec = ModelSpec.parse({"kind": "hf", "config": {**config, "bos_token_id": 0, "eos_token_id": 0}})
    facts = Facts({"input_ids": (4,)}, None, "language")
    torch.manual_seed(5)
    new = spec.build(facts)
    torch.manual_seed(6)
    module = spec.build(facts)
    assert fingerprint(module) != fingerprint(new)
    torch.manual_seed(5)
    assert fingerprint(initialise(module)) == fingerprint(new)
    assert module.lm_head.weight is module.transformer.wte.weight, "still tied"


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("module", "generator", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), Bare()), None, "'1' (Bare) has parameters and no reset_parameters(); add that"),
        (Bare(), None, "The model (Bare) has parameters and no reset_parameters()"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))), None, "'0' is parametrized"),
        (
            nn.Linear(2, 2, device="meta"),
            torch.Generator(),
            "The generator is on 'cpu' and parameters of Linear are not",
        ),
    ],
    ids=["submodule", "root", "parametrized", "device"],
)
def test_what_cannot_be_drawn_anew_is_named(module, generator, message):
    with pytest.raises(UserError) as caught:
        initialise(module, generator)
    assert str(caught.value).startswith(message)

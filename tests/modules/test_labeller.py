"""A labeller starts at zero-shot, trains its factors alone, equals merged weights, and stores just what it says it does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.errors import UserError
from stillhouse.modules.labeller import Labeller, factor_numbers, view_label_bytes
from stillhouse.modules.lora import merge_lora


class Encoder(nn.Module):
    """Convolutions of every kind, a norm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 6)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(F.relu(self.plain(x)))))
        return self.out(x.mean((2, 3)))


@pytest.fixture
def made():
    torch.manual_seed(0)
    encoder = Encoder().eval()
    base = F.normalize(torch.randn(5, 6), dim=1)
    return encoder, base, torch.randn(7, 2, 8, 8)


def filled(labeller):
    """Factors that are not zero."""
    for parameter in labeller.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return labeller


def test_without_deltas_it_is_zero_shot_classification(made):
    encoder, base, x = made
    wanted = 50 * F.normalize(copy.deepcopy(encoder)(x), dim=1) @ base.T
    labeller = Labeller(encoder, base, scale=50, encoder_rank=4, head_rank=3).eval()
    torch.testing.assert_close(labeller(x), wanted, rtol=0, atol=1e-6 * 50)


def test_factors_in_place_equal_merged_weights(made):
    encoder, base, x = made
    labeller = filled(Labeller(encoder, base, encoder_rank=4, head_rank=3).eval())
    found, factors = labeller(x).detach(), labeller.factors()
    original = labeller.encoder.plain.parametrizations.weight.original.clone()
    merge_lora(labeller.encoder)
    assert not any("parametrizations" in name for name, _ in labeller.encoder.named_parameters())
    torch.testing.assert_close(labeller(x), found, rtol=1e-5, atol=1e-4)
    # peft's form: a layer of `rank` outputs, then a 1x1 one, also where the layer is strided.
    one, other = (factors[f"base_model.model.plain.lora_{side}.weight"] for side in "AB")
    assert (one.shape, other.shape) == ((4, 2, 3, 3), (8, 4, 1, 1))
    kernel = F.conv2d(one.transpose(0, 1), other).transpose(0, 1)
    delta = labeller.encoder.plain.weight - original
    torch.testing.assert_close(kernel, delta, rtol=1e-4, atol=1e-5)
    assert factors["base_model.model.grouped.lora_A.weight"].shape == (4, 4, 3, 3)


def test_only_factors_are_trained(made):
    encoder, base, x = made
    labeller = filled(Labeller(encoder, base, encoder_rank=4, head_rank=3).eval())
    before = {name: value.clone() for name, value in labeller.named_buffers()}
    labeller(x).square().mean().backward()
    reached = {name for name, p in labeller.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in labeller.named_parameters() if name.split(".")[-1] in "AB"}
    # Batch norm's statistics stay, too.
    assert all(torch.equal(value, before[name]) for name, value in labeller.named_buffers())


@pytest.mark.parametrize("head_rank", [3, None])
@pytest.mark.parametrize("encoder_rank", [0, 2])
def test_what_is_stored_is_as_much_as_the_formula_says(made, encoder_rank, head_rank):
    encoder, base, _ = made
    shapes = [layer.weight.shape for layer in (encoder.plain, encoder.grouped, encoder.out)]
    labeller = Labeller(encoder, base, encoder_rank=encoder_rank, head_rank=head_rank)
    stored = sum(value.numel() for value in labeller.factors().values())
    assert stored == factor_numbers(shapes if encoder_rank else [], encoder_rank, 5, 6, head_rank)
    assert stored == sum(p.numel() for p in labeller.parameters() if p.requires_grad)


def test_factors_go_out_and_come_in_again(made):
    encoder, base, x = made
    other = copy.deepcopy(encoder)
    labeller = filled(Labeller(encoder, base, encoder_rank=2, head_rank=3).eval())
    labeller.round(torch.float16)
    stored = {name: value.half() for name, value in labeller.factors().items()}
    again = Labeller(other, base, encoder_rank=2, head_rank=3).eval()
    again.load_factors(stored)
    assert torch.equal(again(x), labeller(x))
    with pytest.raises(UserError, match="another encoder, other ranks"):
        Labeller(Encoder(), base, encoder_rank=1, head_rank=3).load_factors(stored)


def test_pixels_and_sizes_are_those_of_the_encoder(made):
    encoder, base, x = made
    plain = Labeller(copy.deepcopy(encoder), base, encoder_rank=0, head_rank=None).eval()
    fitted = Labeller(encoder, base, encoder_rank=0, head_rank=None, gain=[2.0, 0.5], shift=[1.0, -1.0]).eval()
    own = (x - torch.tensor([1.0, -1.0]).view(-1, 1, 1)) / torch.tensor([2.0, 0.5]).view(-1, 1, 1)
    torch.testing.assert_close(fitted.embed(own), plain.embed(x), rtol=1e-4, atol=1e-5)
    sized = Labeller(copy.deepcopy(encoder), base, encoder_rank=0, head_rank=None, size=16).eval()
    larger = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(sized.embed(x), plain.embed(larger))
    grey = Labeller(
        copy.deepcopy(encoder), base, encoder_rank=0, gain=[1.0, 1.0], shift=[0.0, 0.0], head_rank=None
    ).eval()
    torch.testing.assert_close(grey.embed(x[:, :1]), plain.embed(x[:, :1].expand(-1, 2, -1, -1)))


def test_ranks_that_do_not_fit_are_refused(made):
    encoder, base, _ = made
    with pytest.raises(UserError, match="layer 'out' has a side of 6"):
        Labeller(copy.deepcopy(encoder), base, encoder_rank=7, head_rank=3)
    with pytest.raises(UserError, match="head_rank is 6, but the head is 5 classes by 6 values"):
        Labeller(encoder, base, encoder_rank=2, head_rank=6)


def test_bytes_at_imagenets_size():
    assert view_label_bytes(300, 1000, 1000) == 600_000_000  # 572 MiB at one image a class
    assert round(view_label_bytes(300, 1000, 1000) / 2**20) == 572
    assert view_label_bytes(300, 200_000, 1000) / 2**30 == pytest.approx(111.76, abs=0.01)
    # A labeller of 0.8 million numbers in half precision, beside the labels at 100 images a class.
    assert 2 * 800_000 / view_label_bytes(300, 100_000, 1000) == pytest.approx(2.7e-5, rel=0.02)

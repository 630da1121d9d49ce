"""Paraphraser and translator of factor transfer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import factor_transfer
from stillhouse.modules.factors import Paraphraser, Translator


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def test_factors_of_both_sides_meet():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 12, 4, 4), torch.randn(2, 6, 8, 8)
    paraphraser, translator = Paraphraser(12, 0.75), Translator(6, 12, 0.75)
    assert paraphraser(teacher).shape == (2, 9, 4, 4)
    assert paraphraser.reconstruct(teacher).shape == teacher.shape
    assert translator(student).shape == (2, 9, 8, 8)
    assert factor_transfer(translator(student), paraphraser(teacher)) > 0
    assert paraphraser(torch.randn(2, 12)).shape == (2, 9, 1, 1)


def test_layers_are_the_papers():
    paraphraser, translator = Paraphraser(8), Translator(6, 8)
    assert [m.out_channels for m in paraphraser.encoder if isinstance(m, nn.Conv2d)] == [8, 4, 4]
    assert [m.out_channels for m in paraphraser.decoder if isinstance(m, nn.ConvTranspose2d)] == [4, 8, 8]
    assert {m.negative_slope for m in paraphraser.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert (norms(paraphraser), norms(translator), norms(Paraphraser(8, batch_norm=True))) == (0, 3, 6)


def test_a_paraphraser_learns_to_reconstruct():
    torch.manual_seed(0)
    features = torch.rand(16, 1, 5, 5) * torch.rand(1, 4, 1, 1)
    paraphraser = Paraphraser(4)
    optimizer = torch.optim.Adam(paraphraser.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = nn.functional.mse_loss(paraphraser.reconstruct(features), features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_rate_that_leaves_nothing_is_refused():
    for part in (lambda: Paraphraser(8, 0.1), lambda: Translator(6, 8, 0.1)):
        with pytest.raises(UserError, match=r"0\.1 times 8 channels has none"):
            part()

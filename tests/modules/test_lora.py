"""LoRA: nothing at first, a low-rank change afterwards, plain weights after merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.modules.lora import add_lora, merge_lora


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 16, 5))


def test_nothing_changes_at_first_and_only_adapters_train() -> None:
    plain, x = net(), torch.randn(3, 2, 4, 4)
    adapted = copy.deepcopy(plain)
    assert add_lora(adapted, ["0", "3"], rank=2, alpha=4.0) == ["0", "3"]
    torch.testing.assert_close(adapted(x), plain(x), rtol=0, atol=0)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.parametrizations.weight.0.{m}" for i in (0, 3) for m in "AB"}


def test_the_change_is_the_scaled_product_and_merging_keeps_the_function() -> None:
    plain, x = net(), torch.randn(3, 2, 4, 4)
    adapted = copy.deepcopy(plain)
    add_lora(adapted, ["*"], rank=2, alpha=3.0)
    factors = {}
    for path in ("0", "3"):
        low_rank = adapted.get_submodule(path).parametrizations.weight[0]
        nn.init.normal_(low_rank.B)
        factors[path] = (low_rank.B @ low_rank.A).detach()
    before = adapted(x)
    merge_lora(adapted)
    torch.testing.assert_close(adapted(x), before)
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    for path, product in factors.items():
        weight = plain.get_submodule(path).weight
        expected = weight + 1.5 * product.view_as(weight)
        torch.testing.assert_close(adapted.get_submodule(path).weight, expected)
        torch.testing.assert_close(adapted.get_submodule(path).bias, plain.get_submodule(path).bias)


def test_half_precision_weights_keep_their_type() -> None:
    adapted = nn.Linear(4, 3).to(torch.bfloat16)
    wrapped = nn.Sequential(adapted)
    add_lora(wrapped, ["0"], rank=1, alpha=1.0)
    assert adapted.weight.dtype == torch.bfloat16
    assert adapted.parametrizations.weight[0].A.dtype == torch.float32


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential has no linear or convolution layer named \['to_q'\]"):
        add_lora(net(), ["to_q"], rank=1, alpha=1.0)

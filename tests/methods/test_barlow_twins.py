"""Barlow Twins: views share a batch, both ways reach the network, labels are not needed, the head is not shipped."""

import pytest
import torch

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses.redundancy import barlow_twins
from stillhouse.methods.barlow_twins import BarlowTwins, headless
from stillhouse.models import ModelSpec, as_embedding
from stillhouse.modules.projectors import ProjectionHead

TINY = {"model": {"kind": "cnn", "channels": [4, 6]}, "projector": [8, 8], "epochs": 1, "batch_size": 16}


@pytest.fixture
def prepared(tmp_path):
    method = BarlowTwins(data="digits", **TINY)
    run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
    torch.manual_seed(0)
    model = headless(method.model, run.data.facts)
    run.enter("twins", 0, 4)
    run.place("prepare", "", 0, "")
    m = Modules({"model": model, "projector": ProjectionHead(6, [8, 8])})
    return method, run, m, run.data.split("train").batch(range(16))


def test_the_loss_is_that_of_two_passes(prepared):
    method, run, m, batch = prepared
    views = method.views(m, batch, run)
    assert not torch.equal(views["first"], views["second"])
    found = method.loss(m, views, run)
    # Batch norm standardises each view for itself.
    first, second = (m.projector(m.model(views[side])) for side in ("first", "second"))
    wanted = barlow_twins(first, second)
    torch.testing.assert_close((found["invariance"], found["redundancy"]), wanted)
    sum(found.values()).backward()
    assert all(p.grad is not None for module in m.values() for p in module.parameters())


def test_views_are_pictures_at_the_models_scale(prepared):
    _, run, m, batch = prepared
    still = BarlowTwins(data="digits", **TINY, augment="none")
    views = still.views(m, batch, run)
    torch.testing.assert_close(views["first"], batch["pixel_values"])
    torch.testing.assert_close(views["second"], batch["pixel_values"])
    shifted = BarlowTwins(data="digits", **TINY, augment="none", second_augment="shift").views(m, batch, run)
    torch.testing.assert_close(shifted["first"], batch["pixel_values"])
    assert not torch.equal(shifted["second"], batch["pixel_values"])


def test_unlabelled_images_are_enough_and_the_head_stays_behind():
    images = torch.rand(48, 1, 8, 8)
    result = sh.distil("barlow-twins", data={"train": {"pixel_values": images}}, **TINY)
    assert list(result.artefacts) == ["model"]
    assert set(result.metrics) == {"representation/dimensions"}
    assert result.model(torch.zeros(2, 1, 8, 8)).shape == (2, 6)


def test_a_table_has_no_views():
    with pytest.raises(UserError, match="makes views of images"):
        sh.distil("barlow-twins", data=(torch.randn(40, 3), torch.arange(40) % 2), model="mlp", projector=[4])


def test_a_head_is_linear_layers_with_norms_between():
    head = ProjectionHead(5, [7, 3])
    assert [type(part).__name__ for part in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(part.bias is None for part in head if isinstance(part, torch.nn.Linear))
    with pytest.raises(UserError, match="at least 1 layer"):
        ProjectionHead(5, [])


def test_what_is_taken_for_the_embedding_of_a_models_output():
    class Output:
        def __init__(self, **values):
            self.__dict__.update(values)

    tokens, maps = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 4)
    assert as_embedding(Output(pooler_output=maps[..., :1, :1], last_hidden_state=maps)).shape == (2, 3)
    torch.testing.assert_close(as_embedding(Output(pooler_output=None, last_hidden_state=tokens)), tokens.mean(1))
    torch.testing.assert_close(as_embedding(Output(last_hidden_state=maps)), maps.mean((2, 3)))
    assert as_embedding(maps).shape == (2, 48)
    with pytest.raises(UserError, match="there are no logits"):
        as_embedding(Output(loss=1.0))


def test_a_network_of_transformers_is_built_without_a_head():
    pytest.importorskip("transformers")
    spec = ModelSpec.parse(
        {"kind": "hf", "config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}}
    )
    model = headless(spec, load_data("digits").facts)
    assert "Classification" not in type(model).__name__

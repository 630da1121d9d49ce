"""The denoiser: the loss on every process, the class that stands for none, the averaged weights, the table."""

from __future__ import annotations

import math

import pytest
import torch

import stillhouse as sh
from stillhouse.data import Batch
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses.scores import denoising, denoising_weight
from stillhouse.methods.generators.denoiser import Denoiser
from stillhouse.methods.generators.process import Process, ScaledEDMNoise
from stillhouse.methods.generators.scoring import density, grid
from stillhouse.methods.generators.teacher import DiffusionTeacher, Written
from stillhouse.models import PointDenoiser, fingerprint
from stillhouse.modules.noise import EDMNoise, FlowNoise, VPNoise, predict
from stillhouse.recipe import build_recipe

POINTS = {
    "data": {"kind": "ring", "modes": 3, "samples": 300},
    "model": {"kind": "point_denoiser", "width": 16},
    "optimizer": {"lr": 1e-3},
    "num_steps": 4,
    "batch_size": 16,
    "eval_steps": [3, 1],
    "eval_samples": 30,
    "settings": {"device": "cpu", "threads": 1},
}


@pytest.fixture
def run(tmp_path):
    def make(method):
        made = Run(method, RunDirectory(tmp_path / "run"))
        made.enter("model", 0, 10)
        made.place("loss", "loss", 0, 0)
        return made

    return make


def made(**fields):
    torch.manual_seed(0)
    net = PointDenoiser(2, 16, 3, num_class_embeds=4)
    batch = Batch(features=torch.randn(64, 2), labels=torch.arange(64) % 3)
    values = {key: value for key, value in POINTS.items() if key != "settings"}
    return Denoiser(**{**values, **fields}), net, batch


def test_defaults_are_the_papers():
    method = Denoiser()
    assert (method.sigma_mean, method.sigma_std, method.schedule, method.prediction) == (-1.2, 1.2, EDMNoise(), "edm")
    assert method.num_steps * method.batch_size == pytest.approx(200e6, rel=1e-4)
    assert 0.5 ** (method.batch_size / 500_000) == pytest.approx(method.ema, abs=1e-4)
    assert (method.optimizer.name, method.optimizer.lr) == ("adam", 1e-3)


def test_the_loss_on_the_edm_process_is_equation_8(run):
    method, net, batch = made(null_rate=0.0)
    process, r = Process(EDMNoise(), "edm", (2,), 3, 3), run(method)
    found = method.loss(process, Modules(net=net), batch, r)["denoising"]
    r.place("loss", "loss", 0, 0)
    sigma = (-1.2 + 1.2 * r.randn(64)).exp()[:, None]
    y, n = batch["features"], r.randn(64, 2) * sigma
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    c_in, c_noise = 1 / (sigma**2 + 0.25).sqrt(), sigma.log().flatten() / 4
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    x0 = c_skip * (y + n) + c_out * net(c_in * (y + n), c_noise, batch.labels)
    torch.testing.assert_close(found, (weight * (x0 - y) ** 2).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VPNoise(), "epsilon"), (VPNoise(), "v_prediction"), (FlowNoise(), "flow_prediction"), (VPNoise(), "score")],
)
def test_elsewhere_it_is_the_plain_error_of_the_prediction(run, schedule, prediction):
    method, net, batch = made(schedule=schedule, prediction=prediction, null_rate=0.0)
    process, r = Process(schedule, prediction, (2,), 3, 3), run(method)
    found = method.loss(process, Modules(net=net), batch, r)["denoising"]
    r.place("loss", "loss", 0, 0)
    t = schedule.draw(r.rand(64))
    noise, x = r.randn(64, 2), batch["features"]
    alpha, sigma = schedule.alpha(t).float()[:, None], schedule.sigma(t).float()[:, None]
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "flow_prediction": noise - x}.get(prediction)
    output = predict(net, schedule.add_noise(x, noise, t), t, schedule, batch.labels)
    if prediction == "score":
        output, target = -sigma * output, noise
    torch.testing.assert_close(found, ((output - target) ** 2).mean(), rtol=1e-3, atol=1e-4)
    assert denoising_weight(torch.ones(1), torch.ones(1), "epsilon") == 1
    assert denoising(x, x) == 0


def test_a_tenth_of_the_classes_is_withheld(run):
    method, net, batch = made()
    process, r = Process(EDMNoise(), "edm", (2,), 3, 3), run(method)
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    for firing in range(100):
        r.place("loss", "loss", 0, firing)
        method.loss(process, Modules(net=net), batch, r)
    withheld = torch.stack(seen) == 3
    assert withheld.float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(torch.stack(seen)[~withheld], batch.labels.expand(100, 64)[~withheld])


def test_the_model_has_its_averaged_weights_and_is_saved_with_its_process(tmp_path):
    short = sh.distil("denoiser", **{**POINTS, "ema": 0.5}, out=tmp_path / "run")
    still = sh.distil("denoiser", **{**POINTS, "ema": 0.999999})
    assert fingerprint(short.model.net) != fingerprint(still.model.net)
    start = sh.distil("denoiser", **{**POINTS, "ema": 0.5, "optimizer": {"lr": 1e-30}})
    for one, two in zip(still.model.net.parameters(), start.model.net.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    again = DiffusionTeacher.parse(f"file:{tmp_path / 'run' / 'result' / 'model' / 'unet'}")
    assert again._written() == Written(schedule=EDMNoise(), prediction="edm", null_class=3)


def test_the_table_has_a_row_for_each_number_of_steps():
    result = sh.distil("denoiser", **POINTS)
    [table] = result.tables
    assert [row[:2] for row in table.rows] == [["3-step", 5], ["1-step", 1], ["real", ""]]
    assert result.metrics["test/sliced_wasserstein"] == result.metrics["test/3-step/sliced_wasserstein"]
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.sample(5).shape == (5, 2)


def test_time_can_be_counted_in_thousandths():
    x, t = torch.randn(4, 2), torch.tensor([0.1, 1.0, 10.0, 80.0])
    for one, two, factor in zip(
        EDMNoise().network_inputs(x, t), ScaledEDMNoise().network_inputs(x, t), (1, 1000), strict=True
    ):
        torch.testing.assert_close(factor * one, two)


def test_bad_fields_are_refused():
    values = {key: value for key, value in POINTS.items() if key != "settings"}
    for fields, message in (
        ({"prediction": "noise"}, "prediction"),
        ({"schedule": {"kind": "vp", "rescale_betas_zero_snr": True}, "prediction": "epsilon"}, "no signal is left"),
        ({"eval_samples": 3}, "measure at least 10 samples"),
        ({"schedule": "edn"}, "did you mean 'edm'"),
    ):
        with pytest.raises(UserError, match=message):
            build_recipe({"method": "denoiser", **values, **fields})


def test_pictures():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 32, 32) / 6
    picture = grid(images, columns=3)
    assert picture.shape == (1, 65, 98)
    assert picture[0, 33, 33] == images[4, 0, 0, 0]
    dots = density(torch.tensor([[0.9, 0.9], [-0.9, -0.9]]), reach=1.0, bins=10)
    assert (dots == 0).nonzero().tolist() == [[0, 0, 9], [0, 9, 0]]

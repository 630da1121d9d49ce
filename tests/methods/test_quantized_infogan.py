"""Quantised InfoGAN over the engine: which step moves what, the closed forms, its cadence, samples, bad input."""

import pytest
import torch

from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.representations.quantized_infogan import QuantizedInfoGAN
from stillhouse.models import fingerprint, load
from stillhouse.models.autoencoders import CriticEncoder
from stillhouse.recipe import build_recipe

MODEL = {
    "kind": "autoencoder",
    "num_latents": 4,
    "num_values": 3,
    "widths": [4, 8],
    "dense_widths": [16],
    "convolutions_per_stage": 1,
}
DATA = {"kind": "scenes", "size": 16, "pixels": "unit", "held_out": 0}
TINY = {
    "method": "quantized-infogan",
    "data": DATA,
    "model": MODEL,
    "num_steps": 6,
    "batch_size": 8,
    "run": {"threads": 1, "device": "cpu"},
}


@pytest.fixture
def parts(tmp_path):
    """A method outside the engine: its modules, a batch, a run."""
    method = QuantizedInfoGAN(data=DATA, model=MODEL)
    run = Run(method, RunDirectory(tmp_path), seed=0)
    torch.manual_seed(0)
    model = method.build(run)
    m = Modules(critic=CriticEncoder(model.encoder), generator=model.decoder, quantizer=model.latent)
    return method, m, run.data.split("train").batch(range(8)), run


def evaluated(losses):
    return {name: term() if callable(term) else term for name, term in losses.items()}


def reached(loss, m):
    """Modules that a term's gradient reaches."""
    named = {name: list(module.parameters()) for name, module in m.items()}
    found = set()
    for name, parameters in named.items():
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        if any(g is not None and bool(g.abs().sum() > 0) for g in gradients):
            found.add(name)
    return found


def test_the_critic_step_reaches_the_critic_alone(parts):
    method, m, batch, run = parts
    run.place("critic", 0)
    terms = evaluated(method.critic_loss(m, batch, run))
    assert {name: reached(term, m) for name, term in terms.items()} == {
        "value": {"critic"},
        "gradient": {"critic"},
        "latent": {"critic"},
        "commitment": {"critic"},
    }


def test_the_generator_step_reaches_generator_and_stored_values(parts):
    method, m, batch, run = parts
    run.place("generator", 0)
    terms = evaluated(method.generator_loss(m, batch, run))
    found = {name: reached(term, m) - {"critic"} for name, term in terms.items()}
    assert found == {
        "value": {"generator", "quantizer"},
        "latent": {"generator", "quantizer"},
        "commitment": {"generator", "quantizer"},
        "quantization": {"quantizer"},
    }


def test_the_terms_are_the_closed_forms(parts):
    method, m, batch, run = parts
    run.place("critic", 0)
    terms = evaluated(method.critic_loss(m, batch, run))
    run.place("critic", 0)
    uniform, mix = run.rand(8, 4), run.rand(8)
    z = torch.stack([m.quantizer.values[j, (uniform[:, j] * 3).long()] for j in range(4)], dim=1).detach()
    fake, real = m.generator(z).sigmoid().detach(), batch["pixel_values"]
    c = m.critic.encoder(fake)
    zq = m.quantizer(c).quantized
    torch.testing.assert_close(terms["value"], m.critic.value(fake).mean() - m.critic.value(real).mean())
    torch.testing.assert_close(terms["latent"], (zq - z).square().mean())
    torch.testing.assert_close(terms["commitment"], (c - zq).square().mean())
    between = (mix.view(-1, 1, 1, 1) * real + (1 - mix.view(-1, 1, 1, 1)) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(m.critic.value(between).sum(), between)
    torch.testing.assert_close(terms["gradient"], (slope.flatten(1).norm(dim=1) - 1).square().mean())


def test_defaults_are_the_released_ones():
    method = QuantizedInfoGAN()
    assert (method.weight_value, method.weight_gradient, method.weight_latent) == (1.0, 10.0, 200.0)
    assert (method.weight_quantization, method.weight_commitment, method.generator_every) == (0.01, 0.01, 5)
    assert method.batch_size == 64
    decayed, free = method.optimizers()
    assert (decayed.name, decayed.lr, decayed.betas, decayed.weight_decay, decayed.clip_value) == (
        "adamw",
        2e-4,
        (0.0, 0.9),
        1e-4,
        1.0,
    )
    assert (free.name, free.lr, free.betas, free.weight_decay, free.clip_value) == ("adam", 2e-4, (0.0, 0.9), 0.0, None)


def test_stored_values_move_in_the_generator_step_alone(tmp_path):
    """The generator fires at steps 0 and 5: what it trains stands still in between."""
    seen = {}
    for steps in (1, 5, 6):
        model = run_recipe(build_recipe({**TINY, "num_steps": steps}), tmp_path / str(steps)).autoencoder
        seen[steps] = {part: fingerprint(getattr(model, part)) for part in ("latent", "decoder", "encoder")}
    for part in ("latent", "decoder"):
        assert seen[1][part] == seen[5][part] != seen[6][part]
    assert seen[1]["encoder"] != seen[5]["encoder"]


@pytest.mark.parametrize("changed", [{"latent": "shared"}, {"learned_values": False}, {"decoder": "plain"}])
def test_the_ablations_are_switches(tmp_path, changed):
    result = run_recipe(build_recipe({**TINY, "model": {**MODEL, **changed}}), tmp_path)
    assert {"psnr", "infom", "infoe", "infoc"} <= set(result.metrics)


def test_samples_and_codes_of_new_data(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path)
    drawn = result.sample(5, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (5, 3, 16, 16)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, result.sample(5, generator=torch.Generator().manual_seed(1)))
    code = result.encode(drawn)
    assert torch.equal(code.z, result.autoencoder.latent.lookup(code.indices))
    assert result.decode(code.z).shape == drawn.shape
    assert fingerprint(load(tmp_path / "result" / "autoencoder")) == fingerprint(result.autoencoder)
    assert result.pictures["samples"].shape == (3, 16, 160)
    with pytest.raises(UserError, match="ask for at least 1"):
        result.sample(0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": {**MODEL, "latent": "none"}}, "draws from scalar codebooks"),
        ({"model": {**MODEL, "latent": "vector"}}, "draws from scalar codebooks"),
        ({"data": {**DATA, "pixels": "standard"}}, "set data.pixels=unit"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)

"""QLAE over the engine: which term moves what, what is decayed, the ablations, codes of new data, bad input."""

import pytest
import torch

from stillhouse.data import ObjectData
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.representations.autoencoder import PlainAutoencoder
from stillhouse.methods.representations.beta_tcvae import BetaTCVAE
from stillhouse.methods.representations.qlae import QLAE
from stillhouse.models import AutoencoderSpec, fingerprint, load
from stillhouse.modules.quantizers import LatentQuantizer, VectorQuantizer
from stillhouse.recipe import build_recipe

MODEL = {
    "kind": "autoencoder",
    "num_latents": 4,
    "num_values": 3,
    "widths": [4, 8],
    "dense_widths": [16],
    "convolutions_per_stage": 1,
}
TINY = {
    "method": "qlae",
    "data": {"kind": "scenes", "size": 16, "pixels": "unit", "held_out": 0},
    "model": MODEL,
    "num_steps": 3,
    "batch_size": 16,
    "run": {"threads": 1, "device": "cpu"},
}


@pytest.fixture
def step(tmp_path):
    """A loss outside the engine: (method, model) to named terms."""

    def make(method, model):
        run = Run(method, RunDirectory(tmp_path), seed=0)
        batch = run.data.split("train").batch(range(8))
        run.place("loss", "loss", 0, 0)
        losses = method.loss(Modules(model=model), batch, run)
        return {name: term() if callable(term) else term for name, term in losses.items()}

    return make


def method(cls=QLAE, **fields):
    return cls(data=TINY["data"], **{"model": MODEL, **fields})


def build(spec):
    torch.manual_seed(0)
    return AutoencoderSpec.model_validate({k: v for k, v in spec.items() if k != "kind"}).build(
        method().data.load().facts
    )


def reached(loss, model):
    """Parts of the model that a term's gradient reaches."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n.split(".")[0] for n, g in zip(names, gradients, strict=True) if g is not None and bool(g.abs().sum() > 0)}


def test_each_term_moves_what_the_paper_says(step):
    model = build(MODEL)
    terms = step(method(), model)
    assert reached(terms["reconstruction"], model) == {"encoder", "decoder"}, "straight past the codebook"
    assert reached(terms["quantization"], model) == {"latent"}
    assert reached(terms["commitment"], model) == {"encoder"}


def test_the_terms_are_the_closed_forms(step):
    model = build(MODEL)
    terms = step(method(), model)
    x = method().data.load().split("train").batch(range(8))["pixel_values"]
    c = model.encoder(x)
    nearest = (c.unsqueeze(-1) - model.latent.values.expand(4, -1)).abs().argmin(-1)
    zq = model.latent.values.expand(4, -1).gather(1, nearest.T).T
    torch.testing.assert_close(terms["quantization"], (c - zq).square().mean())
    torch.testing.assert_close(terms["commitment"], (c - zq).square().mean())
    bce = torch.nn.functional.binary_cross_entropy_with_logits(model.decoder(zq), x)
    torch.testing.assert_close(terms["reconstruction"], bce)


def test_defaults_are_the_papers():
    qlae = QLAE()
    assert (qlae.num_steps, qlae.batch_size, qlae.lr, qlae.weight_decay, qlae.clip_value) == (
        200_000,
        128,
        1e-3,
        0.1,
        1.0,
    )
    assert (qlae.weight_reconstruction, qlae.weight_quantization, qlae.weight_commitment) == (1.0, 0.01, 0.01)
    assert (qlae.model.num_values, qlae.model.widths, qlae.model.convolutions_per_stage) == (10, (32, 64, 128, 256), 3)
    facts = qlae.data.load().facts
    assert qlae.model.latents(facts) == 2 * len(facts.factors)


def test_biases_and_codebooks_are_never_decayed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        QLAE, "loss", lambda self, m, batch, run: {"nil": 0.0 * sum(p.sum() for p in m.model.parameters())}
    )
    recipe = build_recipe(TINY)
    seen = {}
    original = QLAE.build

    def remember(self, run):
        model = original(self, run)
        seen.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr(QLAE, "build", remember)
    model = run_recipe(recipe, tmp_path).autoencoder
    for name, parameter in model.named_parameters():
        free = name.endswith(".bias") or name.startswith("latent")
        assert torch.equal(parameter, seen[name]) is free, name
        if not free:
            torch.testing.assert_close(parameter, seen[name] * (1 - 1e-3 * 0.1) ** 3)


@pytest.mark.parametrize(
    ("changed", "kind", "learned"),
    [
        ({}, LatentQuantizer, True),
        ({"latent": "shared"}, LatentQuantizer, True),
        ({"learned_values": False}, LatentQuantizer, False),
        ({"latent": "vector", "vector_size": 5}, VectorQuantizer, True),
        ({"latent": "none"}, type(None), False),
        ({"decoder": "plain"}, LatentQuantizer, True),
    ],
)
def test_the_ablations_are_switches(tmp_path, changed, kind, learned):
    result = run_recipe(build_recipe({**TINY, "model": {**MODEL, **changed}}), tmp_path)
    model = result.autoencoder
    assert isinstance(model.latent, kind)
    assert bool(list(model.latent.parameters()) if model.latent is not None else []) is learned
    assert {"psnr", "infom", "infoe", "infoc", "mig", "dci/disentanglement"} <= set(result.metrics)
    assert result.pictures["traversals"].shape[0] == 3


def test_without_quantisation_and_decay_it_is_the_autoencoder(tmp_path):
    none = {**MODEL, "latent": "none"}
    a = run_recipe(build_recipe({**TINY, "model": none, "weight_decay": 0.0, "clip_value": None}), tmp_path / "a")
    b = run_recipe(build_recipe({**TINY, "method": "autoencoder", "model": none}), tmp_path / "b")
    assert fingerprint(a.autoencoder) == fingerprint(b.autoencoder)


def test_new_data_are_encoded_and_decoded(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path)
    images = torch.rand(5, 3, 16, 16)
    code = result.encode(images)
    assert code.indices.shape == (5, 4)
    assert torch.equal(code.z, result.autoencoder.latent.lookup(code.indices))
    pictures = result.decode(code.z)
    assert pictures.shape == images.shape
    assert 0 <= pictures.min() <= pictures.max() <= 1
    again = load(tmp_path / "result" / "autoencoder")
    assert fingerprint(again) == fingerprint(result.autoencoder)
    with pytest.raises(UserError, match=r"encode takes values in \[0, 1\]"):
        result.encode(images * 2)


def test_vectors_without_factors_are_coded_too(tmp_path):
    data = ObjectData.from_object({"x": torch.rand(40, 6)})
    result = run_recipe(build_recipe({**TINY, "data": data, "model": {**MODEL, "dense_widths": [8]}}), tmp_path)
    assert set(result.metrics) == {"psnr", "codebook_usage", "parameters"}


def test_beta_tcvae_is_the_vae_at_weights_1(step):
    model = build({**MODEL, "latent": "gaussian"})
    vae = method(BetaTCVAE, model={**MODEL, "latent": "gaussian"})
    terms = step(vae, model)
    assert set(terms) == {"reconstruction", "mutual_information", "total_correlation", "dimension_wise_kl"}
    torch.manual_seed(0)
    run_terms = sum(terms[k] for k in terms if k != "reconstruction") * 16 * 16 * 3
    assert torch.isfinite(run_terms)
    assert vae.couples()
    assert not PlainAutoencoder().couples()


def test_bad_input_gives_one_sentence(tmp_path):
    for number, (fields, sentence) in enumerate(
        (
            ({"data": {**TINY["data"], "pixels": "standard"}}, "but this method needs [0, 1]; set data.pixels=unit"),
            (
                {"model": {**MODEL, "num_values": 1}},
                "model.num_values: input should be greater than or equal to 2, not 1",
            ),
            ({"model": {**MODEL, "widths": [4] * 5}}, "is not divisible by 32; use fewer stages"),
            ({"model": {"kind": "mlp", "num_outputs": 3}}, "trains an autoencoder (kind: autoencoder), not MLP"),
        )
    ):
        with pytest.raises(UserError) as caught:
            run_recipe(build_recipe({**TINY, **fields}), tmp_path / str(number))
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)

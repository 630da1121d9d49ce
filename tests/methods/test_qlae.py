"""QLAE over the engine: which term moves what, what is decayed, the ablations, codes of new data, bad input."""

import pytest
import torch

from stillhouse.data import ObjectData
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.representations.autoencoder import PlainAutoencoder
from stillhouse.methods.representations.autoencoding import Sampler, measure
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
    assert ("sample" in result.functions) is (model.latent is not None)
    assert model.latent is None or result.sample(2).shape == (2, 3, 16, 16)


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


def test_samples_take_only_values_that_the_data_take(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path)
    drawn = result.sample(6, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (6, 3, 16, 16)
    assert torch.equal(drawn, result.sample(6, generator=torch.Generator().manual_seed(1)))
    seen = torch.zeros(4, 3, dtype=torch.bool)
    seen[:, 1] = True
    only = Sampler(result.autoencoder, seen)(5)
    one = result.decode(result.autoencoder.latent.lookup(torch.ones(1, 4, dtype=torch.long)))
    torch.testing.assert_close(only, one.expand(5, -1, -1, -1))
    with pytest.raises(UserError, match="ask for at least 1"):
        result.sample(0)


def test_a_plain_code_is_moved_as_far_as_it_goes():
    model = build({**MODEL, "latent": "none"})
    x = torch.rand(1, 3, 16, 16)
    z = model.encode(x).z.repeat(3, 1)
    z[:, 2] = torch.tensor([-7.0, 0.0, 7.0])
    torch.testing.assert_close(model.traverse(x, 2, steps=3, span=(-7.0, 7.0)), model.decode(z).sigmoid())


class Oracle(torch.nn.Module):
    """Reads the first five pixels: the factors, written there, give each latent one value, in an order of its own."""

    def __init__(self, orders):
        super().__init__()
        self.orders = orders

    def forward(self, x):
        levels = torch.linspace(-0.5, 0.5, 4)
        found = x[:, 0, 0, :5].mul(4).round().long()
        return torch.stack([levels[order[column]] for order, column in zip(self.orders, found.T, strict=True)], dim=1)


class Written:
    """A split whose images have their factors written into the first pixels."""

    def __init__(self, split):
        self.split, self.name = split, split.name

    def __len__(self):
        return len(self.split)

    def in_order(self, size, device):
        for batch in self.split.in_order(size, device=device):
            batch["pixel_values"][:, 0, 0, :5] = batch["sources"] / 4
            yield batch


def test_a_code_that_names_each_factor_is_perfect_in_any_order_of_its_values(tmp_path):
    run = Run(method(), RunDirectory(tmp_path), seed=0)
    model = build({**MODEL, "num_latents": 5, "num_values": 4})
    model.encoder = Oracle([torch.randperm(4, generator=torch.Generator().manual_seed(j)) for j in range(5)])
    numbers = measure(model, Written(run.data.split("train")), 10_000, run)["numbers"]
    for name in ("infom", "infoc", "mig", "dci/disentanglement", "dci/completeness", "dci/informativeness"):
        assert numbers[name] > 0.99, name
    assert numbers["infoe"] > 0.98


def test_vectors_without_factors_are_coded_too(tmp_path):
    data = ObjectData.from_object({"x": torch.rand(40, 6)})
    result = run_recipe(build_recipe({**TINY, "data": data, "model": {**MODEL, "dense_widths": [8]}}), tmp_path)
    assert set(result.metrics) == {"psnr", "codebook_usage", "parameters"}


def test_beta_tcvae_is_the_vae_at_weights_1(step):
    model = build({**MODEL, "latent": "gaussian"})
    vae = method(BetaTCVAE, model={**MODEL, "latent": "gaussian"})
    codes, encode = [], model.encode
    model.encode = lambda x, **fields: codes.append(encode(x, **fields)) or codes[-1]
    terms = step(vae, model)
    assert set(terms) == {"reconstruction", "mutual_information", "total_correlation", "dimension_wise_kl"}
    (code,) = codes
    posterior = torch.distributions.Normal(code.continuous, code.std)
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = (posterior.log_prob(code.z) - prior.log_prob(code.z)).sum(1).mean()
    torch.testing.assert_close(sum(terms[k] for k in terms if k != "reconstruction"), kl / (16 * 16 * 3))
    assert vae.couples()
    assert not PlainAutoencoder().couples()


class Listed(torch.utils.data.Dataset):
    """Images read one by one, as they are."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, position):
        return {"pixel_values": self.images[position]}


@pytest.mark.parametrize("wrong", [1.5, -0.5, float("nan")])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["qlae", "quantized-infogan"])
def test_a_single_value_outside_the_range_is_refused_wherever_it_is(tmp_path, name, in_memory, wrong):
    images = torch.rand(600, 3, 8, 8)
    images[577, 1, 4, 4] = wrong
    # All samples train: nothing is set aside, so that the wrong one cannot be elsewhere.
    data = ObjectData.from_object(Listed(images)).model_copy(
        update={"in_memory": in_memory, "validation": 0.0, "test": 0.0}
    )
    recipe = {**TINY, "method": name, "data": data, "model": {**MODEL, "num_latents": 2}, "batch_size": 4}
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe(recipe), tmp_path)
    assert "but this method needs [0, 1]; set data.pixels=unit" in str(caught.value)
    assert f"{wrong:.3g}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_are_not_read_through_and_the_check_moves_no_number(tmp_path):
    images = (torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 255).to(torch.uint8)
    found = {}
    for kind, stored, in_memory in (
        ("memory", images, True),
        ("bytes", images, False),
        ("floats", images.float() / 255, False),
    ):
        data = ObjectData.from_object(Listed(stored)).model_copy(
            update={"in_memory": in_memory, "validation": 0.0, "test": 0.0}
        )
        result = run_recipe(build_recipe({**TINY, "data": data, "held_out": 10}), tmp_path / kind)
        found[kind] = (fingerprint(result.autoencoder), (tmp_path / kind / "checkpoints" / "range").exists())
    assert found["bytes"] == (found["memory"][0], False)
    assert found["floats"] == (found["memory"][0], True)


def test_bad_input_gives_one_sentence(tmp_path):
    for number, (fields, sentence) in enumerate(
        (
            ({"data": {**TINY["data"], "pixels": "standard"}}, "but this method needs [0, 1]; set data.pixels=unit"),
            (
                {"model": {**MODEL, "num_values": 1}},
                "model.num_values: expected at least 2, not 1",
            ),
            ({"model": {**MODEL, "widths": [4] * 5}}, "is not divisible by 32; use fewer stages"),
            ({"model": {"kind": "mlp", "num_outputs": 3}}, "trains an autoencoder (kind: autoencoder), not MLP"),
        )
    ):
        with pytest.raises(UserError) as caught:
            run_recipe(build_recipe({**TINY, **fields}), tmp_path / str(number))
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)

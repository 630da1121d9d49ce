"""KRR-ST: its step is the released one's, gradients go where they should, the pool ages, transfer starts from the set."""

import copy
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.data.export import load_tensors
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.engine.stage import SKIP
from stillhouse.errors import UserError
from stillhouse.losses.redundancy import barlow_twins
from stillhouse.methods.barlow_twins import headless, width_of
from stillhouse.methods.datasets.krr_st import (
    KRRST,
    Inner,
    Representation,
    TargetSpec,
    Turns,
    head_of,
    read,
    with_new_head,
)
from stillhouse.models import ConvNetSpec, ModelSpec, Taps
from stillhouse.modules.coresets import k_means
from stillhouse.modules.distilled import DistilledSet

NET = {"kind": "convnet", "width": [4, 6], "depth": 2, "norm": "batch"}
TARGET = {
    "kind": "barlow-twins",
    "model": "cnn:4-5",
    "projector": [6, 6],
    "augment": "shift",
    "epochs": 1,
    "batch_size": 64,
}
TINY = {
    "target": TARGET,
    "network": NET,
    "num_images": 8,
    "pool_size": 2,
    "pool_steps": 4,
    "num_steps": 5,
    "batch_size": 16,
    "eval_networks": 1,
    "eval_epochs": 2,
}


class Setting:
    """An outer step outside the engine, in double precision."""

    def __init__(self, tmp_path, **fields):
        self.method = KRRST.model_validate({"data": "digits", **TINY, **fields})
        self.run = Run(self.method, RunDirectory(tmp_path), data=load_data("digits"), seed=1)
        torch.manual_seed(0)
        facts, split = self.run.data.facts, self.run.data.split("train")
        model = headless(ModelSpec.parse("cnn:4-5"), facts)
        self.target = Representation(model, width_of(model, split, self.run)).eval().requires_grad_(False).double()
        self.pool = nn.ModuleList(self.method.fresh(self.method.network, self.run, 5) for _ in range(2)).double()
        for norm in (m for m in self.pool.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
        images = split.batch(range(8))["pixel_values"].double()
        self.set = DistilledSet(images, torch.randn(8, 5).double(), target="features", learn_labels=True)
        self.m = Modules(set=self.set, pool=self.pool, target=self.target)
        self.batch = split.batch(range(8, 24))
        self.batch = self.batch.replace(pixel_values=self.batch["pixel_values"].double())
        self.taps = [Taps(net, head_of(net), side="input") for net in self.pool]
        self.turns = Turns.of([1, 0, 1, 1], [2, 3], self.method.pool_steps)

    def loss(self, step=0):
        self.run.enter("distillation", step, 4)
        self.run.place("loss", "match", 0, 0)
        self.pool.eval()
        return self.method.match(self.taps, self.turns, self.m, self.batch, self.run)


def published(net, target, x_syn, y_syn, x_real):
    """The outer loss as the released code computes it."""
    embed = lambda x: net.blocks(x).flatten(1)  # noqa: E731
    with torch.no_grad():
        y_real = target(x_real)
        f_real = torch.cat([embed(x_real), torch.ones(len(x_real), 1).to(x_real)], 1)
    f_syn = embed(x_syn)
    f_syn = torch.cat([f_syn, torch.ones(len(x_syn), 1).to(x_syn)], 1)
    k_ss = f_syn @ f_syn.T
    lam = 1e-6 * torch.trace(k_ss.detach())
    solved = torch.linalg.solve(k_ss + lam * torch.eye(len(x_syn)).to(k_ss), y_syn)
    return F.mse_loss(f_real @ f_syn.T @ solved, y_real)


def test_the_outer_loss_and_its_gradients_are_the_released_ones(tmp_path):
    s = Setting(tmp_path)
    found = s.loss()["representation"]
    wanted = published(s.pool[1], s.target, s.set.images, s.set.labels, s.batch["pixel_values"])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    both = [s.set.images, s.set.labels]
    grads, published_grads = (torch.autograd.grad(loss, both) for loss in (found, wanted))
    torch.testing.assert_close(grads, published_grads, rtol=1e-5, atol=1e-9)


def test_nothing_but_the_set_gets_a_gradient(tmp_path):
    s = Setting(tmp_path)
    real = s.batch["pixel_values"].requires_grad_()
    torch.autograd.backward(s.loss()["representation"], inputs=[s.set.images, s.set.labels])
    assert s.set.images.grad.abs().sum() > 0
    assert s.set.labels.grad.abs().sum() > 0
    assert real.grad is None
    assert all(p.grad is None for p in (*s.pool.parameters(), *s.target.parameters()))


def test_the_gradient_to_the_images_agrees_with_finite_differences(tmp_path):
    s = Setting(tmp_path, ridge=1e-3)
    s.pool[1].blocks.apply(lambda m: setattr(m, "inplace", False) if hasattr(m, "inplace") else None)
    for block in s.pool[1].blocks:
        # A smooth network: the ridge's trace is held at its value, so it is fixed for the differences as well.
        block.activation = nn.Tanh()
    (gradient,) = torch.autograd.grad(s.loss()["representation"], s.set.images)
    direction = torch.randn_like(s.set.images)
    features = read(s.pool[1], s.taps[1], s.set.images).detach()
    trace = features.square().sum() + len(features)

    def at(step):
        moved = copy.copy(s.set.images.data)
        s.set.images.data = moved + step * direction
        now = read(s.pool[1], s.taps[1], s.set.images).detach()
        ridge = 1e-3 * trace / (now.square().sum() + len(now))
        fixed = s.method.model_copy(update={"ridge": float(ridge)})
        loss = fixed.match(s.taps, s.turns, s.m, s.batch, s.run)["representation"].item()
        s.set.images.data = moved
        return loss

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_the_meta_gradient_has_no_noise_and_that_of_a_self_supervised_inner_loss_has(tmp_path):
    s = Setting(tmp_path)
    first, second = (torch.autograd.grad(s.loss()["representation"], s.set.images)[0] for _ in range(2))
    assert torch.equal(first, second)

    def through_one_step(seed):
        """The outer gradient through one SGD step on Barlow Twins with drawn views."""
        torch.manual_seed(seed)
        head = torch.randn(24, 5, dtype=torch.float64).requires_grad_()
        net = s.pool[1]
        views = [s.set.images + 0.3 * torch.randn_like(s.set.images) for _ in range(2)]
        sides = [net.blocks(view).flatten(1) @ head for view in views]
        (step,) = torch.autograd.grad(sum(barlow_twins(*sides)), head, create_graph=True)
        with torch.no_grad():
            queries, wanted = net.blocks(s.batch["pixel_values"]).flatten(1), s.target(s.batch["pixel_values"])
        loss = F.mse_loss(queries @ (head - 0.01 * step), wanted)
        return torch.autograd.grad(loss, s.set.images)[0]

    noisy = torch.stack([through_one_step(seed) for seed in range(6)])
    assert noisy.std(0).norm() > 0.1 * noisy.mean(0).norm()


def test_the_pool_is_refreshed_on_the_new_set_and_an_old_network_is_drawn_afresh(tmp_path):
    s = Setting(tmp_path)
    s.run.enter("distillation", 0, 4)
    s.run.place("loss", "refresh", 0, 0)
    # Member 1 is 3 steps old and makes its fourth; with T = 4 it is drawn afresh in its next turn.
    assert s.turns.ages == (3, 2, 4, 0)
    s.pool.train()
    found = s.method.refresh(s.turns, s.m, s.batch, s.run)
    wanted = F.mse_loss(s.pool[1](s.set.images), s.set.labels)
    torch.testing.assert_close(found["regression"], wanted)
    found["regression"].backward()
    assert s.set.images.grad is None
    assert s.set.labels.grad is None

    class Spy:
        reset = None

    spied, before, other = Spy(), copy.deepcopy(s.pool[1].state_dict()), copy.deepcopy(s.pool[0].state_dict())
    s.run.reset = lambda net: setattr(spied, "reset", net)
    s.run.enter("distillation", 2, 4)
    assert s.method.refresh(s.turns, s.m, s.batch, s.run) is SKIP
    assert spied.reset is s.pool[1]
    after = s.pool[1].state_dict()
    assert not torch.equal(after["blocks.0.conv.weight"], before["blocks.0.conv.weight"])
    assert after["blocks.0.norm.num_batches_tracked"] == 0
    assert all(torch.equal(value, other[name]) for name, value in s.pool[0].state_dict().items())


def test_ages_stay_within_bounds_and_the_released_count_is_never_set_back():
    generator = torch.Generator().manual_seed(0)
    members = torch.randint(3, (500,), generator=generator).tolist()
    turns = Turns.of(members, [1, 5, 9], 10)
    assert {0, 10} <= set(turns.ages) <= set(range(11))
    for member in range(3):
        own = [age for age, of in zip(turns.ages, members, strict=True) if of == member]
        assert all(b == (0 if a == 10 else a + 1) for a, b in pairwise(own))
    released = Turns.of(members, [1, 5, 9], 10, restarts=False)
    last = dict(zip(members, released.ages, strict=True))
    assert set(last.values()) == {10}


def test_a_fresh_network_has_no_momentum_in_the_engine(tmp_path, monkeypatch):
    """Over a whole run: what the optimiser remembers of a network is gone when it is drawn afresh."""
    seen = []
    plain = Run.reset

    def watched(run, module):
        optimizer = run._fit.turns[1].groups[0][3]
        remembered = [p in optimizer.state for p in module.parameters()]
        plain(run, module)
        seen.append((any(remembered), any(p in optimizer.state for p in module.parameters())))

    monkeypatch.setattr(Run, "reset", watched)
    sh.distil("krr-st", data="digits", **{**TINY, "num_steps": 16, "pool_size": 1, "compare_start": False})
    assert len(seen) == 3
    assert all(after is False for _, after in seen)
    assert any(before for before, _ in seen)


@pytest.mark.parametrize("head", ["ridge", "descent"])
@pytest.mark.parametrize("outer", ["representation", "barlow-twins"])
def test_ablations_reach_the_images(head, outer, tmp_path):
    s = Setting(tmp_path, head=head, outer=outer, head_steps=3)
    s.batch = s.batch.replace(pixel_values=s.batch["pixel_values"].float())
    s.pool.float(), s.target.float(), s.set.float()
    (term,) = s.loss().values()
    grads = torch.autograd.grad(term, [s.set.images, s.set.labels])
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("krr") / "run"
    fields = {
        "transfer": ["digits"],
        "protocols": ["probe", "finetune"],
        "probe_steps": 2,
        "finetune_steps": 2,
        "init": "k-means",
        "standardize": True,
    }
    return sh.distil("krr-st", data="digits", **TINY, **fields, out=out), out


def test_a_run_hands_over_images_and_representations_and_scores_all_three(distilled):
    result, out = distilled
    kept = load_tensors(out / "result" / "set" / "distilled.safetensors")
    assert (kept.target, kept.images.shape, kept.labels.shape) == ("features", (8, 1, 8, 8), (8, 5))
    assert kept.mean.item() == 0
    assert isinstance(kept.labels, nn.Parameter)
    for label in ("", "start/"):
        assert result.metrics[f"{label}test/mse"] > 0
    for label in ("", "start/", "scratch/"):
        for protocol in ("probe", "finetune"):
            assert 0 <= result.metrics[f"{label}transfer/digits/{protocol}"] <= 1
    assert result.metrics["outer/fall"] == pytest.approx(
        1 - result.metrics["outer/end"] / result.metrics["outer/start"]
    )
    assert "class labels" in result.notes[0]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("match/representation" in row for row in rows)


def test_the_start_is_real_images_with_the_targets_words_for_them():
    result = sh.distil("krr-st", data="digits", **{**TINY, "num_steps": 0})
    kept = result.artefacts["set"].distilled
    data = load_data("digits")
    index = kept.provenance["start"]["samples"]
    real = data.split("train").batch(index)["pixel_values"]
    torch.testing.assert_close(kept.images.detach(), data.to_unit(real))
    assert set(result.metrics) == {"test/mse", "test/mse/std"}
    standard = sh.distil("krr-st", data="digits", **{**TINY, "num_steps": 0, "raw_start": False})
    other = standard.artefacts["set"].distilled
    torch.testing.assert_close(other.images.detach(), real)
    torch.testing.assert_close(other.pixels, data.to_unit(real))
    # The target reads standardised images in either case.
    torch.testing.assert_close(other.labels, kept.labels)


def test_a_fixed_target_stays_and_images_move():
    result = sh.distil("krr-st", data="digits", **TINY, learn_targets=False, compare_start=False)
    fixed = result.artefacts["set"].distilled
    start = sh.distil("krr-st", data="digits", **{**TINY, "num_steps": 0}).artefacts["set"].distilled
    assert torch.equal(fixed.labels, start.labels)
    assert not torch.equal(fixed.images, start.images)


def test_transfer_keeps_everything_but_the_last_layer():
    facts = load_data("digits").facts
    spec = ConvNetSpec(width=(4, 6), depth=2, norm="batch", num_outputs=5)
    net = spec.build(facts)
    new = with_new_head(ConvNetSpec(width=(4, 6), depth=2, norm="batch"), net, facts)
    assert new.classifier.out_features == 10
    kept = {name for name, value in net.state_dict().items() if torch.equal(value, new.state_dict().get(name, value))}
    assert not any(name.startswith("classifier") for name in kept - {"classifier.weight", "classifier.bias"})
    assert torch.equal(new.blocks[1].conv.weight, net.blocks[1].conv.weight)


def test_k_means_takes_a_sample_of_each_cluster():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = torch.cat([centre + 0.1 * torch.randn(20, 2) for centre in centres])
    chosen = k_means(points, 3)
    assert (chosen // 20).tolist() == [0, 1, 2]
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        assert len(set(k_means(torch.ones(5, 2), 5).tolist())) == 5
    with pytest.raises(UserError, match="ask for 1 to 60"):
        k_means(points, 61)
    with pytest.raises(UserError, match="not finite"):
        k_means(points / 0, 2)


def test_targets_are_teachers_too():
    teacher = TargetSpec.parse("cnn:4")
    assert teacher.kind == "teacher"
    assert TargetSpec.parse(teacher.dump()) == teacher
    assert TargetSpec.parse("barlow-twins").kind == "barlow-twins"
    net = ModelSpec.parse("cnn:4-6").build(load_data("digits").facts).eval()
    inner = Inner(net, "blocks.1")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(inner(x), net.features(x))


def test_an_own_layer_of_a_labelled_teacher_is_a_target():
    target = {"kind": "teacher", "teacher": {"kind": "trained", "model": "cnn:4-6", "epochs": 1}, "layer": "blocks.1"}
    result = sh.distil("krr-st", data="digits", **{**TINY, "target": target, "num_steps": 1, "compare_start": False})
    assert result.artefacts["set"].distilled.labels.shape == (8, 6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_images": 5000}, "num_images is 5000, but 'digits' has only"),
        ({"num_images": 1}, "at least 2"),
        ({"network": {**NET, "num_outputs": 3}}, "it has 3 outputs and the target's representation 5"),
        ({"transfer": ["mini"]}, "there is no"),
        ({"transfer": [{"kind": "digits", "image_size": 16}]}, "set image_size of either"),
        ({"data": (torch.randn(40, 3), torch.arange(40) % 2)}, "needs images"),
    ],
)
def test_bad_input_gives_a_sentence(fields, words):
    with pytest.raises(UserError, match=words):
        sh.distil("krr-st", **{"data": "digits", **TINY, "num_steps": 1, **fields})


def test_data_free_students_see_the_sets_images_alone():
    fields = {
        "transfer": ["digits"],
        "protocols": ["data-free"],
        "data_free_epochs": 1,
        "data_free_teacher": {"kind": "trained", "model": "cnn:4", "epochs": 1},
        "compare_start": False,
        "num_steps": 1,
    }
    result = sh.distil("krr-st", data="digits", **{**TINY, **fields})
    assert 0 <= result.metrics["transfer/digits/data-free"] <= 1
    assert "scratch/transfer/digits/data-free" in result.metrics

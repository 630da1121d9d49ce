"""TRG: tokens on one grid, the same positions on both sides, three terms over them, probes of their relations."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses.relations import neighbour_graph
from stillhouse.methods.knowledge.trg import TRG
from stillhouse.methods.wiring import Wiring
from stillhouse.models import ModelSpec, fingerprint

CNN = {"kind": "cnn", "strides": [2, 1]}
TEACHER = {"kind": "trained", "model": {**CNN, "channels": [8, 8]}, "epochs": 1}
SMALL = {
    "data": "digits",
    "teacher": TEACHER,
    "student": {**CNN, "channels": [4, 6]},
    "epochs": 1,
    "tokens_per_image": 3,
}
VIT = {"kind": "vit", "patch": 2, "dim": 12, "depth": 2, "heads": 2}


@pytest.fixture
def started(tmp_path):
    def make(method, student=None, teacher=None):
        run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
        run.enter("student", 0, 11)
        torch.manual_seed(0)
        nets = [
            ModelSpec.parse(spec or default).build(run.data.facts).eval()
            for spec, default in ((teacher, TEACHER["model"]), (student, SMALL["student"]))
        ]
        nets[0].requires_grad_(False)
        wiring = Wiring(method.objectives, nets[1], {"teacher": nets[0]}, run)
        batch = run.data.split("train").batch(range(16))
        m = Modules(student=nets[1], teacher=nets[0], **wiring.modules())
        return m, batch, wiring, run

    return make


def test_the_terms_are_those_of_the_card(started):
    method = TRG(**{**SMALL, "tokens_per_image": None}, neighbours=5)
    # Noise and many channels: no two tokens are alike, so that neighbours are no matter of taste.
    wide = ({**CNN, "channels": [4, 16]}, {**CNN, "channels": [8, 24]})
    m, batch, wiring, _ = started(method, *wide)
    batch = batch.replace(pixel_values=torch.randn_like(batch["pixel_values"]))
    terms = wiring.terms(m, batch)
    assert set(terms) == {"ce", "kd", "inner", "local", "global"}
    maps = [m[name].blocks(batch["pixel_values"]) for name in ("student", "teacher")]
    tokens = [x.flatten(2).transpose(1, 2) for x in maps]
    contexts = [(x @ x.mT / math.sqrt(x.shape[2])).softmax(-1) for x in tokens]
    torch.testing.assert_close(terms["inner"](), 16**2 * F.mse_loss(*contexts), rtol=1e-4, atol=1e-6)

    nodes = [F.normalize(x.flatten(0, 1)) for x in tokens]
    graphs = []
    for x in nodes:
        distances = torch.cdist(x, x)
        kept = (
            distances.clone().fill_diagonal_(math.inf)
            <= distances.clone().fill_diagonal_(math.inf).kthvalue(5).values[:, None]
        )
        graphs.append(torch.where(kept, torch.exp(-distances.square() / (2 * 0.5)), 0))
    mine, theirs = (graph.log_softmax(-1) for graph in graphs)
    expected = (mine.exp() * (mine - theirs)).sum(1).mean()
    torch.testing.assert_close(terms["local"](), expected, rtol=1e-3, atol=1e-8)

    projected = F.normalize(m.projector(tokens[0].flatten(0, 1)))
    similarity = projected @ nodes[1].T
    torch.testing.assert_close(
        terms["global"](), F.cross_entropy(similarity / 0.5, torch.arange(len(similarity))), rtol=1e-4, atol=1e-5
    )
    sum(term() for term in terms.values()).backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert m.projector.weight.grad is not None
    wiring.close()


def test_the_same_positions_are_drawn_on_both_sides_and_anew_each_step(started):
    method = TRG(**SMALL)
    *_, run = started(method)
    # Tokens that say where they are.
    place = torch.arange(16.0)[None, :, None] + 100 * torch.arange(8.0)[:, None, None]
    mine, theirs = method.sampled(place, place.repeat(1, 1, 2), run)
    assert torch.equal(mine[:, 0], theirs[:, 1])
    assert len(mine) == 8 * 3
    by_image = mine.view(8, 3)
    assert torch.equal(by_image // 100, torch.arange(8.0)[:, None].expand(8, 3))
    assert all(len(row.unique()) == 3 for row in by_image)
    assert len((by_image % 100).unique(dim=0)) > 1, "each image has positions of its own"
    run.enter("student", 1, 11)
    assert not torch.equal(method.sampled(place, place, run)[0], mine)
    run.enter("student", 0, 11)
    run._draws = 0
    assert torch.equal(method.sampled(place, place, run)[0], mine), "a resumed step draws the same"


def test_equal_tokens_have_no_loss(started):
    method = TRG(**SMALL)
    *_, _ = started(method)
    tokens = torch.randn(8, 16, 6)
    assert method.inner(tokens, tokens).item() == 0
    nodes = tokens.flatten(0, 1)
    assert method.local(nodes, nodes).abs().item() < 1e-7
    turned = torch.linalg.qr(torch.randn(6, 6)).Q
    other = torch.randn(8, 16, 6)
    torch.testing.assert_close(method.inner(other @ turned, tokens), method.inner(other, tokens), rtol=1e-3, atol=1e-5)
    moved = method.local(other.flatten(0, 1) @ turned, nodes)
    torch.testing.assert_close(moved, method.local(other.flatten(0, 1), nodes), rtol=1e-3, atol=1e-7)
    order = torch.randperm(len(nodes))
    permuted = method.local(other.flatten(0, 1)[order], nodes[order])
    torch.testing.assert_close(permuted, method.local(other.flatten(0, 1), nodes), rtol=1e-3, atol=1e-8)


def test_the_graph_is_scikit_learns_and_not_symmetric():
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    weights, _ = neighbour_graph(x, 6)
    unit = F.normalize(x)
    expected = NearestNeighbors(n_neighbors=6).fit(unit).kneighbors_graph().toarray()
    assert torch.equal(weights > 0, torch.from_numpy(expected > 0))
    assert (weights.diagonal() == 0).all()
    assert not torch.equal(weights > 0, (weights > 0).T)


def test_the_contrasts_temperature_falls_from_start_to_end(started):
    *_, run = started(TRG(**SMALL))
    for shape in ("linear", "cosine"):
        method = TRG(**SMALL, global_temperature={"start": 0.5, "end": 0.1, "shape": shape})
        found = []
        for step in range(11):
            run.enter("student", step, 11)
            found.append(method.temperature_at(run))
        assert found[0] == 0.5
        assert found[-1] == pytest.approx(0.1)
        assert found == sorted(found, reverse=True)


def test_a_transformer_and_a_cnn_meet_on_one_grid_without_the_class_token(started):
    method = TRG(**SMALL)
    m, batch, wiring, _ = started(method, student=VIT)
    pair = wiring.pairs(m, batch)[0][0]
    mine, theirs = method.tokens(pair)
    assert mine.shape == (16, 16, 12)
    assert theirs.shape == (16, 16, 8)
    m, batch, wiring, _ = started(method, student=VIT, teacher={**VIT, "pooling": "mean", "dim": 16, "patch": 1})
    pair = wiring.pairs(m, batch)[0][0]
    assert pair.student.features[-1].shape == (16, 17, 12)
    mine, theirs = method.tokens(pair)
    # 8 x 8 patches are pooled to the 4 x 4 of the other.
    patches = pair.teacher.features[-1].transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(theirs[:, 0], patches[:, :, :2, :2].mean((2, 3)))
    assert torch.equal(mine, pair.student.features[-1][:, 1:])


def test_both_sides_may_be_projected(started):
    method = TRG(**SMALL, projection_width=5)
    m, batch, wiring, _ = started(method)
    assert {"projector", "teacher-projector"} <= set(m)
    assert m["teacher-projector"].weight.shape == (5, 8)
    wiring.terms(m, batch)["global"]().backward()
    assert m["teacher-projector"].weight.grad is not None


def test_graphs_of_whole_images_come_from_the_same_code(started):
    method = TRG(**SMALL, nodes="images", neighbours=4)
    m, batch, wiring, _ = started(method)
    terms = wiring.terms(m, batch)
    assert "inner" not in terms
    pooled = [m[name].blocks(batch["pixel_values"]).mean((2, 3)) for name in ("student", "teacher")]
    torch.testing.assert_close(terms["local"](), method.local(*pooled), rtol=1e-3, atol=1e-8)


def test_tokens_without_length_stay_finite(started):
    method = TRG(**SMALL)
    *_, _ = started(method)
    torch.manual_seed(0)
    tokens = torch.randn(4, 16, 6)
    tokens[:, ::2] = 0
    student = tokens.clone().requires_grad_()
    loss = method.local(student.flatten(0, 1), torch.randn(64, 6)) + method.inner(student, torch.randn(4, 16, 6))
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad.isfinite().all()


def test_half_the_tokens_make_a_graph_of_a_quarter():
    sizes = [neighbour_graph(torch.randn(16 * m, 4), 3)[0].numel() for m in (8, 4)]
    assert sizes[0] == 4 * sizes[1]


def test_a_run_measures_relations_and_ships_the_student_alone(tmp_path):
    data = {"kind": "digits", "long_tail": 10}
    fields = {**SMALL, "data": data, "teacher": {**TEACHER, "data": "digits"}, "batch_size": 32}
    result = sh.distil("trg", **fields, settings={"threads": 1}, out=tmp_path / "run")
    assert list(result.artefacts) == ["student"]
    found = result.metrics
    assert found["probe/retrieval_chance"] == 1 / (64 * 16)
    for name in ("distance_correlation", "neighbour_overlap", "retrieval"):
        assert -1 <= found[f"probe/{name}"] <= 1
    shots = {name for name in found if name.startswith("test/student/accuracy_")}
    assert shots == {f"test/student/accuracy_{name}" for name in ("many", "medium", "few", "balanced")}
    table = result.tables[0]
    assert "test accuracy, few" in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert "the graph was taken over the samples of each process" in " ".join(result.notes)
    # Without the contrast there is no projection, and the same probes.
    plain = sh.distil("trg", **fields, weight_global=0, weight_inner=0, weight_local=0, compare_alone=False)
    assert "probe/retrieval" in plain.metrics


def test_the_probes_leave_the_teacher_as_it_was():
    """Its batch norm's running statistics too."""
    torch.manual_seed(0)
    teacher = ModelSpec.parse(TEACHER["model"]).build(load_data("digits").facts)
    before = fingerprint(teacher)
    result = sh.distil("trg", **{**SMALL, "teacher": teacher}, compare_alone=False)
    assert fingerprint(teacher) == before
    assert f"teacher has fingerprint {before}" in result.notes


def test_it_stands_beside_another_objective():
    result = sh.distil(
        "kd", **{k: v for k, v in SMALL.items() if k != "tokens_per_image"}, also=["trg"], compare_alone=False
    )
    assert "probe/distance_correlation" in result.metrics


def test_defaults_are_the_cards():
    method = TRG()
    assert (method.weight_inner, method.weight_local, method.weight_global) == (1.0, 1.0, 0.1)
    assert (method.neighbours, method.sigma, method.tokens_per_image, method.inner_power) == (8, 0.5, 8, 2)
    assert (method.global_temperature.start, method.global_temperature.end) == (0.5, 0.1)
    assert (method.temperature, method.epochs, method.optimizer.lr) == (4.0, 240, 0.05)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tokens_per_image": 17}, "tokens_per_image is 17 and an image has 16 tokens"),
        ({"neighbours": 96, "batch_size": 32}, "k lies between 1 and 95, the number of other tokens, not 96"),
        ({"grid": 5}, "A grid of 5x5 is finer than the features, 4x4"),
        ({"batch_size": 1, "tokens_per_image": 1}, "k lies between|at least 2 nodes"),
        ({"accumulate": 2}, "couples the samples of a batch"),
        ({"student": "mlp:8"}, "not from features of shape"),
        ({"data": {"kind": "digits", "long_tail": 0.5}}, "long_tail.ratio"),
        ({"data": {"kind": "digits", "long_tail": 1e4}}, "would have no sample"),
        ({"false_negatives": 2}, "false_negatives"),
        ({"sigma": "mean"}, "sigma"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("trg", **{**SMALL, **fields}, compare_alone=False)

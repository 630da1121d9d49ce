"""SSLD: no label anywhere, a pool mined exactly, two stages, a teacher that follows the batch and never moves."""

import csv
import json

import pytest
import torch
from scipy.stats import entropy
from torch import nn

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Run, RunDirectory, Silent
from stillhouse.errors import UserError
from stillhouse.losses import js
from stillhouse.methods.knowledge.ssld import SSLD, as_pool
from stillhouse.methods.supervised import by_stage
from stillhouse.models import ModelSpec, fingerprint, load, logits, save
from stillhouse.recipe import load_recipe

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"}
SETTINGS = {"threads": 1}
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0)}


def pictures(count, seed, classes=3, size=24):
    """Coloured textures: the class is the colour, and no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = sum(
        nn.functional.interpolate(torch.rand(count, 1, n, n, generator=generator), size=(size, size), mode="bicubic")
        for n in (3, 5, 9)
    )
    labels = torch.arange(count) % classes
    tints = torch.tensor(list(COLOURS.values()))[labels]
    return (noise / 3 * tints[:, :, None, None]).clamp(0, 1), labels


class Teacher(nn.Module):
    """Tells colours by rule; with a batch norm and a dropout that would show if they switched."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(8 * torch.eye(3))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.drop(self.norm(x).mean((2, 3))))


TRAIN, TEST = pictures(60, 0), pictures(60, 1)
DATA = {"train": TRAIN, "validation": pictures(12, 2), "test": TEST}
SMALL = {
    "data": DATA,
    "teacher": Teacher(),
    "student": {"kind": "cnn", "channels": [4, 8]},
    "optimizer": SGD,
    "batch_size": 12,
    "epochs": 2,
    "finetune_epochs": 1,
    "compare_alone": False,
    "settings": SETTINGS,
}


def trained(**fields):
    return sh.distil("ssld", **{**SMALL, **fields})


def pool_of(images):
    return {"kind": "object", "object": (images,)}


def write_images(place, images):
    Image = pytest.importorskip("PIL.Image")
    place.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(place / f"{number:03}.png")


# The loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_both_divergences(tmp_path):
    run = Run(SSLD(), RunDirectory(tmp_path / "run"), data=load_data(DATA))
    torch.manual_seed(0)
    s, t = 3 * torch.randn(20, 7, dtype=torch.float64), 3 * torch.randn(20, 7, dtype=torch.float64)
    p, q = s.softmax(1).numpy(), t.softmax(1).numpy()
    expected = (entropy(q, p, axis=1) + entropy(p, q, axis=1)).mean() / 2
    loss = SSLD().soft(s, t, None, run)
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert float(SSLD().soft(t, s, None, run)) == pytest.approx(expected, rel=1e-12), "symmetric"
    assert float(SSLD().soft(s, s + 5, None, run)) == pytest.approx(0, abs=1e-12), "logits up to a constant"
    assert float(js(s, t, 1.0)) <= torch.tensor(2.0).log()
    true = SSLD(divergence="js").soft(s, t, None, run)
    m = (p + q) / 2
    assert float(true) == pytest.approx(((entropy(p, m, axis=1) + entropy(q, m, axis=1)) / 2).mean(), rel=1e-9)
    kl = SSLD(divergence="kl").soft(s, t, None, run)
    assert float(kl) == pytest.approx(entropy(q, p, axis=1).mean(), rel=1e-9)
    soft = SSLD(divergence="soft_ce").soft(s, t, None, run)
    assert float(soft) == pytest.approx((entropy(q, p, axis=1) + entropy(q, axis=1)).mean(), rel=1e-9)


def test_the_true_js_is_four_times_flatter_where_both_agree(tmp_path):
    run = Run(SSLD(), RunDirectory(tmp_path / "run"), data=load_data(DATA))
    t = torch.randn(9, 5, dtype=torch.float64)
    s = (t + 1e-3 * torch.randn_like(t)).requires_grad_()
    jeffreys, true = (
        torch.autograd.grad(SSLD(divergence=name).soft(s, t, None, run), s)[0] for name in ("jeffreys", "js")
    )
    assert float(jeffreys.norm() / true.norm()) == pytest.approx(4, rel=1e-2)


def test_no_label_enters_the_student():
    """Bit for bit the same student when every training label is -1, with a pool or without."""
    images, labels = TRAIN
    hidden = {**DATA, "train": (images, torch.full_like(labels, -1))}
    for fields in ({}, {"pool": pool_of(pictures(40, 3)[0]), "per_class": 8}):
        facts = {"kind": "object", "num_classes": 3}
        a = trained(**fields, data={**facts, "object": DATA})
        b = trained(**fields, data={**facts, "object": hidden})
        for one, other in zip(a.student.state_dict().values(), b.student.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def test_labels_are_not_even_in_the_batch(tmp_path):
    seen = []

    class Watching(SSLD):
        name = "ssld"

        def terms(self, pair, run):
            seen.append(set(pair.batch))
            return super().terms(pair, run)

    fields = {k: v for k, v in SMALL.items() if k not in ("data", "settings")}
    method = Watching(data={"kind": "object", "object": DATA}, **fields)
    Run(method, RunDirectory(tmp_path / "run"), data=load_data(DATA)).execute()
    assert len(seen) == 15
    assert all("labels" not in batch for batch in seen)


# The teacher ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["batch", "running"])
def test_the_teacher_follows_the_batch_or_itself_and_never_moves(policy, tmp_path):
    teacher, data = Teacher(), load_data(DATA)
    before, seen = fingerprint(teacher), []
    teacher.head.register_forward_hook(lambda module, args, out: seen.append((args[0], teacher.drop.training)))
    fields = {k: v for k, v in SMALL.items() if k not in ("data", "settings", "teacher")}
    asked = []

    class Watching(SSLD):
        name = "ssld"

        def terms(self, pair, run):
            asked.append((pair.batch["pixel_values"], pair.teacher.logits))
            return super().terms(pair, run)

    method = Watching(data={"kind": "object", "object": DATA}, **fields, teacher=teacher, teacher_bn=policy)
    Run(method, RunDirectory(tmp_path / "run"), data=data).execute()
    assert fingerprint(teacher) == before, "weights and running statistics"
    assert not any(dropping for _, dropping in seen)
    x, told = asked[-1]
    with torch.no_grad():
        running = teacher.eval()(x)
        normed = nn.functional.batch_norm(x, None, None, teacher.norm.weight, teacher.norm.bias, training=True)
        batch = teacher.head(normed.mean((2, 3)))
    torch.testing.assert_close(told, batch if policy == "batch" else running)
    assert not torch.allclose(batch, running, atol=1e-2)
    assert not any(module._forward_hooks for module in (teacher, teacher.norm))


def test_a_teacher_without_batch_norm_is_told_of():
    told = trained(teacher=nn.Sequential(nn.Flatten(), nn.Linear(1728, 3)), epochs=1, finetune_epochs=0)
    assert any("teacher_bn=batch does nothing" in note for note in told.notes)


# The pool ---------------------------------------------------------------------------------------------------------------


def test_the_pool_is_mined_exactly(tmp_path):
    """The surest of each class stay, copies of evaluation images leave however they were changed, and all is counted."""
    foreign, _ = pictures(90, 3)
    cut = nn.functional.interpolate(TEST[0][6:9, :, 1:-1, 1:-1], size=24, mode="bilinear", antialias=True)
    copies = torch.cat([TEST[0][:3], TEST[0][3:6].flip(-1), cut, 0.9 * DATA["validation"][0][:2]])
    pool = torch.cat([foreign[:50], copies, foreign[50:]])
    duplicates = {"embedding": "pixels"}
    result = trained(pool=pool_of(pool), per_class=7, duplicates=duplicates, out=tmp_path / "run")
    report = tmp_path / "run" / "result" / "pool"
    removed = list(csv.DictReader((report / "removed.csv").open()))
    planted = {str(number) for number in range(50, 61)}
    assert {row["pool_index"] for row in removed} == planted, "and no others"
    by_index = {row["pool_index"]: row for row in removed}
    assert (by_index["50"]["split"], by_index["50"]["index"], by_index["50"]["mirrored"]) == ("test", "0", "no")
    assert (by_index["53"]["index"], by_index["53"]["mirrored"]) == ("3", "yes")
    assert by_index["59"]["split"] == "validation"
    told = json.loads((report / "report.json").read_text())
    assert (told["images"], told["near_duplicates"], told["unreadable"]) == (101, len(removed), 0)

    chosen = list(csv.DictReader((report / "chosen.csv").open()))
    assert len(chosen) == told["picked"] == 21
    left = [i for i in range(101) if str(i) not in by_index]
    with torch.no_grad():
        probabilities = Teacher().eval()(pool[left]).log_softmax(1)
    score, predicted = probabilities.max(1)
    expected = []
    for label in range(3):
        mine = (predicted == label).nonzero().flatten()
        expected += [left[int(i)] for i in mine[score[mine].argsort(descending=True)[:7]]]
    assert sorted(int(row["pool_index"]) for row in chosen) == sorted(expected)
    titles = [table.title for table in result.tables]
    assert titles == ["Comparison", "Pool", "Pool by class", "Removed pairs (first 20)"]
    counts = {row[0]: row[1] for row in result.tables[1].rows}
    assert counts["images in the pool"] == 101
    assert counts["chosen"] == 21
    assert result.metrics["pool/picked"] == 21.0


def test_a_folder_without_labels_works_and_what_cannot_be_read_is_counted(tmp_path):
    foreign, _ = pictures(120, 3, size=20)
    write_images(tmp_path / "pool" / "deep" / "down", foreign[:60])
    write_images(tmp_path / "pool", foreign[60:119])
    (tmp_path / "pool" / "broken.jpg").write_bytes(b"\xff\xd8nonsense")
    (tmp_path / "pool" / "notes.txt").write_text("no image")
    result = trained(pool=f"folder:{tmp_path / 'pool'}", per_class=10, duplicates=False)
    assert (result.metrics["pool/images"], result.metrics["pool/unreadable"]) == (120, 1)
    assert result.metrics["pool/picked"] == 30
    for number in range(2):
        (tmp_path / "pool" / f"more{number}.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"pool: 3 of 122 images cannot be read, more than 1%"):
        trained(pool=f"folder:{tmp_path / 'pool'}", per_class=10, duplicates=False)


def test_a_flat_folder_is_a_target_too(tmp_path):
    """Nothing anywhere has a label: the student learns what the teacher says, and that is what is measured."""
    write_images(tmp_path / "images", pictures(100, 5)[0])
    result = trained(data=f"folder:{tmp_path / 'images'}", epochs=20)
    assert result.metrics["test/student/agreement/teacher"] > 0.8
    assert "validation/agreement" in result.metrics
    assert result.student(torch.rand(2, 3, 24, 24)).shape == (2, 3)
    assert any("the data have no labels" in note for note in result.notes)


def test_several_pools_are_one_and_each_ones_share_is_told():
    clean, noise = pictures(30, 3)[0], 0.5 + 0.01 * torch.randn(90, 3, 24, 24)
    fields = {"pool": [pool_of(clean), pool_of(noise)], "per_class": 8, "duplicates": False}
    top, random = trained(**fields), trained(**fields, select="random")
    assert top.metrics["pool/picked"] == random.metrics["pool/picked"] == 24
    assert top.metrics["pool/share/0"] > 0.9
    assert 0.1 < random.metrics["pool/share/0"] < 0.5
    everything = trained(**{**fields, "per_class": None})
    assert everything.metrics["pool/picked"] == 120


def test_the_pool_is_mined_once_for_all_seeds_but_drawn_for_each(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    asked = []
    original = SSLD.mine
    monkeypatch.setattr(SSLD, "mine", lambda *args: asked.append(1) or original(*args))
    fields = {"pool": pool_of(pictures(40, 3)[0]), "per_class": 4, "duplicates": False, "finetune_epochs": 0}
    for seed in (0, 1):
        trained(**fields, seed=seed)
    assert len(asked) == 1
    for seed in (0, 1):
        trained(**fields, seed=seed, select="random")
    assert len(asked) == 3


def test_classes_without_an_image_are_listed():
    red = pictures(60, 3)[0][::3]
    result = trained(pool=pool_of(red), per_class=5, duplicates=False, teacher_bn="running")
    note = next(note for note in result.notes if "no pool image was chosen" in note)
    assert note.endswith(": 1, 2.")
    assert result.metrics["pool/picked"] == 5


def test_a_larger_scorer_may_score(tmp_path):
    scorer = Teacher()
    with torch.no_grad():
        scorer.head.weight.copy_(8 * torch.eye(3)[[1, 2, 0]])
    images = pictures(30, 3)[0]
    fields = {"pool": pool_of(images), "per_class": 3, "duplicates": False}
    trained(**fields, scorer=scorer, out=tmp_path / "a")
    trained(**fields, out=tmp_path / "b")
    classes = [
        [row["class"] for row in csv.DictReader((tmp_path / run / "result" / "pool" / "chosen.csv").open())]
        for run in "ab"
    ]
    assert classes[0] != classes[1]


def test_what_a_pool_becomes():
    target = load_data(DATA).split("train")
    spec = as_pool(load_recipe("ssld", ["pool=folder:somewhere"]).method.pool, target)
    assert (spec.labels, spec.skip_unreadable, spec.image_size, spec.channels) == (False, True, 24, 3)
    assert (spec.validation, spec.test) == (0, 0)


# The stages -------------------------------------------------------------------------------------------------------------


def rates(place, stage):
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return {k: v for row in rows if row.get("stage") == stage for k, v in row.items() if "/lr/" in k}


def test_two_stages_the_second_at_a_hundredth(tmp_path):
    class Ear(Silent):
        def __init__(self):
            self.stages = []

        def stage(self, name, steps, done):
            self.stages.append((name, steps))

    ear = Ear()
    pool = pool_of(pictures(60, 3)[0])
    constant = {**SGD, "schedule": "constant"}
    fields = {"pool": pool, "per_class": 20, "duplicates": False, "warmup_epochs": 10, "listener": ear, "epochs": 20}
    result = trained(**fields, optimizer=constant, out=tmp_path / "run", settings={**SETTINGS, "log_every": 1})
    steps = dict(ear.stages)
    assert (steps["pool"], steps["target"]) == (20 * 10, 5), "120 images, then 60, in batches of 12"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lr = {
        stage: [v for row in rows if row.get("stage") == stage for k, v in row.items() if "/lr/" in k]
        for stage in ("pool", "target")
    }
    assert lr["pool"][0] == pytest.approx(0.05 / 20), "warmed up over a tenth, as ten passes would be half of it"
    assert max(lr["pool"]) == pytest.approx(0.05)
    assert max(lr["target"], default=5e-4) == pytest.approx(5e-4)
    assert {"after-pool/test/accuracy", "test/accuracy"} <= set(result.metrics)
    ear.stages = []
    trained(**fields, num_steps=7)
    assert dict(ear.stages)["pool"] == 7


def test_a_student_with_weights_may_skip_the_first_stage(tmp_path):
    first = trained(finetune_epochs=0)
    save(first.student, tmp_path / "first")
    second = trained(student=f"file:{tmp_path / 'first'}", epochs=0)
    assert fingerprint(second.student) != fingerprint(first.student)
    moved = [
        float(((a - b).norm() / b.norm()).detach())
        for a, b in zip(second.student.parameters(), first.student.parameters(), strict=True)
        if b.dim() > 1
    ]
    assert 0 < max(moved) < 0.05, "a hundredth of the rate moves little"


def test_the_plain_student_takes_as_many_steps():
    result = trained(compare_alone=True)
    assert {"test/student-alone/accuracy", "test/student/accuracy"} <= set(result.metrics)
    method = SSLD(**{k: v for k, v in SMALL.items() if k not in ("data", "settings")})
    run = Run(method, None, data=load_data(DATA))
    assert method.alone_for(run, 35).epochs == pytest.approx(7)


def test_the_fix_stage_moves_the_classifier_alone(tmp_path):
    plain = trained(out=tmp_path / "plain")
    result = trained(fix={"image_size": 32, "epochs": 3, "lr": 0.1}, out=tmp_path / "fixed")
    ours, theirs = dict(result.student.state_dict()), dict(plain.student.state_dict())
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved == {"classifier.weight", "classifier.bias"}, "running statistics included"
    assert {"fix/before/test/accuracy", "fix/test/accuracy"} <= set(result.metrics)
    assert result.metrics["test/accuracy"] == plain.metrics["test/accuracy"], "measured before"
    big = load_data({"kind": "object", "object": DATA, "image_size": 32}).split("test")
    x = big.batch(range(60))
    accuracy = float((logits(result.student, x).argmax(1) == x.labels).float().mean())
    assert result.metrics["fix/test/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_the_fix_stage_asks_several_teachers_as_the_stages_before_do(tmp_path):
    """A teacher of weight 0 teaches nothing there either."""
    other = Teacher()
    with torch.no_grad():
        other.head.weight.mul_(-1)
    fields = {"fix": {"image_size": 32, "epochs": 2, "lr": 0.1}, "epochs": 1, "teacher_bn": "running"}
    one = trained(**fields, out=tmp_path / "one")
    both = trained(**fields, teacher=[Teacher(), other], teacher_weights=[1, 0], out=tmp_path / "both")
    for mine, theirs in zip(both.student.parameters(), one.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_labels_the_agreement_is_with_the_teacher_and_not_with_what_is_stored_of_it(tmp_path):
    write_images(tmp_path / "images", pictures(100, 5)[0])
    fields = {"data": f"folder:{tmp_path / 'images'}", "epochs": 2, "teacher_bn": "running"}
    plain = trained(**fields, out=tmp_path / "plain")
    stored = trained(**fields, cache_teacher=True, out=tmp_path / "stored")
    assert stored.metrics["validation/agreement"] == plain.metrics["validation/agreement"]


def test_stages_of_the_network_have_rates_of_their_own(tmp_path):
    """The backbone that comes out, fine-tuned on other data: small rates at the stem, whole ones at the classifier."""
    fields = {"data": DATA, "model": {"kind": "cnn", "channels": [4, 4, 4]}, "epochs": 1, "batch_size": 12}
    optimizer = {**SGD, "schedule": "linear"}
    settings = {**SETTINGS, "log_every": 1}
    place = tmp_path / "run"
    sh.distil("supervised", **fields, optimizer=optimizer, stage_rates=[0.1, 0.5], settings=settings, out=place)
    found = rates(place, "model")
    groups = {key.rpartition("/lr/")[2]: value for key, value in found.items()}
    assert len(groups) == 3
    first = next(v for k, v in groups.items() if k.startswith("model.blocks.0.conv"))
    last = next(v for k, v in groups.items() if "classifier" in k)
    assert first == pytest.approx(0.1 * last)
    whole = {part for group in groups for part in group.split("+")}
    model = ModelSpec.parse(fields["model"]).build(load_data(DATA).facts)
    assert whole == {f"model.{name}" for name, _ in model.named_parameters()}
    with pytest.raises(UserError, match="stage_rates has 5 factors and the network 2 stages"):
        sh.distil("supervised", **fields, stage_rates=[0.1, 0.1, 0.2, 0.2, 0.3])
    student = trained(stage_rates=[0.5], finetune_epochs=0)
    assert student.metrics


def test_the_student_is_a_backbone_for_other_classes(tmp_path):
    first = trained(finetune_epochs=0, out=tmp_path / "run")
    x, y = pictures(60, 7)
    fields = {"data": {"train": (x, y % 2), "test": (x, y % 2)}, "epochs": 1, "batch_size": 12, "settings": SETTINGS}
    model = {"kind": "file", "path": str(tmp_path / "run" / "result" / "student"), "new_head": True}
    rate = {**SGD, "lr": 1e-3}
    result = sh.distil("supervised", **fields, model=model, optimizer=rate, stage_rates=[0.1])
    assert result.model.classifier.out_features == 2
    ours, theirs = result.model.blocks[0].conv.weight, first.student.blocks[0].conv.weight
    assert 0 < float((ours - theirs).norm().detach()) < 0.01
    with pytest.raises(UserError, match=r"new_head: 'blocks.0.conv.weight' has the shape \(4, 3, 3, 3\)"):
        sh.distil("supervised", **{**fields, "data": (x[:, :1], y)}, model=model)


def test_five_groups_of_a_resnet_and_what_is_left_out():
    facts = load_data(
        {"kind": "object", "object": (torch.rand(4, 3, 96, 96), torch.arange(4) % 2), "validation": 0, "test": 0}
    ).facts
    net = ModelSpec.parse("imagenet-resnet:18").build(facts)
    example = {"pixel_values": torch.rand(2, 3, 96, 96)}
    optimizer = SSLD().optimizer
    divided = by_stage({("net", "!net.classifier", "part"): optimizer}, "net", net, example, (0.1, 0.1, 0.2, 0.2, 0.3))
    groups = list(divided.items())
    assert [round(o.lr / optimizer.lr, 6) for _, o in groups] == [0.1, 0.1, 0.2, 0.2, 0.3, 1.0]
    assert all(name.startswith("net.stem") for name in groups[0][0])
    for stage, (names, _) in enumerate(groups[1:5]):
        assert all(name.startswith(f"net.stages.{stage}.") for name in names)
    assert groups[5][0] == ("part",)
    assert sum(len(names) for names, _ in groups[:5]) == len(list(net.parameters())) - 2


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"per_class": 0}, "per_class"),
        ({"weight_ce": 0.1}, "no label enters the loss of ssld"),
        ({"also": ["kd"]}, "'kd' cannot stand beside it"),
        ({"batch_size": 1}, "one sample has no batch statistics"),
        ({"cache_teacher": True}, "depends on its batch; use running"),
        ({"epochs": 0}, "whose weights stage 2 fine-tunes, and the student 'cnn' has none"),
        ({"epochs": 0, "finetune_epochs": 0}, "both stages are skipped"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(1728, 4))}, "3 classes but teacher_logits has 4"),
        (
            {"fix": {"image_size": 32}, "student": {"kind": "convnet", "depth": 2, "width": 4}},
            "does not take images of 32 x 32",
        ),
        ({"pool": (torch.rand(6, 5),), "duplicates": False}, "need the same inputs"),
        ({"divergence": "jefreys"}, "divergence"),
        ({"duplicates": {"hash_distanc": 3}}, "hash_distanc"),
        ({"pool": "nothing"}, "there is no data set 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        trained(**fields)
    assert "\n" not in str(caught.value)


def test_an_empty_pool_and_a_missing_evaluation_set():
    with pytest.raises(UserError, match=r"pool: none of 60 images is left: 60 are near-duplicates"):
        trained(pool=pool_of(TEST[0]), duplicates={"embedding": "pixels"})
    alone = {"kind": "object", "object": TRAIN, "validation": 0, "test": 0}
    pool = pool_of(pictures(20, 3)[0])
    with pytest.raises(UserError, match="has no validation or test images to take near-duplicates of"):
        trained(data=alone, pool=pool)
    with pytest.raises(UserError, match="ssld compares distributions over classes"):
        trained(data=(TRAIN[0], TRAIN[1] + 0.5))


def test_what_ships_is_the_student(tmp_path):
    result = trained(out=tmp_path / "run")
    again = load(tmp_path / "run" / "result" / "student")
    assert fingerprint(again) == fingerprint(result.student)
    assert list(result.artefacts) == ["student"]

"""A distilled set is judged against random images under the same labels and augmentation, on fresh networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stillhouse as sh
from stillhouse.bench.evaluating import DatasetEvaluation, evaluation_recipe
from stillhouse.data import load_data
from stillhouse.data.export import Card, save_distilled_set
from stillhouse.engine import Interrupted, Run, RunDirectory, Signals, Silent
from stillhouse.errors import UserError
from stillhouse.methods.datasets.scoring import Scoring
from stillhouse.modules.distilled import DistilledSet

NET = {"kind": "convnet", "width": 4, "depth": 2}
FEW = {"eval_epochs": 4, "full_epochs": 0.2, "settings": {"threads": 1, "device": "cpu"}, "seeds": 2}


def write(place, *, per_class=1, **fields):
    """Real images of the digits, exported with a card."""
    data = load_data("digits")
    split = data.split("train")
    chosen = torch.cat([members[:per_class] for members in split.by_class().values()])
    batch = split.batch(chosen)
    labels = fields.pop("labels", batch["labels"])
    scale = data.scale
    found = DistilledSet(batch["pixel_values"], labels, num_classes=10, mean=scale.mean, std=scale.std, **fields)
    protocol = {"network": NET, "epochs": 4, "batch_size": 5, "augment": {"strategy": "crop_scale"}}
    save_distilled_set(found, place, Card("dm", "digits", 0, protocol))
    return place


@pytest.fixture
def asked(monkeypatch):
    """What is trained, by the name of its comparison."""
    seen = {}
    original = Scoring.trained

    def trained(self, run, name, trainings, **keywords):
        seen[name] = trainings
        return original(self, run, name, trainings, **keywords)

    monkeypatch.setattr(Scoring, "trained", trained)
    return seen


def test_every_number_comes_from_its_comparison(tmp_path, asked):
    place = write(tmp_path / "set", per_class=2)
    found = sh.evaluate_dataset(place, models=[NET, "cnn:4-4"], budgets=[0.5], out=tmp_path / "run", **FEW)
    m = found.metrics
    for key in ("", "0-cnn/"):
        distilled, random = m[f"test/distilled/{key}accuracy"], m[f"test/random/{key}accuracy"]
        suffix = f"/{key}".rstrip("/")
        assert m[f"test/improvement_over_random{suffix}"] == pytest.approx(distilled - random)
        full, hard = m[f"test/full/{key}accuracy"], m[f"test/hard/{key}accuracy"]
        assert m[f"test/hard_label_recovery_gap{suffix}"] == pytest.approx(full - hard)
        assert hard == distilled, "the labels are hard"
        assert 0 < m[f"test/label_robust_score{suffix}"] < 1
        assert 0 < m[f"test/augmentation_robust_score{suffix}"] < 1
    assert m["test/accuracy"] == m["test/distilled/accuracy"]
    assert set(asked) == {"first", "0-cnn", "after-2"}
    assert set(asked["first"]) == {"distilled", "random", "distilled-plain", "random-plain"}
    for name, several in asked["first"].items():
        assert len(several) == 2
        assert all(one.epochs == 4 for one in several)
        assert all(bool(one.augment.operations) is not name.endswith("plain") for one in several)
    assert all(one.epochs == 2 for several in asked["after-2"].values() for one in several)
    curve = found.tables[-1].rows
    assert [row[1] for row in curve] == [20 * 2, 20 * 4, round(1079 * 0.2)]
    page = (tmp_path / "run" / "metrics.json").read_text()
    assert json.loads(page) == m


def test_random_images_are_real_ones_as_many_of_each_class_and_new_for_each_seed(tmp_path, asked):
    sh.evaluate_dataset(write(tmp_path / "set", per_class=3), out=tmp_path / "run", **FEW)
    draws = [one.tensors for one in asked["first"]["random"]]
    real = load_data("digits").split("train")
    for tensors in draws:
        assert tensors["labels"].tolist() == [label for label in range(10) for _ in range(3)]
        same = (tensors["pixel_values"][:, None] == real.tensors["pixel_values"]).flatten(2).all(2)
        assert bool(same.any(1).all())
        assert torch.equal(real.labels[same.int().argmax(1)], tensors["labels"])
    assert not torch.equal(draws[0]["pixel_values"], draws[1]["pixel_values"])
    assert torch.equal(asked["first"]["random-plain"][0].tensors["labels"], draws[0]["labels"])


def test_soft_labels_are_given_to_random_images_too_and_taken_from_the_set_for_its_gap(tmp_path, asked):
    values = torch.randn(10, 10)
    fields = {"labels": values, "target": "logits", "classes": torch.arange(10), "lr": 0.05}
    found = sh.evaluate_dataset(write(tmp_path / "set", **fields), out=tmp_path / "run", **FEW)
    first = asked["first"]
    torch.testing.assert_close(first["distilled"][0].tensors["labels"], values.softmax(1))
    assert first["hard"][0].tensors["labels"].tolist() == values.argmax(1).tolist()
    for one in first["random"]:
        soft = one.tensors["labels"]
        assert soft.shape == (10, 10)
        torch.testing.assert_close(soft.sum(1), torch.ones(10))
        assert 0 < soft.max() < 1
    assert all(one.optimizer.lr == pytest.approx(0.05) for several in first.values() for one in several)
    assert any("learned rate 0.05" in note for note in found.notes)


def test_rates_are_chosen_for_each_set_on_the_validation_split(tmp_path, asked, monkeypatch):
    from stillhouse.bench import evaluating

    reached = {0.001: 0.1, 0.01: 0.7, 0.1: 0.7}
    original = evaluating.DatasetEvaluation.trained

    def trained(self, run, name, trainings, *, on="test"):
        found = yield from original(self, run, name, trainings, on=on)
        if name.startswith("rate"):
            assert on == "validation"
            return {key: [reached[round(several[0].optimizer.lr, 6)]] for key, several in trainings.items()}
        return found

    monkeypatch.setattr(evaluating.DatasetEvaluation, "trained", trained)
    sh.evaluate_dataset(write(tmp_path / "set"), rates=list(reached), budgets=[], out=tmp_path / "run", **FEW)
    assert {"rate-distilled", "rate-random"} <= set(asked)
    assert all(one.optimizer.lr == pytest.approx(0.01) for several in asked["first"].values() for one in several)


def test_without_augmentation_nothing_is_trained_twice(tmp_path, asked):
    found = sh.evaluate_dataset(write(tmp_path / "set"), augment="none", budgets=[], out=tmp_path / "run", **FEW)
    assert set(asked["first"]) == {"distilled", "random"}
    m = found.metrics
    assert m["test/distilled-plain/accuracy"] == m["test/distilled/accuracy"]


def test_the_card_is_the_protocol_and_what_is_given_wins(tmp_path):
    place = write(tmp_path / "set")
    told = evaluation_recipe(place).method
    assert (told.data.kind, told.eval_epochs, told.eval_batch_size, told.network.width) == ("digits", 4, 5, 4)
    assert told.augment.operations == ("crop", "scale")
    given = evaluation_recipe(place, data="mnist", models=["cnn", "vit"], seeds=3, overrides=["eval_epochs=7"]).method
    assert (given.data.kind, given.network.kind, given.eval_architectures[0].kind) == ("mnist", "cnn", "vit")
    assert (given.eval_networks, given.eval_epochs) == (3, 7)


class StopAt(Silent):
    def __init__(self, signals, stage):
        self.signals, self.wanted = signals, stage

    def stage(self, name, steps, done):
        self.signals.stop = self.wanted in name


def test_an_evaluation_that_is_stopped_goes_on_and_one_that_ended_stays(tmp_path):
    place = write(tmp_path / "set")
    straight = sh.evaluate_dataset(place, budgets=[], out=tmp_path / "a", **FEW).metrics
    signals = Signals()
    listener = StopAt(signals, "score/first-random-1")
    with pytest.raises(Interrupted):
        sh.evaluate_dataset(place, budgets=[], out=tmp_path / "b", signals=signals, listener=listener, **FEW)
    assert sh.evaluate_dataset(place, budgets=[], out=tmp_path / "b", **FEW).metrics == straight
    assert sh.evaluate_dataset(place, budgets=[], out=tmp_path / "b", **FEW).metrics == straight
    write(place, per_class=2)
    with pytest.raises(UserError, match=r"was .* when this run was started"):
        sh.evaluate_dataset(place, budgets=[], out=tmp_path / "b", **FEW)


def too_many(place):
    images = torch.rand(30, 1, 8, 8)
    labels = torch.arange(30) % 10
    return {"data": {"train": (images, labels), "test": (images, labels)}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: {"data": "nowhere"}, "there is no data set 'nowhere'"),
        (lambda p: {"eval_epochs": 0}, "eval_epochs: expected at least 1"),
        (lambda p: {"models": ["convnett"]}, "network: .*did you mean 'convnet'"),
        (lambda p: {"models": [{"kind": "vit", "patch": 3}]}, "patches of 3 pixels"),
        (lambda p: {"depth": 3}, "depth: there is no such field"),
        (too_many, "has 5 images of class 0, more than the 2 training images"),
    ],
)
def test_bad_input_gives_one_sentence(change, sentence, tmp_path):
    place = write(tmp_path / "set", per_class=5)
    with pytest.raises(UserError, match=sentence) as caught:
        sh.evaluate_dataset(place, **{**FEW, "out": tmp_path / "run", **change(place)})
    assert "\n" not in str(caught.value)


def test_a_folder_that_says_nothing_needs_the_name_of_its_data(tmp_path):
    place = write(tmp_path / "set")
    with pytest.raises(UserError, match="does not say which data set it stands for"):
        sh.evaluate_dataset(place / "images", out=tmp_path / "run")
    found = sh.evaluate_dataset(place / "images", data="digits", network=NET, budgets=[], out=tmp_path / "run", **FEW)
    assert 0 <= found.metrics["test/accuracy"] <= 1


def test_sets_and_data_without_what_a_comparison_needs_are_refused(tmp_path):
    place = write(tmp_path / "set")
    data = load_data("digits")
    for missing, fields, sentence in (("test", {}, "has none"), ("validation", {"rates": (0.1,)}, "has none")):
        method = DatasetEvaluation(directory=str(place), network=NET, **fields)
        splits = {name: split for name, split in data.splits.items() if name != missing}
        part = type(data)(data.name, data.facts, splits, data.fingerprint, data.scale)
        with pytest.raises(UserError, match=sentence):
            Run(method, RunDirectory(tmp_path / missing), data=part).execute()


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "stillhouse", "evaluate-dataset", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
    )


def test_the_command_prints_tables_json_and_a_page(tmp_path):
    write(tmp_path / "set")
    few = [
        "eval_epochs=2",
        "full_epochs=0.1",
        "run.threads=1",
        "budgets=[]",
        "network={kind: convnet, width: 4, depth: 2}",
    ]
    done = command("set", *few, "--seeds", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["test/label_robust_score"] <= 1
    for word in ("distilled", "random", "label-robust", "Cost curve", "report:"):
        assert word in done.stderr
    [home] = (tmp_path / "runs" / "evaluate-dataset").iterdir()
    assert (home / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--data", "digits"], "error: There is no directory nowhere."),
        (["set", "--models", "cnn,,vit"], "names nothing between two commas"),
        (["set", "--seeds", "0"], "0 is not in the range"),
    ],
)
def test_the_command_refuses_with_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path):
    write(tmp_path / "set")
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr
    assert not list(Path(tmp_path).glob("runs/*/*"))

"""Recipes: overrides by type, sentences with key paths, resolved dumps that read back equal."""

import pytest

from stillhouse.errors import UserError
from stillhouse.recipe import build_recipe, load_recipe


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_yaml_1_2_numbers_and_words(tmp_path):
    recipe = load_recipe(write(tmp_path, "method: kd\noptimizer: {lr: 1e-3}\naugment: none\ndivergence: js\n"))
    assert recipe.method.optimizer.lr == 1e-3
    assert recipe.method.augment.kind == "none"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("temperature=3", lambda r: r.method.temperature == 3.0),
        ("optimizer.lr=1e-2", lambda r: r.method.optimizer.lr == 1e-2),
        ("optimizer.name=sgd", lambda r: r.method.optimizer.name == "sgd"),
        ("student=mlp", lambda r: r.method.student.kind == "mlp"),
        ("student.channels=[4, 8]", lambda r: r.method.student.channels == (4, 8)),
        ("student.kind=mlp", lambda r: r.method.student.kind == "mlp"),
        ("teacher.model.channels=[8]", lambda r: r.method.teacher.model.channels == (8,)),
        ("teacher.epochs=3", lambda r: r.method.teacher.epochs == 3),
        ("run.log_every=7", lambda r: r.settings.log_every == 7),
        ("seed=5", lambda r: r.seed == 5),
        ("patience=null", lambda r: r.method.patience is None),
        ("weight_soft={start: 1.0, end: 0.0}", lambda r: r.method.weight_soft.at(0.5) == 0.5),
        ("augment=crop-flip", lambda r: r.method.augment.kind == "crop-flip"),
        ("data.train_size=100", lambda r: r.method.data.train_size == 100),
    ],
)
def test_overrides_are_read_by_the_type_of_their_field(override, read):
    assert read(load_recipe("kd", [override]))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["temprature=3"], "temprature: there is no such field; did you mean 'temperature'?"),
        (["temperature=-1"], "temperature: expected more than 0, not -1"),
        (["temperature=.inf"], "temperature: expected a finite number, not inf"),
        (["student.chanels=[1]"], "student.chanels: there is no such field; did you mean 'channels'?"),
        (["student=cn"], "there is no model 'cn'; did you mean 'cnn'?"),
        (["student=resnt:20"], "there is no model 'resnt:20'; did you mean 'resnet'?"),
        (["student.channels=[0]"], "student.channels.0: expected at least 1, not 0"),
        (["optimizer.name=sdg"], "optimizer.name: expected 'sgd', 'adam' or 'adamw', not 'sdg'"),
        (["run.device=gpu"], "run.device: expected 'auto', 'cpu', 'cuda' or 'mps', not 'gpu'"),
        (["temperature"], "'temperature' is no override; write key=value"),
        (["weight_ce=true"], "weight_ce: a weight is a number or a schedule, not yes or no"),
        (["epochs.x=1"], "epochs.x: 'epochs' has no fields of its own"),
        (["weight_ce=-1"], "weight_ce: a weight is 0 or more, not -1"),
        (["method=sinkd"], "a recipe belongs to its method"),
        (["=4"], "'=4' is no override; write key=value"),
        (["student.channels=x"], "student.channels: expected a list of whole numbers, not 'x'"),
        (["student.channels={a: 1}"], "student.channels: expected a list of whole numbers, not {'a': 1}"),
        (["student.channels=[]"], "student.channels: expected at least 1 items, not []"),
        (["epochs=[1]"], "epochs: expected a number, not [1]"),
        (["batch_size=x"], "batch_size: expected a whole number, not 'x'"),
        (["batch_size=1.5"], "batch_size: expected a whole number, not 1.5"),
        (["optimizer.nesterov=maybe"], "optimizer.nesterov: expected true or false, not 'maybe'"),
        (["optimizer.momentum=1"], "optimizer.momentum: expected less than 1, not 1"),
        (["optimizer=[1]"], "optimizer: expected a mapping with fields such as 'name', 'lr', 'weight_decay', not [1]"),
        (["optimizer.milestones=[a]"], "optimizer.milestones.0: expected a number, not 'a'"),
        (["STUDENT=cnn"], "STUDENT: there is no such field"),
        (["student=no.such.module:"], "expected an import path such as 'package.module:Name'"),
        (["epochs=&r [*r]"], "epochs: this holds more than 100,000 values, or a list or mapping that holds itself"),
        (["epochs=2001-12-14"], "epochs: a date stands where only text, numbers, lists and mappings may"),
        (["a\nb=1"], "a b: there is no such field"),
    ],
)
def test_a_mistake_in_an_override_gives_one_sentence_that_does_not_blame_the_file(overrides, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe("kd", overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "small.yaml" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("method: kdd\n", "there is no method 'kdd'; did you mean 'kd'?"),
        ("temperature: 3\n", "a recipe is a mapping with the key 'method'"),
        ("method: [\n", "this is not valid YAML (line 2)"),
        ("method: kd\ntemperatur: 3\n", "r.yaml: temperatur: there is no such field; did you mean 'temperature'?"),
        (
            "method: kd\nteacher: {kind: trained, epoch: 3}\n",
            "teacher.epoch: there is no such field; did you mean 'epochs'?",
        ),
        ("method: kd\nteacher: {kind: cn}\n", "there is no model kind 'cn'; did you mean 'cnn'?"),
        ("method: dmd2\nteacher: {kind: [x]}\n", "r.yaml: teacher: there is no model kind ['x']"),
        ("method: kd\nSTUDENT: 3\n", "r.yaml: STUDENT: there is no such field"),
        ("method: kd\nnew: " + "[" * 150 + "]" * 150, "r.yaml: this is nested more than 100 levels deep"),
        ("method: kd\nnew: " + "[" * 1000, "r.yaml: this is nested more than 100 levels deep"),
        (
            "method: kd\nnew: &r [*r]\n",
            "r.yaml: this holds more than 100,000 values, or a list or mapping that holds itself",
        ),
        ("method: kd\nnew: 2001-12-14\n", "r.yaml: a date stands where only text, numbers, lists and mappings may"),
        ("method: kd\nnew: !!set {a, b}\n", "r.yaml: a set stands where only text, numbers, lists and mappings may"),
        ('method: kd\nnew: "\\ud800"\n', "r.yaml: '\\ud800' holds half of a character"),
        (f"method: kd\nepochs: {'9' * 5000}\n", "r.yaml: Exceeds the limit"),
        (
            "method: kd\n\x0e: 1\n",
            "r.yaml: this is not valid YAML: unacceptable character #x000e: special characters are not allowed.",
        ),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)


def test_aliases_that_multiply_are_not_followed(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    with pytest.raises(UserError, match="this holds more than 100,000 values"):
        load_recipe(write(tmp_path, f"{bomb}method: kd\nstudent: *a29\n"))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"r\.yaml: a recipe is UTF-8 text, which this file is not\."):
        load_recipe(tmp_path / "r.yaml")


def test_python_tags_are_not_executed(tmp_path):
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(write(tmp_path, "method: !!python/object/apply:os.system ['true']\n"))


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("sinkd", ["weight_kd={start: 1.0, end: 0.5}", "student=mlp"], seed=4)
    recipe.write(tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.dump() == recipe.dump()
    assert again.method == recipe.method


def test_missing_names_and_scales():
    with pytest.raises(UserError, match="did you mean 'sinkd'"):
        load_recipe("sinkdd")
    with pytest.raises(UserError, match="has no recipe 'smal'"):
        load_recipe("sinkd/smal")
    with pytest.raises(UserError, match="there is no recipe file"):
        load_recipe("nowhere.yaml")


def test_objects_in_place_of_specs():
    from torch import nn

    net = nn.Linear(2, 2)
    recipe = build_recipe({"method": "kd", "student": net})
    assert recipe.method.student.kind == "object"
    with pytest.raises(UserError, match="passed"):
        build_recipe({"method": "kd", "student": recipe.method.student.dump()})

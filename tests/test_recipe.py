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
        (["temperature=-1"], "temperature: input should be greater than 0, not -1"),
        (["temperature=.inf"], "temperature: input should be a finite number, not inf"),
        (["student.chanels=[1]"], "student.chanels: there is no such field; did you mean 'channels'?"),
        (["student=cn"], "there is no model 'cn'; did you mean 'cnn'?"),
        (["student=resnt:20"], "there is no model 'resnt:20'; did you mean 'resnet'?"),
        (["student.channels=[0]"], "student.channels.0: input should be greater than or equal to 1, not 0"),
        (["optimizer.name=sdg"], "optimizer.name: input should be 'sgd', 'adam' or 'adamw', not 'sdg'"),
        (["run.device=gpu"], "run.device: input should be 'auto', 'cpu', 'cuda' or 'mps', not 'gpu'"),
        (["temperature"], "'temperature' is no override; write key=value"),
        (["weight_ce=true"], "weight_ce: a weight is a number or a schedule, not yes or no"),
        (["epochs.x=1"], "epochs.x: 'epochs' has no fields of its own"),
        (["weight_ce=-1"], "weight_ce: a weight is 0 or more, not -1"),
        (["method=sinkd"], "a recipe belongs to its method"),
        (["=4"], "'=4' is no override; write key=value"),
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
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)


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

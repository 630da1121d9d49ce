"""Arms differ in what belongs to their method alone; what is always compared with is there; mistakes are one sentence."""

import pytest
import torch

from stillhouse.bench.arms import PLAIN, arrange, baseline_of, shared
from stillhouse.bench.comparison import default_out
from stillhouse.engine import Method
from stillhouse.errors import UserError
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.language.sinkd import SinKD
from stillhouse.methods.supervised import TrainingFields
from stillhouse.recipe import load_recipe


def by_name(arms):
    return {arm.name: arm.recipe.method for arm in arms}


def test_the_first_recipe_gives_what_methods_share():
    arms = arrange(["kd", "sinkd"], ["epochs=7"])
    methods = by_name(arms)
    assert list(methods) == ["kd", "sinkd", PLAIN]
    for field in ("data", "teacher", "student", "optimizer", "batch_size", "augment", "keep"):
        assert (
            getattr(methods["sinkd"], field)
            == getattr(methods["kd"], field)
            == getattr(load_recipe("kd").method, field)
        )
    assert methods["sinkd"].epochs == methods["kd"].epochs == methods[PLAIN].epochs == 7
    assert arms[1].set_aside == ("optimizer",)


def test_what_is_learned_stays_each_methods_own():
    methods = by_name(arrange(["kd", "sinkd"]))
    own = load_recipe("sinkd").method
    for field in ("temperature", "weight_ce", "weight_kd", "weight_sinkhorn", "reduction"):
        assert getattr(methods["sinkd"], field) == getattr(own, field)
    assert methods["kd"].weight_ce == load_recipe("kd").method.weight_ce
    assert "also" not in shared(KD, SinKD)
    assert set(TrainingFields.model_fields) | {"teacher", "student"} <= set(shared(KD, SinKD))


def test_the_order_decides_whose_fields_are_shared():
    methods = by_name(arrange(["sinkd", "kd"]))
    assert methods["kd"].optimizer == load_recipe("sinkd").method.optimizer
    assert methods[PLAIN].optimizer == load_recipe("sinkd").method.optimizer


def test_a_field_may_stay_each_arms_own():
    arms = arrange(["kd", "sinkd"], own=["optimizer"])
    assert by_name(arms)["sinkd"].optimizer == load_recipe("sinkd").method.optimizer
    assert arms[1].set_aside == ()


def test_the_plain_student_is_the_same_network_trained_alike_on_labels():
    methods = by_name(arrange(["kd"], ["student.channels=[4, 8]", "batch_size=32"]))
    plain = methods[PLAIN]
    assert plain.name == "supervised"
    assert plain.model == methods["kd"].student
    for field in TrainingFields.model_fields:
        assert getattr(plain, field) == getattr(methods["kd"], field)
    assert not methods["kd"].compare_alone


def test_an_arm_that_is_the_line_already_is_not_added_twice():
    arms = arrange(["kd", "supervised"])
    assert [arm.name for arm in arms] == ["kd", "supervised"]
    assert baseline_of(arms) == "supervised"
    assert [arm.name for arm in arrange(["random-selection", "herding"])] == ["random-selection", "herding"]


def test_training_sets_are_compared_with_random_images():
    arms = arrange(["datadam", "herding"], ["images_per_class=2"])
    assert [arm.name for arm in arms] == ["datadam", "herding", "random-selection"]
    assert {method.images_per_class for method in by_name(arms).values()} == {2}
    assert baseline_of(arms) == "random-selection"


def test_others_are_compared_with_the_first_or_the_named_one():
    arms = arrange(["qlae", "beta-tcvae", "autoencoder"])
    assert [arm.name for arm in arms] == ["qlae", "beta-tcvae", "autoencoder"]
    assert baseline_of(arms) == "qlae"
    assert baseline_of(arms, "autoencoder") == "autoencoder"
    with pytest.raises(UserError, match="did you mean 'qlae'"):
        baseline_of(arms, "qla")


def test_an_override_goes_to_every_method_that_has_the_field(tmp_path):
    methods = by_name(arrange(["kd", "sinkd"], ["temperature=3", "epsilon=0.2", "run.threads=2"]))
    assert methods["kd"].temperature == methods["sinkd"].temperature == 3
    assert methods["sinkd"].epsilon == 0.2
    assert {arm.recipe.settings.threads for arm in arrange(["kd", "sinkd"], ["run.threads=2"])} == {2}


def test_python_values_go_to_all_as_well():
    teacher, data = torch.nn.Linear(6, 2), (torch.randn(60, 6), torch.arange(60) % 2)
    methods = by_name(
        arrange(["kd", "sinkd"], fields={"teacher": teacher, "data": data, "student": torch.nn.Linear(6, 2)})
    )
    assert methods["sinkd"].teacher == methods["kd"].teacher
    assert {method.data.fingerprint for method in methods.values()} == {methods["kd"].data.fingerprint}


def test_recipe_files_of_one_method_differ_in_what_is_its_own(tmp_path):
    (tmp_path / "cold.yaml").write_text("method: kd\ntemperature: 1\nepochs: 5\n")
    (tmp_path / "hot.yaml").write_text("method: kd\ntemperature: 9\nepochs: 6\n")
    arms = arrange([str(tmp_path / "cold.yaml"), str(tmp_path / "hot.yaml")])
    assert [arm.name for arm in arms] == ["cold", "hot", PLAIN]
    assert [arm.recipe.method.temperature for arm in arms[:2]] == [1, 9]
    assert {arm.recipe.method.epochs for arm in arms} == {5}
    assert arms[1].set_aside == ("epochs",)


@pytest.mark.parametrize(
    ("sources", "overrides", "sentence"),
    [
        (["kd", "sinkdd"], [], "did you mean 'sinkd'?"),
        (["kd", "sinkd"], ["temprature=3"], "none of the methods has such a field; did you mean 'temperature'?"),
        (["kd", "sinkd"], ["epsilon=0"], "epsilon: "),
        (["kd", "sinkd"], ["seed=3"], "choose their number with --seeds"),
        (["kd", "sinkd"], ["method=kd"], "a recipe belongs to its method"),
        (["kd", "kd"], [], "'kd' is named twice"),
        (["kd", "qlae"], [], "have nothing in common but the data"),
        (["nowhere.yaml"], [], "there is no recipe file 'nowhere.yaml'"),
    ],
)
def test_mistakes_are_one_sentence(sources, overrides, sentence):
    with pytest.raises(UserError) as error:
        arrange(sources, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_fields_in_python_are_named():
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        arrange(["kd"], fields={"epoch": 3})


def test_the_directory_follows_from_the_arms():
    assert default_out(arrange(["kd", "sinkd"])) == default_out(arrange(["kd", "sinkd"]))
    assert default_out(arrange(["kd", "sinkd"])) != default_out(arrange(["kd", "sinkd"], ["epochs=1"]))


def test_bases_are_no_methods():
    class Warm(KD):
        name = "warm"

    assert "temperature" not in shared(KD, Warm)
    assert set(shared(KD, Method)) == {"data"}

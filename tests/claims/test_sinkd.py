"""The two parts of SinKD's claim differ only in what is compared."""

import pytest
import torch

from stillhouse.claims.sinkd import claim
from stillhouse.facts import Facts
from stillhouse.models import count_parameters, logits
from stillhouse.recipe import build_recipe

TEXT = [arm for arm in claim.arms if arm.startswith("text-")]
REQUESTS = Facts({"input_ids": (20,), "attention_mask": (20,)}, 150, vocabulary_size=5076)


def method(arm):
    return build_recipe(claim.values(arm)).method


def test_the_arms_of_text():
    assert set(TEXT) == {"text-sinkd", "text-kl", "text-reverse-kl", "text-js", "text-labels-only"}


@pytest.mark.parametrize("arm", TEXT)
def test_the_models_of_a_text_arm_can_be_built(arm):
    found = method(arm)
    teacher, student = found.teacher.model.build(REQUESTS), found.student.build(REQUESTS)
    batch = {"input_ids": torch.randint(1, 5076, (2, 20)), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    for model, layers, width in ((teacher, 4, 128), (student, 1, 64)):
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, width)
        assert model.config.vocab_size == 5076
        assert logits(model, batch).shape == (2, 150)
    assert count_parameters(student) < count_parameters(teacher) / 3


@pytest.mark.parametrize("arm", TEXT)
def test_text_arms_share_everything_but_the_loss(arm):
    loss = {"divergence", "weight_ce", "weight_kd", "weight_sinkhorn"}
    own, other = (
        {k: v for k, v in build_recipe(claim.values(name)).dump().items() if k not in loss} for name in (arm, TEXT[0])
    )
    assert own == other
    assert own["data"]["train_size"] == 3000
    assert own["teacher"]["data"] == {**own["data"], "train_size": None}
    assert own["optimizer"]["momentum"] == 0
    assert own["run"]["threads"] == 1


def test_kl_and_sinkd_differ_by_the_term_alone():
    """The soft cross-entropy and KL differ by the teacher's entropy, which has no gradient."""
    ours, theirs = method("text-sinkd"), method("text-kl")
    assert (ours.divergence, theirs.divergence) == ("soft_cross_entropy", "kl")
    assert (ours.weight_sinkhorn, theirs.weight_sinkhorn) == (1, 0)
    assert (ours.weight_ce, ours.weight_kd) == (theirs.weight_ce, theirs.weight_kd)


def test_the_arms_of_images_are_on_images():
    for arm in set(claim.arms) - set(TEXT):
        assert method(arm).data.kind == method(arm).teacher.data.kind == "fashion-mnist"

"""The joint head: what it starts from, what it ships, and that it is never read with other transformations."""

import json

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.modules.joint_head import JointHead
from stillhouse.modules.views import Views


def test_view_0_starts_as_the_classifier_and_can_become_it_again():
    single = nn.Linear(5, 3)
    head = JointHead(5, 3, Views.parse("rotation"), single)
    x = torch.randn(4, 5)
    assert head(x).shape == (4, 12)
    torch.testing.assert_close(head(x)[:, ::4], single(x))
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    head.write_first_view(single)
    torch.testing.assert_close(head(x)[:, ::4], single(x))
    alone = JointHead(5, 3, Views.parse({"kind": "rotation", "turns": [0]}), single)
    assert torch.equal(alone(x), single(x))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_stored_with_its_transformations(bias, tmp_path):
    views = Views.parse("rotation*colors:cyclic")
    head = JointHead(5, 3, views, nn.Linear(5, 3, bias=bias))
    head.save(tmp_path)
    x = torch.randn(4, 5)
    for again in (JointHead.load(tmp_path), JointHead.load(tmp_path, views)):
        assert torch.equal(again(x), head(x))
        assert again.views.dump() == views.dump()
    with pytest.raises(UserError, match=r"was trained with the transformations .*product.*, not .*rotation"):
        JointHead.load(tmp_path, Views.parse("rotation"))


def test_what_is_no_joint_head(tmp_path):
    with pytest.raises(UserError, match="holds no joint head that can be read"):
        JointHead.load(tmp_path)
    JointHead(5, 3, Views.parse("rotation")).save(tmp_path)
    told = json.loads((tmp_path / "joint.json").read_text())
    (tmp_path / "joint.json").write_text(json.dumps({**told, "num_classes": 4}))
    with pytest.raises(UserError, match="has 12 outputs, and 4 classes in 4 views are 16"):
        JointHead.load(tmp_path)

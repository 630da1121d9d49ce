"""Models on disk: what is saved comes back, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, fingerprint, load, load_weights, origin, save

FACTS = Facts({"pixel_values": (1, 8, 8)}, 3, class_names=("a", "b", "c"))
CONVNET = {"kind": "convnet", "width": 4, "norm": "batch"}


class Tied(nn.Module):
    """A head tied to an embedding, a buffer that is a view of a parameter's memory, a scalar and nothing."""

    def __init__(self, size: int = 5):
        super().__init__()
        self.embedding = nn.Embedding(size, 3)
        self.head = nn.Linear(3, size, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("row", self.embedding.weight.detach()[0])
        self.register_buffer("scalar", torch.tensor(2))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("nothing_either", torch.zeros(0))

    def forward(self, x):
        return self.head(self.embedding(x))


def convnet():
    model = ModelSpec.parse(CONVNET).build(FACTS)
    model(torch.randn(4, 1, 8, 8))
    return model


def test_a_built_model_remembers_how_and_comes_back(tmp_path):
    model = convnet()
    assert save(model, tmp_path / "model") == tmp_path / "model"
    back = load(tmp_path / "model")
    assert fingerprint(back) == fingerprint(model)
    assert not back.training
    assert type(back) is type(model)
    assert origin(back) == origin(model) == (ModelSpec.parse(CONVNET), FACTS)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_the_spec_and_facts_that_are_given_go_first(tmp_path):
    model = convnet()
    facts = Facts({"pixel_values": (1, 8, 8)}, 3)
    save(model, tmp_path, facts=facts)
    assert origin(load(tmp_path)) == (ModelSpec.parse(CONVNET), facts)
    save(model, tmp_path, {**CONVNET, "activation": "gelu"})
    assert type(load(tmp_path).blocks[0].activation) is nn.GELU


def test_the_file_kind_builds_it_whatever_the_data(tmp_path):
    model = convnet()
    save(model, tmp_path)
    spec = ModelSpec.parse(f"file:{tmp_path}")
    other = Facts({"pixel_values": (3, 32, 32)}, 10)
    assert fingerprint(spec.build(other)) == fingerprint(model)
    assert ModelSpec.parse(spec.dump()) == spec


def test_a_loaded_model_can_be_saved_over_itself_and_elsewhere(tmp_path):
    model = convnet()
    save(model, tmp_path / "a")
    back = ModelSpec.parse(f"file:{tmp_path / 'a'}").build(FACTS)
    save(back, tmp_path / "a")
    save(back, tmp_path / "b")
    for place in "ab":
        assert fingerprint(load(tmp_path / place)) == fingerprint(model)
        assert json.loads((tmp_path / place / "model.json").read_text())["spec"]["kind"] == "convnet"


def test_a_safetensors_file_with_its_description_beside_it(tmp_path):
    model = convnet()
    save(model, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "teacher.safetensors")
    (tmp_path / "model.json").rename(tmp_path / "teacher.json")
    assert fingerprint(load(tmp_path / "teacher.safetensors")) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_data_type_comes_back(tmp_path, dtype):
    model = convnet().to(dtype)
    save(model, tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)
    assert load(tmp_path).blocks[0].norm.num_batches_tracked.dtype == torch.int64


def test_mixed_data_types_come_back(tmp_path):
    model = convnet()
    model.classifier.bfloat16()
    save(model, tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    model = Tied()
    save(model, tmp_path, {"kind": "import", "path": f"{__name__}:Tied", "arguments": {"size": 5}}, FACTS)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {"embedding.weight", "row", "scalar", "nothing", "nothing_either"}
    fresh = Tied()
    assert load_weights(fresh, tmp_path) is fresh
    assert fingerprint(fresh) == fingerprint(model)
    assert fresh.head.weight is fresh.embedding.weight


def test_the_library_of_the_format_reads_it(tmp_path):
    model, other = Tied(), Tied()
    del model.row, other.row
    save(model, tmp_path)
    load_model(other, tmp_path / "model.safetensors")
    assert fingerprint(other) == fingerprint(model)


def test_weights_load_in_place_and_in_the_module_s_own_type(tmp_path):
    save(convnet(), tmp_path)
    model = convnet().double()
    held = model.classifier.weight
    load_weights(model, tmp_path)
    assert model.classifier.weight is held
    assert held.dtype == torch.float64
    assert torch.equal(held.float(), load(tmp_path).classifier.weight)


def test_channels_last_and_slices_are_stored_by_value(tmp_path):
    model = convnet().to(memory_format=torch.channels_last)
    model.classifier.weight = nn.Parameter(torch.randn(8, 4).T[:3, :4])
    save(model, tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


GPT = {
    "model_type": "gpt2",
    "vocab_size": 20,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LANGUAGE = Facts({"input_ids": (4,)}, None, "language")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers_comes_back_and_stays_one(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    model = ModelSpec.parse({"kind": "hf", "config": GPT}).build(LANGUAGE).to(dtype)
    save(model, tmp_path)
    for back in (load(tmp_path), ModelSpec.parse(f"file:{tmp_path}").build(FACTS)):
        assert type(back).__name__ == "GPT2LMHeadModel"
        assert fingerprint(back) == fingerprint(model)
        assert not back.training
        assert back.lm_head.weight is back.transformer.wte.weight
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == fingerprint(model)


def test_a_directory_that_transformers_wrote_itself(tmp_path):
    model = ModelSpec.parse({"kind": "hf", "config": GPT}).build(LANGUAGE)
    model.save_pretrained(tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


def test_a_class_of_one_s_own_over_transformers(tmp_path):
    spec = ModelSpec.parse(f"{__name__}:own_transformer")
    model = spec.build(FACTS)
    save(model, tmp_path)
    back = load(tmp_path)
    assert type(back) is type(model)
    assert fingerprint(back) == fingerprint(model)
    assert origin(back) == (spec, FACTS)
    save(back, tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


def own_transformer():
    from transformers import BertConfig, BertPreTrainedModel

    class OwnTransformer(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.Linear(3, 2)
            self.post_init()

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return _own(OwnTransformer)(BertConfig(vocab_size=20, **sizes))


_OWN = {}


def _own(cls):
    return _OWN.setdefault("class", cls)


def test_a_model_of_diffusers_comes_back(tmp_path):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    save(model, tmp_path)
    back = load(tmp_path)
    assert type(back) is UNet2DModel
    assert fingerprint(back) == fingerprint(model)


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    model = convnet()
    save(model, tmp_path)

    def dies(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("stillhouse.models.storage.save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        save(convnet(), tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


def _damaged(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def _described(**changes):
    def change(path):
        file = path / "model.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "There is no model in"),
        (_damaged, "is not a whole safetensors file"),
        (lambda path: (path / "model.json").unlink(), "does not say how to build the model"),
        (lambda path: (path / "model.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "model.json").write_text("[]"), "should hold a JSON object, not a list."),
        (_described(spec=None), "does not say how to build the model; build it yourself and call"),
        (_described(spec="convnt"), "there is no model 'convnt'; did you mean 'convnet'?"),
        (_described(facts=None), "holds no facts about the data; pass them to load()."),
        (_described(spec={**CONVNET, "width": 8}), "'blocks.0.conv.weight' has the shape (4, 1, 3, 3) in"),
        (_described(spec="mlp:4"), "has no 'blocks.0.linear.weight', which MLP needs; it belongs to another model."),
        (_described(spec={**CONVNET, "norm": "none"}), "has 'blocks.0.norm.bias', which ConvNet has not; it belongs"),
        (_described(spec={"kind": "object", "object": "a.B"}), "runs only with the object passed again."),
    ],
    ids=range(12),
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path, change, message):
    save(convnet(), tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_facts_that_are_passed_serve_where_none_were_stored(tmp_path):
    model = convnet()
    save(model, tmp_path)
    _described(facts=None)(tmp_path)
    assert fingerprint(load(tmp_path, FACTS)) == fingerprint(model)


def test_a_module_of_one_s_own_loads_into_another(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    save(model, tmp_path)
    with pytest.raises(UserError, match="does not say how to build the model"):
        load(tmp_path)
    assert fingerprint(load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path)) == fingerprint(model)


def test_state_that_is_no_tensor_is_named(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"note": "text"}

    with pytest.raises(UserError, match="'_extra_state' of Extra is a dict and not a tensor"):
        save(Extra(2, 2), tmp_path)


def test_a_stored_network_as_a_backbone_with_a_fresh_head(tmp_path):
    facts = Facts(inputs={"pixel_values": (1, 8, 8)}, num_classes=3)
    stored = ModelSpec.parse("cnn:4-6").build(facts)
    save(stored, tmp_path / "net")
    spec = {"kind": "file", "path": str(tmp_path / "net"), "new_head": True}
    other = Facts(inputs={"pixel_values": (1, 12, 12)}, num_classes=5)
    built = ModelSpec.parse(spec).build(other)
    assert built.classifier.out_features == 5
    for name, value in stored.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(built.state_dict()[name], value)
    again = ModelSpec.parse(spec).build(facts)
    assert not torch.equal(again.classifier.weight, stored.classifier.weight), "also where the classes are as many"
    with pytest.raises(UserError, match=r"new_head: 'blocks.0.conv.weight' has the shape"):
        ModelSpec.parse(spec).build(Facts(inputs={"pixel_values": (3, 8, 8)}, num_classes=5))

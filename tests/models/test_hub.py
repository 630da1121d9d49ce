"""Models of transformers, from configs and from directories; nothing is downloaded."""

import dataclasses
import json
import sys

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, fingerprint, logits
from stillhouse.spec import Spec, read


class Recipe(Spec):
    model: ModelSpec


def hf(**fields):
    return read(Recipe, {"model": {"kind": "hf", **fields}}).model


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BERT = {"model_type": "bert", "vocab_size": 20, "max_position_embeddings": 16, **SIZES}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, **SIZES}
GPT = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
GPT = {**GPT, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"model_type": "t5", "vocab_size": 20, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
WAV = {"model_type": "wav2vec2", "vocab_size": 20, "conv_dim": [4], "conv_kernel": [3], "conv_stride": [2], **SIZES}
WAV = {**WAV, "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAV = {**WAV, "feat_extract_norm": "layer"}

TEXT = Facts({"input_ids": (6,), "attention_mask": (6,)}, 3, class_names=("no", "maybe", "yes"))
SCORES = Facts({"input_ids": (6,)}, None, "regression")
LANGUAGE = Facts({"input_ids": (6,)}, None, "language")
UNLABELLED = Facts({"input_ids": (6,)}, None, "unlabelled")
IMAGES = Facts({"pixel_values": (1, 8, 8)}, 5)
SOUND = Facts({"input_values": (400,)}, 4)


@pytest.fixture
def stored(tmp_path):
    """A directory with a pretrained classifier of three classes, in half precision."""
    model = hf(config=BERT).build(TEXT).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


@pytest.mark.parametrize(
    ("config", "task", "facts", "name"),
    [
        (BERT, "auto", TEXT, "BertForSequenceClassification"),
        (BERT, "auto", SCORES, "BertForSequenceClassification"),
        (BERT, "auto", UNLABELLED, "BertModel"),
        (BERT, "base", TEXT, "BertModel"),
        (BERT, "masked-lm", LANGUAGE, "BertForMaskedLM"),
        (BERT, "token-classification", TEXT, "BertForTokenClassification"),
        (GPT, "auto", LANGUAGE, "GPT2LMHeadModel"),
        (GPT, "causal-lm", TEXT, "GPT2LMHeadModel"),
        (GPT, "classification", TEXT, "GPT2ForSequenceClassification"),
        (T5, "auto", LANGUAGE, "T5ForConditionalGeneration"),
        (T5, "seq2seq", TEXT, "T5ForConditionalGeneration"),
        (VIT, "auto", IMAGES, "ViTForImageClassification"),
        (WAV, "auto", SOUND, "Wav2Vec2ForSequenceClassification"),
    ],
)
def test_the_head_follows_the_task_and_the_data(config, task, facts, name):
    model = hf(config=config, task=task).build(facts)
    assert type(model).__name__ == name
    assert model.training
    if "Classification" in name:
        assert model.config.num_labels == (facts.num_classes or 1)
    assert (model.config.problem_type == "regression") == (facts is SCORES and "Classification" in name)


def test_the_classes_are_named_in_the_config():
    for names in (("no", "yes"), ("no", "maybe", "yes")):
        config = hf(config=BERT).build(Facts({"input_ids": (6,)}, len(names), class_names=names)).config
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: number for number, name in enumerate(names)}


def test_a_head_that_is_kept_keeps_its_names(stored):
    path, _ = stored
    built = ModelSpec.parse(f"hf:{path}").build(Facts({"input_ids": (6,)}, 3, class_names=("a", "b", "c")))
    assert built.config.id2label == {0: "no", 1: "maybe", 2: "yes"}


def test_a_new_config_has_the_vocabulary_of_the_data():
    facts = dataclasses.replace(TEXT, vocabulary_size=37)
    for config in (BERT, GPT, T5):
        free = {name: value for name, value in config.items() if name != "vocab_size"}
        task = "base" if config is T5 else "auto"
        assert hf(config=free, task=task).build(facts).get_input_embeddings().num_embeddings == 37
        assert hf(config=free, task=task, overrides={"vocab_size": 50}).build(facts).config.vocab_size == 50
    assert hf(config={**BERT, "vocab_size": 50}).build(facts).config.vocab_size == 50
    assert hf(config=BERT).build(TEXT).config.vocab_size == 20
    assert hf(config=VIT).build(IMAGES).config.num_labels == 5


def test_a_vocabulary_smaller_than_the_data_s_is_refused(stored, tmp_path):
    facts = dataclasses.replace(TEXT, vocabulary_size=21)
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    too_small = "has a vocabulary of 20 tokens, but the data has ids up to 20; "
    for fields, hint in (
        ({"config": BERT}, "set its 'vocab_size' to 21 or more."),
        (
            {"config": {**BERT, "vocab_size": 30}, "overrides": {"vocab_size": 20}},
            "set its 'vocab_size' to 21 or more.",
        ),
        ({"config": str(tmp_path)}, "set its 'vocab_size' to 21 or more."),
        ({"name": str(stored[0])}, "use its own tokenizer."),
    ):
        with pytest.raises(UserError) as caught:
            hf(**fields).build(facts)
        assert str(caught.value).endswith(too_small + hint)
    assert hf(config=BERT).build(dataclasses.replace(TEXT, vocabulary_size=20)).config.vocab_size == 20


def test_random_weights_come_from_the_global_generator():
    spec = hf(config=BERT)
    torch.manual_seed(1)
    first = fingerprint(spec.build(TEXT))
    assert fingerprint(spec.build(TEXT)) != first
    torch.manual_seed(1)
    assert fingerprint(spec.build(TEXT)) == first


def test_a_config_from_a_file_or_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "small.json").write_text(json.dumps(BERT))
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "small.json"):
        assert hf(config=str(path)).build(TEXT).config.hidden_size == 8


def test_pretrained_weights_from_a_directory(stored):
    path, model = stored
    built = ModelSpec.parse(f"hf:{path}").build(TEXT)
    assert built.training
    assert built.dtype == torch.float32
    assert fingerprint(built) == fingerprint(model.float())
    assert fingerprint(hf(name=str(path), dtype="auto").build(TEXT)) == fingerprint(model.bfloat16())


def test_a_head_that_fits_is_kept_and_one_that_does_not_is_new(stored):
    path, model = stored
    four = ModelSpec.parse(f"hf:{path}").build(Facts({"input_ids": (6,)}, 4))
    assert four.classifier.weight.shape == (4, 8)
    assert torch.equal(four.bert.pooler.dense.weight, model.bert.pooler.dense.weight.float())
    unlabelled = hf(name=str(path), task="classification").build(UNLABELLED)
    assert torch.equal(unlabelled.classifier.weight, model.classifier.weight.float())


def test_overrides_change_the_config_and_the_loading(stored):
    path, _ = stored
    overrides = {"hidden_dropout_prob": 0.25, "attn_implementation": "eager"}
    built = hf(name=str(path), overrides=overrides).build(TEXT)
    assert built.config.hidden_dropout_prob == built.bert.embeddings.dropout.p == 0.25
    assert built.config._attn_implementation == "eager"
    random = hf(config=BERT, overrides=overrides).build(TEXT)
    assert random.bert.embeddings.dropout.p == 0.25
    assert random.config._attn_implementation == "eager"


def test_fields_that_configs_take_undeclared_are_taken():
    assert hf(config={**T5, "decoder_start_token_id": 3}).build(LANGUAGE).config.decoder_start_token_id == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_data_type(dtype):
    assert hf(config=BERT, dtype=dtype).build(TEXT).dtype == getattr(torch, dtype)


def test_a_spec_reads_its_own_dump():
    spec = hf(config=BERT, overrides={"attn_implementation": "eager"}, revision="main")
    assert ModelSpec.parse(spec.dump()) == spec
    assert ModelSpec.parse("hf:owner/name").dump()["name"] == "owner/name"


def test_code_that_a_repository_brings_runs_only_when_trusted(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(UserError, match="could not be made"):
        ModelSpec.parse(f"hf:{tmp_path}").build(TEXT)


def test_untrusted_code_gives_way_to_the_library_s_own(tmp_path):
    hf(config=BERT).build(TEXT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    assert type(ModelSpec.parse(f"hf:{tmp_path}").build(TEXT)).__name__ == "BertForSequenceClassification"


def test_only_a_head_may_have_another_size(stored):
    path, _ = stored
    with pytest.raises(UserError, match="could not be made"):
        hf(name=str(path), overrides={"vocab_size": 30}).build(TEXT)


@pytest.mark.parametrize(
    ("fields", "facts", "message"),
    [
        ({}, TEXT, "model: give either 'name' (pretrained weights) or 'config' (random weights)."),
        ({"name": "a/b", "config": BERT}, TEXT, "model: give either 'name' (pretrained weights) or 'config'"),
        ({"config": {"hidden_size": 8}}, TEXT, "model: 'config' needs 'model_type', such as 'bert'."),
        ({"config": {"model_type": "brt"}}, TEXT, "transformers has no model_type 'brt'; did you mean 'bert'?"),
        ({"config": {"model_type": "zzz"}}, TEXT, "no model_type 'zzz'; see the models of transformers."),
        (
            {"config": {**BERT, "hiden_size": 8}},
            TEXT,
            "config of 'bert' has no field 'hiden_size'; did you mean 'hidden_",
        ),
        (
            {"config": BERT, "overrides": {"hiden_size": 8}},
            TEXT,
            "has no field 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            {"config": {**BERT, "num_attention_heads": 3}},
            TEXT,
            "The model of the given config could not be made: The hid",
        ),
        ({"config": VIT}, TEXT, "is a 'vit', of which transformers has no AutoModelForSequenceClassification; choose"),
        ({"config": BERT, "task": "seq2seq"}, TEXT, "is a 'bert', of which transformers has no AutoModelForSeq2SeqLM"),
        ({"config": "nowhere.json"}, TEXT, "There is no config file 'nowhere.json'; give a path to a config.json."),
        (
            {"name": "./nowhere"},
            TEXT,
            "There is no model directory './nowhere'; give a directory that exists or a hub id.",
        ),
        ({"name": "a/b", "task": "classify"}, TEXT, "model.task: expected 'auto', 'classification'"),
    ],
)
def test_one_sentence_for_what_is_wrong(fields, facts, message):
    with pytest.raises(UserError) as caught:
        hf(**fields).build(facts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_file_without_a_model_type_or_with_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'model_type', such as 'bert'"):
        hf(config=str(tmp_path)).build(TEXT)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be made"):
        hf(config=str(tmp_path)).build(TEXT)


def test_text_without_a_name():
    with pytest.raises(UserError, match="'hf' needs a model, as in 'hf:owner/name'"):
        read(Recipe, {"model": "hf"})


def test_damaged_weights_are_said_in_a_sentence(stored):
    path, _ = stored
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="could not be made"):
        ModelSpec.parse(f"hf:{path}").build(TEXT)


def test_a_missing_library_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError) as caught:
        hf(config=BERT).build(TEXT)
    assert str(caught.value) == "This model needs transformers; install it with: pip install 'stillhouse[language]'."


def test_a_built_classifier_is_called_like_any_model():
    model = hf(config=VIT).build(IMAGES).eval()
    assert logits(model, {"pixel_values": torch.randn(2, 1, 8, 8)}).shape == (2, 5)

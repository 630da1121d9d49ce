"""Calling a model on a batch: what it is passed, and where its logits are."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillhouse.data import Batch
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, as_logits, forward, logits


class Recorder(nn.Module):
    """Notes how it was called, and returns its first argument."""

    def called(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return args[0] if args else next(iter(kwargs.values()))


class Positional(Recorder):
    def forward(self, x):
        return self.called(x)


class Named(Recorder):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.called(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


class NamedWithLabels(Recorder):
    def forward(self, pixel_values, labels=None, index=None):
        return self.called(pixel_values=pixel_values, labels=labels, index=index)


class Anything(Recorder):
    def forward(self, *args, **kwargs):
        return self.called(*args, **kwargs)


class TwoNeeded(Recorder):
    def forward(self, input_ids, prompt):
        return self.called(input_ids, prompt)


class NothingFits(Recorder):
    def forward(self, *, image):
        return self.called(image)


class Nothing(Recorder):
    def forward(self):
        return None


IMAGES = Batch(pixel_values=torch.randn(2, 3), labels=torch.tensor([0, 1]), index=torch.tensor([5, 6]))
TEXT = Batch(
    input_ids=torch.ones(2, 4), attention_mask=torch.ones(2, 4), extra=torch.ones(2), labels=torch.tensor([0, 1])
)


def test_a_bare_module_gets_the_first_input_positionally():
    module = Positional()
    forward(module, IMAGES)
    assert module.args[0] is IMAGES["pixel_values"]
    sequential = nn.Sequential(nn.Linear(3, 2))
    assert torch.equal(forward(sequential, IMAGES), sequential(IMAGES["pixel_values"]))


def test_named_inputs_go_by_keyword_and_no_other():
    module = Named()
    forward(module, TEXT)
    assert module.kwargs["input_ids"] is TEXT["input_ids"]
    assert module.kwargs["attention_mask"] is TEXT["attention_mask"]
    assert module.kwargs["token_type_ids"] is None


@pytest.mark.parametrize("batch", [IMAGES, dict(IMAGES)], ids=["Batch", "dict"])
def test_labels_and_index_are_never_passed(batch):
    module = NamedWithLabels()
    forward(module, batch)
    assert module.kwargs["labels"] is None
    assert module.kwargs["index"] is None


def test_a_wrapper_that_takes_anything_gets_all_inputs_by_keyword():
    module = Anything()
    forward(module, TEXT)
    assert set(module.kwargs) == {"input_ids", "attention_mask", "extra"}


def test_names_set_aside_are_not_inputs():
    batch = Batch(TEXT)
    batch.aside = frozenset({"extra"})
    module = Anything()
    forward(module, batch)
    assert set(module.kwargs) == {"input_ids", "attention_mask"}


def test_a_compiled_module_is_called_by_the_signature_inside():
    module = Named()
    forward(torch.compile(module, backend="eager"), TEXT)
    assert set(module.kwargs) == {"input_ids", "attention_mask", "token_type_ids"}
    bare = nn.Linear(3, 2)
    assert torch.equal(logits(torch.compile(bare, backend="eager"), IMAGES), bare(IMAGES["pixel_values"]))


def test_the_plan_follows_the_batch_and_not_only_the_class():
    module = Named()
    forward(module, TEXT)
    forward(module, {"input_ids": TEXT["input_ids"]})
    assert module.kwargs["attention_mask"] is None
    forward(module, TEXT)
    assert module.kwargs["attention_mask"] is not None


@pytest.mark.parametrize(
    ("module", "batch", "message"),
    [
        (
            TwoNeeded(),
            TEXT,
            "TwoNeeded.forward requires 'prompt', which the batch does not have; "
            "its inputs are 'input_ids', 'attention_mask', 'extra'.",
        ),
        (NothingFits(), IMAGES, "NothingFits.forward requires 'image', which the batch does not have"),
        (Nothing(), IMAGES, "Nothing.forward takes no input"),
        (Positional(), Batch(labels=torch.zeros(1)), "The batch has no input for Positional"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(module, batch, message):
    with pytest.raises(UserError) as caught:
        forward(module, batch)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: SimpleNamespace(logits=x, hidden_states=None),
        lambda x: {"loss": None, "logits": x},
        lambda x: (x, "state"),
        lambda x: [x],
    ],
    ids=["tensor", "object", "mapping", "tuple", "list"],
)
def test_logits_are_found(wrap):
    class Net(nn.Module):
        def forward(self, x):
            return wrap(x)

    assert logits(Net(), IMAGES) is IMAGES["pixel_values"]
    assert as_logits(wrap(IMAGES["pixel_values"])) is IMAGES["pixel_values"]


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (None, "NoneType"),
        ((), "tuple"),
        (("text",), "tuple"),
        ({"scores": 1, "loss": 2}, "['loss', 'scores']"),
        (SimpleNamespace(logits=None), "SimpleNamespace"),
    ],
    ids=str,
)
def test_no_logits_is_said_in_a_sentence(output, shown):
    class Net(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(UserError) as caught:
        logits(Net(), IMAGES)
    assert f"Net returned {shown}, in which there are no logits" in str(caught.value)


BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}


def test_a_transformers_classifier():
    model = ModelSpec.parse({"kind": "hf", "config": BERT}).build(Facts({"input_ids": (6,)}, 3)).eval()
    batch = Batch(
        input_ids=torch.randint(0, 20, (2, 6)),
        attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        labels=torch.tensor([0, 2]),
        index=torch.arange(2),
    )
    found = logits(model, batch)
    assert found.shape == (2, 3)
    assert forward(model, batch).loss is None
    changed = batch.replace(input_ids=torch.cat([batch["input_ids"][:, :3], 1 + 0 * batch["input_ids"][:, 3:]], 1))
    torch.testing.assert_close(logits(model, changed)[1], found[1], msg="the mask arrived")


def test_an_encoder_decoder_reads_the_labels_shifted_right():
    config = {"model_type": "t5", "vocab_size": 20, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    spec = ModelSpec.parse({"kind": "hf", "config": {**config, "decoder_start_token_id": 0}})
    model = spec.build(Facts({"input_ids": (6,)}, None, "language")).eval()
    batch = Batch(input_ids=torch.randint(1, 20, (2, 6)), labels=torch.tensor([[3, 4, 1], [5, 1, -100]]))
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
    torch.testing.assert_close(logits(model, batch), expected)
    own = batch.replace(decoder_input_ids=torch.tensor([[0, 3], [0, 5]]))
    assert logits(model, own).shape == (2, 2, 20)


def test_adapting_costs_microseconds():
    module, batch = Positional(), IMAGES
    forward(module, batch)
    inputs = batch["pixel_values"]

    def seconds(call):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(1000):
                call()
            best = min(best, time.perf_counter() - start)
        return best / 1000

    assert seconds(lambda: forward(module, batch)) - seconds(lambda: module(inputs)) < 20e-6

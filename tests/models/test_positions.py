"""Which labels belong to which logits: checked against the losses that transformers computes itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse import losses
from stillhouse.data import Batch
from stillhouse.errors import UserError
from stillhouse.models import IGNORED, logits, targets

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def bert(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, kind)(transformers.BertConfig(**sizes, intermediate_size=8, num_labels=11)).eval()


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (gpt2, IDS.masked_fill(MASK == 0, -100)),
        (gpt2, torch.where(torch.arange(5) < 2, -100, IDS.masked_fill(MASK == 0, -100))),
        (t5, torch.tensor([[5, 6, 7], [5, 1, -100]])),
        (t5, IDS.masked_fill(MASK == 0, -100)),
        (lambda: bert("BertForMaskedLM"), torch.tensor([[-100, 4, -100, -100, 2], [8, -100, -100, -100, -100]])),
        (lambda: bert("BertForTokenClassification"), torch.tensor([[0, 1, 2, 1, 0], [1, 1, 2, -100, -100]])),
        (lambda: bert("BertLMHeadModel"), IDS.masked_fill(MASK == 0, -100)),
    ],
    ids=["gpt2", "gpt2-prompts", "t5", "t5-copies", "masked-lm", "tagger", "bert-lm"],
)
def test_the_cross_entropy_is_the_loss_of_transformers(model, labels):
    model = model()
    theirs = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    batch = Batch(input_ids=IDS, attention_mask=MASK, labels=labels)
    ours = losses.cross_entropy(logits(model, batch), targets(model, batch))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_compiled_model_stands_where_the_one_inside_does():
    batch = {"input_ids": IDS}
    assert torch.equal(targets(torch.compile(gpt2(), backend="eager"), batch), targets(gpt2(), batch))


def test_a_student_that_copies_its_input_has_learnt_nothing():
    """Unshifted, it would be perfect."""
    copies = nn.Embedding.from_pretrained(50 * torch.eye(11))
    batch = Batch(input_ids=IDS[:1])
    assert losses.cross_entropy(copies(IDS[:1]), targets(copies, batch, next_token=True)) > 40
    successor = nn.Embedding.from_pretrained(50 * torch.eye(11).roll(1, 1))
    assert losses.cross_entropy(successor(IDS[:1]), targets(successor, batch, next_token=True)) < 1e-6


def test_without_labels_a_causal_model_is_labelled_with_its_input():
    expected = torch.tensor([[4, 5, 6, 7, -100], [9, 3, -100, -100, -100]])
    for model, known in ((gpt2(), {}), (nn.Identity(), {"next_token": True})):
        assert torch.equal(targets(model, {"input_ids": IDS, "attention_mask": MASK}, **known), expected)
        repeated = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
        assert torch.equal(targets(model, repeated, **known), expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_more_padding_changes_nothing(side, causal):
    labels = IDS[:1] if causal else (IDS[:1] + 1) % 11
    before = targets(nn.Identity(), {"input_ids": IDS[:1], "labels": labels}, next_token=causal)
    width = (0, 3) if side == "right" else (3, 0)
    padded = {
        "input_ids": F.pad(IDS[:1], width, value=9),
        "attention_mask": F.pad(torch.ones_like(IDS[:1]), width),
        "labels": F.pad(labels, width, value=9),
    }
    found = targets(nn.Identity(), padded, next_token=causal)
    assert found.shape == (1, 8)
    assert torch.equal(found[:, :5] if side == "right" else found[:, 3:], before)
    assert bool((found[:, 5:] if side == "right" else found[:, :3]).eq(IGNORED).all())


@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
def test_more_padding_changes_no_loss(make):
    model = make()
    labels = IDS.masked_fill(MASK == 0, -100)
    batch = Batch(input_ids=IDS, attention_mask=MASK, labels=labels)
    wide = Batch(
        input_ids=F.pad(IDS, (0, 3), value=5),
        attention_mask=F.pad(MASK, (0, 3)),
        labels=F.pad(labels, (0, 3), value=-100),
    )
    one, two = (losses.cross_entropy(logits(model, part), targets(model, part)) for part in (batch, wide))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_a_decoder_has_its_own_mask():
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "decoder_input_ids": IDS}
    assert torch.equal(targets(nn.Identity(), batch, next_token=True), IDS)
    batch["decoder_attention_mask"] = MASK
    assert torch.equal(targets(nn.Identity(), batch), IDS.masked_fill(MASK == 0, -100))


@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 0]), torch.tensor([0.5, -1.0]), torch.tensor([[0.2, 0.8], [1.0, 0.0]])]
)
def test_labels_of_whole_samples_are_returned_as_they_are(labels):
    batch = {"input_ids": IDS, "attention_mask": MASK[:, :2], "labels": labels}
    for model in (nn.Identity(), gpt2(), bert("BertForSequenceClassification")):
        assert targets(model, batch, next_token=True) is labels


def test_without_labels_only_causal_models_can_be_trained():
    message = "This batch has no labels, which BertForMaskedLM needs; it holds input_ids."
    for model, reason in ((bert("BertForMaskedLM"), message), (t5(), "which T5ForConditionalGeneration needs")):
        with pytest.raises(UserError, match=reason):
            targets(model, {"input_ids": IDS}, next_token=True)
    with pytest.raises(UserError, match="is an encoder-decoder, whose batches need 'labels' or 'decoder_input_ids'"):
        logits(t5(), {"input_ids": IDS})


def test_a_model_that_says_that_it_generates_is_causal():
    own = nn.Identity()
    own.can_generate = lambda: True
    assert targets(own, {"input_ids": IDS})[0].tolist() == [4, 5, 6, 7, -100]
    own.config = SimpleNamespace(is_encoder_decoder=True)
    assert targets(own, {"input_ids": IDS, "labels": IDS}) is IDS

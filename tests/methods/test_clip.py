"""CLIP's training: its loss, its pixels, zero-shot classification that works, and what it refuses."""

import pytest
import torch

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses.contrastive import image_text
from stillhouse.methods.clip import CLIP, prompts

MODEL = {
    "kind": "two-towers",
    "image": {"kind": "cnn", "channels": [8, 16], "strides": [1, 2]},
    "width": 8,
    "text_hidden": 16,
}
DATA = {"kind": "characters", "characters": "01x", "per_class": 60, "size": 8}


def test_equal_captions_are_each_right(tmp_path):
    method = CLIP(data=DATA, model=MODEL)
    run = Run(method, RunDirectory(tmp_path), data=load_data(DATA))
    model = method.model.build(run.data.facts).eval()
    batch = run.data.split("train").batch(range(40))
    found = method.loss(Modules(model=model), batch, run)["pairs"]
    images, texts = model(batch["pixel_values"], batch["input_ids"])
    ids = [tuple(row.tolist()) for row in batch["input_ids"]]
    same = torch.tensor([[a == b for b in ids] for a in ids])
    assert same.sum() > 40
    torch.testing.assert_close(found, image_text(images, texts, model.scale, same=same))


def test_names_alone_classify_after_training():
    optimizer = {"name": "adamw", "lr": 0.003, "weight_decay": 0.01, "schedule": "cosine"}
    result = sh.distil("clip", data=DATA, model=MODEL, epochs=60, batch_size=32, optimizer=optimizer)
    assert result.metrics["test/zero-shot"] > 0.8
    data = load_data(DATA)
    torch.testing.assert_close(result.model.mean, torch.tensor(data.scale.mean))
    torch.testing.assert_close(result.model.std, torch.tensor(data.scale.std))


def test_prompts_need_names_that_differ():
    assert prompts("a {} of {}", ("x",)) == ["a x of x"]
    for names, template, words in (
        ((), "a {}", "no class names"),
        (("x", "x"), "a {}", "named 'x'"),
        (("x",), "a cat", "has no place"),
    ):
        with pytest.raises(UserError, match=words):
            prompts(template, names)


def test_images_without_captions_are_refused():
    with pytest.raises(UserError, match="needs captioned images"):
        sh.distil("clip", data="digits", model=MODEL)
    with pytest.raises(UserError, match="'two-towers', not 'cnn'"):
        sh.distil("clip", data=DATA, model="cnn:4")

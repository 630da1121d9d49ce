"""Exported forms compute what PyTorch does, for any batch size, or nothing is kept and one sentence says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse import exporting, models
from stillhouse.cli import main
from stillhouse.errors import RunError, UserError
from stillhouse.exporting import entries, export, formats
from stillhouse.facts import Facts
from stillhouse.front import run_recipe

IMAGES = Facts({"pixel_values": (3, 16, 16)}, num_classes=5)
TEXTS = Facts({"input_ids": (12,), "attention_mask": (12,)}, num_classes=4, vocabulary_size=50)
TINY = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8},
}


class Own(nn.Module):
    """A module of somebody's own, with buffers that change in training and two named outputs."""

    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.head = nn.Linear(width, 5)

    def forward(self, pixel_values):
        features = self.net(pixel_values)
        return {"features": features, "scores": self.head(features)}


class Fixed(nn.Module):
    """Only for the batch size at hand: to a tracer, ``len`` is a constant."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 5))

    def forward(self, pixel_values):
        return self.weight.expand(len(pixel_values), -1) * pixel_values.mean()


class Distances(Fixed):
    """Uses an operation that ONNX lacks."""

    def forward(self, pixel_values):
        return torch.cdist(pixel_values.flatten(1)[:, :5], self.weight, compute_mode="donot_use_mm_for_euclid_dist")


class OfALength(nn.Module):
    """Takes texts of 12 tokens and no others."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(48, 3)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids).flatten(1))


class Random(nn.Module):
    """Draws anew at every call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values):
        return self.weight * torch.rand_like(pixel_values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of kd, two steps long."""
    out = tmp_path_factory.mktemp("runs") / "kd"
    recipe = sh.load_recipe("kd", ["teacher.epochs=1", "epochs=1", "compare_alone=false", "run.device=cpu"])
    return out, run_recipe(recipe, out)


def saved(tmp_path, spec, facts):
    """A module built from a spec, on disk."""
    return models.save(models.ModelSpec.parse(spec).build(facts).eval(), tmp_path / "model")


def onnx_outputs(done, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch-export"])
def test_the_student_of_a_run_is_exported_alone_and_the_printed_lines_load_it(finished, format):
    out, result = finished
    done = sh.export(out, format)
    assert done.artefact == "student"
    assert done.real
    assert done.largest_difference <= done.tolerance < 1e-2
    assert done.inputs["pixel_values"] == ["batch", 1, 8, 8]
    assert done.outputs == {"logits": ["batch", 10]}
    recorded = json.loads((out / "export" / "export.json").read_text())
    (row,) = [row for row in recorded if row["format"] == format]
    assert row["load"] == done.load
    assert set(row["latency_ms"]) == {"PyTorch"} | ({formats.FORMATS[format].engine} - {"PyTorch"})
    assert all(value > 0 for times in row["latency_ms"].values() for value in times.values())
    pixel_values = torch.randn(5, 1, 8, 8)
    expected = result.student.eval()(pixel_values).detach().numpy()
    names = {"pixel_values": pixel_values.numpy() if format == "onnx" else pixel_values}
    exec(done.load, names)
    got = names["model"](pixel_values).detach() if format == "safetensors" else names["logits"]
    if format == "torch-export":
        (got,) = [got.detach()] if isinstance(got, torch.Tensor) else got
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5)
    # Nothing is left aside, and an export of the same takes the place of the older one.
    assert {path.name for path in (out / "export").iterdir()} <= {
        ".lock", "export.json", "student", "student.onnx", "student.pt2"
    }  # fmt: skip
    export(out, format)
    assert len(json.loads((out / "export" / "export.json").read_text())) == len(recorded)


@pytest.mark.parametrize(
    ("format", "spec"),
    [
        ("onnx", "resnet:8"),
        ("torch-export", "wrn:10-1"),
        ("onnx", {"kind": "vit", "dim": 16, "depth": 1, "heads": 2, "patch": 4}),
        ("torch-export", {"kind": "convnet", "width": 8, "depth": 2}),
        ("onnx", {"kind": "cnn", "channels": [4, 8]}),
        ("torch-export", {"kind": "mlp", "widths": [8]}),
        ("onnx", {"kind": "autoencoder", "widths": [4], "dense_widths": [16]}),
        ("torch-export", {"kind": "autoencoder", "widths": [4], "latent": "gaussian", "decoder": "plain"}),
        ("onnx", {"kind": "autoencoder", "widths": [4], "dense_widths": [16], "latent": "vector", "vector_size": 4}),
    ],
    ids=str,
)
def test_the_networks_that_come_along_are_exported_for_any_batch(tmp_path, format, spec):
    done = export(saved(tmp_path, spec, IMAGES), format)
    assert done.inputs == {"pixel_values": ["batch", 3, 16, 16]}
    assert done.largest_difference <= done.tolerance
    assert not done.real


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_models_of_tokens_take_texts_of_any_length_and_padding(tmp_path, kind):
    task = "classification" if kind == "bert" else "causal-lm"
    spec = {"kind": "hf", "task": task, "config": {"model_type": kind, "vocab_size": 50, **TINY[kind]}}
    place = saved(tmp_path, spec, TEXTS)
    done = export(place, "onnx", out=tmp_path / "out")
    assert done.inputs == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert list(done.outputs) == ["logits"]
    ids = torch.randint(50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    (got,) = onnx_outputs(done, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        expected = models.load(place)(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("format", ["safetensors", "torch-export"])
def test_a_text_of_one_length_only(tmp_path, format):
    result = sh.Result(artefacts={"net": OfALength()})
    ids = {"input_ids": torch.randint(50, (5, 12))}
    done = export(result, format, out=tmp_path, samples=ids)
    assert done.inputs == {"input_ids": ["batch", 12]}
    with pytest.raises(UserError, match="net cannot be called on its samples: mat1 and mat2 shapes"):
        export(result, format, out=tmp_path, samples={"input_ids": ids["input_ids"][:, :5]})


def test_an_encoder_decoder_takes_what_its_decoder_reads(tmp_path):
    spec = {"kind": "hf", "task": "seq2seq", "config": {"model_type": "t5", "vocab_size": 50, **TINY["t5"]}}
    facts = Facts({"input_ids": (12,), "decoder_input_ids": (6,)}, task="language", vocabulary_size=50)
    done = export(saved(tmp_path, spec, facts), "torch-export")
    assert done.inputs == {"input_ids": ["batch", "length"], "decoder_input_ids": ["batch", "decoder_length"]}
    assert done.largest_difference <= done.tolerance


def test_a_transformers_directory_without_stillhouse_in_it(tmp_path):
    import transformers

    config = transformers.BertConfig(vocab_size=50, **TINY["bert"], num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    done = export(tmp_path / "theirs", out=tmp_path / "out")
    again = transformers.BertForSequenceClassification.from_pretrained(done.file)
    assert again.config.num_labels == 3
    assert isinstance(models.load(done.file), transformers.BertForSequenceClassification)
    assert done.load.startswith("from transformers import BertForSequenceClassification\n")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_one_step_generator_turns_noise_into_samples_and_others_are_networks(tmp_path, steps):
    from stillhouse.methods.generators.process import Diffusion, Process
    from stillhouse.models import UNetSpec
    from stillhouse.modules.noise import EDMNoise

    facts = Facts({"pixel_values": (1, 8, 8)}, num_classes=3)
    net, schedule = UNetSpec(width=8, multipliers=(1, 1), attention=False).build(facts), EDMNoise()
    process = Process.of(net, schedule, "edm", facts)
    model = Diffusion(net, process, schedule.grid(steps), "multistep")
    result = sh.Result(artefacts={"student": model})
    with pytest.raises(UserError, match="say with out="):
        export(result, "onnx")
    if steps == 2:
        done = export(result, "torch-export", out=tmp_path)
        assert list(done.inputs) == ["sample", "timestep", "class_labels"]
        assert list(done.outputs) == ["out_sample"]
        return
    done = export(result, "onnx", out=tmp_path)
    assert list(done.inputs) == ["noise", "labels"]
    noise, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    (got,) = onnx_outputs(done, {"noise": noise, "labels": labels})
    np.testing.assert_allclose(got, model(noise, labels).numpy(), atol=1e-4)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    written = export(tmp_path / "model", "safetensors", out=tmp_path / "plain")
    assert (written.file / "process.json").is_file()
    loaded = models.load(written.file)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert export(written.file, out=tmp_path / "again").inputs == done.inputs


def test_a_module_of_ones_own_is_exported_from_its_result_and_left_as_it_was(tmp_path):
    module = Own().train()
    x = torch.randn(9, 3, 16, 16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = sh.Result(artefacts={"net": module})
    with pytest.raises(UserError, match="pass a batch of inputs as samples="):
        export(result, "onnx", out=tmp_path)
    done = export(result, "onnx", out=tmp_path, samples={"pixel_values": x})
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert list(done.outputs) == ["features", "scores"]
    _, scores = onnx_outputs(done, {"pixel_values": x})
    np.testing.assert_allclose(scores, module.eval()(x)["scores"].detach().numpy(), atol=1e-5)
    assert done.largest_difference < 1e-5


def test_weights_that_do_not_say_how_they_are_built_need_the_module(tmp_path):
    trained = Own()
    models.save(trained, tmp_path / "net")
    with pytest.raises(UserError, match="module=your_module"):
        export(tmp_path / "net")
    x = {"pixel_values": torch.randn(4, 3, 16, 16)}
    done = export(tmp_path / "net", module=Own(), samples=x)
    assert "load_weights(model, " in done.load
    again = models.load_weights(Own(), done.file)
    assert torch.equal(again.head.weight, trained.head.weight)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [(Fixed, r"^net cannot be traced by torch\.export: "), (Distances, r"^net cannot be written as ONNX: .*cdist")],
)
def test_what_cannot_be_exported_says_why_in_one_sentence_and_leaves_nothing(tmp_path, module, sentence):
    result = sh.Result(artefacts={"net": module()})
    with pytest.raises(UserError, match=sentence) as caught:
        export(result, "onnx", out=tmp_path, samples={"pixel_values": torch.randn(4, 3, 16, 16)})
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch-export"])
def test_a_form_that_computes_something_else_is_not_kept(tmp_path, format):
    with pytest.raises(RunError, match="differs from PyTorch by up to"):
        export(
            sh.Result(artefacts={"net": Random()}),
            format,
            out=tmp_path,
            samples={"pixel_values": torch.zeros(4, 3, 2, 2)},
        )
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_a_difference_that_is_not_a_number_is_refused(tmp_path):
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(torch.nan)
    with pytest.raises(RunError, match="by up to nan"):
        export(sh.Result(artefacts={"net": module}), out=tmp_path, samples={"features": torch.zeros(4, 3)})


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PROTOBUF_LIMIT", 1000)
    done = export(saved(tmp_path, {"kind": "mlp", "widths": [64]}, IMAGES), "onnx", out=tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 1000
    assert done.bytes > (tmp_path / "out" / "model.onnx").stat().st_size
    x = torch.randn(2, 3, 16, 16)
    (got,) = onnx_outputs(done, {"pixel_values": x})
    np.testing.assert_allclose(got, models.load(tmp_path / "model")(x).detach().numpy(), atol=1e-5)


def test_half_precision_is_written_in_single_precision(tmp_path):
    result = sh.Result(artefacts={"net": nn.Linear(3, 2).bfloat16()})
    done = export(result, "onnx", out=tmp_path, samples={"features": torch.randn(4, 3)})
    assert "half-precision" in done.notes[0]
    assert result.net.weight.dtype == torch.bfloat16
    kept = export(result, "safetensors", out=tmp_path, samples={"features": torch.randn(4, 3)})
    assert kept.notes == ()


def test_the_operator_set_is_the_one_asked_for(tmp_path):
    place = saved(tmp_path, {"kind": "mlp", "widths": [8]}, IMAGES)
    assert export(place, "onnx", opset=18).opset == 18
    with pytest.raises(UserError, match="--opset: an operator set from 18 to"):
        export(place, "onnx", opset=7)
    with pytest.raises(UserError, match="--opset: only onnx has operator sets"):
        export(place, "torch-export", opset=18)


def test_data_that_is_gone_is_said(finished, tmp_path):
    import shutil

    out, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    text = (copy / "recipe.yaml").read_text().replace("kind: digits", "kind: csv\n  path: gone.csv", 1)
    (copy / "recipe.yaml").write_text(text)
    done = export(copy)
    assert not done.real
    assert "could not be read again" in done.notes[0]


def test_what_ships_decides(tmp_path, finished):
    out, _ = finished
    two = sh.Result(artefacts={"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"ships 'a' and 'b'; say which with --artefact a"):
        export(two, out=tmp_path)
    with pytest.raises(UserError, match="has no artefact 'studnt'; did you mean 'student'"):
        export(out, artefact="studnt")
    with pytest.raises(UserError, match="there is no format 'onx'; did you mean 'onnx'"):
        export(out, "onx")
    with pytest.raises(UserError, match="there is no directory"):
        export(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither a run"):
        export(tmp_path / "empty")
    (tmp_path / "empty" / "recipe.yaml").write_text("method: kd\n")
    with pytest.raises(UserError, match="has not finished"):
        export(tmp_path / "empty")


def test_a_distilled_data_set_is_no_model(tmp_path):
    recipe = sh.load_recipe("random-selection", ["eval_networks=1", "eval_epochs=1", "run.device=cpu"])
    run_recipe(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="ships only 'set', which is no model"):
        export(tmp_path / "run", "onnx")
    with pytest.raises(UserError, match="is no model and lies in open formats"):
        export(tmp_path / "run", "onnx", artefact="set")


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[onnx\]'"):
        export(tmp_path, "onnx")


def test_the_command_line_prints_difference_latency_and_load_line(finished, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(sys, "argv", ["stillhouse", "export", "kd", "--format", "onnx"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.err) == (0, "")
    for words in (
        "largest difference to PyTorch",
        "Latency of one sample",
        "ONNX Runtime",
        "InferenceSession(",
        "report: ",
    ):
        assert words in printed.out
    assert Path("kd/report.html").exists()
    monkeypatch.setattr(sys, "argv", ["stillhouse", "export", "kd", "--format", "onx"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --format: there is no format 'onx'; did you mean 'onnx'?\n"


def test_exporting_writes_nothing_into_the_home_directory(tmp_path):
    place = saved(tmp_path, {"kind": "mlp", "widths": [8]}, IMAGES)
    home = tmp_path / "home"
    home.mkdir()
    program = f"import stillhouse; stillhouse.export({str(place)!r}, 'onnx')"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    assert (place / "export" / "model.onnx").is_file()
    assert list(home.rglob("*")) == []


def test_batch_sizes_include_one_and_more():
    assert entries.BATCH_SIZES[0] == 1
    assert len(set(entries.BATCH_SIZES)) >= 3
    assert exporting.RECORD == "export.json"

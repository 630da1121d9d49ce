"""What a run did in words, and under which licences: nothing is claimed that is not known."""

import json

import pytest

from stillhouse.data import DataSpec
from stillhouse.report.account import data_sets, models, parts
from stillhouse.report.provenance import DATA_SETS, data_origin, model_origin
from stillhouse.report.reading import read_run

RUN = {"kind": "run", "name": "teacher", "of": "supervised c458a09c seed 4"}
STAGE = {
    "kind": "stage",
    "name": "student",
    "steps": 480,
    "modules": {
        "student": "trained CNN [(6, 1, 3, 3), (6,)]",
        "fake": "trained UNet [(2,)]",
        "teacher": "frozen BigCNN [(10, 2), ()]",
        "probe": "scratch Net []",
    },
    "updates": ["generator trains ['student'] every 5 times 1", "guidance trains ['fake'] every 1 times 2"],
}


def told(writer, *yields):
    writer.json("checkpoints/yields.json", [list(group) for group in yields])
    return {part.name: part for part in parts(read_run(writer.path))}


def test_each_part_is_told_in_a_sentence_with_its_time(writer):
    writer.json("cost.json", {"teacher": 1.5, "student": 2.0})
    found = told(writer, [RUN], [STAGE], [{"kind": "computation", "name": "comparison"}])
    assert found["teacher"].what == "a run of its own (supervised, seed 4), or found in the cache of earlier runs."
    assert found["student"].what == (
        "trained student and fake for 480 steps, with teacher as it was and probe drawn afresh at every step; "
        "losses: generator at every 5th step and guidance at every step, 2 times."
    )
    assert (found["teacher"].seconds, found["student"].seconds, found["comparison"].seconds) == (1.5, 2.0, None)


def test_parts_that_differ_by_a_number_are_told_once(writer):
    experts = [
        {"kind": "stage", "name": f"expert-{i}", "steps": 9, "modules": {"net": "trained Net []"}} for i in range(5)
    ]
    writer.json("cost.json", {f"expert-{i}": 2.0 for i in range(5)})
    found = told(writer, *[[expert] for expert in experts], [{"kind": "computation", "name": "end"}])
    assert list(found) == ["expert-0 to expert-4 (5)", "end"]
    assert found["expert-0 to expert-4 (5)"].what == "5 alike, each: trained net for 9 steps."
    assert found["expert-0 to expert-4 (5)"].seconds == 10.0
    # The engine keeps one time for stages that were yielded together.
    writer.json("cost.json", {"+".join(f"expert-{i}" for i in range(5)): 7.0})
    assert told(writer, experts)["expert-0 to expert-4 (5)"].seconds == 7.0


def test_the_models_are_told_with_what_became_of_them(writer):
    recipe = {
        "method": "kd",
        "teacher": {"kind": "trained", "model": {"kind": "cnn", "channels": [32, 64]}},
        "student": {"kind": "cnn", "channels": [6], "norm": "batch", "strides": None},
        "fake": {"kind": "hf", "name": "owner/net"},
    }
    writer.text("recipe.yaml", json.dumps(recipe)).finish(parameters__student__alone=1.0)
    told(writer, [RUN], [STAGE], [{"kind": "run", "name": "student-alone", "of": "supervised a seed 0"}])
    writer.json("metrics.json", {"parameters/student-alone": 60.0})
    found = {model.name: model for model in models(read_run(writer.path))}
    assert (found["student"].architecture, found["student"].parameters) == ("CNN", 60)
    assert found["student"].fields == "channels 6; norm batch"
    assert (found["student"].role, found["student"].source) == ("trained in student", "random start")
    assert (found["teacher"].source, found["teacher"].role) == ("a run of supervised before", "as it is in student")
    assert found["student-alone"].role == "trained in student-alone"
    assert found["fake"].source == "huggingface.co/owner/net"
    assert found["fake"].licence.startswith("not known")
    assert found["student"].licence == found["teacher"].licence == ""


def test_the_data_is_told_with_sizes_source_and_licence(writer):
    other = {"kind": "mnist"}
    recipe = {
        "method": "kd",
        "data": {"kind": "digits", "train_size": 100},
        "teacher": {"kind": "trained", "data": other},
    }
    writer.text("recipe.yaml", json.dumps(recipe))
    names = [str(i) for i in range(10)]
    splits = {"train": 1078, "validation": 359, "test": 360}
    writer.json("result/inputs.json", {"splits": splits, "inputs": {"pixel_values": [1, 8, 8]}, "class_names": names})
    own, teachers = data_sets(read_run(writer.path))
    assert own.title == "Data"
    assert dict(own.facts)["set"] == "digits (train size 100)"
    assert dict(own.facts)["samples"] == "1,078 train, 359 validation, 360 test"
    assert dict(own.facts)["a sample"] == "pixel_values 1 × 8 × 8"
    assert dict(own.facts)["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert "CC BY 4.0" in dict(own.facts)["licence"]
    assert teachers.title == "Data of teacher"
    assert "CC BY-SA 3.0" in dict(teachers.facts)["licence"]


def test_every_data_set_that_is_known_by_name_has_its_licence_told():
    general = {"hf", "folder", "csv", "jsonl", "parquet", "object", "import"}
    named = {name for name in DataSpec.members if name not in general}
    assert {name for name in named if data_origin({"kind": name}).licence == "not known"} == set()
    assert set(DATA_SETS) <= set(DataSpec.members)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(kind, name, card, ...)`` puts a state of a repository into a cache of the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(kind, name, card, commit="c1", ref="main", file="README.md"):
        home = tmp_path / "hub" / f"{kind}--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
        (home / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (home / "snapshots" / commit / file).write_text(card)

    return put


def test_a_hub_licence_is_read_off_the_card_at_hand(hub):
    hub("models", "owner/net", "---\nlicense: apache-2.0\ntags: [x]\n---\n# Net\n")
    assert model_origin({"kind": "hf", "name": "owner/net"}).licence == "apache-2.0, by its card"
    hub("datasets", "owner/set", "---\nlicense:\n- cc-by-4.0\n- mit\n---\n")
    origin = data_origin({"kind": "hf", "path": "owner/set"})
    assert (origin.licence, origin.source) == ("cc-by-4.0, mit, by its card", "huggingface.co/datasets/owner/set")
    hub("models", "owner/own", "---\nlicense: other\nlicense_name: research-only\n---\n")
    assert model_origin({"kind": "hf", "name": "owner/own"}).licence == "research-only, by its card"


def test_the_licence_is_that_of_the_revision_asked_for(hub):
    hub("models", "owner/net", "---\nlicense: mit\n---\n", commit="a1")
    hub("models", "owner/net", "---\nlicense: cc0-1.0\n---\n", commit="b2", ref="old")
    for revision, licence in ((None, "mit"), ("old", "cc0-1.0"), ("b2", "cc0-1.0")):
        assert (
            model_origin({"kind": "hf", "name": "owner/net", "revision": revision}).licence == f"{licence}, by its card"
        )


def test_what_is_not_at_hand_is_said_to_be_unknown(hub, tmp_path):
    hub("models", "owner/silent", "# A card without a head\n")
    for name in ("owner/silent", "owner/absent"):
        told = model_origin({"kind": "hf", "name": name}).licence
        assert told == f"not known: no card of it is on this machine; see huggingface.co/{name}"
    assert model_origin({"kind": "object", "object": "Net"}).licence.startswith("not known")
    assert model_origin({"kind": "import", "path": "mine:Net"}).licence.startswith("not known")
    assert data_origin({"kind": "folder", "path": str(tmp_path)}).licence.startswith("not known")
    assert data_origin({"kind": "csv", "path": str(tmp_path / "a.csv")}).licence.startswith("not known")
    assert (model_origin({"kind": "cnn"}).source, model_origin({"kind": "cnn"}).licence) == ("", "")


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: mit\n---\n", "mit, by its card"),
        ("config.json", '{"license": "openrail"}', "openrail, by its config.json"),
        ("LICENSE", "\n  Some Licence, version 2\nmore", "Some Licence, version 2, by its LICENSE"),
        ("config.json", "[1", "not known: no card and no licence file lies beside it"),
        ("README.md", "---\nlicense: {a: b}\n---\n", "not known: no card and no licence file lies beside it"),
        ("README.md", "---\n: : :\n  - x\n---\n", "not known: no card and no licence file lies beside it"),
    ],
)
def test_a_directory_tells_its_licence_by_its_files(tmp_path, file, text, licence):
    (tmp_path / file).write_text(text)
    assert data_origin({"kind": "folder", "path": str(tmp_path)}).licence == licence
    assert model_origin({"kind": "file", "path": str(tmp_path)}).licence == licence
    assert model_origin({"kind": "hf", "name": str(tmp_path)}).licence == licence

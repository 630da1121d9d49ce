"""Whatever is written: one sentence or a result, never a traceback, a hang, or a file where none belongs.

Valid recipes, command lines, data and models are damaged in over two thousand ways, the same ones every time. Nothing is
trained: what would train also holds a mistake.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stillhouse import memory
from stillhouse.cli import main
from stillhouse.data import DataSpec, read_spec
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec
from stillhouse.recipe import Recipe, build_recipe, load_recipe
from stillhouse.registry import RECIPES, entries, method_class
from stillhouse.spec import Spec, read

SECONDS, WALL = 10, 60
"""What computes for longer, or waits for longer on a busy machine, hangs."""

NAMES = [entry["name"] for entry in entries()]
SOURCES = [f"{path.parent.name}/{path.stem}" for path in sorted(RECIPES.glob("*/*.yaml"))]
VALUES = {source: YAML(typ="safe", pure=True).load((RECIPES / f"{source}.yaml").read_text()) for source in SOURCES}


def damaging(cases):
    """The same ``cases`` in every run, none of them kept on disk."""
    return settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


class Hangs(BaseException):
    """Raised by the watchdog: no handler of errors takes it for one of its own."""


@contextlib.contextmanager
def watched():
    """A limit on the time within the block."""

    def stop(number, frame):
        raise Hangs(f"{SECONDS} seconds of work, or {WALL} in all, were not enough")

    assert threading.current_thread() is threading.main_thread()
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def check_sentence(text):
    """One line that ends as a sentence does, and is none of a library's own messages."""
    assert "\n" not in text, text
    assert text.endswith((".", "?", "!")), text
    assert "Traceback" not in text, text
    assert "pydantic" not in text, text
    assert not re.search(r"\binput should\b", text, re.IGNORECASE), text


def tree(root):
    """Every file and directory below ``root`` with its size and time."""
    found = {}
    for directory, _, files in os.walk(root):
        found[directory] = None
        for file in files:
            status = os.lstat(os.path.join(directory, file))
            found[os.path.join(directory, file)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A working directory with a neighbour, a home and a cache beside it, all of which are watched."""
    root = tmp_path_factory.mktemp("house")
    for name in ("work", "neighbour", "home", "cache"):
        (root / name).mkdir()
    (root / "neighbour" / "kept.yaml").write_text("method: kd\n")
    (root / "neighbour" / "kept.csv").write_text("a,label\n1,x\n2,y\n")
    work = root / "work"
    (work / "good.yaml").write_text("method: kd\nepochs: 1\n")
    (work / "binary.yaml").write_bytes(bytes(range(256)))
    (work / "empty.yaml").write_text("")
    (work / "folder.yaml").mkdir()
    (work / "bare").mkdir()
    (work / "bare" / "recipe.yaml").write_text("method: kd\n")
    (work / "broken").mkdir()
    (work / "broken" / "recipe.yaml").write_text("method: [\n")
    (work / "broken" / "run.json").write_text("{")
    (work / "table.csv").write_text("a,b,label\n" + "".join(f"{i},{i % 7},{'xyz'[i % 3]}\n" for i in range(60)))
    (work / "numbers.csv").write_text("a,label\n" + "".join(f"{i},{i / 7:.3f}\n" for i in range(60)))
    (work / "lines.jsonl").write_text("".join(f'{{"t": "w{i % 5} v", "label": {i % 2}}}\n' for i in range(60)))
    # What is imported once is no case's to wait for.
    for name in NAMES:
        method_class(name)
    patch = pytest.MonkeyPatch()
    patch.chdir(work)
    patch.setenv("HOME", str(root / "home"))
    patch.setenv("XDG_CACHE_HOME", str(root / "home" / "cache"))
    patch.setenv("STILLHOUSE_CACHE", str(root / "cache"))
    patch.delenv("STILLHOUSE_DATA", raising=False)
    # On every machine the same is too large, and nothing takes long.
    patch.setattr(memory, "physical", lambda: 2**28)
    patch.setattr(memory, "TENSORS", 3000)
    yield root
    patch.undo()


# Recipes as files ------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(
        [10**12, -(10**12), 10**30, 2**63, -1, 0, 1e308, -0.0, 1e-320, float("inf"), float("-inf"), float("nan"), 0.5]
    ),
    st.sampled_from(
        ["", " ", "x", "none", "null", "nan", "1e5", "1_0", "0x1F", "010", "yes", "é", "名前", "a/b", "../x", "/etc/passwd",
         "~", "a\nb", "a\0b", "a:b", "hf:", "hf:./nowhere", "file:", "csv:", "csv:table.csv", "resnet:0", "resnet:1000000",
         "resnet:-2", "mlp:", "mlp:1000000000-1000000000", "wrn:10-1", "wrn:10-99999999", "no.such:Thing", "os:system",
         "torch.nn:Linear", "stillhouse:Nothing", "digits", "kd", "{}", "[1", "=", "%s", "{0}", "x" * 3000]
    ),
    st.text(max_size=6),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["kind", "name", "model", "path", "lr", "start", "end", 1, None, True]),
                st.text(max_size=4),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


def places(values, path=()):
    """The paths of everything within nested mappings and lists."""
    found = [path] if path else []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mistyped(draw, key):
    """A key as a hurried person writes it."""
    text = str(key)
    at = draw(st.integers(0, max(0, len(text) - 1)))
    return draw(
        st.sampled_from(
            [text[:at] + text[at + 1 :], text[:at] + "x" + text[at:], text.upper(), text + " ", text + ".", "__class__"]
        )
    )


@st.composite
def damaged(draw):
    """A recipe's values with one to three things wrong (or, by luck, still right)."""
    values = copy.deepcopy(VALUES[draw(st.sampled_from(SOURCES))])
    for _ in range(draw(st.integers(1, 3))):
        *heads, last = draw(st.sampled_from(places(values) or [("method",)]))
        here = values
        for head in heads:
            here = here[head]
        match draw(st.sampled_from(["set", "set", "set", "key", "drop", "wrap", "unwrap", "move", "add"])):
            case "set":
                here[last] = draw(TREES)
            case "key" if isinstance(here, dict):
                here[mistyped(draw, last)] = here.pop(last)
            case "drop":
                del here[last]
            case "wrap":
                here[last] = draw(
                    st.sampled_from([[here[last]], {"kind": here[last]}, {last: here[last]}, str(here[last])])
                )
            case "unwrap" if isinstance(here[last], dict) and here[last]:
                here[last] = next(iter(here[last].values()))
            case "move":
                values[draw(st.sampled_from(["run", "data", "student", "also"]))] = here[last]
            case _:
                if isinstance(here, dict):
                    here[
                        draw(
                            st.sampled_from(
                                ["kind", "seed", "run", "lr", "optimizer", "teacher", "é", "model_config", "data"]
                            )
                        )
                    ] = draw(TREES)
    return values


def reads(read_recipe):
    """Read a recipe: it is valid and reads back equal from what it writes, or one sentence says why not."""
    with watched():
        try:
            recipe = read_recipe()
        except UserError as error:
            check_sentence(str(error))
            return
        assert isinstance(recipe, Recipe)
        again = Path("again.yaml")
        recipe.write(again)
        try:
            # A NaN within fields that somebody else will read is not equal to itself.
            assert json.dumps(load_recipe(again).dump()) == json.dumps(recipe.dump())
        finally:
            again.unlink()


# Recipes as text -------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)
)
PIECES = [
    "!!python/object/apply:os.system ['touch ../neighbour/owned']",
    "!!python/name:os.system",
    "!!python/object/new:pathlib.Path ['x']",
    "!ruby/object:Gem {}",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2001-12-14",
    "2001-12-14t21:59:43.10-05:00",
    "190:20:30",
    "9" * 5000,
    "-" + "9" * 400,
    "1e99999",
    ".nan",
    "-.inf",
    "0o17",
    "&r [*r]",
    "&r {r: *r}",
    "*nowhere",
    "[" * 500,
    "{a: " * 120 + "1" + "}" * 120,
    "[" * 300 + "]" * 300,
    "'" + "x" * 5000 + "'",
    "|\n  a\n  b\n",
    '"\\x00\\ud800"',
    "? [a, b]\n: 1",
    "<<: {epochs: 1}",
    "@",
    "%YAML 1.1",
    "{a: 1, a: 2}",
    "{}",
    "[]",
    "~",
    "",
]
LINES = [
    *(
        f"{key}: {piece}"
        for piece in PIECES
        for key in ("student", "epochs", "data", "run", "weight_ce", "new", "method")
    ),
    BOMB + "student: *a8",
    BOMB + "augment: {kind: *a8}",
    BOMB + "teacher: {kind: trained, model: {kind: cnn, channels: *a8}}",
    "epochs: 1\nepochs: 2",
    "method: kd\nmethod: sinkd",
    "---",
    "...\n---\nmethod: kd",
    "\t- x",
    "- x",
    "\ufeff",
    "# " + "x" * 1000,
    "'unclosed",
    "a: b: c",
    "method kd",
    "\0",
    "\x1b[31m: red",
    "\u2028: line",
]


@st.composite
def texts(draw):
    """A recipe's bytes, with lines put in, taken out or doubled, or bytes changed."""
    source = draw(st.sampled_from(SOURCES))
    lines = (RECIPES / f"{source}.yaml").read_text().splitlines()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines)))
        match draw(st.sampled_from(["put", "put", "put", "drop", "double", "indent"])):
            case "put":
                lines.insert(at, draw(st.sampled_from(LINES)))
            case "drop":
                del lines[at : at + 1]
            case "double":
                lines[at:at] = lines[at : at + 1]
            case "indent":
                lines[at : at + 1] = [" " * draw(st.integers(1, 4)) + line for line in lines[at : at + 1]]
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


# Overrides -------------------------------------------------------------------------------------------------------------

KEYS = sorted({".".join(map(str, path)) for values in VALUES.values() for path in places(values) if "" not in path})


@st.composite
def overrides(draw):
    """``key=value`` as it may be typed, or nearly."""
    key = draw(
        st.sampled_from(
            [*KEYS, "seed", "run.device", "run.log_every", "temperature", "weight_ce.start", "also", "patience"]
        )
    )
    if draw(st.integers(0, 2)) == 0:
        key = draw(
            st.sampled_from(
                [key + ".x", "x." + key, key + ".", "." + key, key.replace(".", ".."), key.upper(), "", ".", "..", "kind", "é",
                 "a" * 500, "__class__", "model_fields", "run.run", key + ".kind", "0", "method", "data.kind", "a b", "a\nb",
                 "teacher.model.kind", "teacher.0", "student.channels.0", mistyped(draw, key)]
            )
        )  # fmt: skip
    value = draw(
        st.one_of(
            st.sampled_from(PIECES),
            st.sampled_from(
                ["cnn", "mlp:8-8", "[1, 2]", "{start: 1, end: 0}", "{kind: cnn}", "{kind: [}", "true", "null", "none", "1e-3",
                 "10", "-1", str(10**12), "a=b", "=", "hf:x/y", "csv:table.csv", "import:x", "os:system", "resnet:20", "{", "]",
                 "digits", "{a: *b}", "!!python/name:os.system"]
            ),
            st.text(max_size=8),
        )
    )  # fmt: skip
    return draw(
        st.sampled_from(
            [f"{key}={value}", f"{key}={value}", f"{key}={value}", key, f"{key}:{value}", f"{key} = {value}"]
        )
    )


# Data and models -------------------------------------------------------------------------------------------------------

FACTS = [
    Facts({"pixel_values": (3, 8, 8)}, num_classes=3),
    Facts({"features": (2,)}, task="regression"),
    Facts({"input_ids": (6,), "attention_mask": (6,)}, num_classes=2, vocabulary_size=20),
    Facts({"pixel_values": (1, 28, 28)}, task="unlabelled", factors={"shape": 3}),
]
HUGE = st.sampled_from(
    [10**5, 10**6, 10**8, 10**9, 10**12, 2**31, 2**63, 2**64, 10**30, -(10**12), 0, -1, 1, 2, 3, 5, 17]
)


def a_field(family, kind):
    """Fields of one member of a family, of the right names and any values."""
    names = sorted(family.members[kind].model_fields)
    lists = st.lists(HUGE, min_size=1, max_size=3)
    values = st.one_of(HUGE, HUGE, lists, SCALARS)
    return st.dictionaries(st.sampled_from(names or ["kind"]), values, min_size=1, max_size=2) if names else st.just({})


MODELS = [kind for kind in ModelSpec.members if kind not in ("object", "predictor")]
TINY = {
    "hf": {"config": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "convnet": {"width": 4, "depth": 2},
    "vit": {"dim": 6, "depth": 1, "heads": 1},
    "unet": {"width": 8, "multipliers": [1], "attention": False},
    "resnet": {"depth": 8},
    "wrn": {"depth": 10, "width": 1},
    "autoencoder": {"widths": [4], "dense_widths": [8]},
}


class _OfAModel(Spec):
    model: ModelSpec


DATA = [kind for kind in DataSpec.members if kind not in ("object", "hf", "cifar10", "cifar100")]
FILES = {"csv": "table.csv", "jsonl": "lines.jsonl", "parquet": "table.csv", "folder": "bare", "import": "os:environ"}


# Command lines ---------------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(
        ["kd", "sinkd", "kdd", "qlae/small", "kd/huge", "/kd", "kd/", "good.yaml", "binary.yaml", "empty.yaml", "folder.yaml",
         "gone.yaml", "../neighbour/kept.yaml", "../neighbour", "bare", "broken", "gone", ".", "..", "/", "/etc/passwd", "", " ",
         "é", "a\nb", "a\0b", "-", "--", "-x", "--help", "x" * 5000, "table.csv", "/dev/null", "~", "a/b/c", "%s", "[bold]x[/]"]
    ),
    st.text(max_size=6),
)  # fmt: skip
OPTIONS = st.sampled_from(
    ["--out", "--out=", "--seed", "--seed=x", "--seed=-1", "--seed=1.5", "--seed=99999999999999999999999", "--sed=1", "--json",
     "--jsn", "--family", "--family=langage", "--seeds=0", "--seeds=1.5", "--seeds=x", "--no-cache", "--nocache", "--dry-run=1",
     "--format", "--format=onx", "--opset=1", "--opset=x", "--artefact", "--artefact=../x", "-o", "--", "--out=a\nb",
     "--out=a\0b", "--out=../x", "--out=/dev/null", "--out=" + "x" * 300, "--version=1", "--port=99999", "--trials=0", "--jobs=0"]
)  # fmt: skip
COMMANDS = [
    "info",
    "list",
    "run",
    "resume",
    "report",
    "claims",
    "export",
    "compare",
    "search",
    "ui",
    "ru",
    "",
    "INFO",
    "é",
]


def runs(arguments):
    """Exit code, standard output and standard error of a command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["stillhouse", *arguments]
    try:
        with (
            watched(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main()
    finally:
        sys.argv, sys.path[:] = argv, path
    return stopped.value.code, out.getvalue(), err.getvalue()


def ends_well(arguments):
    """Run a command line that trains nothing: its exit code says how it ended, and a failure is one line."""
    code, out, err = runs(arguments)
    assert code in (0, 1, 2, 130), (code, err)
    assert "Traceback" not in out + err
    if code in (1, 2) and not (code == 2 and err.startswith("Usage: ")):
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        check_sentence(err.removesuffix("\n"))
    return code


@st.composite
def command_lines(draw):
    """A command with arguments that may be right, and something that is wrong wherever it would train or serve."""
    command = draw(st.sampled_from(COMMANDS))
    arguments = draw(st.lists(WORDS, max_size=2))
    options = draw(st.lists(OPTIONS, max_size=2))
    line = [*arguments, *options]
    if command in ("run", "resume", "claims", "compare", "search", "ui"):
        # No method has such a field, no directory such a name: nothing that follows can be carried out.
        line += {"claims": ["no-such-claim"] * 3, "resume": ["no-such-run"], "ui": ["--port=-1"]}.get(
            command, ["no_such_field=1"] * 3
        )
    if draw(st.booleans()):
        line = draw(st.permutations(line))
    return [command, *line]


WRONG = [
    "data=csv:gone.csv",
    "data=table.csv",
    "data=folder:bare",
    "data=os:nothing",
    "data={kind: ring, samples: 20, train_size: 19}",
    "data={kind: csv, path: table.csv, label_column: gone}",
    "data={kind: csv, path: ../neighbour/kept.csv, label_column: a b}",
    "data={kind: digits, image_size: 4096}",
    "data={kind: digits, train_size: 99999999}",
    "student={kind: mlp, widths: [1000000000000]}",
    "student={kind: cnn, channels: [100000000]}",
    "student={kind: hf, config: {model_type: bert, hidden_size: 1000000, num_attention_heads: 1}}",
    "student={kind: vit, patch: 7}",
    "student=file:bare",
    "student=file:../neighbour",
    "student=no.such:Thing",
    "student=os:system",
    "student=diffusers:gone",
    "teacher=file:/dev/null",
    "teacher=hf:./gone",
    "teacher.model=gone.module:Net",
    "batch_size=1000000000000",
]


# Run directories -------------------------------------------------------------------------------------------------------

RUN = {
    "recipe.yaml": "method: kd\nseed: 0\nrun: {}\ndata: {kind: digits}\n",
    "run.json": '{"command": ["stillhouse", "run", "kd"], "seed": 0, "environment": {"torch": "2"}, "method": {"name": "kd"}}',
    "metrics.json": '{"test/student/accuracy": 0.5, "parameters/student": 10}',
    "metrics.jsonl": '{"stage": "student", "step": 0, "student/ce": 1.0}\n{"stage": "student", "step": 5, "student/ce": 0.5}\n',
    "cost.json": '{"student": 1.5}',
    "memory.json": '{"student": 1000}',
    "result/tables.json": '{"tables": [{"title": "t", "columns": ["a", "b"], "rows": [["student", 0.5]]}], "notes": ["n"]}',
    "result/inputs.json": '{"data": "digits", "task": "classification", "inputs": {"pixel_values": [1, 8, 8]}}',
    "result/student/model.json": '{"dtype": "float32", "class": "x:Y", "spec": {"kind": "mlp"}, "facts": {"inputs": '
    '{"pixel_values": [1, 8, 8]}, "num_classes": 10, "task": "classification", "class_names": []}}',
    "checkpoints/yields.json": '[[{"kind": "stage", "name": "student", "steps": 5, "modules": {"student": "w (2, 5)"}}]]',
    "export/export.json": '[{"format": "onnx", "file": "x", "load": "y", "largest_difference": 0.0, "latency_ms": {}}]',
}
TORN = [
    "",
    "{",
    "[]",
    "{}",
    "null",
    "0",
    "[null]",
    '{"a": NaN}',
    "[[[]]]",
    '{"tables": 3}',
    '{"student": "x"}',
    "\0",
    "\ufeff{}",
]


@st.composite
def torn_files(draw):
    """The files of a run, of which one or two were cut off, are gone, or hold something else somewhere."""
    files = dict(RUN)
    for name in draw(st.lists(st.sampled_from(list(RUN)), min_size=1, max_size=2, unique=True)):
        values = json.loads(files[name]) if name.endswith(".json") and files[name] else None
        found = places(values)
        match draw(st.sampled_from(["inside", "inside", "whole", "gone", "cut"])):
            case "inside" if found:
                *heads, last = draw(st.sampled_from(found))
                here = values
                for head in heads:
                    here = here[head]
                here[last] = draw(TREES)
                files[name] = json.dumps(values, default=str)
            case "gone":
                files[name] = None
            case "cut":
                files[name] = (files[name] or "")[: draw(st.integers(0, 40))]
            case _:
                files[name] = draw(st.sampled_from(TORN))
    return files


# The cases ---------------------------------------------------------------------------------------------------------------

# Two classes, as workers that run tests side by side share them out by class.


class TestRecipes:
    """What is written in files and overrides."""

    @damaging(700)
    @given(values=damaged())
    def test_recipes_with_damaged_values(self, house, values):
        reads(lambda: build_recipe(values, where="fuzzed.yaml"))

    @damaging(400)
    @given(content=st.one_of(texts(), texts(), texts(), st.binary(max_size=60)))
    def test_recipes_with_damaged_text(self, house, content):
        Path("fuzzed.yaml").write_bytes(content)
        before = tree(house)
        reads(lambda: load_recipe("fuzzed.yaml"))
        assert tree(house).keys() == before.keys()

    @damaging(400)
    @given(
        source=st.sampled_from(
            ["kd", "sinkd", "dmd2/small", "qlae", "supervised", "datadam/small", "beta-tcvae", "good.yaml"]
        ),
        given_overrides=st.lists(overrides(), min_size=1, max_size=3),
        seed=st.sampled_from([None, None, 0, 3]),
    )
    def test_overrides(self, house, source, given_overrides, seed):
        reads(lambda: load_recipe(source, given_overrides, seed=seed))


class TestWhatIsBuiltAndRun:
    """Models, data, command lines, run directories."""

    @damaging(300)
    @given(data=st.data())
    def test_models_of_any_size_are_built_or_refused(self, house, data):
        kind = data.draw(st.sampled_from(MODELS))
        value = {"kind": kind, **TINY.get(kind, {}), **data.draw(a_field(ModelSpec, kind))}
        if kind == "hf" and data.draw(st.booleans()):
            value["config"] = {
                **TINY["hf"]["config"],
                data.draw(st.sampled_from(["hidden_size", "num_hidden_layers", "vocab_size"])): data.draw(HUGE),
            }
        text = data.draw(st.one_of(st.none(), st.none(), st.none(), SCALARS))
        facts = data.draw(st.sampled_from(FACTS))
        with watched():
            try:
                holder = read(_OfAModel, {"model": value if text is None else text})
                holder.model.build(facts)
            except UserError as error:
                check_sentence(str(error))
            except OSError:
                pass  # Such as a name that is too long: the command line says so in a sentence.

    @damaging(220)
    @given(data=st.data())
    def test_data_of_any_fields_is_loaded_or_refused(self, house, data):
        kind = data.draw(st.sampled_from(DATA))
        small = {"sprites": {"scales": 1, "orientations": 2, "positions": 2}, "ring": {"samples": 100}}.get(kind, {})
        value = {
            "kind": kind,
            **small,
            **({"path": FILES[kind]} if kind in FILES else {}),
            **data.draw(a_field(DataSpec, kind)),
        }
        text = data.draw(st.one_of(st.none(), st.none(), st.none(), SCALARS))
        before = tree(house)
        with watched():
            try:
                loaded = read_spec(value if text is None else text).load()
                assert loaded.split("train").batch([0]).size == 1
            except UserError as error:
                check_sentence(str(error))
        assert tree(house) == before

    @damaging(500)
    @given(line=command_lines())
    def test_command_lines(self, house, line):
        before = tree(house)
        ends_well(line)
        assert tree(house) == before

    @damaging(50)
    @given(
        name=st.sampled_from(["kd", "sinkd"]),
        wrong=st.lists(st.sampled_from(WRONG), min_size=1, max_size=2),
        more=st.lists(overrides(), max_size=1),
    )
    def test_dry_runs_of_what_cannot_be_built(self, house, name, wrong, more):
        before = tree(house)
        ends_well(["run", name, *wrong, *more, "--dry-run"])
        assert tree(house) == before

    @damaging(80)
    @given(
        files=torn_files(),
        command=st.sampled_from(
            [["report"], ["report"], ["export"], ["export", "--format=onnx"], ["export", "--artefact=x"]]
        ),
    )
    def test_run_directories_with_damaged_files(self, house, files, command):
        place = house / "work" / "torn"
        for name, text in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_text(text, errors="replace")
        before = {path for path in tree(house) if not path.startswith(str(place))}
        try:
            ends_well([*command, "torn"])
            assert {path for path in tree(house) if not path.startswith(str(place))} == before
        finally:
            shutil.rmtree(place)

"""The command line. Help and lists import neither torch nor pydantic: each command imports what it needs when called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from stillhouse.errors import StillhouseError

app = typer.Typer(
    name="stillhouse",
    help="Distillation and disentanglement: one command runs a published method, survives anything, says what it did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Typer keeps its copy of click private; the base of its usage errors is two steps above a public one.
CommandError: type[Exception] = typer.BadParameter.__mro__[2]

Name = Annotated[str, typer.Argument(metavar="NAME", help="a method's name, as in 'stillhouse list'")]
Source = Annotated[
    str, typer.Argument(metavar="NAME|RECIPE.yaml", help="a method (its small recipe), NAME/SCALE, or a file")
]
Overrides = Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="fields to change")]  # noqa: UP045
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Jobs = Annotated[int, typer.Option(help="worker processes on this machine", min=1)]
Storage = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="URL|FILE", help="the queue that workers share; a file in the directory by default"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"stillhouse {version('stillhouse')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options of the command line as a whole."""


@app.command("list")
def list_methods(
    family: Annotated[Optional[str], typer.Option(help="only this family")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """List every system and classic."""
    from stillhouse.errors import UserError, nearest
    from stillhouse.registry import entries

    found = entries()
    if family is not None:
        families = sorted({entry["family"] for entry in found})
        if family not in families:
            raise UserError(f"--family: there is no family {family!r}; {nearest(family, families)}")
        found = [entry for entry in found if entry["family"] == family]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from stillhouse.cli.listing import show

    show(found)


@app.command()
def info(name: Name, as_json: AsJson = False) -> None:
    """Show what a method is for, its fields, its recipes, its claim and how it was verified."""
    from stillhouse.cli.info import show

    show(name, as_json=as_json)


@app.command()
def run(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="run directory; runs/NAME by default")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="in place of the recipe's seed", min=0)] = None,  # noqa: UP045
    no_cache: Annotated[bool, typer.Option("--no-cache", help="train teachers anew, within the run directory")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="train nothing: say what would be done, and forecast its time and memory")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: print the forecast as JSON")] = False,
    debug: Debug = False,
) -> None:
    """Run a method: train, measure, write the report."""
    if as_json and not dry_run:
        raise typer.BadParameter("--json prints the forecast of a dry run; give --dry-run as well")
    if dry_run:
        from stillhouse.cli.forecasting import dry

        dry(source, overrides or [], seed=seed, cache=not no_cache, as_json=as_json)
    else:
        from stillhouse.cli.running import start

        start(source, overrides or [], out=out, seed=seed, cache=not no_cache)


@app.command()
def resume(directory: Directory, debug: Debug = False) -> None:
    """Continue an interrupted run where it stopped."""
    from stillhouse.cli.running import go_on

    go_on(directory)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="of a run, a comparison or a search")],
    debug: Debug = False,
) -> None:
    """Write the page of a run, a comparison or a search again."""
    from stillhouse.report import rebuild

    print(rebuild(directory))


@app.command()
def ui(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where the runs are")] = Path("runs"),
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8350,
    debug: Debug = False,
) -> None:
    """Show the runs below a directory on a local page: list, filter, compare. It only reads, for this machine alone."""
    from stillhouse.cli.viewing import show

    show(directory, port)


@app.command("export")
def export_artefact(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory, or that of a saved model")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="safetensors, onnx or torch-export")
    ] = "safetensors",
    artefact: Annotated[Optional[str], typer.Option(help="which one, where a run ships several models")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(metavar="DIR", help="where it goes; DIR/export by default")] = None,  # noqa: UP045
    opset: Annotated[Optional[int], typer.Option(help="operator set of ONNX")] = None,  # noqa: UP045
    debug: Debug = False,
) -> None:
    """Write the trained model alone in another format, compared with PyTorch before it is kept."""
    from stillhouse.cli.exporting import write

    write(directory, form, artefact=artefact, out=out, opset=opset)


@app.command()
def claims(
    names: Annotated[Optional[list[str]], typer.Argument(metavar="[NAME]...", help="systems; all by default")] = None,  # noqa: UP045
    seeds: Annotated[int | None, typer.Option(help="so many seeds in place of the claim's own number", min=1)] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="where NAME.json is recorded; claims/results by default"),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the comparisons that systems claim to win, say whether they hold, and record the results."""
    from stillhouse.cli.claiming import judge

    judge(names or [], seeds=seeds, out=out, as_json=as_json)


@app.command()
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|RECIPE.yaml... [KEY=VALUE]...", help="what is compared, then fields for all of it"
        ),
    ],
    seeds: Annotated[int, typer.Option(help="so many seeds of each", min=1)] = 3,
    baseline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ARM", help="what the others are compared with; the plain student by default"),
    ] = None,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME[:max|:min]", help="what counts as quality; the first test number by default"),
    ] = None,
    own: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="FIELD", help="a shared field that each keeps from its own recipe; may be repeated"),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="below runs/compare by default"),
    ] = None,
    jobs: Jobs = 1,
    storage: Storage = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods on equal terms: one teacher, equal budgets, every seed, differences told from noise, cost."""
    from stillhouse.cli.comparing import compare

    compare(
        arguments,
        seeds=seeds,
        baseline=baseline,
        metric=metric,
        own=own or [],
        out=out,
        jobs=jobs,
        storage=storage,
        as_json=as_json,
    )


@app.command()
def search(
    source: Source,
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[KEY=LOW..HIGH | KEY=A|B | KEY=VALUE]...",
            help="what is tried (weights and temperatures by default), and fixed values",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="how many recipes are tried", min=1)] = 20,
    seed: Annotated[Optional[int], typer.Option(help="of the runs and of the draws", min=0)] = None,  # noqa: UP045
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="below runs/search by default"),
    ] = None,
    jobs: Jobs = 1,
    storage: Storage = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search for the recipe that is best on the validation split; write it out."""
    from stillhouse.cli.searching import search

    search(source, arguments or [], trials=trials, seed=seed, out=out, jobs=jobs, storage=storage, as_json=as_json)


@app.command("evaluate-dataset")
def evaluate_dataset(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a distilled set: an export, a Hugging Face directory, class folders")
    ],
    overrides: Overrides = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", metavar="DATA", help="the real data set; as the set's card says by default"),
    ] = None,
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,NAME,...", help="networks, such as convnet,resnet,vit; as the card says by default"),
    ] = None,
    seeds: Annotated[Optional[int], typer.Option(help="fresh networks for each number; 5 by default", min=1)] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="of all draws", min=0)] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="below runs/evaluate-dataset by default"),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="train on the whole data anew")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Judge a distilled data set fairly: against random images under the same labels and augmentation."""
    from stillhouse.cli.evaluating import evaluate

    evaluate(
        directory,
        overrides or [],
        data=data,
        models=models,
        seeds=seeds,
        seed=seed,
        out=out,
        cache=not no_cache,
        as_json=as_json,
    )


def main() -> None:
    """Run the command line: user errors are one sentence and exit code 2; Ctrl-C is 130."""
    debug = "--debug" in sys.argv
    # Import paths in recipes (pkg.mod:Name) may name modules of the directory one works in.
    sys.path.insert(0, "")
    try:
        if any("\0" in argument for argument in sys.argv):
            raise CommandError("an argument holds the character NUL, which no name of a file or method has.")
        code = typer.main.get_command(app).main(standalone_mode=False)
    except StillhouseError as error:
        if debug:
            raise
        _say(str(error))
        code = error.exit_code
    except CommandError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
        else:
            _say(error.format_message() if hasattr(error, "format_message") else str(error))
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = 0
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        if debug:
            raise
        _say(
            f"{getattr(error, 'filename', None) or 'a file'} cannot be used: {getattr(error, 'strerror', None) or error}."
        )
        code = 2
    except (MemoryError, RuntimeError) as error:
        from stillhouse.memory import out_of_memory

        if debug or not out_of_memory(error):
            raise
        _say("there is not enough memory for this; take smaller models or batches.")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(sentence: str) -> None:
    print(f"error: {StillhouseError(sentence)}", file=sys.stderr)

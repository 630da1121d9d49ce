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
        bool, typer.Option("--dry-run", help="read the recipe, build data and models, train nothing")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a method: train, measure, write the report."""
    from stillhouse.cli.running import dry, start

    if dry_run:
        dry(source, overrides or [], seed=seed)
    else:
        start(source, overrides or [], out=out, seed=seed, cache=not no_cache)


@app.command()
def resume(directory: Directory, debug: Debug = False) -> None:
    """Continue an interrupted run where it stopped."""
    from stillhouse.cli.running import go_on

    go_on(directory)


@app.command()
def report(directory: Directory, debug: Debug = False) -> None:
    """Write the report page of a run again."""
    from stillhouse.report import build

    print(build(directory))


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


def main() -> None:
    """Run the command line: user errors are one sentence and exit code 2; Ctrl-C is 130."""
    debug = "--debug" in sys.argv
    # Import paths in recipes (pkg.mod:Name) may name modules of the directory one works in.
    sys.path.insert(0, "")
    try:
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
    sys.exit(code if isinstance(code, int) else 0)


def _say(sentence: str) -> None:
    print("error: " + " ".join(sentence.split()), file=sys.stderr)

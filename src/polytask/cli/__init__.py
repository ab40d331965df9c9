"""The command line: `polytask demo | adapt | predict | compare | compose | merge | library | methods`.

Nothing heavy is imported before a command runs, so that help comes at once. Exit status: 0 done, 1 the work failed or
was stopped, 2 wrong use. An error is one line on standard error; POLYTASK_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from polytask import __version__
from polytask.cli import adapt, compare, compose, demo, library, merge, methods, predict
from polytask.errors import PolytaskError

app = typer.Typer(
    name="polytask",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("adapt")(adapt.adapt)
app.command("predict")(predict.predict)
app.command("compare")(compare.compare)
app.command("compose")(compose.compose)
app.command("merge")(merge.merge)
app.add_typer(library.app, name="library")
app.command("methods")(methods.methods)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"polytask {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """One frozen language model, many tasks: teach it a task, keep what it learned, use it.

    See it work, offline, in a minute or two:
      polytask demo
    Learn a task from your own file:
      polytask adapt tickets.csv --input text --output team
    Ask; the adapter that knows answers:
      echo "my card was charged twice" | polytask predict
    Find the method that is best on your task:
      polytask compare tickets.csv --methods head,lora,full
    See what has been learned so far:
      polytask library list

    Every command explains itself: [bold]polytask COMMAND --help[/bold].
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default); its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it has an ending of its own for each of the exceptions below.
        with command.make_context("polytask", list(sys.argv[1:] if arguments is None else arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:
        # Who read the output has gone; what is still buffered must not complain when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 1)
    except PolytaskError as error:
        return _fail(str(error), error.status)
    except typer.TyperException as error:
        wrong = getattr(error, "ctx", None)
        path = wrong.command_path if wrong else "polytask"
        return _fail(f"{error.format_message()} (see `{path} --help`)", 2)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error} (POLYTASK_DEBUG=1 shows where; please report it)", 1)
    return 0


def _fail(message: str, status: int) -> int:
    """One line on standard error. Called while an exception is handled."""
    if os.environ.get("POLYTASK_DEBUG") == "1":
        traceback.print_exc()
    print("polytask:", " ".join(message.split()), file=sys.stderr)
    return status

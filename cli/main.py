"""The `beeline` command: its subcommands, each importing its room only when it is called."""

from __future__ import annotations

import signal
import sys
import warnings

import typer

from beeline.errors import BeelineError, short
from cli.archive import app as archive
from cli.bench import app as bench
from cli.console import say
from cli.data import app as data
from cli.doctor import doctor
from cli.evaluate import evaluate
from cli.predict import predict
from cli.quickstart import quickstart
from cli.search import search
from cli.serve import app as serve
from cli.train import train
from host.signals import Interrupted

app = typer.Typer(
    name="beeline",
    help="From a trained vision model to a fast, measured, hard-to-break endpoint.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(quickstart)
app.command()(train)
app.command()(search)
app.add_typer(archive, name="archive")
app.add_typer(serve, name="serve")
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.command()(predict)
app.command()(evaluate)
app.command()(doctor)


def main() -> None:
    """Run the command line. An error is one sentence and an exit code; `--debug` shows its traceback."""
    debug = "--debug" in sys.argv
    # Such as Pillow's "corrupt EXIF data": what is wrong with a picture is in its answer, or in the list of damage.
    if not (debug or sys.warnoptions):
        warnings.simplefilter("ignore")
    # On SIGTERM a command leaves through its `with` blocks, so that no temporary folder stays.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app(args=[word for word in sys.argv[1:] if word != "--debug"], prog_name="beeline")
    except BeelineError as error:
        if debug:
            raise
        say(f"beeline: {error}")
        sys.exit(error.exit_code)
    except Interrupted as interruption:
        say(f"beeline: stopped before there was a result ({interruption})")
        sys.exit(interruption.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:
            why, code = f"{error.filename} cannot be used ({error.strerror}); make it writable, or name another", 1
        else:
            why, code = f"unexpected {type(error).__name__}: {short(error, 2_000)}; run it again with --debug", 2
        say(f"beeline: {why}")
        sys.exit(code)

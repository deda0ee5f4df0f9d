"""The `beeline` command: its subcommands, each imported from its room only when it is called."""

from __future__ import annotations

import sys

import typer

from beeline.errors import BeelineError
from cli.console import err

app = typer.Typer(
    name="beeline",
    help="From a trained vision model to a fast, measured, hard-to-break endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error of ours is one sentence and an exit code, `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(args=arguments, prog_name="beeline")
    except BeelineError as error:
        if debug:
            raise
        err.print(f"beeline: {error}", markup=False)
        sys.exit(error.exit_code)

"""The output of every command: plain lines or one JSON object, and an exit code."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from beeline.errors import plain

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
# Progress goes to stderr and results to stdout, so that `beeline ... --json | jq` always works.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    err.print(plain(text), markup=False)


def result(values: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result to stdout: one line of JSON, or `text` for people."""
    if as_json:
        sys.stdout.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        out.print(plain(text), markup=False)


def fail(code: int = 1) -> NoReturn:
    """End the command with an exit code, after its result; 1 means that what was asked for does not hold."""
    raise typer.Exit(code)

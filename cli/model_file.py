"""A model that somebody brings: from the options of `archive build` to an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from beeline.errors import BeelineError

if TYPE_CHECKING:
    from archive.export import ExportRequest


def request(
    model: Path,
    labels: Path | None,
    preset: tuple[str, str | None],
    overrides: dict[str, object],
    facts: dict[str, object],
) -> ExportRequest:
    """Return what the options of `archive build` say of a model.

    Args:
        model: its file, for the error.
        labels: a file of them.
        preset: its name, and the architecture.
        overrides: of the preset's geometry and photometry.
        facts: everything else that an export asks for.

    Raises:
        BeelineError: without labels, or for what does not fit together.
    """
    from archive import presets
    from archive.export import ExportRequest
    from archive.labels import read_labels

    if labels is None:
        raise BeelineError(f"the model {model} comes without labels; add --labels FILE, one a line in output order")
    chosen = presets.find_preset(*preset).override(**overrides)  # type: ignore[arg-type]
    return ExportRequest(
        labels=read_labels(labels),
        geometry=chosen.geometry,
        mean=chosen.mean,
        std=chosen.std,
        architecture=preset[1] or "unknown",
        **facts,  # type: ignore[arg-type]
    )


def export(model: Path, architecture: str | None, request: ExportRequest, out: Path, uint8_input: bool) -> None:
    """Export a model's file into `out`, with golden pictures.

    Raises:
        BeelineError: why it cannot be.
    """
    from archive.artifact import load_network
    from archive.export import export_folder

    export_folder(load_network(model, architecture), request, out, takes_uint8=uint8_input)


def numbers(key: str, text: str | None) -> list[float] | None:
    """Return the numbers of an option such as `0.5,0.5,0.5`.

    Raises:
        BeelineError: for what is none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BeelineError(f"--{key} is {text!r}; allowed: three numbers, as 0.5,0.5,0.5") from error

"""Sample pictures for the page, from where a build knows them: a named folder, or the data of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from beeline.errors import ArchiveError, BeelineError

if TYPE_CHECKING:
    from archive.build import Built
    from archive.samples import Sample


def named(folder: Path) -> list[Sample]:
    """Return the samples of a folder that somebody named.

    Raises:
        ArchiveError: when it holds none.
    """
    from archive import samples

    chosen = samples.choose(samples.in_folder(folder))
    if not chosen:
        raise ArchiveError(
            f"the samples' folder {folder} holds no whole picture under {samples.MAX_BYTES / 1e6:g} MB that browsers "
            "show (JPEG, PNG, GIF, WebP, AVIF, BMP); add some, or leave it out"
        )
    return chosen


def put(built: Built, export: Path, folder: Path | None, chosen: list[Sample] | None) -> tuple[Path | None, str]:
    """Put an archive's samples beside it; return their folder and a clause on them.

    Args:
        built: the archive; of one that was there already, samples that are there are kept.
        export: what it was built from, perhaps in a run.
        folder: what was named.
        chosen: the samples in it; None takes the run's.
    """
    from archive import samples

    store, spec = built.path.parent, built.spec
    there = samples.place(store, spec)
    if chosen is None and built.reused and (there / samples.LIST).is_file():
        return there, "the samples are the same as before"
    source = "" if folder is None else folder.resolve().name
    why = "the model did not come from a run; --samples FOLDER names some"
    if chosen is None and (run := export.resolve().parent).joinpath("run.json").is_file():
        chosen, source, why = _of_run(run)
    target = samples.replace(store, spec, chosen or [], source)
    if target is None:
        return None, f"no samples: {why}"
    return target, f"{len(chosen or [])} samples from {source}"


def _of_run(folder: Path) -> tuple[list[Sample], str, str]:
    """Return a run's samples, its data's name, and why there are none."""
    from archive import samples
    from train.runs import open_run, validation_pictures

    try:
        run = open_run(folder)
        found = validation_pictures(run)
    except BeelineError as error:
        return [], "", f"{error}, or name others with --samples FOLDER"
    chosen = samples.choose((one.path, found.labels[one.truth]) for one in found.pictures)
    return chosen, str(run.record["data"]["name"]), "no validation picture is small enough and shown by browsers"

"""The validation pictures of a finished run, found again: no download, and only if they are the same still."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from train.data import CACHE, VARIABLE, LabelledPictures, read
from train.errors import DataError
from train.runs import Run


def pictures(run: Run, cache: Path = CACHE, environ: Mapping[str, str] = os.environ) -> LabelledPictures:
    """Return the pictures that the run was judged by.

    They are looked for where the run found them, where `BEELINE_DATA` points, and among the downloaded and
    generated ones.

    Args:
        run: the finished run.
        cache: where downloaded and generated pictures are kept.
        environ: the environment to read, for tests.

    Raises:
        DataError: when they are gone or changed.
    """
    config, recorded = run.config().data, run.record["data"]
    named = [folder for folder in (config.folder, environ.get(VARIABLE)) if folder]
    kept = cache.glob("generated-*" if recorded["generated"] else f"{recorded['name']}-*")
    folders = [*(Path(folder).expanduser() for folder in named), *sorted(path for path in kept if path.is_dir())]
    for folder in dict.fromkeys(folders):
        try:
            data = read(folder, config.held_out, recorded["name"])
        except (DataError, OSError):
            continue
        if data.digest == recorded["digest"]:
            return data.val
    where = ", ".join(map(str, dict.fromkeys(folders))) or str(cache)
    raise DataError(f"the pictures of the run {run.id} are no longer as they were in {where}; bring them back")

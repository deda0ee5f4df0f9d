"""Variants: one archive under several names, so that one server serves it in several configurations at once.

Neither server changes a model's batch size or delay while it runs, and TorchServe takes no other model then.
Beside each other the variants start once, and a turn of one follows a turn of another at once: workers
without requests take memory and no processor time.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import javaproperties

from archive.mar import MANIFEST
from bench.tune.model import Model
from bench.tune.settings import Settings
from serve.properties import VARIABLES

_STARTUP_SECONDS = 600
_OURS = ("BATCH_SIZE", "WORKERS", "LINGER_MS")


def write(model: Model, wanted: Sequence[Settings], folder: Path) -> tuple[list[Path], Path]:
    """Write one archive for each configuration and the configuration file that serves them.

    Args:
        model: whose archive and other settings are kept.
        wanted: all with the same number of threads.
        folder: an empty one.

    Returns:
        The archives, in the order of `wanted`, each named by its configuration's label; and the file.
    """
    paths = [folder / f"{settings.label}.mar" for settings in wanted]
    targets = [zipfile.ZipFile(path, "w") for path in paths]
    try:
        with zipfile.ZipFile(model.archive.path) as source:
            for info in source.infolist():
                data = source.read(info)
                for target, settings in zip(targets, wanted, strict=True):
                    # Stored, not compressed: a server unpacks it once, and it is gone after that.
                    target.writestr(info.filename, _named(data, settings) if info.filename == MANIFEST else data)
    finally:
        for target in targets:
            target.close()
    return paths, _configuration(model, wanted, folder)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would win over the variants' file; `Model.properties` has it already."""
    return {name: value for name, value in environ.items() if name not in VARIABLES and name not in _OURS}


def _named(manifest: bytes, settings: Settings) -> bytes:
    values = json.loads(manifest)
    values["model"]["modelName"] = settings.label
    return json.dumps(values).encode()


def _configuration(model: Model, wanted: Sequence[Settings], folder: Path) -> Path:
    """Write the person's own numbers with the variants in place of the models; addresses are free ones."""
    entries = model.properties.models.get(model.name, {})
    entry = entries.get(model.archive.version) or next(iter(entries.values()), None)
    timeout = {} if entry is None else {"responseTimeout": entry.numbers.get("responseTimeout", 120)}
    models = {
        settings.label: {
            model.archive.version: {
                "minWorkers": settings.workers,
                "maxWorkers": settings.workers,
                "batchSize": settings.batch_size,
                "maxBatchDelay": settings.max_batch_delay,
                "startupTimeout": _STARTUP_SECONDS,
                **timeout,
            }
        }
        for settings in wanted
    }
    values = {key: str(value) for key, value in model.properties.numbers.items()}
    if "vmargs" in model.properties.texts:
        values["vmargs"] = model.properties.texts["vmargs"]
    values |= {"beeline_threads": str(wanted[0].threads), "models": json.dumps(models)}
    path = folder / "config.properties"
    with path.open("w", encoding="utf-8") as file:
        javaproperties.dump(values, file, timestamp=False)
    return path

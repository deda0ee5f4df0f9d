"""MAR-INF/MANIFEST.json: what torch-model-archiver writes, with nothing in it that changes from day to day."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from archive.safety import MANIFEST
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec

CREATED = "01/01/1980 00:00:00"
CONFIG_FILE = "model-config.yaml"
HANDLER = "vision_handler.py"


def canonical(raw: bytes) -> bytes:
    """Return the archiver's manifest with a fixed date, sorted and indented."""
    values = json.loads(raw)
    values["createdOn"] = CREATED
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def check(raw: bytes, spec: ModelSpec, files: Collection[str]) -> str:
    """Compare a manifest with the spec and the files beside it, every key of it.

    Args:
        raw: the manifest's bytes.
        spec: of the model in the same archive.
        files: names of the archive's files.

    Returns:
        The handler's file name.

    Raises:
        ArchiveError: naming the first key that differs; any further key, since some of them make a server
            install packages.
    """
    try:
        values: dict[str, Any] = json.loads(raw)
        model: dict[str, Any] = dict(values["model"])
        handler = str(model["handler"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error}); build it again") from error
    wanted = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "serializedFile": spec.model.file,
        "handler": handler,
        **({"configFile": CONFIG_FILE} if CONFIG_FILE in files else {}),
    }
    _compare("model.", wanted, model)
    top = {"createdOn": CREATED, "runtime": "python", "archiverVersion": values.get("archiverVersion")}
    _compare("", top, {key: value for key, value in values.items() if key != "model"})
    if handler not in files or not handler.endswith(".py"):
        raise ArchiveError(f"{MANIFEST} names the handler {handler!r}, which is not in the archive; build it again")
    return handler


def _compare(prefix: str, wanted: dict[str, Any], actual: dict[str, Any]) -> None:
    for key in (*wanted, *actual):
        if wanted.get(key) != actual.get(key):
            raise ArchiveError(
                f"{MANIFEST} has {prefix}{key} {actual.get(key)!r}, expected {wanted.get(key)!r}; "
                "it was changed since: build it again"
            )

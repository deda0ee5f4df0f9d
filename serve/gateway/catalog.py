"""The gateway's catalog, which are read-only files: the list of models, each model's card, sample pictures."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archive.mar import Archive
from beeline.errors import BeelineError
from host.files import write_json
from serve.gateway.runtime import open_to_all
from serve.gateway.settings import Settings

if TYPE_CHECKING:
    from serve.config import Configuration

# Reads an archive's card; the code for that is in `archive`, which this room does not import.
Card = Callable[[Path], Mapping[str, Any]]
SAMPLES = "samples"
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def write(
    settings: Settings,
    configuration: Configuration,
    archives: Sequence[Archive],
    built: Mapping[str, Path],
    server: str,
    card: Card | None,
) -> None:
    """Write `catalog.json`, the cards and the samples below the document root.

    `configuration` has the models in the order of `archives`. `built` is the path at which each archive was built, by
    file name; the samples are in that folder. `server` is its name for people.
    """
    models = []
    for archive, model in zip(archives, configuration.models, strict=True):
        folder = settings.web / "catalog" / archive.model
        folder.mkdir(parents=True, exist_ok=True)
        values = _card(archive, card)
        write_json(folder / f"{archive.version}.json", values, 0o644)
        labels = values["spec"].get("labels")
        path = f"/predictions/{archive.model}"
        models.append(
            {
                "name": archive.model,
                "version": archive.version,
                "default": model.default_version,
                "task": values["spec"].get("task", "classify"),
                "labels": None if labels is None else len(labels),
                "predictions": path if model.default_version else f"{path}/{archive.version}",
                "card": f"/catalog/{archive.model}/{archive.version}.json",
                "samples": _samples(settings, archive, built[archive.path.name].parent),
                "batch_size": model.batch_size.value,
                "max_batch_delay_ms": model.max_batch_delay.value,
            }
        )
    limits = {
        "bytes": settings.max_image,
        "pixels": configuration.numbers["beeline_max_image_pixels"].value,
        "in_flight": settings.in_flight * len(settings.backends),
        "deadline_s": settings.deadline,
    }
    gateway = {"kind": "nginx", "version": settings.version}
    who = ("token" if settings.feedback_token else "here") if settings.feedback else ""
    catalog = {"models": models, "limits": limits, "server": server, "gateway": gateway, "feedback": who}
    write_json(settings.web / "catalog.json", catalog, 0o644)
    open_to_all(settings.web)


def add_choices(settings: Settings, choices: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Add the workers' own choices (device, precision, threads, each with its reason) to the cards."""
    for (model, version), choice in choices.items():
        path = settings.web / "catalog" / model / f"{version}.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"serving": choice}
        if values.get("serving") != choice:
            write_json(path, {**values, "serving": choice}, 0o644)


def _card(archive: Archive, card: Card | None) -> dict[str, Any]:
    # An archive of another project has no spec; it is served too.
    with contextlib.suppress(BeelineError):
        if card is not None:
            # Without the archive's path on this machine.
            return {key: value for key, value in card(archive.path).items() if key != "archive"}
    return {"spec": {"name": archive.model, "version": archive.version}}


def _samples(settings: Settings, archive: Archive, store: Path) -> list[dict[str, Any]]:
    """Copy the samples of the archive's store, else its golden pictures; return their entries in the catalog."""
    target = settings.web / SAMPLES / archive.model / archive.version
    target.mkdir(parents=True, exist_ok=True)
    source = store / SAMPLES / archive.model / archive.version
    samples: list[dict[str, Any]] = []
    if (source / "samples.json").is_file():
        for sample in json.loads((source / "samples.json").read_text(encoding="utf-8")):
            if _SAFE.fullmatch(sample["file"]) and (source / sample["file"]).is_file():
                shutil.copyfile(source / sample["file"], target / sample["file"])
                samples.append(sample)
    for golden in archive.goldens if not samples else ():
        file = Path(golden.file).name
        if _SAFE.fullmatch(file):
            (target / file).write_bytes(archive.golden_bytes(golden))
            samples.append({"file": file, "label": golden.label, "source": "drawn for its self-test"})
    path = f"/{SAMPLES}/{archive.model}/{archive.version}"
    return [{"url": f"{path}/{one['file']}", "label": one["label"], "source": one["source"]} for one in samples]

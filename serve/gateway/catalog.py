"""What the gateway says of its models: the list, each model's card, sample pictures; read-only files."""

from __future__ import annotations

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
    from serve.config import Configuration, ModelSettings

# Reads an archive's card; given by whoever knows archives.
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

    Args:
        settings: the gateway's.
        configuration: what the models are served with, in the order of `archives`.
        archives: what is served.
        built: by file name, where each archive was built; its samples lie beside it.
        server: `torchserve` or `mms`.
        card: reads an archive's card; a model without one of ours gets its name and version.
    """
    models = []
    for archive, model in zip(archives, configuration.models, strict=True):
        folder = settings.web / "catalog" / archive.model
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{archive.version}.json", _card(archive, card), 0o644)
        models.append(_entry(model, archive, _samples(settings, archive, built[archive.path.name].parent), settings))
    limits = {
        "bytes": settings.max_image,
        "pixels": configuration.numbers["beeline_max_image_pixels"].value,
        "in_flight": settings.in_flight * len(settings.backends),
        "deadline_s": settings.deadline,
    }
    gateway = {"kind": "nginx", "version": settings.version}
    values = {"models": models, "limits": limits, "server": server, "gateway": gateway}
    write_json(settings.web / "catalog.json", values, 0o644)
    open_to_all(settings.web)


def add_choices(settings: Settings, choices: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Put what the workers chose by themselves (device, precision, threads, each with its reason) into the cards."""
    for (model, version), choice in choices.items():
        path = settings.web / "catalog" / model / f"{version}.json"
        if not path.is_file():
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("serving") != choice:
            write_json(path, {**values, "serving": choice}, 0o644)


def _card(archive: Archive, card: Card | None) -> dict[str, Any]:
    plain = {"spec": {"name": archive.model, "version": archive.version}}
    if card is None:
        return plain
    try:
        values = dict(card(archive.path))
    except BeelineError:
        # An archive made by other means has no spec of ours; it is served all the same.
        return plain
    # Where it lies on this machine is nobody's business.
    values.pop("archive", None)
    return values


def _entry(model: ModelSettings, archive: Archive, samples: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    path = f"/predictions/{archive.model}"
    return {
        "name": archive.model,
        "version": archive.version,
        "default": model.default_version,
        "labels": _labels(settings, archive),
        "predictions": path if model.default_version else f"{path}/{archive.version}",
        "card": f"/catalog/{archive.model}/{archive.version}.json",
        "samples": samples,
        "batch_size": model.batch_size.value,
        "max_batch_delay_ms": model.max_batch_delay.value,
    }


def _labels(settings: Settings, archive: Archive) -> int | None:
    values = json.loads((settings.web / "catalog" / archive.model / f"{archive.version}.json").read_text("utf-8"))
    labels = values["spec"].get("labels")
    return None if labels is None else len(labels)


def _samples(settings: Settings, archive: Archive, store: Path) -> list[dict[str, Any]]:
    """Copy the samples that lie beside the archive, else its golden pictures; return what the list says of them."""
    target = settings.web / SAMPLES / archive.model / archive.version
    target.mkdir(parents=True, exist_ok=True)
    source = store / SAMPLES / archive.model / archive.version
    found: list[dict[str, Any]] = []
    if (source / "samples.json").is_file():
        for sample in json.loads((source / "samples.json").read_text(encoding="utf-8")):
            if _SAFE.fullmatch(sample["file"]) and (source / sample["file"]).is_file():
                shutil.copyfile(source / sample["file"], target / sample["file"])
                found.append(sample)
    found = found or _golden(archive, target)
    path = f"/{SAMPLES}/{archive.model}/{archive.version}"
    return [{"url": f"{path}/{one['file']}", "label": one["label"], "source": one["source"]} for one in found]


def _golden(archive: Archive, target: Path) -> list[dict[str, Any]]:
    found = []
    for golden in archive.goldens:
        file = Path(golden.file).name
        if _SAFE.fullmatch(file):
            (target / file).write_bytes(archive.golden_bytes(golden))
            found.append({"file": file, "label": golden.label, "source": "drawn for its self-test"})
    return found

"""From a finished run to an exported folder that `archive build` takes."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beeline import pixels
from beeline.errors import ArchiveError, SpecError
from beeline.spec import EXPECTED, GOLDEN, Accuracy, Lineage, ModelSpec, Provenance
from train.config import QUICK, ExportConfig
from train.errors import RunError
from train.runs import Run

if TYPE_CHECKING:  # An earlier export is found without importing torch.
    from torch import nn

# The version of `archive.export`, `archive.graph`, `archive.outputs` and `archive.goldens`: raise it when the same
# network gives another export. A run's export of another version is made again. The number is here because those
# modules import torch, and finding an earlier export must not.
EXPORT = 2


def export(
    run: Run, naming: ExportConfig | None = None, golden: Path | None = None, blind_to: tuple[str, ...] = ()
) -> ModelSpec:
    """Write `<run>/export/` and return its spec; an earlier export that says the same is kept.

    `naming` are name, version and top-k; None takes those that the run was trained with. `golden` and `blind_to` are
    those of `archive.export.ExportRequest`; with either the export is made again. Raise `RunError` when the checkpoint
    is missing or damaged, `ArchiveError` when the model cannot be exported.
    """
    config, data = run.config(), run.record["data"]
    if naming is not None:
        config = dataclasses.replace(config, export=naming)
    described: dict[str, Any] = {
        "name": config.export.name or config.model.name.removeprefix("timm:"),
        "version": config.export.version,
        "labels": run.labels,
        "geometry": config.model.geometry,
        "top_k": config.export.top_k,
        "temperature": run.record.get("temperature"),
        "not_sure_under": run.record.get("not_sure_under"),
        "accuracy": Accuracy(run.accuracy, sum(data["val"].values()), f"{data['name']}, validation pictures"),
        "provenance": Provenance(
            data["name"], data["generated"], run.record["weights"]["name"], recipe=_recipe(run), lineage=lineage(run)
        ),
    }
    maker = run.folder / "exported_by"
    if not (golden or blind_to) and maker.is_file() and maker.read_text() == str(EXPORT):
        with suppress(SpecError):
            spec = ModelSpec.load(run.export)
            same = all(getattr(spec, key) == value for key, value in described.items())
            whole = (run.export / spec.model.file).is_file() and (run.export / GOLDEN / EXPECTED).is_file()
            if same and whole and spec.geometry_version == pixels.GEOMETRY:
                return spec
    maker.unlink(missing_ok=True)

    from archive.export import ExportRequest, export_folder
    from archive.graph import Preprocessing

    preprocessing = Preprocessing(described.pop("geometry"), config.model.mean, config.model.std)
    described |= {"architecture": config.model.name, "output": "logits", "golden_pictures": golden}
    request = ExportRequest(preprocessing=preprocessing, blind_to=blind_to, **described)
    spec = export_folder(network(run), request, run.export)
    maker.write_text(str(EXPORT))
    return spec


def lineage(run: Run) -> Lineage:
    """Return the digests of what a run was trained from."""
    record = run.record
    teacher = record.get("teacher") or {}
    return Lineage(
        record["data"]["digest"], run.fingerprint, record["weights"].get("sha256"), teacher.get("fingerprint")
    )


def _recipe(run: Run) -> str | None:
    """Return how a run was trained where that is not the plain way: quickly, by a teacher, or as a search picked it."""
    teacher, search = run.record.get("teacher"), run.record.get("search")
    taught = teacher and f"learnt from {teacher['run']}, whose accuracy is {teacher['accuracy']:.4f}"
    return "; ".join(filter(None, (QUICK.get(run.config().fit.recipe), taught, search))) or None


def network(run: Run) -> nn.Module:
    """Return the run's trained network in evaluation mode: float32 normalised NCHW to logits."""
    from archive.artifact import read_weights

    if not run.checkpoint.is_file():
        raise RunError(f"{run.checkpoint} is missing; train again")
    try:
        return read_weights(run.checkpoint, run.config().model.name).network()
    except ArchiveError as error:
        raise RunError(f"{run.checkpoint} is damaged or of another architecture ({error}); train again") from error

"""The card of an archive: its model, where the model comes from, and its files. No code of the archive is run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archive.mar import Contents, check
from beeline.spec import GOLDEN, Agreement, Caption
from host.files import SHORT, sha256

_LABELS = 8
_DECODING = {
    "full": "",
    "scaled": ", large JPEGs decoded at a part of their size",
    "cuda": ", JPEGs decoded on the CUDA device",
}


@dataclass(frozen=True)
class Card(Contents):
    """An archive's facts. `parts` are bytes by part; `handler_version` is the digest of the code in the archive."""

    mar: Path
    sha256: str
    bytes: int
    handler_version: str
    parts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the spec with all its labels, and everything else."""
        return {
            "archive": str(self.mar),
            "sha256": self.sha256,
            "bytes": self.bytes,
            "fingerprint": self.spec.fingerprint(),
            "spec": self.spec.to_dict(),
            "handler": {"file": self.handler, "version": self.handler_version},
            "parts": self.parts,
            "golden": {"detects": list(self.detects), "pictures": list(self.pictures)},
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the card's lines, each a name and its text."""
        spec = self.spec
        size, accuracy, source = spec.geometry, spec.accuracy, spec.provenance
        caption = spec.caption
        labels = ", ".join((*spec.labels[:_LABELS], *(["..."] if len(spec.labels) > _LABELS else [])))
        measured = "not measured"
        if accuracy:
            kind = "exact match" if caption else "top-1"
            measured = f"{kind} {accuracy.top1:.3f} on {accuracy.pictures} pictures ({accuracy.data})"
        cut = f"{size.shape[1]} x {size.shape[0]}"
        steps = {
            "crop": f"shorter side to {size.resize}, middle {cut}",
            "squash": f"squashed to {cut}",
            "pad": f"fitted into {cut} with black around",
            "centre": f"middle {cut}, not resized",
        }[size.fit] + f", {size.interpolation}"
        asked = spec.not_sure_under
        guess = "" if asked is None else f"; under {asked:.0%} the best is a guess, as validation pictures show"
        warm = "" if spec.temperature is None else f" at temperature {spec.temperature:.3g}"
        best = ("answers", f"the best {min(spec.top_k, len(spec.labels))}, from {spec.output}{warm}{guess}")
        answers = ", ".join(f"{picture['top'][0][0]} {picture['top'][0][1]:.2f}" for picture in self.pictures)
        return [
            ("archive", f"{self.mar.name}, {_size(self.bytes)}"),
            ("model", f"{spec.name} {spec.version}, {spec.model.architecture}"),
            *([("captions", _writing(caption))] if caption else [("labels", f"{len(spec.labels)}: {labels}"), best]),
            ("input", steps + _DECODING[size.decoding]),
            ("engine", f"{spec.engine}, {spec.precision}, {spec.model.format.replace('_', ' ')}"),
            ("accuracy", measured),
            *(
                [("agreement", _agreement(spec.agreement, "caption" if caption else "first label"))]
                if spec.agreement
                else []
            ),
            ("data", source.data + (", generated: no photographs" if source.generated else "")),
            ("weights", source.weights),
            *([("recipe", source.recipe)] if source.recipe else []),
            *([("lineage", str(source.lineage))] if source.lineage else []),
            ("licence", source.licence),
            ("golden", f"{len(self.pictures)} pictures within {spec.tolerance:g}: {answers}"),
            ("they notice", ", ".join(self.detects) or "not recorded"),
            ("handler", f"{self.handler}, {self.handler_version}"),
            ("parts", ", ".join(f"{part} {_size(count)}" for part, count in self.parts.items())),
            ("fingerprint", spec.fingerprint()[:SHORT]),
            ("sha256", self.sha256),
        ]


def card(mar: Path) -> Card:
    """Return the card of an archive; raise `ArchiveError` if it is unsafe, damaged or was changed."""
    contents = check(mar)
    code = sorted(f"{name} {digest}\n" for name, digest in contents.digests.items() if name.endswith(".py"))
    version = hashlib.sha256("".join(code).encode()).hexdigest()[:SHORT]
    parts = {"model": 0, "handler": 0, "golden": 0, "other": 0}
    for name, size in contents.sizes.items():
        if name in contents.spec.digests:
            parts["model"] += size
        elif name.endswith(".py"):
            parts["handler"] += size
        else:
            parts["golden" if name.startswith(f"{GOLDEN}/") else "other"] += size
    return Card(
        **vars(contents), mar=mar, sha256=sha256(mar), bytes=mar.stat().st_size, handler_version=version, parts=parts
    )


def _writing(caption: Caption) -> str:
    """Return how captions are written."""
    search = "greedy" if caption.beams == 1 else f"beam search over {caption.beams}"
    prompt = f", after {caption.prompt!r}" if caption.prompt else ""
    return f"at most {caption.max_tokens} tokens, {search}{prompt}"


def _agreement(agreement: Agreement, answer: str) -> str:
    return (
        f"{agreement.top1:.1%} the same {answer} as the fp32 reference on {agreement.pictures} pictures "
        f"({agreement.data}); "
        f"probabilities moved by at most {agreement.moved_99:.3f} on 99 of 100, {agreement.moved:.3f} on one"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"

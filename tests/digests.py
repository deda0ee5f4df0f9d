"""Digests of the code behind each version number, from its syntax trees, which are the same in every Python.

`python -m tests.digests` records today's digests in `digests.json`, also that of the drawn pictures.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import archive.build
import train.export
import train.plan
from beeline import formats, pixels
from tests.conftest import ROOT
from tests.handlers import drawn

RECORD = Path(__file__).with_suffix(".json")
RENEW = ".venv/bin/python -m tests.digests"
# By name: the version number, and the files that it stands for.
VERSIONS = {
    "GEOMETRY": (pixels.GEOMETRY, [f"handlers/beeline/{name}.py" for name in ("pixels", "formats", "firewall")]),
    "RECIPE": (
        train.plan.RECIPE,
        [f"train/{name}.py" for name in ("data", "distil", "fit", "index", "learner", "loader", "model")],
    ),
    "BUILD": (
        archive.build.BUILD,
        [
            f"archive/{name}.py"
            for name in ("build", *(f"variants/{part}" for part in ("__init__", "convert", "agreement")))
        ],
    ),
    "EXPORT": (
        train.export.EXPORT,
        [f"archive/{name}.py" for name in ("export", "graph", "outputs", "goldens/__init__", "goldens/mistakes")],
    ),
}
# Fields that change no result, or that only some versions of Python have.
_LEFT_OUT = ("annotation", "returns", "type_comment", "type_params", "type_ignores", "kind")


def tree_digest(sources: Sequence[str]) -> str:
    """Return the sha256 of the sources' syntax trees without comments, docstrings, annotations and empty fields."""
    return hashlib.sha256(repr([_plain(ast.parse(source)) for source in sources]).encode()).hexdigest()


def today(name: str) -> dict[str, Any]:
    """Return a version number and the digest of its files."""
    number, files = VERSIONS[name]
    return {"number": number, "tree": tree_digest([(ROOT / file).read_text(encoding="utf-8") for file in files])}


def check(name: str) -> None:
    """Compare with the record; say what to do if the code differs."""
    recorded = json.loads(RECORD.read_text())[name]
    assert today(name) == recorded, (
        f"{', '.join(VERSIONS[name][1])} differ from what {name} {recorded['number']} was recorded for: raise {name} "
        f"where results change; then, or if no result can change, run `{RENEW}`"
    )


def _plain(value: Any) -> Any:
    """Turn a tree into tuples and lists of text."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    kind, fields = type(value).__name__, dict(ast.iter_fields(value))
    if isinstance(value, ast.AnnAssign) and value.value is not None:
        kind, fields = "Assign", {"targets": [value.target], "value": value.value}
    if isinstance(value, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(value) is not None:
        fields["body"] = value.body[1:]
    return kind, [
        (key, _plain(each)) for key, each in fields.items() if each not in (None, []) and key not in _LEFT_OUT
    ]


def reader() -> str:
    """Return what decides how pictures decode, to the last bit: Pillow and the kind of processor."""
    return f"Pillow {formats.pillow_version()}, {platform.machine()}"


def main() -> None:
    """Record today's digests; the pixels of drawn pictures change only with `GEOMETRY` or Pillow."""
    before, arrays = json.loads(RECORD.read_text()), drawn.decoded()
    pictures = {"number": pixels.GEOMETRY, "reader": reader(), "arrays": drawn.digest(arrays)}
    if before["pictures"] != pictures:
        if before["pictures"]["number"] == pixels.GEOMETRY:
            if before["pictures"]["reader"] == reader():
                raise SystemExit("the drawn pictures decode to other pixels than recorded: raise GEOMETRY first")
            drawn.check_close(arrays)
        np.savez_compressed(drawn.STORED, **arrays)  # type: ignore[arg-type]
    record = {**{name: today(name) for name in VERSIONS}, "pictures": pictures}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

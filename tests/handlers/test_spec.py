"""A spec survives its JSON, and says what is wrong with a broken one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beeline.errors import SpecError
from beeline.spec import Accuracy, Agreement, Artifact, Geometry, ModelSpec, Provenance

DIGEST = "0" * 64
SPEC = ModelSpec(
    name="resnet18",
    version="1.0",
    labels=("ants", "bees"),
    geometry=Geometry(256, 224),
    model=Artifact("model.pt2", "exported_program", DIGEST, "resnet18"),
    geometry_version=1,
    accuracy=Accuracy(0.94, 153, "hymenoptera_data"),
    provenance=Provenance("hymenoptera_data", False, "resnet18.pth", "unknown"),
)


def test_round_trip(tmp_path: Path) -> None:
    SPEC.save(tmp_path / "model_spec.json")
    assert ModelSpec.load(tmp_path) == SPEC
    assert ModelSpec.load(tmp_path).fingerprint() == SPEC.fingerprint()


def test_a_field_that_came_later_changes_no_fingerprint_until_it_says_something() -> None:
    """The digest is of this spec as it was before the fields in question were there."""
    spec = ModelSpec(
        "flowers",
        "1.0",
        ("rose", "tulip"),
        Geometry(256, 224),
        Artifact("model.pt2", "exported_program", DIGEST),
        geometry_sha256="f" * 64,
        schema=1,
    )
    assert spec.fingerprint() == "a548f02a36ab5ab26d42e1237d4b89b59a75c34c3b56079aa41e259621f0b8c9"
    said = (
        dataclasses.replace(spec, agreement=Agreement(1.0, 0.0, 0.0, 50, "val")),
        dataclasses.replace(spec, geometry=dataclasses.replace(spec.geometry, decoding="scaled")),
        dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights="model.bin", weights_sha256=DIGEST)),
    )
    assert len({each.fingerprint() for each in (spec, *said)}) == 4


def _set(values: dict[str, Any], path: str, value: object) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        values = values[parent]
    values[key] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lables", ["a"], "unknown key lables; did you mean 'labels'?"),
        ("geometry.resiz", 3, "unknown key geometry.resiz; did you mean 'resize'?"),
        ("schema", 3, "schema is 3"),
        ("schema", 1, "geometry_version is 1; allowed: none with schema 1"),
        ("geometry_version", 0, "geometry_version is 0; allowed: 1 or more"),
        ("geometry_version", None, "geometry_version is None; allowed: 1 or more"),
        ("geometry_sha256", DIGEST, "allowed: none with schema 2"),
        ("name", "../etc", "name is '../etc'"),
        ("name", "", "name is ''"),
        ("version", "1/0", "version is '1/0'"),
        ("labels", ["ants"], "labels is"),
        ("labels", ["ants", "ants"], "occurs twice"),
        ("labels", ["ants", " "], "blank"),
        ("labels", "ants", "a list"),
        ("labels", ["ants", 3], r"labels\[1\] is 3; allowed: text"),
        ("geometry.crop", 0, "geometry.crop is 0"),
        ("geometry.crop", 257, "geometry.resize is 256"),
        ("geometry.crop", True, "a whole number"),
        ("geometry.crop", 22.5, "a whole number"),
        ("geometry.interpolation", "bilinaer", "did you mean 'bilinear'"),
        ("model.file", "../model.pt2", "model.file is"),
        ("model.format", "caffe", "model.format is 'caffe'"),
        ("model.sha256", "abc", "64 hexadecimal digits"),
        ("tolerance", 0, "tolerance is 0"),
        ("tolerance", float("nan"), "tolerance is nan"),
        ("top_k", 0, "top_k is 0"),
        ("accuracy.top1", 1.5, "accuracy.top1 is 1.5"),
        ("provenance.generated", 1, "true or false"),
        ("engine", "torhc", "did you mean 'torch'"),
    ],
)
def test_a_broken_value_is_named(path: str, value: object, words: str) -> None:
    values = json.loads(json.dumps(SPEC.to_dict()))
    _set(values, path, value)
    with pytest.raises(SpecError, match=words):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize("changes", [{"geometry_sha256": None}, {"geometry_sha256": "0"}])
def test_a_spec_of_the_first_schema_has_the_digest_of_the_geometry_code(changes: dict[str, object]) -> None:
    values: dict[str, Any] = {**SPEC.to_dict(), "schema": 1, "geometry_sha256": DIGEST}
    del values["geometry_version"]
    assert ModelSpec.from_dict(values).to_dict() == values
    with pytest.raises(SpecError, match=r"geometry_sha256 is '0?'; allowed: 64 hexadecimal digits"):
        ModelSpec.from_dict({**values, **changes})


def test_a_missing_key_is_named() -> None:
    values = SPEC.to_dict()
    del values["labels"]
    with pytest.raises(SpecError, match="labels is missing"):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("{"), lambda p: p.write_text("[]")])
def test_the_file_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "model_spec.json")
    with pytest.raises(SpecError, match=r"model_spec\.json"):
        ModelSpec.load(tmp_path)


@pytest.mark.parametrize("changes", [{"labels": ["bees", "ants"]}, {"version": "1.1"}, {"geometry_version": 2}])
def test_every_value_is_in_the_fingerprint(changes: dict[str, object]) -> None:
    assert ModelSpec.from_dict({**SPEC.to_dict(), **changes}).fingerprint() != SPEC.fingerprint()

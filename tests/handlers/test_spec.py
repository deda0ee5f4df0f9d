"""A spec survives its JSON, and says what is wrong with a broken one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from beeline.errors import SpecError
from beeline.spec import Accuracy, Agreement, Artifact, Geometry, Lineage, ModelSpec, Provenance

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


def test_a_later_field_changes_no_fingerprint_until_it_is_set() -> None:
    """The digest is that of this spec before it had those fields."""
    model = Artifact("model.pt2", "exported_program", DIGEST)
    named = {"name": "flowers", "version": "1.0", "labels": ("rose", "tulip")}
    spec = ModelSpec(**named, geometry=Geometry(256, 224), model=model, geometry_sha256="f" * 64, schema=1)  # type: ignore[arg-type]
    assert spec.fingerprint() == "a548f02a36ab5ab26d42e1237d4b89b59a75c34c3b56079aa41e259621f0b8c9"
    said = (
        dataclasses.replace(spec, agreement=Agreement(1.0, 0.0, 0.0, 50, "val")),
        dataclasses.replace(spec, geometry=dataclasses.replace(spec.geometry, decoding="scaled")),
        dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights="model.bin", weights_sha256=DIGEST)),
    )
    later = [dataclasses.replace(spec, temperature=1.5), dataclasses.replace(spec, not_sure_under=0.7)]
    later.append(dataclasses.replace(spec, provenance=Provenance(lineage=Lineage("a" * 64, "b" * 64))))
    assert len({each.fingerprint() for each in (spec, *said, *later)}) == 7
    assert ModelSpec.from_dict(later[-1].to_dict()) == later[-1]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lables", ["a"], "unknown key lables; did you mean 'labels'?"),
        ("geometry.resiz", 3, "unknown key geometry.resiz; did you mean 'resize'?"),
        ("schema", 3, "schema is 3"),
        ("schema", 1, "geometry_version is 1; allowed: none with schema 1"),
        ("geometry_version", 0, "geometry_version is 0; allowed: 1 or more"),
        ("geometry_sha256", DIGEST, "allowed: none with schema 2"),
        ("name", "../etc", "name is '../etc'"),
        ("version", "1/0", "version is '1/0'"),
        ("labels", ["ants"], "labels is"),
        ("labels", ["ants", "ants"], "occurs twice"),
        ("labels", ["ants", " "], "blank"),
        ("labels", "ants", "a list"),
        ("labels", ["ants", 3], r"labels\[1\] is 3; allowed: text"),
        ("geometry.crop", 0, "geometry.crop is 0"),
        ("geometry.crop", 257, "geometry.resize is 256"),
        ("geometry.crop", True, "a whole number"),
        ("geometry.interpolation", "bilinaer", "did you mean 'bilinear'"),
        ("model.file", "../model.pt2", "model.file is"),
        ("model.format", "caffe", "model.format is 'caffe'"),
        ("model.sha256", "abc", "64 hexadecimal digits"),
        ("tolerance", 0, "tolerance is 0"),
        ("tolerance", float("nan"), "tolerance is nan"),
        ("top_k", 0, "top_k is 0"),
        ("accuracy.top1", 1.5, "accuracy.top1 is 1.5"),
        ("temperature", 0.01, "temperature is 0.01; allowed: 0.05 to 20.0"),
        ("not_sure_under", 1.5, "not_sure_under is 1.5; allowed: 0 to 1"),
        ("provenance.generated", 1, "true or false"),
        ("engine", "torhc", "did you mean 'torch'"),
    ],
)
def test_a_broken_value_is_named(path: str, value: object, words: str) -> None:
    values = SPEC.to_dict()
    group, _, key = path.rpartition(".")
    (values[group] if group else values)[key] = value
    with pytest.raises(SpecError, match=words):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize("changes", [{"geometry_sha256": None}, {"geometry_sha256": "0"}])
def test_a_spec_of_the_first_schema_has_the_digest_of_the_geometry_code(changes: dict[str, object]) -> None:
    values: dict[str, Any] = {**SPEC.to_dict(), "schema": 1, "geometry_sha256": DIGEST}
    del values["geometry_version"]
    assert ModelSpec.from_dict(values).to_dict() == values
    with pytest.raises(SpecError, match=r"geometry_sha256 is '0?'; allowed: 64 hexadecimal digits"):
        ModelSpec.from_dict({**values, **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing; export the model first"),
        ("{", "cannot be read as JSON"),
        ("[]", ": the spec is"),
        ('{"name": "x"}', ": version is missing; add it"),
    ],
)
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "model_spec.json").write_text(text)
    with pytest.raises(SpecError, match=rf"model_spec\.json ?{words}"):
        ModelSpec.load(tmp_path)


@pytest.mark.parametrize("changes", [{"labels": ["bees", "ants"]}, {"version": "1.1"}, {"geometry_version": 2}])
def test_every_value_is_in_the_fingerprint(changes: dict[str, object]) -> None:
    assert ModelSpec.from_dict({**SPEC.to_dict(), **changes}).fingerprint() != SPEC.fingerprint()

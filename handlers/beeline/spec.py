"""ModelSpec: what a model expects and answers, as frozen, versioned, validated JSON.

The one place for labels, geometry, engine and provenance. Photometry (scale, mean, standard
deviation, layout) is not here: it is inside the model artifact, whose graph takes uint8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from beeline.errors import SpecError, did_you_mean

SCHEMA = 2
FILE_NAME = "model_spec.json"
# Also in an archive: the golden pictures' folder, the expected answers in it, and the digest of each file.
GOLDEN = "golden"
EXPECTED = "expected.json"
CHECKSUMS = "checksums.json"
FORMATS = ("exported_program", "torchscript", "openvino", "onnx")
OUTPUTS = ("logits", "probabilities")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
DECODINGS = ("full", "scaled", "cuda")
ENGINES = ("torch", "torch_compile", "openvino", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


@dataclass(frozen=True)
class Geometry:
    """From a decoded picture to the model's input: shorter side to `resize`, then the middle `crop`.

    Both are pixels; `interpolation` is the resize filter, always antialiased. The same two steps as
    torchvision's `Resize(resize)` and `CenterCrop(crop)` on a Pillow image.

    `decoding` is `full`, the reference that models are trained with; `scaled`: a JPEG whose shorter side is at least
    twice `resize` is decoded at a half, a quarter or an eighth of its size; or `cuda`: JPEGs are decoded and resized on
    the CUDA device that the model runs on, and as in `full` where it runs on none.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"
    decoding: str = "full"


@dataclass(frozen=True)
class Artifact:
    """The model file: its name in the spec's folder, its format, its sha256 and its architecture.

    Its graph takes uint8 `[N, crop, crop, 3]` RGB and returns float32 `[N, len(labels)]`. Where the format keeps
    its weights in a second file, `weights` and `weights_sha256` are that one's.
    """

    file: str
    format: str
    sha256: str
    architecture: str = "unknown"
    weights: str | None = None
    weights_sha256: str | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Return the sha256 of each of its files by name."""
        second = {} if self.weights is None or self.weights_sha256 is None else {self.weights: self.weights_sha256}
        return {self.file: self.sha256, **second}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in [0, 1] on `pictures` labelled pictures of the set named `data`."""

    top1: float
    pictures: int
    data: str


@dataclass(frozen=True)
class Agreement:
    """How a variant's answers compare with the fp32 reference's, on `pictures` pictures of `data` that fitted nothing.

    `top1` is the part with the same first label, in [0, 1]; `moved` the largest difference of any probability, and
    `moved_99` what 99 of 100 pictures stay within.
    """

    top1: float
    moved: float
    moved_99: float
    pictures: int
    data: str


@dataclass(frozen=True)
class Provenance:
    """Where the model comes from: pictures, starting weights, licence; `generated` pictures are not photographs."""

    data: str = "unknown"
    generated: bool = False
    weights: str = "unknown"
    licence: str = "unknown"


@dataclass(frozen=True)
class ModelSpec:
    """One model as the worker serves it. Build it with `load` or `from_dict`, which validate.

    `output` says whether the graph returns logits or probabilities; `tolerance` is the largest
    difference in any golden probability that this engine and precision may show;
    `geometry_version` is the `GEOMETRY` of the `pixels.py` that made the goldens. Specs of schema 1 have the digest of
    that file instead, `geometry_sha256`.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    geometry: Geometry
    model: Artifact
    geometry_version: int | None = None
    engine: str = "torch"
    precision: str = "fp32"
    output: str = "logits"
    top_k: int = 5
    tolerance: float = 0.02
    accuracy: Accuracy | None = None
    agreement: Agreement | None = None
    provenance: Provenance = field(default_factory=Provenance)
    geometry_sha256: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check every value against the others.

        Raises:
            SpecError: naming the key, its value and what is allowed.
        """
        _check(
            self.schema in (1, SCHEMA), "schema", self.schema, f"this Beeline reads 1 and {SCHEMA}; rebuild the archive"
        )
        for key, value in (("name", self.name), ("version", self.version)):
            _check(
                bool(_NAME.fullmatch(value)), key, value, "letters, digits, '.', '_' and '-', first a letter or digit"
            )
        _check(len(self.labels) >= 2, "labels", list(self.labels), "a classifier needs at least two")
        seen: set[str] = set()
        for label in self.labels:
            _check(bool(label.strip()), "labels", label, "no label may be blank")
            _check(label not in seen, "labels", label, "it occurs twice; tell them apart, as by their class ids")
            seen.add(label)
        size = self.geometry
        _check(1 <= size.crop <= 4096, "geometry.crop", size.crop, "1 to 4096 pixels")
        _check(size.crop <= size.resize <= 8192, "geometry.resize", size.resize, f"crop ({size.crop}) to 8192 pixels")
        _one_of("geometry.interpolation", size.interpolation, INTERPOLATIONS)
        _one_of("geometry.decoding", size.decoding, DECODINGS)
        _one_of("model.format", self.model.format, FORMATS)
        _one_of("engine", self.engine, ENGINES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("output", self.output, OUTPUTS)
        digests = {"model.sha256": self.model.sha256}
        if self.schema == 1:
            digests["geometry_sha256"] = self.geometry_sha256 or ""
            _check(self.geometry_version is None, "geometry_version", self.geometry_version, "none with schema 1")
        else:
            version = self.geometry_version
            _check(
                version is not None and version >= 1, "geometry_version", version, "1 or more; export the model again"
            )
            _check(self.geometry_sha256 is None, "geometry_sha256", self.geometry_sha256, f"none with schema {SCHEMA}")
        files = {"model.file": self.model.file}
        if self.model.weights is not None or self.model.weights_sha256 is not None:
            files["model.weights"] = self.model.weights or ""
            digests["model.weights_sha256"] = self.model.weights_sha256 or ""
        for key, name in files.items():
            _check("/" not in name and name not in ("", ".", ".."), key, name, "a file name beside model_spec.json")
        for key, digest in digests.items():
            _check(bool(_SHA256.fullmatch(digest)), key, digest, "64 hexadecimal digits")
        _check(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _check(0 < self.tolerance <= 0.5, "tolerance", self.tolerance, "over 0, at most 0.5")
        if self.accuracy is not None:
            _check(0 <= self.accuracy.top1 <= 1, "accuracy.top1", self.accuracy.top1, "0 to 1")
            _check(self.accuracy.pictures >= 1, "accuracy.pictures", self.accuracy.pictures, "at least 1")
        if self.agreement is not None:
            for key in ("top1", "moved", "moved_99"):
                value = getattr(self.agreement, key)
                _check(0 <= value <= 1, f"agreement.{key}", value, "0 to 1")
            _check(self.agreement.pictures >= 1, "agreement.pictures", self.agreement.pictures, "at least 1")

    def fingerprint(self) -> str:
        """Return the sha256 of the whole spec in canonical JSON: it covers the model by its digest."""
        values = self.to_dict()
        # Left out where unset, so that older archives, which lack these fields, keep their fingerprint.
        for place, key, unsaid in (
            (values, "agreement", None),
            (values["geometry"], "decoding", "full"),
            (values["model"], "weights", None),
            (values["model"], "weights_sha256", None),
        ):
            if place[key] == unsaid:
                del place[key]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, keys in the order of the fields, `schema` first."""
        values = dataclasses.asdict(self)
        del values["geometry_sha256" if self.geometry_sha256 is None else "geometry_version"]
        values["labels"] = list(self.labels)
        return {"schema": values.pop("schema"), **values}

    def save(self, path: Path) -> None:
        """Write the spec as indented UTF-8 JSON with a final newline."""
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: object) -> ModelSpec:
        """Build and validate a spec from plain JSON values.

        Raises:
            SpecError: for an unknown or missing key, a wrong type or an impossible value.
        """
        return _decode(cls, values, "")

    @classmethod
    def load(cls, path: Path) -> ModelSpec:
        """Read `path` (the file, or the folder that holds `model_spec.json`).

        Raises:
            SpecError: when it is missing, is no JSON or breaks the schema; the path is in the message.
        """
        if path.is_dir():
            path = path / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SpecError(f"{path} is missing; export the model first, or name the right folder") from error
        except (OSError, ValueError, RecursionError) as error:
            raise SpecError(f"{path} cannot be read as JSON ({error}); export the model again") from error
        try:
            return cls.from_dict(values)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error


def _check(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise SpecError(f"{key} is {value!r}; allowed: {allowed}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{key} is {value!r}{did_you_mean(value, allowed)}")


def _decode(cls: type[T], values: object, prefix: str) -> T:
    """Turn a JSON object into the dataclass `cls`, strictly: no unknown key, no missing one, no other type."""
    if not isinstance(values, dict):
        raise SpecError(f"{prefix or 'the spec'} is {values!r}; allowed: a JSON object")
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SpecError(f"unknown key {prefix}{key}{did_you_mean(str(key), known)}")
    for key, item in known.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if key not in values and not optional:
            raise SpecError(f"{prefix}{key} is missing; add it, or export the model again")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: object, key: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _decode(typing.cast(type, hint), value, f"{key}.")
    if typing.get_origin(hint) is tuple:
        _check(isinstance(value, (list, tuple)), key, value, "a list")
        return tuple(_value(str, entry, f"{key}[{i}]") for i, entry in enumerate(typing.cast(list[object], value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    fits = fits and not (isinstance(value, float) and not math.isfinite(value))
    _check(
        fits,
        key,
        value,
        {"str": "text", "int": "a whole number", "float": "a number"}.get(hint.__name__, "true or false"),
    )
    return value

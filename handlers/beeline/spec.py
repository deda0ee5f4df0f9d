"""ModelSpec: what a model expects and answers, as frozen, versioned, validated JSON.

Photometry (scale, mean, standard deviation, layout) is not here: it is inside the artifact, whose graph takes uint8.
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
from typing import Any

from beeline import tasks
from beeline.errors import SpecError, did_you_mean

SCHEMA = 2
FILE_NAME = "model_spec.json"
# Also in an archive: the golden pictures' folder, the expected answers in it, and the digest of each file.
GOLDEN, EXPECTED, CHECKSUMS = "golden", "expected.json", "checksums.json"
FORMATS = ("exported_program", "torchscript", "openvino", "onnx")
# Scores are of independent labels: each is 0 to 1, and they need not sum to 1.
OUTPUTS = ("logits", "probabilities", "scores")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
DECODINGS = ("full", "scaled", "cuda")
FITS = ("crop", "squash", "pad", "centre")
TEMPERATURES = (0.05, 20.0)
ENGINES = ("torch", "torch_compile", "openvino", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

# Of a model's name and its version.
NAME, NAMES = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "1 to 128 letters, digits, '.', '_' and '-', first a letter or digit"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Geometry:
    """From a decoded picture to the model's input, `crop` pixels high and `width` wide (None: as wide as high).

    `fit` is `crop`: the shorter side to `resize` pixels, then the middle, as torchvision's `Resize` and `CenterCrop` do
    on a Pillow image, with the antialiased filter `interpolation`; `squash`: both sides at once, as `Resize([h, w])`;
    `pad`: as large as fits, with black around it; or `centre`: the middle without a resize, as `CenterCrop` alone, with
    black around a smaller picture. `resize` counts for `crop` alone.

    `decoding` is `full`, the reference that models are trained with; `scaled`: a JPEG whose shorter side is at least
    twice `resize` is decoded at a half, a quarter or an eighth of its size; or `cuda`: JPEGs are decoded and resized on
    the model's CUDA device, and as in `full` where it has none.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"
    decoding: str = "full"
    fit: str = "crop"
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        return self.crop, self.width or self.crop


@dataclass(frozen=True)
class Artifact:
    """The model file in the spec's folder; some formats have a second file, for the weights.

    A model's graph takes uint8 `[N, crop, crop, 3]` RGB. A classifier's returns float32 `[N, len(labels)]`, that of a
    captioning model what its decoder takes as `cross`; see `beeline.caption`.
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
    """How a variant's answers differ from the fp32 reference's, on `pictures` pictures of `data` that fitted nothing.

    `top1` is the share with the same first label, in [0, 1]; `moved` is the largest difference of any probability,
    `moved_99` that of 99 in 100 pictures.
    """

    top1: float
    moved: float
    moved_99: float
    pictures: int
    data: str


@dataclass(frozen=True)
class Lineage:
    """What a model was trained from, each by its sha256: the list of its pictures, its run, weights, and teacher's run.

    A run's covers its configuration, pictures, weights and the versions of the code (its `fingerprint`).
    """

    data: str
    run: str
    weights: str | None = None
    teacher: str | None = None

    def __str__(self) -> str:
        """Return the first digits of each, for people."""
        return ", ".join(f"{name} {digest[:12]}" for name, digest in vars(self).items() if digest)


@dataclass(frozen=True)
class Provenance:
    """Where the model comes from: pictures, starting weights, licence; `generated` pictures are not photographs.

    `recipe` says how it was trained where that was a quick way; `lineage` is that of a run of Beeline.
    """

    data: str = "unknown"
    generated: bool = False
    weights: str = "unknown"
    licence: str = "unknown"
    recipe: str | None = None
    lineage: Lineage | None = None


@dataclass(frozen=True)
class Caption:
    """How a captioning model writes: its decoder, its tokenizer's file, and token ids.

    `start` is the first token, `end` the one that ends a caption, `pad` stands where there is none. A caption has at
    most `max_tokens` tokens after the prompt, unless a request says less. `beams` are searched (1: greedy). All tokens,
    the start included, fit into `positions`.
    """

    decoder: Artifact
    tokenizer: str
    tokenizer_sha256: str
    start: int
    end: int
    pad: int
    max_tokens: int = 20
    beams: int = 1
    prompt: str = ""
    positions: int = 512


@dataclass(frozen=True)
class ModelSpec:
    """One model as the worker serves it.

    `output` is what the graph returns, one of `OUTPUTS`; `tolerance` is the largest difference in any golden
    probability that this engine and precision may show; `geometry_version` is the `GEOMETRY` of the `pixels.py` that
    made the goldens. Specs of schema 1 have that file's digest instead, `geometry_sha256`. Logits are divided by
    `temperature` for an answer's probabilities (None: 1), not for golden pictures. Under the score `not_sure_under` the
    page calls the best label a guess (None: the page's own number). `task` is one of `beeline.tasks`, which checks
    its own part; a captioning model has `caption` and no labels.
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
    temperature: float | None = None
    not_sure_under: float | None = None
    task: str = "classify"
    caption: Caption | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check every value; raise `SpecError` with the key, its value and what is allowed."""
        check(
            self.schema in (1, SCHEMA), "schema", self.schema, f"this Beeline reads 1 and {SCHEMA}; rebuild the archive"
        )
        for key, name in (("name", self.name), ("version", self.version)):
            check(bool(re.fullmatch(NAME, name)), key, name, NAMES)
        size = self.geometry
        for key, side in zip(("crop", "width"), size.shape, strict=True):
            check(1 <= side <= 4096, f"geometry.{key}", side, "1 to 4096 pixels")
        least = max(size.shape) if size.fit == "crop" else 1
        check(least <= size.resize <= 8192, "geometry.resize", size.resize, f"crop ({least}) to 8192 pixels")
        known = size.fit == "crop" or size.decoding == "full"
        check(known, "geometry.decoding", size.decoding, f"full, where geometry.fit is {size.fit!r}")
        for key, value, allowed in (
            ("geometry.interpolation", size.interpolation, INTERPOLATIONS),
            ("geometry.decoding", size.decoding, DECODINGS),
            ("geometry.fit", size.fit, FITS),
            ("model.format", self.model.format, FORMATS),
            ("engine", self.engine, ENGINES),
            ("precision", self.precision, PRECISIONS),
            ("task", self.task, tuple(tasks.TASKS)),
        ):
            if value not in allowed:
                raise SpecError(f"{key} is {value!r}{did_you_mean(value, allowed)}")
        self._check_files()
        check(0 < self.tolerance <= 0.5, "tolerance", self.tolerance, "over 0, at most 0.5")
        for key, measured in (("accuracy", self.accuracy), ("agreement", self.agreement)):
            for name, number in (vars(measured) if measured else {}).items():
                if name == "pictures":
                    check(number >= 1, f"{key}.{name}", number, "at least 1")
                elif name != "data":
                    check(0 <= number <= 1, f"{key}.{name}", number, "0 to 1")
        tasks.of(self).check()

    def _check_files(self) -> None:
        """Check the names of files, the digests, and the version of the geometry code."""
        version, model = self.geometry_version, self.model
        files, digests = {"model.file": model.file}, {"model.sha256": model.sha256}
        if self.schema == 1:
            digests["geometry_sha256"] = self.geometry_sha256 or ""
            check(version is None, "geometry_version", version, "none with schema 1")
        else:
            made = version is not None and version >= 1
            check(made, "geometry_version", version, "1 or more; export the model again")
            check(self.geometry_sha256 is None, "geometry_sha256", self.geometry_sha256, f"none with schema {SCHEMA}")
        if model.weights is not None or model.weights_sha256 is not None:
            files["model.weights"] = model.weights or ""
            digests["model.weights_sha256"] = model.weights_sha256 or ""
        for name, digest in self.digests.items() if self.caption else ():
            files[f"caption ({name})"], digests[f"caption ({name})"] = name, digest
        for key, name in files.items():
            check("/" not in name and name not in ("", ".", ".."), key, name, "a file name beside model_spec.json")
        for key, digest in digests.items():
            check(bool(_SHA256.fullmatch(digest)), key, digest, "64 hexadecimal digits")

    @property
    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file of the model by name, with those that its task needs."""
        caption = self.caption
        more = {**caption.decoder.digests, caption.tokenizer: caption.tokenizer_sha256} if caption else {}
        return {**self.model.digests, **more}

    def fingerprint(self) -> str:
        """Return the sha256 of the whole spec, in which the model's digest stands for the model."""
        values = self.to_dict()
        # Left out where unset, so that older archives, which lack these fields, keep their fingerprint.
        geometry, model = values["geometry"], values["model"]
        later = [(values, key) for key in ("agreement", "temperature", "not_sure_under", "task", "caption")]
        later += [(model, "weights"), (model, "weights_sha256"), (values["provenance"], "recipe")]
        later.append((values["provenance"], "lineage"))
        for place, key in [*later, *((geometry, key) for key in ("decoding", "fit", "width"))]:
            if place[key] is None or (key, place[key]) in (("decoding", "full"), ("fit", "crop"), ("task", "classify")):
                del place[key]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, `schema` first."""
        values = dataclasses.asdict(self)
        del values["geometry_sha256" if self.geometry_sha256 is None else "geometry_version"]
        values["labels"] = list(self.labels)
        return {"schema": values.pop("schema"), **values}

    def save(self, path: Path) -> None:
        """Write the spec as indented UTF-8 JSON with a final newline."""
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: object) -> ModelSpec:
        """Build a spec from plain JSON values, and raise `SpecError` for a key or value that is not allowed."""
        spec: ModelSpec = _decode(cls, values, "")
        return spec

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


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise `SpecError` for a key whose value does not hold."""
    if not holds:
        raise SpecError(f"{key} is {value!r}; allowed: {allowed}")


def _decode(cls: Any, values: object, prefix: str) -> Any:
    """Turn a JSON object into the dataclass `cls`; an unknown key, a missing one or another type is an error."""
    if not isinstance(values, dict):
        raise SpecError(f"{prefix or 'the spec'} is {values!r}; allowed: a JSON object")
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls)}
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
        return _decode(hint, value, f"{key}.")
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, (list, tuple)), key, value, "a list")
        return tuple(_value(str, entry, f"{key}[{i}]") for i, entry in enumerate(typing.cast(list[object], value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    fits = fits and not (isinstance(value, float) and not math.isfinite(value))
    check(fits, key, value, {str: "text", int: "a whole number", float: "a number"}.get(hint, "true or false"))
    return value

"""Variants of an exported captioning model: OpenVINO, also in int8, proved to write the captions of the ONNX export."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive.variants import ONNX_REFERENCE, Variant, agreement, convert, default_engine, left_out, with_tolerance
from archive.variants.agreement import Gate, Pictures
from beeline import engines, tasks
from beeline.errors import ArchiveError, BeelineError, ConfigError, SelfTestError, short
from beeline.spec import FILE_NAME, GOLDEN, Agreement, Artifact, ModelSpec
from host import Say
from host.files import sha256

VARIANTS = (ONNX_REFERENCE, Variant("openvino", "fp32"), Variant("openvino", "int8"))
_BATCH, _CALIBRATION = 8, 100


def task_of(folder: Path, spec: ModelSpec) -> Any:
    """Load an exported folder on the CPU, as a worker does; return its task, of which `forward` writes captions."""
    task = tasks.of(spec)
    task.load(folder, engines.load(folder, spec, device="cpu"))
    return task


def prepare(
    export: Path,
    scratch: Path,
    asked: tuple[str | None, str | None],
    pictures: tuple[Path | None, Path | None],
    gate: tuple[float, float],
    decoding: str,
    say: Say,
) -> tuple[Path, None]:
    """Do as `archive.variants.prepare` for the export of a captioning model; no engine is chosen by its time."""
    spec, (judged, calibration) = ModelSpec.load(export), pictures
    engine, precision = asked
    if asked == (None, None):
        choice = default_engine()
        engine = "openvino" if choice.value == "openvino" else ONNX_REFERENCE.engine
        say(f"engine: {engine} in fp32, because {choice.reason}")
    variant = Variant(engine or "openvino", precision or "fp32")
    if variant not in VARIANTS:
        raise ConfigError(f"there is no {variant} of a captioning model; allowed: {', '.join(map(str, VARIANTS))}")
    if decoding != "full":
        raise ConfigError(f"--decoding is {decoding!r}; allowed: full, since this model's pictures are squashed")
    if variant != ONNX_REFERENCE and (why := left_out(variant, timed=False)):
        raise ConfigError(f"{variant} cannot be built here: {why}")
    decoded = None
    if variant.precision == "int8":
        if judged is None:
            raise ConfigError("a variant is judged by pictures; name a folder of photographs with --pictures")
        decoded = agreement.read(judged, calibration, spec.geometry)
        say(f"making {variant} and comparing its captions on {len(decoded.judged)} pictures ...")
    elif judged or calibration:
        raise ConfigError(f"--pictures and --calibration are for int8, and this is {variant}; leave them out")
    if variant == ONNX_REFERENCE:
        return export, None
    make(export, scratch / "variant", variant, decoded, Gate(*gate))
    return scratch / "variant", None


def make(export: Path, out: Path, variant: Variant, pictures: Pictures | None, gate: Gate) -> ModelSpec:
    """Write encoder and decoder for OpenVINO into the new folder `out`; return the spec.

    In int8 the encoder computes in it, calibrated, and the decoder keeps its weights in it, since a step of a few rows
    waits for their bytes. `pictures` judge it: captions equal to the reference's, and how far their scores move. Raise
    `ArchiveError` where the gate refuses it, or a golden caption differs.
    """
    spec = ModelSpec.load(export)
    assert spec.caption is not None
    out.mkdir()
    try:
        encoder, decoder = (_converted(export / name) for name in (spec.model.file, spec.caption.decoder.file))
        if pictures is not None:
            encoder, decoder = _quantised(encoder, decoder, pictures)
        model, step = (
            _save(graph, out, old) for graph, old in ((encoder, spec.model), (decoder, spec.caption.decoder))
        )
    except (BeelineError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ArchiveError(f"{spec.name} cannot be made into {variant} ({short(error, 300)}); take fp32") from error
    shutil.copyfile(export / spec.caption.tokenizer, out / spec.caption.tokenizer)
    shutil.copytree(export / GOLDEN, out / GOLDEN)
    written = dataclasses.replace(spec.caption, decoder=step)
    draft = dataclasses.replace(spec, model=model, caption=written, tolerance=0.5, **vars(variant))
    task = task_of(out, draft)
    if pictures is not None:
        expected, actual = (_captions(each, pictures.judged) for each in (task_of(export, spec), task))
        measured = compared(expected, actual, pictures.source)
        agreement.check(measured, gate, str(variant), "captions")
        draft = dataclasses.replace(draft, agreement=measured)
    try:
        final = with_tolerance(out, draft, task.forward, convert.photometry(export, spec), variant, _moved)
    except SelfTestError as error:
        raise ArchiveError(f"{variant} is refused: {error}") from error
    final.save(out / FILE_NAME)
    return final


def compared(expected: list[Any], actual: list[Any], source: str) -> Agreement:
    """Compare captions of the same pictures: the share with the same tokens, and how far the scores move.

    A caption that failed is another one, and has moved by 1.
    """
    same = [getattr(one, "ids", None) == getattr(other, "ids", ()) for one, other in zip(expected, actual, strict=True)]
    reference = np.array([getattr(each, "score", 0.0) for each in expected])
    scores = np.array([getattr(each, "score", 1.0) for each in actual])
    return agreement.summary(np.array(same), np.abs(reference - scores), source)


def _captions(task: Any, crops: NDArray[np.uint8]) -> list[Any]:
    parts = (crops[start : start + _BATCH] for start in range(0, len(crops), _BATCH))
    return [caption for part in parts for caption in task.forward(part)]


def _moved(spec: ModelSpec, sentences: list[Any], pictures: list[dict[str, Any]]) -> float:
    """Return how far the score of a golden caption moves at most."""
    pairs = zip(sentences, pictures, strict=True)
    return max(abs(float(sentence.score) - float(entry["top"][0][1])) for sentence, entry in pairs)


def _converted(path: Path) -> Any:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return openvino.convert_model(path)


def _quantised(encoder: Any, decoder: Any, pictures: Pictures) -> tuple[Any, Any]:
    """Return the encoder in int8, calibrated, and the decoder with weights in int8."""
    # As in `archive.variants.convert`.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(), convert.silence():
        warnings.simplefilter("ignore")
        import nncf

        logging.getLogger("nncf").setLevel(logging.WARNING)
        ones = [crop[None] for crop in pictures.calibration[:_CALIBRATION]]
        kind = nncf.ModelType.TRANSFORMER
        encoder = nncf.quantize(encoder, nncf.Dataset(ones), model_type=kind, subset_size=len(ones))
        return encoder, nncf.compress_weights(decoder, mode=nncf.CompressWeightsMode.INT8_SYM)


def _save(model: Any, out: Path, old: Artifact) -> Artifact:
    import openvino

    convert.number(model)
    graph = out / f"{Path(old.file).stem}.xml"
    weights = graph.with_suffix(".bin")
    openvino.save_model(model, graph, compress_to_fp16=False)
    return Artifact(graph.name, "openvino", sha256(graph), old.architecture, weights.name, sha256(weights))

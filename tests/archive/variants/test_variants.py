"""Variants: each engine answers as the fp32 reference, is the same bytes each time, and is refused when it is not."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from archive import inspect, variants
from archive.build import build
from archive.variants import CONVERTERS, Converter, Variant, agreement, convert
from archive.variants.agreement import Gate, Pictures
from beeline import engines, pixels
from beeline.cuda_jpeg import CudaJpegs
from beeline.errors import ArchiveError, ConfigError
from beeline.settings import Choice
from beeline.spec import Artifact, ModelSpec
from host.files import sha256
from tests.archive.variants.test_agreement import SMALL, draw

# Of noise the small network is sure of little, so int8 moves more there than of photographs.
GATE = Gate(0.95, 0.3)
MADE_UP = ((0.0,) * 3, (1.0,) * 3)
# What this machine lacks something for is a test of its own.
FAST = [
    # It needs a C++ compiler, which the README does not ask for.
    pytest.param(wanted, marks=[pytest.mark.server] if wanted.engine == "torch_compile" else [])
    for wanted in variants.known()
    if wanted != variants.REFERENCE and variants.left_out(wanted) is None
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Small pictures of noise."""
    return agreement.read(draw(tmp_path_factory.mktemp("pictures"), 240), None, SMALL)


def made(export: Path, out: Path, wanted: Variant, pictures: Pictures) -> ModelSpec:
    out.mkdir()
    return variants.make(export, out, wanted, pictures, GATE, convert.photometry(export, ModelSpec.load(export)))


@pytest.mark.parametrize("wanted", FAST, ids=str)
def test_a_variant_is_verified_and_answers_every_batch_size(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, wanted: Variant
) -> None:
    spec = made(tiny_export, tmp_path / "variant", wanted, pictures)
    assert (spec.engine, spec.precision) == (wanted.engine, wanted.precision)
    assert spec.agreement is not None
    assert spec.agreement.top1 >= (0.95 if wanted.precision == "int8" else 0.99)
    assert spec.agreement.pictures == len(pictures.judged)
    built = build(tmp_path / "variant", tmp_path / "store")
    assert built.verified is not None
    assert built.verified.choice["engine"][0] == wanted.engine
    forward = engines.load(tmp_path / "variant", spec).forward
    whole = forward(pictures.judged[:7])
    for size in (1, 2, 5):
        assert np.allclose(forward(pictures.judged[:size]), whole[:size], atol=1e-3)
    # What an earlier batch returned is not written over by the next one.
    kept = whole.copy()
    forward(pictures.judged[7:14])
    assert np.array_equal(whole, kept)


@pytest.mark.parametrize("wanted", FAST, ids=str)
def test_the_same_choice_gives_the_same_bytes(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, wanted: Variant
) -> None:
    digests = []
    for name in ("one", "two"):
        made(tiny_export, tmp_path / name, wanted, pictures)
        digests.append(build(tmp_path / name, tmp_path / f"{name}-store", check=False).sha256)
    assert digests[0] == digests[1]


def test_the_photometry_is_read_off_the_graph(tiny_export: Path) -> None:
    mean, std = convert.photometry(tiny_export, ModelSpec.load(tiny_export))
    assert np.allclose(mean, (0.485, 0.456, 0.406), atol=1e-5)
    assert np.allclose(std, (0.229, 0.224, 0.225), atol=1e-5)


def test_a_variant_that_answers_otherwise_is_refused(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is made here: of every fourth picture the engine turns the scores round."""

    class Faulty:
        def __init__(self, inner: engines.Engine) -> None:
            self.inner, self.choice = inner, inner.choice

        def forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            scores = self.inner.forward(pixels)
            scores[::4] = -scores[::4]
            return scores

    real = engines.load

    def load(folder: Path, spec: ModelSpec, **options: object) -> object:
        loaded = real(folder, spec, device="cpu")
        return Faulty(loaded) if spec.engine == "openvino" else loaded

    monkeypatch.setattr(engines, "load", load)
    with pytest.raises(ArchiveError, match=r"openvino fp32 is refused: 7\d\.\d% of the first labels"):
        made(tiny_export, tmp_path / "variant", Variant("openvino", "fp32"), pictures)


def test_variants_are_made_of_the_reference_alone(tiny_export: Path, tmp_path: Path, pictures: Pictures) -> None:
    made(tiny_export, tmp_path / "one", Variant("openvino", "fp32"), pictures)
    (tmp_path / "two").mkdir()
    with pytest.raises(ArchiveError, match="is openvino fp32 already"):
        variants.make(tmp_path / "one", tmp_path / "two", Variant("openvino", "int8"), pictures, GATE, MADE_UP)


def test_the_fastest_of_those_that_pass_is_taken(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, spec: ModelSpec, out: Path, precision: str, pictures: Pictures, gate: Gate) -> Artifact:
        raise ArchiveError("it cannot be converted")

    monkeypatch.setitem(CONVERTERS, "openvino", Converter(refused, {"fp32": ("openvino",)}))
    said: list[str] = []
    folder, results = variants.fastest(
        tiny_export,
        tmp_path,
        pictures,
        Gate(),
        convert.photometry(tiny_export, ModelSpec.load(tiny_export)),
        [Variant("torch", "fp32"), Variant("openvino", "fp32")],
        said.append,
    )
    assert folder == tiny_export
    assert isinstance(results["torch fp32"], float)
    assert results["openvino fp32"] == "it cannot be converted"
    assert "it cannot be converted" in said[1]


def test_what_this_machine_lacks_is_left_out_and_said(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setenv("PATH", "/nowhere")
    reasons = {str(wanted): variants.left_out(wanted) for wanted in variants.known()}
    assert [name for name, why in reasons.items() if why is None] == ["torch fp32", "openvino fp32"]
    assert reasons["torch fp16"] == "fp16 is for CUDA devices, and none is there; take --precision bf16 or fp32"
    assert reasons["onnxruntime int8"] == "onnxscript and nncf are not installed here; install what is missing"
    assert "install g++" in str(reasons["torch_compile bf16"])
    said: list[str] = []
    folder, results = variants.fastest(
        tiny_export, tmp_path, pictures, GATE, MADE_UP, [variants.REFERENCE, Variant("torch", "fp16")], said.append
    )
    assert folder == tiny_export
    assert results["torch fp16"] == f"left out: {reasons['torch fp16']}"
    assert said[1] == f"  torch fp16 is left out: {reasons['torch fp16']}"


def test_a_lone_variant_that_cannot_be_made_here_says_why(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    with pytest.raises(
        ConfigError, match=r"openvino bf16 cannot be built here: .* cannot multiply in bf16; build it on"
    ):
        variants.prepare(tiny_export, tmp_path, ("openvino", "bf16"), (None, None), (0.99, 0.1), "full", print)


def test_a_precision_that_this_machine_does_not_compute_in_is_refused(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bf16 in the processor OpenVINO computes in fp32; a stand-in for such a processor."""
    real = engines.load

    def load(folder: Path, spec: ModelSpec, **options: object) -> object:
        loaded = real(folder, spec, **options)
        loaded.choice = {**loaded.choice, "precision": Choice("fp32", "no bf16 here")}
        return loaded

    monkeypatch.setattr("beeline.engines.load", load)
    with pytest.raises(ArchiveError, match=r"torch bf16 is refused: this machine computes it in fp32"):
        made(tiny_export, tmp_path / "variant", Variant("torch", "bf16"), pictures)


def test_where_nothing_is_let_through_it_says_why_of_each(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArchiveError, match=r"torch fp16: left out: fp16 is for CUDA devices.*take --engine auto"):
        variants.fastest(tiny_export, tmp_path, pictures, GATE, MADE_UP, [Variant("torch", "fp16")], print)


def test_the_reference_is_the_first_variant_and_pytorchs_files_are_its_own(
    tiny_export: Path, tmp_path: Path, pictures: Pictures
) -> None:
    assert variants.known()[0] == variants.REFERENCE
    assert len(set(variants.known())) == len(variants.known())
    spec = made(tiny_export, tmp_path / "variant", Variant("torch", "bf16"), pictures)
    assert spec.model == ModelSpec.load(tiny_export).model
    assert sha256(tmp_path / "variant" / spec.model.file) == spec.model.sha256


def photographs(folder: Path) -> Path:
    """Draw JPEGs of a few times the model's size."""
    folder.mkdir()
    for number in range(130):
        values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((200, 160)).save(folder / f"{number}.jpg")
    return folder


def test_scaled_decoding_is_a_variant_judged_by_what_the_worker_will_see(tiny_export: Path, tmp_path: Path) -> None:
    geometry = dataclasses.replace(ModelSpec.load(tiny_export).geometry, decoding="scaled")
    read = agreement.read(photographs(tmp_path / "large"), None, geometry)
    assert not np.array_equal(read.judged, read.served)
    spec = made(tiny_export, tmp_path / "variant", variants.REFERENCE, read)
    assert spec.geometry == geometry
    assert spec.agreement is not None
    assert spec.agreement.moved > 0
    built = build(tmp_path / "variant", tmp_path / "store")
    assert built.verified is not None


def test_decoding_on_a_device_is_judged_by_what_the_device_makes_of_a_picture(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a fake: a CPU, whose pixels are moved by three so that they can be told from Pillow's."""

    def moved(self: CudaJpegs, bodies: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        crops = [pixels.decode(body, self._geometry) for body in bodies]
        return [np.where(crop < 250, crop + 3, crop).astype(np.uint8) for crop in crops]

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(CudaJpegs, "__init__", lambda self, device, geometry: setattr(self, "_geometry", geometry))
    monkeypatch.setattr(CudaJpegs, "decode", moved)
    geometry = dataclasses.replace(ModelSpec.load(tiny_export).geometry, decoding="cuda")
    read = agreement.read(photographs(tmp_path / "large"), None, geometry)
    monkeypatch.undo()
    assert np.abs(read.served.astype(int) - read.judged).max() == 3
    spec = made(tiny_export, tmp_path / "variant", variants.REFERENCE, read)
    assert spec.agreement is not None
    assert 0 < spec.agreement.moved < 0.1
    built = build(tmp_path / "variant", tmp_path / "store")
    assert built.verified is not None
    assert dict(inspect.card(built.path).rows())["input"].endswith("JPEGs decoded on the CUDA device")


def test_what_runs_on_cpus_is_left_out_aloud_where_a_device_is_to_decode() -> None:
    why = str(variants.left_out(Variant("openvino", "fp32"), "cuda"))
    assert why.startswith("--decoding is 'cuda', and openvino runs on CPUs")
    assert variants.left_out(Variant("openvino", "fp32"), "scaled") is None
    assert variants.left_out(variants.REFERENCE, "cuda") is None


def test_a_worker_without_the_runtime_says_what_to_install(tiny_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(ModelSpec.load(tiny_export), engine="openvino")
    monkeypatch.setitem(engines._ENGINES, "openvino", ("no_such_runtime.engine", "Engine", "no_such_runtime"))
    with pytest.raises(ConfigError, match=r"engine openvino, which is not installed here; install no_such_runtime"):
        engines.load(tiny_export, spec)


def test_every_file_of_the_model_is_covered(tiny_export: Path, tmp_path: Path, pictures: Pictures) -> None:
    made(tiny_export, tmp_path / "variant", Variant("openvino", "fp32"), pictures)
    weights = tmp_path / "variant" / "model.bin"
    before = sha256(weights)
    body = bytearray(weights.read_bytes())
    body[len(body) // 2] ^= 1
    weights.write_bytes(body)
    with pytest.raises(ArchiveError, match=rf"model.bin has sha256 .* its spec says {before[:8]}"):
        build(tmp_path / "variant", tmp_path / "store", check=False)

"""Variants: each engine answers like the fp32 reference with the same bytes each time, or the variant is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from archive import inspect, variants
from archive.build import build
from archive.variants import CONVERTERS, REFERENCE, Converter, Variant, agreement
from archive.variants.agreement import Gate, Pictures
from beeline import engines, pixels
from beeline.cuda_jpeg import CudaJpegs
from beeline.errors import ArchiveError, ConfigError
from beeline.settings import Choice
from beeline.spec import ModelSpec
from host.files import sha256
from tests.archive.variants.test_agreement import SMALL, draw
from tests.conftest import ROOT

# The small network is sure of little on noise, so int8 moves more there than on photographs.
GATE = Gate(0.95, 0.3)
OPENVINO = Variant("openvino", "fp32")
# Those that this machine can make; the others have a test of their own.
POSSIBLE = [
    # It needs a C++ compiler, which the README does not require.
    pytest.param(each, marks=[pytest.mark.server] if each.engine == "torch_compile" else [])
    for each in variants.known()
    if each != REFERENCE and variants.left_out(each) is None
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Small pictures of noise."""
    return agreement.read(draw(tmp_path_factory.mktemp("pictures"), 240), None, SMALL)


@pytest.fixture
def change_engines(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Change every engine that is loaded."""
    load = engines.load

    def change(edit: Callable[[Any], None]) -> None:
        def changed(folder: Path, spec: ModelSpec, **_: object) -> engines.Engine:
            engine = load(folder, spec, device="cpu")
            edit(engine)
            return engine

        monkeypatch.setattr(engines, "load", changed)

    return change


@pytest.mark.parametrize("variant", POSSIBLE, ids=str)
def test_a_variant_is_verified_answers_every_batch_size_and_has_the_same_bytes_each_time(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, variant: Variant
) -> None:
    out = tmp_path / "variant"
    spec = variants.make(tiny_export, out, variant, pictures, GATE)
    assert Variant(spec.engine, spec.precision) == variant
    assert spec.agreement is not None
    assert spec.agreement.top1 >= (0.95 if variant.precision == "int8" else 0.99)
    assert spec.agreement.pictures == len(pictures.judged)
    if variant.engine == "onnxruntime":
        check_onnx(out, variant.precision)
    built = build(out, tmp_path / "store")
    assert built.verified is not None
    assert built.verified.choice["engine"][0] == variant.engine
    forward = engines.load(out, spec).forward
    whole = forward(pictures.judged[:7])
    for size in (1, 2, 5):
        assert np.allclose(forward(pictures.judged[:size]), whole[:size], atol=1e-3)
    # The next batch does not overwrite what an earlier one returned.
    kept = whole.copy()
    forward(pictures.judged[7:14])
    assert np.array_equal(whole, kept)
    variants.make(tiny_export, tmp_path / "again", variant, pictures, GATE)
    assert build(tmp_path / "again", tmp_path / "store", reuse=True).reused


def check_onnx(folder: Path, precision: str) -> None:
    """Check that the model is one file for any batch, and that nothing of its origin is in it."""
    data = (folder / "model.onnx").read_bytes()
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    [given] = model.graph.input
    assert (given.name, given.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    assert [each.dim_param or each.dim_value for each in given.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert (precision == "int8") == any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert [path for path in folder.iterdir() if path.suffix not in (".onnx", ".json") and path.is_file()] == []
    assert not [word for word in (b"pytorch", str(ROOT).encode(), b"site-packages", b"pkg.torch") if word in data]


def test_the_graph_gives_its_photometry(tiny_export: Path) -> None:
    mean, std = variants.convert.photometry(tiny_export, ModelSpec.load(tiny_export))
    assert np.allclose([mean, std], [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], atol=1e-5)


def test_a_variant_with_other_answers_is_refused(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, change_engines: Callable[[Callable[[Any], None]], None]
) -> None:
    """A deliberate fault: the engine negates the scores of every fourth picture."""

    def edit(engine: Any) -> None:
        forward = engine.forward

        def faulty(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
            scores: NDArray[np.float32] = forward(crops)
            scores[::4] = -scores[::4]
            return scores

        engine.forward = faulty if engine.spec.engine == "openvino" else forward

    change_engines(edit)
    with pytest.raises(ArchiveError, match=r"openvino fp32 is refused: 7\d\.\d% of the first labels"):
        variants.make(tiny_export, tmp_path / "variant", OPENVINO, pictures, GATE)


def test_a_precision_in_which_this_machine_does_not_compute_is_refused(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, change_engines: Callable[[Callable[[Any], None]], None]
) -> None:
    """A stand-in for a processor without bf16, on which OpenVINO computes in fp32."""
    change_engines(lambda engine: engine.choice.update(precision=Choice("fp32", "no bf16 here")))
    with pytest.raises(ArchiveError, match=r"torch bf16 is refused: this machine computes it in fp32"):
        variants.make(tiny_export, tmp_path / "variant", Variant("torch", "bf16"), pictures, GATE)


def test_only_the_reference_has_variants_and_every_file_of_one_is_checked(
    tiny_export: Path, tmp_path: Path, pictures: Pictures
) -> None:
    out = tmp_path / "one"
    variants.make(tiny_export, out, OPENVINO, pictures, GATE)
    with pytest.raises(ArchiveError, match="is openvino fp32 already"):
        variants.make(out, tmp_path / "two", Variant("openvino", "int8"), pictures, GATE)
    before, body = sha256(out / "model.bin"), bytearray((out / "model.bin").read_bytes())
    body[len(body) // 2] ^= 1
    (out / "model.bin").write_bytes(body)
    with pytest.raises(ArchiveError, match=rf"model.bin has sha256 .* its spec says {before[:8]}"):
        build(out, tmp_path / "store", check=False)


def default(export: Path, scratch: Path, said: list[str], *paths: Path) -> tuple[Path, Any]:
    """Prepare an export without naming an engine; `paths` are the pictures of its data."""
    known = [(path, None) for path in paths], "noise"
    return variants.prepare(
        export, scratch, (None, None), (None, None), (0.99, 0.1), "full", said.append, lambda: known
    )


def test_the_default_is_openvino_judged_by_the_models_own_pictures_or_its_goldens(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host.machine.gpus", list)
    own = sorted(draw(tmp_path / "own", 110).iterdir())
    (tmp_path / "broken.png").write_bytes(b"none")
    for number, (paths, judged) in enumerate(
        (((), (4, "golden pictures")), ((*own, tmp_path / "broken.png"), (50, "noise")))
    ):
        said: list[str] = []
        scratch = tmp_path / str(number)
        scratch.mkdir()
        folder, times = default(tiny_export, scratch, said, *paths)
        spec = ModelSpec.load(folder)
        assert (spec.engine, spec.precision) == ("openvino", "fp32")
        assert spec.agreement is not None
        assert (spec.agreement.pictures, spec.agreement.data, spec.agreement.top1) == (*judged, 1.0)
        assert spec.agreement.moved < 0.001
        assert list(times) == ["openvino fp32", "torch fp32"]
        assert said[0].startswith("engine: openvino in fp32, the default on CPUs; ")


def test_the_default_is_the_reference_where_openvino_is_not_possible_and_says_why(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise RuntimeError("Illegal instruction")

    monkeypatch.delenv("BEELINE_DEVICE", raising=False)
    said: list[str] = []
    monkeypatch.setattr("host.machine.gpus", lambda: ["H100"])
    assert default(tiny_export, tmp_path, said) == (tiny_export, None)
    monkeypatch.setattr("host.machine.gpus", list)
    monkeypatch.setitem(CONVERTERS, "openvino", Converter(refuse, {"fp32": ()}))
    assert default(tiny_export, tmp_path, said) == (tiny_export, None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert default(tiny_export, tmp_path, said) == (tiny_export, None)
    reasons = [
        "a CUDA device is there (H100)",
        "model.pt2 cannot be made into openvino fp32 (Illegal instruction); take another --engine",
        "openvino is not installed here",
    ]
    assert said == [f"engine: torch in fp32, because {reason}" for reason in reasons]
    assert variants.default_engine({"BEELINE_DEVICE": "cpu"}).value == "reference"


def test_a_default_that_is_slower_than_the_reference_is_warned_of(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"openvino fp32": 22.5, "torch fp32": 20.0}
    monkeypatch.setattr("host.machine.gpus", list)
    monkeypatch.setattr("archive.variants.compared", lambda *_: (None, times))
    said: list[str] = []
    assert default(tiny_export, tmp_path, said)[1] == times
    assert "22.5 ms of CPU time a picture, torch takes 20.0" in said[0]
    assert said[1] == "warning: openvino is slower than torch on this processor; --engine torch is faster here"
    times["torch fp32"] = 22.0
    said.clear()
    default(tiny_export, tmp_path, said)
    assert len(said) == 1


def test_auto_takes_the_fastest_that_passes_and_says_why_others_did_not(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise ArchiveError("it cannot be converted")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(CONVERTERS, "openvino", Converter(refuse, {"fp32": ("openvino",)}))
    lines: list[str] = []
    among = [REFERENCE, OPENVINO, Variant("torch", "fp16")]
    folder, results = variants.fastest(tiny_export, tmp_path, pictures, GATE, among, lines.append)
    assert folder == tiny_export
    assert isinstance(results["torch fp32"], float)
    assert results["openvino fp32"] == "it cannot be converted"
    why = "fp16 is for CUDA devices, and there is none here; take --precision bf16 or fp32"
    assert results["torch fp16"] == f"left out: {why}"
    assert lines[1:] == ["  openvino fp32: it cannot be converted", f"  torch fp16 is left out: {why}"]
    with pytest.raises(ArchiveError, match=r"torch fp16: left out: fp16 is for CUDA devices.*take --engine auto"):
        variants.fastest(tiny_export, tmp_path, pictures, GATE, among[2:], print)


def test_a_variant_is_left_out_if_this_machine_lacks_something(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.cuda.is_available", "torch.cpu._is_avx512_bf16_supported", "torch.cpu._is_amx_tile_supported"):
        monkeypatch.setattr(name, lambda: False)
    for name in ("onnxscript", "nncf"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "/nowhere")
    known = variants.known()
    assert (known[0], len(set(known))) == (REFERENCE, len(known))
    reasons = {str(each): variants.left_out(each) for each in known}
    assert [name for name, why in reasons.items() if why is None] == ["torch fp32", "openvino fp32"]
    assert reasons["onnxruntime int8"] == "not installed here: onnxscript, nncf; install what is missing"
    assert "install g++" in str(reasons["torch_compile bf16"])
    with pytest.raises(ConfigError, match=r"openvino bf16 cannot be built here: this processor has no bf16; build it"):
        variants.prepare(tiny_export, tmp_path, ("openvino", "bf16"), (None, None), (0.99, 0.1), "full", print)


def test_a_worker_without_the_runtime_says_what_to_install(tiny_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(ModelSpec.load(tiny_export), engine="openvino")
    monkeypatch.setitem(engines._ENGINES, "openvino", ("no_such_runtime.engine", "Engine", "no_such_runtime"))
    with pytest.raises(ConfigError, match=r"engine openvino, and no_such_runtime is not installed here; install"):
        engines.load(tiny_export, spec)


@pytest.mark.parametrize("decoding", ["scaled", "cuda"])
def test_other_decoding_is_judged_by_the_pictures_that_a_worker_decodes(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: str
) -> None:
    """The CUDA device is a fake: a CPU that moves pixels by three, so that they differ from Pillow's."""

    def moved(self: CudaJpegs, bodies: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        crops = [pixels.decode(body, self._geometry) for body in bodies]
        return [np.where(crop < 250, crop + 3, crop).astype(np.uint8) for crop in crops]

    photographs = tmp_path / "large"
    photographs.mkdir()
    for number in range(130):
        values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((200, 160)).save(photographs / f"{number}.jpg")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(CudaJpegs, "__init__", lambda self, device, geometry: setattr(self, "_geometry", geometry))
    monkeypatch.setattr(CudaJpegs, "decode", moved)
    geometry = dataclasses.replace(ModelSpec.load(tiny_export).geometry, decoding=decoding)
    read = agreement.read(photographs, None, geometry)
    monkeypatch.undo()
    furthest = np.abs(read.served.astype(int) - read.judged).max()
    assert furthest == 3 if decoding == "cuda" else furthest > 0
    spec = variants.make(tiny_export, tmp_path / "variant", REFERENCE, read, GATE)
    assert spec.geometry == geometry
    assert spec.agreement is not None
    assert 0 < spec.agreement.moved < 0.3
    # On a CPU the worker decodes in full where the archive says `cuda`.
    built = build(tmp_path / "variant", tmp_path / "store", check=decoding == "scaled")
    assert "JPEGs decoded" in dict(inspect.card(built.path).rows())["input"]

"""A user's ONNX model: its archive answers as ONNX Runtime on the same pixels, or a sentence says why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from archive import variants
from archive.artifact import kind_of, load_network, read_weights
from archive.export import ExportRequest, export_folder
from archive.graph import Preprocessing, Uint8Input
from archive.onnx_graph import OnnxGraph
from archive.outputs import settle
from beeline import engines, pixels
from beeline.errors import ArchiveError, BeelineError
from beeline.spec import Geometry, ModelSpec

LABELS = ("ants", "bees", "flies")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 12
GEOMETRY = Geometry(SIDE, SIDE)
PREPROCESSING = Preprocessing(GEOMETRY, MEAN, STD)


def model(
    nodes: list[Any] | None = None,
    shape: tuple[Any, ...] = ("N", 3, SIDE, SIDE),
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("scores",),
    opset: int = 17,
) -> Any:
    """Return a network of one strided convolution, written with ONNX alone: no code of ours or of PyTorch's."""
    planes = shape[1] if isinstance(shape[1], int) else 3
    weights = np.random.default_rng(3).normal(0, 1, (3, planes, 5, 5))
    filters = numpy_helper.from_array(weights.astype(helper.tensor_dtype_to_np_dtype(kind)), "filters")
    nodes = nodes or [
        helper.make_node("Conv", ["input", "filters"], ["maps"], strides=[3, 3]),
        helper.make_node("GlobalMaxPool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [filters],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(path: Path, made: Any) -> Path:
    onnx.save(made, path / "net.onnx")
    return path / "net.onnx"


def request(golden: Path | None = None, **options: Any) -> ExportRequest:
    options = {"labels": LABELS, "preprocessing": Preprocessing(Geometry(16, SIDE), MEAN, STD), **options}
    return ExportRequest("net", "1.0", golden_pictures=golden, **options)


def pictures(count: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(5).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def expected(made: Any, crops: Any, kind: Any = np.float32) -> Any:
    """Return what ONNX Runtime answers to pixels that are normalised here."""
    planes = ((crops / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(kind)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: planes})


def own_pictures(folder: Path, made: Any, count: int, sure: tuple[float, float] = (0.8, 0.97)) -> Path:
    """Write random pictures of which the network is so sure."""
    folder.mkdir()
    rng, written = np.random.default_rng(1), 0
    while written < count:
        cells = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        path = folder / f"{written}.png"
        cells.resize((36, 24), Image.Resampling.NEAREST).save(path)
        (row,) = expected(made, pixels.decode(path.read_bytes(), Geometry(16, SIDE))[None])[0]
        chances = np.exp(row - row.max())
        written += bool(sure[0] < (chances / chances.sum()).max() < sure[1])
    (folder / f"{written}.png").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)])
def test_the_graph_answers_as_onnx_runtime_does(tmp_path: Path, kind: int, dtype: Any) -> None:
    made = model(kind=kind)
    graph: Any = OnnxGraph(load_network(saved(tmp_path, made)), PREPROCESSING)
    settled = settle(graph, made, 3, None)
    assert settled.output == "logits"
    got = graph(torch.from_numpy(pictures())).numpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, expected(made, pictures(), dtype)[0], rtol=1e-3, atol=0.03 if dtype != np.float32 else 1e-4
    )


def test_an_archive_of_onnx_is_the_reference_of_its_variants(tmp_path: Path) -> None:
    made = model()
    made.graph.initializer.append(numpy_helper.from_array(np.full(3, 1e-41, np.float32), "bias"))
    made.graph.node[0].input.append("bias")
    network = load_network(saved(tmp_path, made))
    golden = own_pictures(tmp_path / "golden", made, 8)
    judged = own_pictures(tmp_path / "judged", made, 50, (0, 1))
    spec = export_folder(network, request(golden, blind_to=("exif", "normalisation", "channels")), tmp_path / "export")
    assert (spec.engine, spec.model.format, spec.output) == ("onnxruntime", "onnx", "logits")
    held = {
        each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "export/model.onnx").graph.initializer
    }
    assert not held["net/bias"].any()
    first = (tmp_path / "export/model.onnx").read_bytes()
    assert (
        export_folder(network, request(golden, blind_to=("exif", "normalisation", "channels")), tmp_path / "export")
        == spec
    )
    assert (tmp_path / "export/model.onnx").read_bytes() == first
    crops = pictures()
    answers = engines.load(tmp_path / "export", spec).forward(crops)
    np.testing.assert_allclose(answers, expected(made, crops)[0], rtol=1e-4, atol=1e-4)
    said: list[str] = []
    folder, measured = variants.prepare(
        tmp_path / "export", tmp_path, ("openvino", None), (judged, None), (0.9, 0.1), "full", said.append
    )
    assert ModelSpec.load(folder).engine == "openvino"
    assert measured is None
    with pytest.raises(BeelineError, match=r"--engine is 'torch' for an ONNX model; .*onnxruntime"):
        variants.prepare(
            tmp_path / "export", tmp_path, ("torch", None), (judged, None), (0.9, 0.1), "full", said.append
        )


def test_without_golden_pictures_it_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no gradient passes this model.*--golden DIR"):
        export_folder(load_network(saved(tmp_path, model())), request(), tmp_path / "export")


def test_a_program_of_pytorch_in_onnx_answers_as_pytorch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    with warnings.catch_warnings():
        # PyTorch warns about its own code.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, SIDE, SIDE),),
            tmp_path / "net.onnx",
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    graph: Any = OnnxGraph(load_network(tmp_path / "net.onnx"), PREPROCESSING)
    crops = torch.from_numpy(pictures())
    with torch.no_grad():
        own = Uint8Input(network, MEAN, STD, (SIDE, SIDE))(crops)
    torch.testing.assert_close(graph(crops), own, rtol=1e-4, atol=1e-5)


def test_outputs_of_other_forms_are_taken(tmp_path: Path) -> None:
    two = model(outputs=("maps", "scores"))
    graph: Any = OnnxGraph(two, PREPROCESSING)
    assert settle(graph, two, 3, None).notes == ["its output 'scores' is taken"]
    named = settle(OnnxGraph(two, PREPROCESSING), two, 3, None, "1")  # type: ignore[arg-type]
    assert named.notes == ["its output 'scores' is taken"]
    flat = model(outputs=("pooled",))
    graph = OnnxGraph(flat, PREPROCESSING)
    assert settle(graph, flat, 3, "scores").rows.shape == (3, 3)
    rows = expected(flat, settle(graph, flat, 3, "scores").noise)[0].reshape(3, 3)
    np.testing.assert_allclose(
        graph(torch.from_numpy(settle(graph, flat, 3, "scores").noise)), 1 / (1 + np.exp(-rows)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": (1, 3, SIDE, SIDE)}, "batches of exactly 1; export it for every size: torch.onnx.export"),
        ({"shape": ("N", 3, 20, 24)}, "takes pictures of 24 x 20 pixels, and the crop is 12 x 12; add --crop 24x20"),
        ({"shape": ("N", 4, SIDE, SIDE)}, "takes 4 channels; pictures have 3"),
        ({"shape": ("N", 3 * SIDE * SIDE)}, r"input is \[None, 432\]; allowed: \[batch, 3, 12, 12\]"),
    ],
)
def test_what_an_input_lacks_is_said_with_what_mends_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        OnnxGraph(model(**options), PREPROCESSING)


def nhwc() -> Any:
    turn = helper.make_node("Transpose", ["input"], ["planes"], perm=[0, 3, 1, 2])
    rest = [
        helper.make_node("Conv", ["planes", "filters"], ["maps"], strides=[3, 3]),
        helper.make_node("GlobalMaxPool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    made = model([turn, *rest])
    for place, side in enumerate((SIDE, SIDE, 3), 1):
        made.graph.input[0].type.tensor_type.shape.dim[place].dim_value = side
    return made


def test_channels_last_and_blue_first_are_taken() -> None:
    crops = torch.from_numpy(pictures())
    plain = OnnxGraph(model(), PREPROCESSING)(crops)
    torch.testing.assert_close(OnnxGraph(nhwc(), PREPROCESSING)(crops), plain)
    swapped = model()
    filters = numpy_helper.to_array(swapped.graph.initializer[0])
    swapped.graph.initializer[0].CopyFrom(numpy_helper.from_array(filters[:, ::-1].copy(), "filters"))
    torch.testing.assert_close(OnnxGraph(swapped, Preprocessing(GEOMETRY, MEAN, STD, "bgr"))(crops), plain)
    # With the wrong order the answers are others.
    assert not torch.allclose(OnnxGraph(swapped, PREPROCESSING)(crops), plain, atol=0.01)


def test_uint8_planes_are_taken() -> None:
    cast = helper.make_node("Cast", ["input"], ["planes"], to=TensorProto.FLOAT)
    made = model(
        [cast, helper.make_node("Conv", ["planes", "filters"], ["maps"], strides=[3, 3]), *model().graph.node[1:]]
    )
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (right,) = session.run(None, {"input": pictures().transpose(0, 3, 1, 2)})
    own = OnnxGraph(made, Preprocessing(GEOMETRY, MEAN, STD, takes_uint8=True))(torch.from_numpy(pictures()))
    np.testing.assert_allclose(own, right, rtol=1e-4)


def test_only_the_sentence_is_printed_for_a_fixed_reshape(capfd: pytest.CaptureFixture[str]) -> None:
    shape = helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1, 3])))
    made = model([*model().graph.node[:2], shape, helper.make_node("Reshape", ["pooled", "shape"], ["scores"])])
    graph: Any = OnnxGraph(made, PREPROCESSING)
    with pytest.raises(ArchiveError, match=r"its batch size is fixed: torch\.onnx\.export"):
        settle(graph, made, 3, None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: model(kind=TensorProto.DOUBLE).SerializeToString(), "export it in float32, after model.float"),
        (lambda data: data[: len(data) // 2], "does not load in ONNX Runtime .*; download or copy it again"),
        (lambda data: model(opset=99).SerializeToString(), "export it with opset_version="),
        (
            lambda data: model([helper.make_node("Mine", ["input"], ["scores"])]).SerializeToString(),
            "export it again with operations of ONNX alone",
        ),
    ],
)
def test_a_file_that_does_not_load_has_its_own_sentence(
    tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    path = saved(tmp_path, model())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArchiveError, match=said):
        load_network(path)


def test_external_weights_are_read_and_missing_ones_named(tmp_path: Path) -> None:
    made = model()
    onnx.save(made, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    graph: Any = OnnxGraph(load_network(tmp_path / "net.onnx"), PREPROCESSING)
    assert graph(torch.from_numpy(pictures())).shape == (4, 3)
    (tmp_path / "net.data").unlink()
    with pytest.raises(ArchiveError, match=r"net.data.*; copy the file of its weights beside it"):
        load_network(tmp_path / "net.onnx")


def test_onnx_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"is a program \(onnx\), which cannot be trained"):
        read_weights(saved(tmp_path, model()), "resnet18")


def test_one_output_for_two_labels_is_the_second_ones() -> None:
    last = helper.make_node("ReduceMax", ["pooled"], ["scores"], axes=[1], keepdims=1)
    made = model([*model().graph.node[:2], last])
    graph: Any = OnnxGraph(made, PREPROCESSING)
    assert settle(graph, made, 2, None).output == "logits"
    highest = expected(made, pictures())[0].reshape(4)
    got = graph(torch.from_numpy(pictures())).numpy()
    np.testing.assert_allclose(got, np.stack([np.zeros(4), highest], 1), rtol=1e-4, atol=1e-4)


def test_safetensors_whose_length_begins_like_onnx_are_none(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes((0x120108).to_bytes(8, "little") + b"{}")
    assert kind_of(tmp_path / "net.safetensors") == "pickle"
    assert kind_of(saved(tmp_path, model())) == "onnx"

"""ONNX: one file with its weights, uint8 pictures in batches of any size, nothing of the machine that made it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from archive.variants import CONVERTERS, agreement
from archive.variants.agreement import Gate, Pictures
from archive.variants.convert import to_onnx
from beeline.errors import ArchiveError
from beeline.spec import ModelSpec
from tests.archive.variants.test_agreement import SMALL, draw
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Small pictures of noise."""
    return agreement.read(draw(tmp_path_factory.mktemp("pictures"), 120), None, SMALL)


@pytest.mark.parametrize("precision", list(CONVERTERS["onnxruntime"].packages))
def test_one_file_for_any_batch_with_nothing_of_its_origin(
    tiny_export: Path, tmp_path: Path, pictures: Pictures, precision: str
) -> None:
    artifact = to_onnx(tiny_export, ModelSpec.load(tiny_export), tmp_path, precision, pictures, Gate(0.95, 1.0))
    assert (artifact.file, artifact.format, artifact.weights) == ("model.onnx", "onnx", None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    [given] = model.graph.input
    assert given.name == "pixels"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [each.dim_param or each.dim_value for each in given.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert (precision == "int8") == any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    body = (tmp_path / "model.onnx").read_bytes()
    for word in (b"pytorch", str(ROOT).encode(), b"site-packages", b"pkg.torch"):
        assert word not in body


def test_torchscript_is_refused_with_the_fix(tiny_export: Path, tmp_path: Path, pictures: Pictures) -> None:
    spec = ModelSpec.load(tiny_export)
    scripted = dataclasses.replace(spec, model=dataclasses.replace(spec.model, format="torchscript"))
    with pytest.raises(
        ArchiveError, match=r"torchscript, and PyTorch writes only exported programs as ONNX; take --engine torch"
    ):
        to_onnx(tiny_export, scripted, tmp_path, "fp32", pictures, Gate(0.95, 1.0))

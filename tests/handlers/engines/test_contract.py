"""The contract with every engine: no broken picture moves or harms a neighbour, whatever runs the model."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from archive.graph import IMAGENET_MEAN, IMAGENET_STD
from archive.variants import CONVERTERS, REFERENCE, Variant
from archive.variants.agreement import Gate, Pictures
from beeline import pixels
from beeline.settings import MAX_PIXELS
from beeline.spec import ModelSpec
from tests.archive.variants.test_variants import POSSIBLE
from tests.conftest import BLUE, GREEN, RED, write_checksums
from tests.handlers.test_pixels import independent_decode
from tests.handlers.test_vision_handler import BROKEN, GOOD, ask, check_all_placements, loaded
from vision_handler import VisionHandler


def converted(folder: Path, out: Path, wanted: Variant, crops: NDArray[np.uint8], tolerance: float) -> VisionHandler:
    """Load a handler on a variant of a served folder, past the gate, which has tests of its own."""
    spec = ModelSpec.load(folder)
    shutil.copytree(folder / "golden", out / "golden")
    pictures = Pictures(crops, crops, crops, spec.geometry, "drawn")
    artifact = CONVERTERS[wanted.engine].convert(folder, spec, out, wanted.precision, pictures, Gate(0.9, 1.0))
    made = dataclasses.replace(
        spec, model=artifact, engine=wanted.engine, precision=wanted.precision, tolerance=tolerance
    )
    made.save(out / "model_spec.json")
    write_checksums(out, made)
    return loaded(out)


# POSSIBLE marks the variants of torch_compile with pytest.mark.server.
@pytest.fixture(scope="module", params=POSSIBLE, ids=str)
def handler(
    request: pytest.FixtureRequest, colour_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> VisionHandler:
    """The model that names a colour, on each engine."""
    geometry = ModelSpec.load(colour_model).geometry
    crops = np.stack([pixels.decode(data, geometry) for data in (RED, GREEN, BLUE)] * 20)
    return converted(colour_model, tmp_path_factory.mktemp("variant"), request.param, crops, 0.1)


def test_all_256_placements_of_broken_pictures_in_a_batch_of_8(handler: VisionHandler) -> None:
    check_all_placements(handler, GOOD, BROKEN)


def test_the_choice_says_engine_and_precision_with_a_reason(handler: VisionHandler) -> None:
    choice = handler.engine.choice
    assert (choice["engine"].value, choice["precision"].value) == (handler.spec.engine, handler.spec.precision)
    assert all(made.reason for made in choice.values())


def tops(handler: VisionHandler, pictures: list[bytes]) -> list[str | int]:
    """Return each picture's top label, or its status where it was refused."""
    replies = ask(handler, [{"body": data} for data in pictures])
    return [reply.top if reply.status == 200 else reply.status for reply in replies]


def reference_top(network: torch.nn.Module, labels: tuple[str, ...], image: Image.Image) -> str:
    """Answer as torchvision's documentation does it: resize, centre crop, to tensor, normalise, argmax."""
    norm = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), norm]
    with torch.inference_mode():
        return labels[int(network(transforms.Compose(steps)(image)[None]).argmax())]


@pytest.mark.shared
def test_identical_top_1_on_the_imagenet_samples(
    model_folder: Path, network: torch.nn.Module, shared_data: Path
) -> None:
    handler = loaded(model_folder)
    paths = sorted((shared_data / "imagenet_samples").glob("*.JPEG"))
    assert len(paths) == 200
    same = 0
    for start in range(0, 200, 8):
        chunk = [path.read_bytes() for path in paths[start : start + 8]]
        wanted = [reference_top(network, handler.spec.labels, independent_decode(data)) for data in chunk]
        same += sum(ours == theirs for ours, theirs in zip(tops(handler, chunk), wanted, strict=True))
    print(f"identical top-1: {same} of 200")  # noqa: T201 - the figure, shown with -s
    assert same >= 199


@pytest.fixture(scope="module")
def expected(network: torch.nn.Module, model_folder: Path, shared_data: Path) -> dict[Path, str | int | None]:
    """Each awkward picture's label by the reference, 413 where it is too large, None where it cannot be read."""
    labels = ModelSpec.load(model_folder).labels
    found: dict[Path, str | int | None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted((shared_data / "awkward").rglob("*.*")):
            try:
                image = independent_decode(path.read_bytes())
            except Exception:  # noqa: BLE001 - whatever Pillow raises: the reference fails
                found[path] = None
                continue
            large = image.width * image.height > MAX_PIXELS
            found[path] = 413 if large else reference_top(network, labels, image)
    return found


@pytest.mark.shared
@pytest.mark.parametrize("wanted", [REFERENCE, *POSSIBLE], ids=str)
def test_every_awkward_picture_gets_its_status(
    wanted: Variant, model_folder: Path, expected: dict[Path, str | int | None], shared_data: Path, tmp_path: Path
) -> None:
    """Every status is the reference's; in fp32 every label too, in bf16 19 of 20.

    In int8 four of five: with its thousand labels the gate would refuse this model (37 and 38 of 41 were seen), and
    one that answers for its neighbour has next to none.
    """
    samples = sorted((shared_data / "imagenet_samples").glob("*.JPEG"))
    geometry = ModelSpec.load(model_folder).geometry
    crops = np.stack([pixels.decode(path.read_bytes(), geometry) for path in samples[:30]])
    # The gate would refuse what int8 does to these goldens; here only the pictures count.
    same = wanted == REFERENCE
    handler = loaded(model_folder) if same else converted(model_folder, tmp_path, wanted, crops, 0.5)
    paths = list(expected)
    answers: list[str | int] = []
    for start in range(0, len(paths), 8):
        answers += tops(handler, [path.read_bytes() for path in paths[start : start + 8]])
    equal: list[bool] = []
    for path, answer in zip(paths, answers, strict=True):
        if expected[path] is None:
            assert answer in (400, 413, 415, 422), path.name
        elif expected[path] == 413:
            assert answer == 413, path.name
        else:
            assert isinstance(answer, str), path.name
            equal.append(answer == expected[path])
    print(f"{wanted}: {sum(equal)} of {len(equal)} awkward pictures have the reference's label")  # noqa: T201
    assert np.mean(equal) >= {"fp32": 1.0, "bf16": 0.95, "fp16": 0.95, "int8": 0.8}[wanted.precision]

"""Archives compared with torchvision's and timm's own transforms and networks, on ten pictures.

Nothing is downloaded: weights are seeded, saved under the names that the library publishes, and read by our reader.
Planted faults show that each comparison can fail. `-m bench` compares all architectures, and writes a table to the file
that BEELINE_TABLE names.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from archive.architectures import AUXILIARY, TIMM
from archive.artifact import load_network
from archive.export import find_preset
from archive.graph import Graph
from beeline import pixels
from beeline.engines.torch import TorchEngine
from beeline.spec import Artifact, ModelSpec

Row = dict[str, Any]
# Names as for `--architecture`. With a second word, the published weights that say how large its pictures are.
FAST = ("resnet18", "timm:resnet18d")
ALL = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16"),
    *("wide_resnet50_2", "vit_b_16 ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1"),
    *("timm:efficientnet_b0", "timm:resnet18d", "timm:vit_tiny_patch16_224", "timm:ghostnet_100"),
    "timm:convnextv2_nano.fcmae_ft_in22k_in1k_384",
)
# Names of tensors today, and in the files that torchvision publishes.
OLDER = {
    "densenet121": ((r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),),
    "vit_b_16": ((r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")),
}
# The bounds: of 255, and of the spread of the logits.
PIXELS, LOGITS = 1.0, 1e-3
# The bound holds for 999 of 1000 values. Pillow orders its two passes by their cost, which is another here, since we do
# not resize what is cropped off. Between the passes Pillow rounds, and clips what a bicubic filter puts outside 0..255.
MOST = 0.999


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Ten pictures: real ones where BEELINE_SHARED names them, else drawn ones of large and small detail."""
    if shared := os.environ.get("BEELINE_SHARED"):
        return [path.read_bytes() for path in sorted(Path(shared, "imagenet_samples").glob("*.JPEG"))[::20]][:10]
    random, drawn = np.random.default_rng(0), []
    for number in range(10):
        colours = Image.fromarray(random.integers(0, 256, (3 + number, 4 + 2 * number, 3), np.uint8))
        width, height = random.integers(100, 1000, 2).tolist()
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC))
        picture = Image.fromarray((smooth + random.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8))
        picture.save(target := io.BytesIO(), "PNG" if number % 2 else "JPEG", quality=90)
        drawn.append(target.getvalue())
    return drawn


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IO[str]]:
    path = os.environ.get("BEELINE_TABLE") or tmp_path_factory.mktemp("table") / "architectures.jsonl"
    with Path(path).open("w", encoding="utf-8") as file:
        yield file


def of_library(name: str) -> tuple[str, Any, Callable[[Image.Image], Tensor], Sequence[float]]:
    """Return the library with its version, and its own network, transform and deviation."""
    torch.manual_seed(0)
    if name.startswith(TIMM):
        network: nn.Module = timm.create_model(name.removeprefix(TIMM), pretrained=False)
        config = resolve_model_data_config(network)
        return f"timm {timm.__version__}", network, create_transform(**config), config["std"]
    models, (architecture, _, published) = torchvision.models, name.partition(" ")
    weights = models.get_weight(published) if published else models.get_model_weights(architecture).DEFAULT
    options: Row = {"image_size": weights.meta["min_size"][0]} if published else {}
    if architecture in AUXILIARY:
        options = {"aux_logits": True, "transform_input": True, "init_weights": False}
    network, transform = models.get_model(architecture, weights=None, **options), weights.transforms()
    return f"torchvision {torchvision.__version__}", network, transform, transform.std


def vary(network: nn.Module, planes: Tensor) -> None:
    """Make the logits depend on the picture.

    Parameters of one value, such as the zeros of a ViT's head, get noise. Batch norms measure these pictures.
    """
    for parameter in network.parameters():
        if parameter.min() == parameter.max():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.momentum = 1.0
    network(planes)
    network.eval()


@torch.no_grad()
def compare(name: str, bodies: Sequence[bytes], folder: Path) -> Row:
    """Return how far pixels (of 255) and logits (of their spread) are apart, and how far with each planted fault.

    The spread is the mean over the classes of the largest minus the smallest logit.
    """
    library, network, transform, deviation = of_library(name)
    architecture, _, published = name.partition(" ")
    preset = find_preset(published or ("timm" if name.startswith(TIMM) else "torchvision"), architecture)
    crops = np.stack([pixels.decode(body, preset.geometry) for body in bodies])
    unit = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255
    mean, std, their_std = (torch.tensor(each).view(3, 1, 1) for each in (preset.mean, preset.std, deviation))
    planes = (unit - mean) / std
    # Three pictures are enough to show a fault.
    faults = {"swapped channels": (unit[:3].flip(1) - mean) / std, "no normalisation": unit[:3]}
    theirs = torch.stack([transform(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies])

    def apart(ours: Tensor, part: float = MOST) -> float:
        return short(((ours - theirs[: len(ours)]) * their_std * 255).abs().quantile(part))

    row: Row = {"architecture": name, "library": library, "input": list(planes.shape[2:])}
    row |= {"real": bool(os.environ.get("BEELINE_SHARED")), "largest_of_pixels": apart(planes, 1.0)}
    row["pixels"] = {"apart": apart(planes), **{fault: apart(wrong) for fault, wrong in faults.items()}}

    vary(network, planes)
    state = network.state_dict()
    for today, older in OLDER.get(architecture, ()):
        state = {re.sub(today, older, key): tensor for key, tensor in state.items()}
    torch.save(state, folder / "weights.pth")
    loaded = load_network(folder / "weights.pth", architecture, preset.is_imagenets)
    graph = Graph(loaded, preset)
    model = Artifact(graph.save(folder).name, graph.format, "0" * 64)
    labels = tuple(map(str, range(1000)))
    spec = ModelSpec("compared", "1", labels, preset.geometry, model, pixels.GEOMETRY)
    archive = torch.from_numpy(TorchEngine(folder, spec, device="cpu", threads=2).forward(crops))
    right = network(planes)
    spread = (right.amax(0) - right.amin(0)).mean()
    answers = {"apart": right, **{fault: network(wrong) for fault, wrong in faults.items()}}
    if architecture in AUXILIARY:
        network.transform_input = False
        answers["no transform_input"] = network(planes[:3])
    row["logits"] = {key: short((each - archive[: len(each)]).abs().max() / spread) for key, each in answers.items()}
    return {**row, "spread": short(spread), "largest_logit": short(right.abs().max())}


def short(value: Tensor) -> float:
    return float(f"{value:.3g}")


def check(row: Row) -> None:
    for key, bound in (("pixels", PIXELS), ("logits", LOGITS)):
        apart, *faults = row[key].values()
        assert apart <= bound < min(faults), row


@pytest.mark.parametrize("name", FAST)
def test_pixels_and_logits_are_those_of_the_library(name: str, pictures: list[bytes], tmp_path: Path) -> None:
    check(compare(name, pictures, tmp_path))


@pytest.mark.bench
@pytest.mark.parametrize("name", ALL)
def test_those_of_each_family_are_too(name: str, pictures: list[bytes], tmp_path: Path, table: IO[str]) -> None:
    row = compare(name, pictures, tmp_path)
    table.write(json.dumps(row) + "\n")
    table.flush()
    check(row)

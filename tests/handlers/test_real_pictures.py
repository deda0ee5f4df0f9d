"""The whole handler on real photographs: torchvision's answers, and memory that comes back."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from ts.context import Context, RequestProcessor

from archive.export import IMAGENET_MEAN, IMAGENET_STD
from beeline.settings import MAX_PIXELS
from serve.servers.protocol import MALLOC
from vision_handler import VisionHandler

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def handler(model_folder: Path) -> VisionHandler:
    handler = VisionHandler()
    handler.initialize(Context("resnet18", str(model_folder), {}, 8, None, "0.12.0"))
    return handler


def tops(handler: VisionHandler, pictures: list[bytes]) -> list[str | int]:
    """Return each picture's top label, or its status where it was refused."""
    context = Context("resnet18", "", {}, 8, None, "0.12.0")
    context.request_processor = [RequestProcessor({}) for _ in pictures]
    bodies = handler.handle([{"body": data} for data in pictures], context)
    statuses = [context.get_response_status(i)[0] for i in range(len(pictures))]
    return [str(next(iter(json.loads(body)))) if s == 200 else s for s, body in zip(statuses, bodies, strict=True)]


def reference_top(network: torch.nn.Module, labels: tuple[str, ...], image: Image.Image) -> str:
    """Answer as torchvision's documentation does it: resize, centre crop, to tensor, normalise, argmax."""
    norm = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), norm]
    with torch.inference_mode():
        return labels[int(network(transforms.Compose(steps)(image)[None]).argmax())]


def independent_decode(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)
        grey = np.where(wide == image.info.get("transparency", -1), 255, (wide * 255 / 65535).round())
        image = Image.fromarray(grey.astype(np.uint8))
    elif "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def test_identical_top_1_on_the_imagenet_samples(
    handler: VisionHandler, network: torch.nn.Module, shared_data: Path
) -> None:
    paths = sorted((shared_data / "imagenet_samples").glob("*.JPEG"))
    assert len(paths) == 200
    same = 0
    for start in range(0, 200, 8):
        chunk = [path.read_bytes() for path in paths[start : start + 8]]
        wanted = [reference_top(network, handler.spec.labels, independent_decode(data)) for data in chunk]
        same += sum(ours == theirs for ours, theirs in zip(tops(handler, chunk), wanted, strict=True))
    print(f"identical top-1: {same} of 200")  # noqa: T201 - the figure, shown with -s
    assert same >= 199


def test_every_awkward_picture_gets_the_references_answer(
    handler: VisionHandler, network: torch.nn.Module, shared_data: Path
) -> None:
    paths = sorted((shared_data / "awkward").rglob("*.*"))
    answers: dict[str, str | int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(0, len(paths), 8):
            chunk = paths[start : start + 8]
            answers.update(zip(map(str, chunk), tops(handler, [p.read_bytes() for p in chunk]), strict=True))
        for path in paths:
            answer = answers[str(path)]
            try:
                image = independent_decode(path.read_bytes())
            except Exception:  # noqa: BLE001 - whatever Pillow raises: the reference fails
                assert answer in (400, 413, 415, 422), path.name
                continue
            if image.width * image.height > MAX_PIXELS:
                assert answer == 413, path.name
            else:
                assert answer == reference_top(network, handler.spec.labels, image), path.name


MEMORY = """
import io, json, sys, warnings
from pathlib import Path
import numpy as np
from PIL import Image
from ts.context import Context, RequestProcessor
from vision_handler import VisionHandler

warnings.simplefilter("ignore")

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024

def worst(kind, mode, **options):
    target = io.BytesIO()
    Image.new(mode, (7071, 7071)).save(target, kind, **options)
    return target.getvalue()

handler = VisionHandler()
handler.initialize(Context("resnet18", sys.argv[1], {}, 8, None, "0.12.0"))
awkward = [path.read_bytes() for path in sorted(Path(sys.argv[2]).rglob("*.*"))]
largest = [
    worst("JPEG", "RGB"), worst("PNG", "RGBA", compress_level=1), worst("JPEG", "CMYK"), worst("PNG", "I;16"),
    worst("WEBP", "RGB", method=0), worst("AVIF", "RGB", speed=10),
]

def send(pictures):
    for start in range(0, len(pictures), 8):
        chunk = pictures[start:start + 8]
        context = Context("resnet18", "", {}, 8, None, "0.12.0")
        context.request_processor = [RequestProcessor({}) for _ in chunk]
        assert len(handler.handle([{"body": data} for data in chunk], context)) == len(chunk)

send(awkward[:8])
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
for _ in range(3):
    send(awkward)
# The same last batch as before, since the memory of its forward pass is kept for the next one.
send(awkward[:8])
after = memory("VmRSS")
for _ in range(3):
    send(largest)
print(json.dumps({"before": before, "after": after, "peak": memory("VmHWM")}))
"""


def test_memory_comes_back_and_its_peak_is_bounded(model_folder: Path, shared_data: Path) -> None:
    handlers = Path(__file__).resolve().parents[2] / "handlers"
    command = [sys.executable, "-c", MEMORY, str(model_folder), str(shared_data / "awkward")]
    # What the launcher sets for its workers, with two threads that decode.
    environ = {**MALLOC, "BEELINE_THREADS": "2", "PATH": "/usr/bin"}
    done = subprocess.run(command, cwd=handlers, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print({key: f"{value:.0f} MB" for key, value in seen.items()})  # noqa: T201 - the figures, shown with -s
    assert abs(seen["after"] - seen["before"]) < 64
    # 50 megapixels at 16 bytes each: WebP's decoder holds its canvas twice besides Pillow's copy.
    assert seen["peak"] - seen["before"] < 50 * 16 + 64

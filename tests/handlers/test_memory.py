"""Memory of a worker on large pictures: it comes back, and its peak is bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.servers.protocol import MALLOC
from tests.conftest import ROOT

pytestmark = pytest.mark.shared

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
after = []
for _ in range(3):
    send(awkward)
    # The same last batch as before, since the memory of its forward pass is kept for the next one.
    send(awkward[:8])
    after.append(memory("VmRSS"))
# The least: glibc may keep a freed part of its heap for a while, and what a worker holds is held in every round.
after = min(after)
for _ in range(3):
    send(largest)
print(json.dumps({"before": before, "after": after, "peak": memory("VmHWM")}))
"""


def test_memory_comes_back_and_its_peak_is_bounded(model_folder: Path, shared_data: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(model_folder), str(shared_data / "awkward")]
    # What the launcher sets for its workers, with two threads that decode.
    environ = {**MALLOC, "BEELINE_THREADS": "2", "PATH": "/usr/bin"}
    done = subprocess.run(command, cwd=ROOT / "handlers", env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print({key: f"{value:.0f} MB" for key, value in seen.items()})  # noqa: T201 - the figures, shown with -s
    assert abs(seen["after"] - seen["before"]) < 64
    # 50 megapixels at 16 bytes each: WebP's decoder holds its canvas twice besides Pillow's copy.
    assert seen["peak"] - seen["before"] < 50 * 16 + 64

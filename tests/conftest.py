"""What several rooms' tests share: a tiny model as a real exported folder, pictures, a fake server, the shared data."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from prometheus_client.values import close_all_multiprocess_files

from beeline import metrics, pixels
from beeline.spec import CHECKSUMS, Artifact, Geometry, ModelSpec

if TYPE_CHECKING:
    from playwright.sync_api import Playwright

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("red", "green", "blue")
TIERS = {"server", "browser", "shared", "train", "readme", "bench", "docker", "gpu"}

# In the background or under nohup these are ignored, in every process that a test starts too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Site(BaseHTTPRequestHandler):
    """A fake server: it answers POST with `answers` in turn, the last one for ever, and GET with `page`."""

    protocol_version = "HTTP/1.1"
    url: str
    page: tuple[int, bytes]
    # Status, body and, where it has one, Retry-After.
    answers: list[tuple[int, bytes] | tuple[int, bytes, str | None]]
    # The paths of the POSTs, and the ports of their clients.
    asked: list[str]
    ports: set[int]

    def do_GET(self) -> None:
        self.reply(*self.page)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        self.ports.add(self.client_address[1])
        self.reply(*self.answers[min(len(self.asked), len(self.answers)) - 1])

    def reply(self, status: int, body: bytes, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture
def site() -> Iterator[type[Site]]:
    handler: Any = type("Bound", (Site,), {"page": (404, b""), "answers": [], "asked": [], "ports": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


class ColourNet(torch.nn.Module):
    """A real graph that is exported in a second: it names the picture's strongest colour."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn uint8 `[N, H, W, 3]` into logits `[N, 3]`."""
        return pictures.float().mean(dim=(1, 2)) / 16 - 4


def picture(
    colour: tuple[int, int, int], size: tuple[int, int] = (48, 40), kind: str = "PNG", **options: object
) -> bytes:
    """Return the bytes of a picture of one colour."""
    target = io.BytesIO()
    Image.new("RGB", size, colour).save(target, kind, **options)
    return target.getvalue()


RED, GREEN, BLUE = (picture(colour) for colour in ((220, 30, 40), (20, 200, 60), (30, 40, 210)))

_ended = itertools.count(1)
atexit.register(close_all_multiprocess_files)


def worker(
    folder: Path,
    model: str = "colours",
    version: str = "1.0",
    choice: Mapping[str, Mapping[str, str]] | None = None,
    pid: int | None = None,
) -> metrics.Metrics:
    """Return the counts of the worker with the process id `pid`; without one, of a worker that has ended."""
    name = f"{2**30}-{next(_ended)}" if pid is None else metrics.identity(pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(metrics.FOLDER, str(folder))
        patch.setattr(metrics, "identity", lambda _: name)
        return metrics.Metrics(model, version, choice or {})


def post_together(url: str, bodies: Sequence[bytes], headers: dict[str, str] | None = None) -> list[requests.Response]:
    """Send every body at the same time, each as a client of its own."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: requests.post(url, data=body, headers=headers, timeout=60), bodies))


def until_one_batch(send: Callable[[], list[requests.Response]]) -> list[requests.Response]:
    """Send several requests at once, up to five times, until they share one batch; return their answers.

    On a busy machine one may come too late, and the gateway's golden picture may come between.
    """
    for _ in range(5):
        responses = send()
        if all(each.headers["X-Batch-Size"] == str(len(responses)) for each in responses):
            return responses
    pytest.fail(f"in five tries {len(responses)} requests at once never shared one batch")


def post_as_one_batch(url: str, bodies: Sequence[bytes], wanted: Sequence[object]) -> list[requests.Response]:
    """Send as many bodies as a batch holds, one a client, until they share a batch.

    `wanted` is what each client must get every time: the first label, or the status if that is not 200.
    """

    def send() -> list[requests.Response]:
        responses = post_together(url, bodies)
        got = [next(iter(each.json())) if each.status_code == 200 else each.status_code for each in responses]
        assert got == list(wanted), [each.text for each in responses]
        return responses

    return until_one_batch(send)


def write_checksums(folder: Path, spec: ModelSpec) -> None:
    """Record every file's digest as an archive does."""
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    record = {"schema": 1, "fingerprint": spec.fingerprint(), "files": files}
    (folder / CHECKSUMS).write_text(json.dumps(record))


def write_archive(
    path: Path,
    model: str,
    files: dict[str, bytes],
    handler: str,
    config: str | None = None,
    version: str = "1.0",
    serialized: str = "model.pt",
) -> Path:
    """Zip the files under a manifest as torch-model-archiver writes it."""
    manifest = {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {
            "modelName": model,
            "serializedFile": serialized,
            "handler": handler,
            "modelVersion": version,
            **({"configFile": config} if config else {}),
        },
        "archiverVersion": "0.12.0",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="session")
def player() -> Iterator[Playwright]:
    """What drives browsers: one a process, because a process has room for one of its loops."""
    from playwright.sync_api import sync_playwright

    from tests.frontend.conftest import CHROMIUM, require_chromium

    require_chromium(CHROMIUM)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a server unpacks it: artifact, spec, golden pictures, checksums."""
    folder = tmp_path_factory.mktemp("colour")
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(ColourNet(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt2")
    spec = ModelSpec(
        name="colours",
        version="1.0",
        labels=LABELS,
        geometry=Geometry(resize=36, crop=32),
        model=Artifact(
            "model.pt2", "exported_program", hashlib.sha256((folder / "model.pt2").read_bytes()).hexdigest()
        ),
        geometry_version=pixels.GEOMETRY,
    )
    spec.save(folder / "model_spec.json")
    (folder / "golden").mkdir()
    expected = []
    for name, data in (("0.png", RED), ("1.png", BLUE)):
        (folder / "golden" / name).write_bytes(data)
        logits = pixels.decode(data, spec.geometry).astype(np.float64).mean(axis=(0, 1)) / 16
        values = np.exp(logits) / np.exp(logits).sum()
        top = sorted(zip(LABELS, values.tolist(), strict=True), key=lambda pair: -pair[1])
        expected.append({"file": name, "sha256": hashlib.sha256(data).hexdigest(), "top": top})
    (folder / "golden" / "expected.json").write_text(json.dumps({"schema": 1, "pictures": expected}))
    write_checksums(folder, spec)
    return folder


@pytest.fixture(scope="session")
def openvino_model(colour_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for OpenVINO, in fp32."""
    from archive.variants.agreement import Gate, Pictures
    from archive.variants.convert import to_openvino

    spec = ModelSpec.load(colour_model)
    folder = tmp_path_factory.mktemp("openvino")
    none = np.empty((0, spec.geometry.crop, spec.geometry.crop, 3), np.uint8)
    pictures = Pictures(none, none, none, spec.geometry, "none")
    made = to_openvino(colour_model, spec, folder, "fp32", pictures, Gate())
    spec = dataclasses.replace(spec, model=made, engine="openvino")
    spec.save(folder / "model_spec.json")
    shutil.copytree(colour_model / "golden", folder / "golden")
    write_checksums(folder, spec)
    return folder


def pack(folder: Path, path: Path) -> Path:
    """Pack a model folder with the project's handler, under the name and version of its spec."""
    handlers = ROOT / "handlers"
    spec = ModelSpec.load(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {path.relative_to(handlers).as_posix(): path.read_bytes() for path in handlers.rglob("*.py")}
    record = json.loads(files["checksums.json"])
    record["files"] = {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "checksums.json"
    }
    files["checksums.json"] = json.dumps(record).encode()
    return write_archive(path, spec.name, files, "vision_handler.py", version=spec.version, serialized=spec.model.file)


@pytest.fixture(scope="session")
def colour_archive(colour_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real archive: the project's handler with the smallest model that names a colour."""
    return pack(colour_model, tmp_path_factory.mktemp("colours") / "colours.mar")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real pictures and weights; `BEELINE_SHARED` names their folder."""
    folder = Path(os.environ.get("BEELINE_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real pictures at {folder}; set BEELINE_SHARED to their folder")
    return folder


@pytest.fixture
def edit_spec() -> Callable[[Path, dict[str, object]], ModelSpec]:
    """Change keys of a model folder's spec and record the new checksums, as a new build would."""

    def edit(folder: Path, changes: dict[str, object]) -> ModelSpec:
        spec = ModelSpec.from_dict({**ModelSpec.load(folder).to_dict(), **changes})
        spec.save(folder / "model_spec.json")
        write_checksums(folder, spec)
        return spec

    return edit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of a CUDA device unless `-m` names them: few machines have one, and a skip may fail.

    Every file must name its marks, because `make` finds a tier's files by these words.
    """
    for path, name in {(item.path, mark.name) for item in items for mark in item.iter_markers()}:
        if name in TIERS and f"mark.{name}" not in path.read_text(encoding="utf-8"):
            raise pytest.UsageError(
                f"{path} has {name} tests and does not name the mark; write pytest.mark.{name} there"
            )
    if "gpu" in str(config.option.markexpr):
        return
    left = [item for item in items if item.get_closest_marker("gpu")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in red that a skipped test makes the run fail."""
    if os.environ.get("BEELINE_NO_SKIPS") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("skipped tests fail this run (BEELINE_NO_SKIPS is set)", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that skipped a test and must not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("BEELINE_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

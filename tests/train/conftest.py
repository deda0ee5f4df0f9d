"""A web server that misbehaves on request, and tiny pictures to train on."""

from __future__ import annotations

import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from host import silent
from train.fit import fit
from train.generate import generate
from train.model import build
from train.plan import Plan, plan
from train.predictor import RunPredictor
from train.runs import Run, open_run


class FileServer(ThreadingHTTPServer):
    """Serves `content` at every path; the switches say how badly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.content = b""
        self.etag: str | None = '"one"'
        self.status = 200
        self.ranges = True
        self.cuts: list[int] = []
        self.shift = 0
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set.zip"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of these tests."""


class _Answer(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.seen.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start -= server.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            self.wfile.write(body[: server.cuts.pop(0)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """For tiny networks the wait for a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is known of pictures, and decoded ones, stay out of the project's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.cache.FOLDER", tmp_path_factory.mktemp("cache"))
        patch.setattr("train.index.FOLDER", tmp_path_factory.mktemp("index"))
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A running FileServer; a broken download is retried without a pause."""
    monkeypatch.setattr("train.download._PAUSE_SECONDS", 0.0)
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four validation pictures a class."""
    return generate(tmp_path_factory.mktemp("drawn"), train=8, val=4)


def zipped(files: dict[str, bytes]) -> bytes:
    """Return a zip file of these names and contents."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of a 1000-class squeezenet1_1 with seeded random weights."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(build("squeezenet1_1", 1000).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def environ(drawn: Path, random_weights: Path) -> dict[str, str]:
    """An environment that names the tiny pictures and weights."""
    return {"BEELINE_DATA": str(drawn), "BEELINE_WEIGHTS": str(random_weights)}


@pytest.fixture(scope="session")
def tiny_plan(environ: dict[str, str]) -> Plan:
    """Two epochs of squeezenet1_1 on pictures of 64 pixels."""
    words = ["model.name=squeezenet1_1", "model.resize=72", "model.crop=64", "fit.epochs=2", "fit.batch=6"]
    return plan(words, silent, environ=environ)


@pytest.fixture(scope="session")
def tiny_run(tiny_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of it; tests that change it copy its folder first."""
    return fit(tiny_plan, silent, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def exported(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of it with its export, which a predictor makes where it is missing."""
    run = open_run(Path(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("exported") / "run")))
    RunPredictor(run.folder)
    return run

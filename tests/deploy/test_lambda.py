"""The Lambda function: alone, and before a real server, through AWS's own client."""

from __future__ import annotations

import base64
import ctypes
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import requests
import yaml

from serve import sagemaker
from tests.conftest import BLUE, RED
from tests.deploy.test_aws import FUNCTION, TEMPLATE
from tests.serve.conftest import wait_for
from tests.serve.test_sagemaker import Container

# An address of the Internet, which in a network of its own is this machine's.
PUBLIC = "8.8.4.4"
NEW_NETWORK = 0x40000000


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The function's module, with an endpoint at an address that nobody has."""
    return load_function(monkeypatch, "http://127.0.0.1:1")


def load_function(patch: pytest.MonkeyPatch, url: str) -> ModuleType:
    """Import the function as Lambda does: its environment first."""
    values = {"ENDPOINT_NAME": "beeline", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url, "AWS_DEFAULT_REGION": "eu-west-1"}
    values |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_CONFIG_FILE": "/nonexistent"}
    for name, value in values.items():
        patch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("classify", FUNCTION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTEXT = SimpleNamespace(aws_request_id="id-1")


def test_all_tries_fit_into_the_templates_time(function: ModuleType) -> None:
    settings = yaml.safe_load(re.sub(r"!\w+ ?", "", TEMPLATE.read_text()))["Resources"]["Function"]["Properties"]
    # And pauses between them.
    assert settings["Timeout"] > function.TRIES * (function.CONNECT + function.READ)
    assert function.PAYLOAD == sagemaker.PAYLOAD


@pytest.mark.parametrize(
    ("event", "status", "kind"),
    [
        ({}, 400, "EmptyBody"),
        ([], 400, "EmptyBody"),
        ({"data": 1}, 400, "BadEncoding"),
        ({"data": "no base64!"}, 400, "BadEncoding"),
        ({"data": ""}, 400, "EmptyBody"),
        ({"body": "{", "isBase64Encoded": False}, 400, "BadEncoding"),
        ({"body": None}, 400, "EmptyBody"),
        ({"data": base64.b64encode(bytes(sagemaker.PAYLOAD + 1)).decode()}, 413, "TooManyBytes"),
        # Nobody listens there.
        ({"url": "https://a.b/c.jpg"}, 502, "BadGateway"),
    ],
)
def test_a_call_that_fails_is_an_error_in_json_and_one_line_of_log(
    function: ModuleType, event: dict[str, Any], status: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = function.handler(event, CONTEXT)
    assert (answer["statusCode"], json.loads(answer["body"])["type"]) == (status, kind)
    assert answer["headers"] == {"Content-Type": "application/json", "X-Request-Id": "id-1"}
    line = json.loads(capsys.readouterr().out)
    assert (line["request"], line["status"]) == ("id-1", status)
    assert "a.b" not in json.dumps(line)


class Front:
    """A fake of what AWS has before a container: its path, and its error for a container's answer other than 2xx.

    It answers `faults` first, each a status and the name of an error.
    """

    def __init__(self, container: str) -> None:
        self.faults: list[tuple[int, str]] = []
        self.calls = 0
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                front.calls += 1
                assert self.path == "/endpoints/beeline/invocations"
                if front.faults:
                    status, name = front.faults.pop(0)
                    self.answer(status, json.dumps({"Message": "no"}).encode(), name)
                    return
                kept = {name: self.headers[name] for name in ("Content-Type", "Accept")}
                got = requests.post(f"{container}/invocations", data=body, headers=kept, timeout=60)
                if got.ok:
                    self.answer(200, got.content)
                else:
                    original = {"OriginalStatusCode": got.status_code, "OriginalMessage": got.text, "Message": "424"}
                    self.answer(424, json.dumps(original).encode(), "ModelError")

            def answer(self, status: int, body: bytes, error: str = "") -> None:
                self.send_response(status)
                if error:
                    self.send_header("x-amzn-ErrorType", error)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def place(
    colour_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Callable[..., Any], Container]]:
    """A container in a network of its own, where `PUBLIC` is this machine; what is called is called in there."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a network in which a public address is this machine's")
    # In a folder that nginx's workers may enter.
    commands = f'ip link set lo up && ip address add {PUBLIC}/32 dev lo && exec "$0" "$@"'
    with ThreadPoolExecutor(1) as inside:
        libc = ctypes.CDLL(None, use_errno=True)
        folder = tmp_path_factory.mktemp("container")
        environ = {"BEELINE_URL_HOSTS": f"{PUBLIC}:8123", "BEELINE_URL_HTTP": "true"}
        within = ("unshare", "--net", "sh", "-c", commands)
        container = Container(folder, colour_archive, folder / "state", within, environ)

        def enter() -> None:
            path = Path(f"/proc/{container.process.pid}/ns/net")
            wait_for(lambda: not path.samefile("/proc/self/ns/net"))
            with path.open() as file:
                assert libc.setns(file.fileno(), NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())

        inside.submit(enter).result()

        def call(what: Callable[..., Any], *arguments: Any) -> Any:
            return inside.submit(what, *arguments).result()

        try:
            call(wait_for, container.ping, lambda status: status == 200)
            yield call, container
        finally:
            container.stop()


@pytest.fixture(scope="module")
def front(place: tuple[Callable[..., Any], Container], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The fake front of the container, and a host with one picture."""
    call, container = place
    front = call(Front, container.url)
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "blue.png").write_bytes(BLUE)
    pictures = call(ThreadingHTTPServer, (PUBLIC, 8123), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    # A thread is in the network of the thread that starts it.
    for server in (front.server, pictures):
        call(threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start)
    yield front
    for server in (front.server, pictures):
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(
    place: tuple[Callable[..., Any], Container], front: Front, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Call the function with an event, before the fake front and the real container."""
    module = load_function(monkeypatch, f"http://127.0.0.1:{front.server.server_port}")
    front.calls = 0
    return lambda event: place[0](module.handler, event, CONTEXT)


@pytest.mark.server
def test_a_picture_by_url_in_base64_and_as_it_is_get_the_endpoints_answer(
    ask: Callable[..., Any], place: tuple[Callable[..., Any], Container], capsys: pytest.CaptureFixture[str]
) -> None:
    call, container = place
    plain = call(container.invoke, BLUE).json()
    encoded = base64.b64encode(BLUE).decode()
    url = {"url": f"http://{PUBLIC}:8123/blue.png"}
    events = [{"data": encoded}, {"body": encoded, "isBase64Encoded": True}, {"body": json.dumps({"data": encoded})}]
    for event in (*events, url, {"body": json.dumps(url), "headers": {"content-type": "application/json"}}):
        answer = ask(event)
        assert (answer["statusCode"], json.loads(answer["body"])) == (200, plain), event
        line = json.loads(capsys.readouterr().out)
        assert (line["status"], line["tries"], line["endpoint"]) == (200, 1, "beeline")
        assert line["source"] == ("url" if "url" in str(event) else "bytes")


@pytest.mark.server
def test_the_containers_own_errors_are_the_callers(ask: Callable[..., Any]) -> None:
    refused = ask({"data": base64.b64encode(b"no picture").decode()})
    assert (refused["statusCode"], json.loads(refused["body"])["code"]) == (415, 415)
    for url, status in ((f"http://{PUBLIC}:8123/none", 424), ("http://127.0.0.1:8123/blue.png", 403)):
        assert ask({"url": url})["statusCode"] == status


@pytest.mark.server
def test_throttling_is_tried_again_and_then_said(
    ask: Callable[..., Any], front: Front, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"data": base64.b64encode(RED).decode()}
    front.faults = [(400, "ThrottlingException"), (503, "ServiceUnavailable")]
    assert ask(event)["statusCode"] == 200
    assert json.loads(capsys.readouterr().out)["tries"] == front.calls == 3
    front.faults = [(400, "ThrottlingException")] * 3
    answer = ask(event)
    assert (answer["statusCode"], answer["headers"]["Retry-After"]) == (429, "1")
    assert json.loads(answer["body"])["type"] == "TooManyRequests"
    front.faults = [(400, "ValidationError")]
    assert ask(event)["statusCode"] == 502

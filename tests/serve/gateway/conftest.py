"""Real nginx with the project's configuration and the real prober, in front of stand-ins that can misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from beeline.errors import BeelineError
from host import processes
from serve.gateway import runtime
from serve.gateway.nginx import choose, listening
from serve.gateway.settings import Backend, Name, Settings, Tls
from serve.ports import Address, settle
from tests.conftest import ROOT as ROOT
from tests.serve.conftest import MakeArchive
from tests.serve.conftest import wait_for as wait_for

ONE_READY = {"workers": 1, "ready": 1}


class StandIn:
    """A stand-in for a server, for faults that a real server cannot be made to have.

    The body of a request says what to do: `echo` (return the request), `sleep SECONDS`, `hold` (until `released`),
    `hang up` (no answer), `late hang up`, `status CODE`; anything else gets a label. `ready` is the state of its
    workers; models in `away` have no workers, those in `wrong` answer another label. While `frozen`, nobody gets an
    answer until it is `released`.
    """

    def __init__(self, inference: int = 0, management: int = 0) -> None:
        self.ready = True
        self.label = "red"
        self.form: object = None
        self.away: set[str] = set()
        self.wrong: set[str] = set()
        self.frozen = False
        self.seen: list[str] = []
        self.managed: list[tuple[str, str, str]] = []
        self.busy = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.inference = _serve(self, _Inference, inference)
        self.management = _serve(self, _Management, management)

    @property
    def backend(self) -> Backend:
        return Backend(*(f"http://127.0.0.1:{each.server_port}" for each in (self.inference, self.management)))

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.released.set()
        self.inference.stop()
        self.management.stop()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Any

    def answer(self, status: int, values: object, **headers: str) -> None:
        headers = {"Content-Type": "application/json", **{name.replace("_", "-"): headers[name] for name in headers}}
        self.send(status, json.dumps(values).encode(), headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Management(_Handler):
    def do_PUT(self) -> None:
        self.owner.managed.append((self.command, self.path, self.headers["Host"]))
        self.answer(202, {"status": "Processing"})

    do_POST = do_DELETE = do_PUT  # noqa: N815

    def do_GET(self) -> None:
        self.owner.managed.append((self.command, self.path, self.headers["Host"]))
        name = "".join(self.path.partition("?")[0].split("/")[2:3]) or "fake"
        worker = {"id": "1", "status": "READY" if self.owner.ready else "LOADING"}
        count = 0 if name in self.owner.away else 1
        numbers = {"minWorkers": count, "maxWorkers": count, "batchSize": 1, "maxBatchDelay": 1}
        self.answer(200, [{"modelName": name, "modelVersion": "1.0", **numbers, "workers": [worker] * count}])


class _Inference(_Handler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.owner.lock:
            self.owner.seen.append(self.path)
            self.owner.busy += 1
        try:
            self.react(*body.decode(errors="replace").partition(" ")[::2])
        finally:
            with self.owner.lock:
                self.owner.busy -= 1

    do_PUT = do_POST  # noqa: N815

    def react(self, what: str, value: str) -> None:
        if what in ("hang", "late"):
            time.sleep(2.5 if what == "late" else 0)
            self.close_connection = True
            return
        if what == "sleep":
            time.sleep(float(value))
        if what == "hold" or self.owner.frozen:
            self.owner.released.wait(60)
        if what == "echo":
            self.answer(200, {"path": self.path, "headers": dict(self.headers)})
        elif what == "status":
            self.answer(int(value), {"code": int(value), "type": "FromTheServer", "message": "its own words"})
        else:
            timing = "decode;dur=1.00, forward;dur=2.00, encode;dur=0.10"
            label = "blue" if self.path.split("/")[2] in self.owner.wrong else self.owner.label
            self.answer(200, self.owner.form or {label: 0.9, "other": 0.1}, X_Batch_Size="1", Server_Timing=timing)


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def stop(self) -> None:
        """Refuse new connections and cut the others, as the kernel does when a process dies."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that were cut."""


class Peer:
    """A stand-in for the gateway of a backend on another host.

    `ping` is the status and the values of its `/ping`, `answers` the status of each prediction, `pages` its catalog,
    with `page_status` and `page_headers`. While `silent` it takes connections and does not answer `/ping`.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        self.ping: tuple[int, object] = (200, {"status": "Healthy", "models": {"fake": {"1.0": ONE_READY}}})
        self.answers = 200
        self.headers: dict[str, str] = {}
        self.pages: dict[str, bytes] = {}
        self.page_status = 200
        self.page_headers: dict[str, str] = {}
        self.seen: list[str] = []
        self.silent = False
        self.stopped = threading.Event()
        self.host = host
        self.server = _serve(self, _Peer, port, host)
        self.offer()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server.server_port}"

    @property
    def pings(self) -> int:
        return self.seen.count("/ping")

    def offer(self, version: str = "1.0", card: bytes = b"{}") -> None:
        """Have a catalog of one model with a card and one sample."""
        files = {f"/catalog/fake/{version}.json": card, f"/samples/fake/{version}/a.png": b"a picture"}
        model = {"name": "fake", "version": version, "card": f"/catalog/fake/{version}.json"}
        self.pages = {**files, "/catalog.json": json.dumps({"models": [model]}).encode()}

    def stop(self) -> None:
        """Refuse connections from now on; a second time nothing."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.server.stop()

    close = stop


class _Peer(_Handler):
    def do_GET(self) -> None:
        self.owner.seen.append(self.path)
        if self.path == "/ping":
            while self.owner.silent and not self.owner.stopped.wait(0.05):
                pass
            self.answer(*self.owner.ping)
        elif (body := self.owner.pages.get(self.path)) is not None:
            self.send(self.owner.page_status, body, self.owner.page_headers)
        else:
            self.answer(404, {"code": 404})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.owner.seen.append(self.path)
        self.answer(self.owner.answers, {"from": self.owner.host}, **self.owner.headers)


def _serve(owner: StandIn | Peer, handler: type[_Handler], port: int, host: str = "127.0.0.1") -> _Server:
    server = _Server((host, port), type("Bound", (handler,), {"owner": owner}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@dataclasses.dataclass
class Site:
    """A running gateway: its address, settings, process and stand-ins."""

    url: str
    settings: Settings
    process: subprocess.Popen[bytes]
    backends: list[StandIn]

    @property
    def port(self) -> int:
        """The first port that it listens on."""
        return self.settings.listen[0].port

    def count(self, path: str) -> int:
        """Return how many requests for this path have reached the stand-ins."""
        return sum(each.seen.count(path) for each in self.backends)

    def release(self) -> None:
        """Let every stand-in answer what it holds."""
        for each in self.backends:
            each.frozen = False
            each.released.set()

    def predict(self, body: Any = "a picture", model: str = "fake", **options: Any) -> requests.Response:
        """Send one prediction."""
        return requests.post(f"{self.url}/predictions/{model}", data=body, timeout=60, **options)

    def ping(self) -> tuple[int, dict[str, Any]]:
        """Return status and values of `/ping`; 0 where nobody answers."""
        try:
            answer = requests.get(f"{self.url}/ping", timeout=5)
        except requests.ConnectionError:
            assert self.process.poll() is None, "the gateway process ended"
            return 0, {}
        return answer.status_code, answer.json()

    def wait_until(self, ready: bool) -> dict[str, Any]:
        """Wait until `/ping` says so, and return its values."""
        return wait_for(self.ping, lambda seen: seen[0] == (200 if ready else 503))[1]

    def wait_until_reason(self, part: str) -> str:
        """Wait until `/ping` gives a reason with `part` in it, and return the reason."""
        return str(wait_for(self.ping, lambda seen: part in seen[1].get("reason", ""))[1]["reason"])

    def members(self) -> list[str]:
        """Return the addresses that share the load by nginx's configuration."""
        text = (self.settings.folder / "settings" / "upstream.conf").read_text(encoding="utf-8")
        # Once for each class of size.
        return list(dict.fromkeys(re.findall(r"server (\S+) max_conns", text)))

    def wait_until_members(self, count: int) -> list[str]:
        """Wait until so many stand-ins share the load, and return their addresses."""
        return wait_for(self.members, lambda members: len(members) == count and self._are_reached(members))

    def _are_reached(self, members: list[str]) -> bool:
        """Whether nginx really shares the load among these, and no old worker does otherwise.

        nginx reads the file a moment after it is written; for a tenth of a second old workers go on accepting.
        """
        master = psutil.Process(int((self.settings.folder / "nginx.pid").read_text()))
        if sum(map(listening, master.children())) != self.settings.processes:
            return False
        self.predict(model="shared")
        alive = [each for each in self.backends if each.backend.inference.removeprefix("http://") in members]
        return all("/predictions/shared" in each.seen for each in alive)

    def raw(self, request: bytes, port: int | None = None, patience: float = 5.0) -> bytes:
        """Send bytes as they are; return what comes back until the connection ends or is silent for so long."""
        with socket.create_connection(("127.0.0.1", port or self.port), timeout=patience) as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(TimeoutError):
                while piece := connection.recv(65_536):
                    answer += piece
        return answer

    def log(self, least: int = 1) -> list[dict[str, Any]]:
        """Return the access log once it has so many predictions: nginx writes it once a second."""

        def lines() -> list[dict[str, Any]]:
            return [json.loads(line) for line in self.settings.access_log.read_text(encoding="utf-8").splitlines()]

        return wait_for(lines, lambda seen: sum("/predictions/" in line["request"] for line in seen) >= least)


Gateway = Callable[..., Site]

WHOSE = ("the system's", "the set-up's")
# For tests, or files of tests, that run with both nginx; the others run with the system's.
both = pytest.mark.parametrize("whose", WHOSE, indirect=True, scope="module")


@pytest.fixture(scope="module")
def whose(request: pytest.FixtureRequest) -> str:
    """Return one of `WHOSE`."""
    return str(getattr(request, "param", WHOSE[0]))


def environment(whose: str) -> dict[str, str]:
    """Return an environment with that nginx: the set-up's is used where the PATH has none."""
    found = {name: value for name, value in os.environ.items() if name != "BEELINE_NGINX"}
    return found if whose == WHOSE[0] else {**found, "PATH": "/nowhere"}


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 and its key, and return both files."""
    chain, key = folder / "chain.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(chain)], check=True, capture_output=True)
    return chain, key


def settings_of(folder: Path, backends: tuple[Backend, ...] = (), **changes: Any) -> Settings:
    """Return the settings of a gateway in a folder; `changes` replace some."""
    values: dict[str, Any] = {
        "folder": folder / "run",
        # A program that ignores its arguments, where no nginx runs.
        "program": shutil.which("true"),
        "version": "1.22.1",
        "listen": (Address("127.0.0.1", 8080),),
        "backends": backends,
        "store": folder / "store",
        "max_body": 100_000,
        "max_image": 70_000,
        "in_flight": 4,
        "per_second": 1000,
        "deadline": 10,
        "drain": 0,
        "stop": 8,
        "processes": 1,
        # Characters with a meaning in nginx's configuration.
        "logs": folder / 'the "logs" of $1',
        "log_megabytes": 10,
        "log_files": 3,
    }
    return Settings(**{**values, **changes})


def start(
    make_fake: MakeArchive,
    backends: int = 1,
    wait: bool = True,
    module: Sequence[str] = ("serve.gateway",),
    models: Sequence[str] = ("fake",),
    whose: str = WHOSE[0],
    **changes: Any,
) -> Site:
    """Start a gateway in front of so many stand-ins that serve `models`; `changes` replace settings.

    `module` is the name and the first arguments of the module that runs.
    """
    found = choose("nginx", environment(whose))
    assert whose in found.sentence, f"{found.sentence}; these tests need both: apt-get install nginx"
    # Started by root, nginx's workers are nobody, and pytest closes its own folders to others.
    folder = Path(tempfile.mkdtemp(prefix="beeline-test-"))
    folder.chmod(0o755)
    for model in models:
        make_fake(folder / "store", model, expected="red")
    stand_ins = [StandIn() for _ in range(backends)]
    public, metrics, management, tls = settle(
        [(Address("127.0.0.1", 0, scheme), "") for scheme in ("http", "http", "http", "https")]
    )
    if "tls" in changes:
        changes["tls"] = Tls(tls, *changes["tls"])
    given = {"program": found.program, "version": found.version, "metrics": metrics, "management": management}
    known = tuple(each.backend for each in stand_ins)
    settings = settings_of(folder, known, **{**given, "listen": (public,), **changes})
    runtime.lay_out(settings)
    with (folder / "process.log").open("w") as log:
        command = [sys.executable, "-m", *module, str(settings.folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    site = Site(str(settings.listen[0]), settings, process, stand_ins)
    try:
        if wait:
            site.wait_until(ready=True)
    except BaseException:
        stop(site)
        raise
    return site


def stop(site: Site) -> None:
    """Stop the gateway, and check that nginx ended with it."""
    site.process.send_signal(signal.SIGTERM)
    site.process.wait(timeout=30)
    for each in site.backends:
        each.stop()
    assert processes.marked(folder=site.settings.folder) == []
    shutil.rmtree(site.settings.folder.parent)


@pytest.fixture
def gateway(make_fake: MakeArchive, whose: str) -> Iterator[Gateway]:
    """Start gateways, each as `start` does."""
    started: list[Site] = []

    def begin(*arguments: Any, **changes: Any) -> Site:
        started.append(start(make_fake, *arguments, **{"whose": whose, **changes}))
        return started[-1]

    yield begin
    for site in started:
        stop(site)


@pytest.fixture(scope="module")
def gateway_once(make_fake: MakeArchive, whose: str) -> Iterator[Site]:
    """One gateway for all tests of a file that leave it as it was."""
    site = start(make_fake, whose=whose)
    yield site
    stop(site)


class Cluster:
    """Backends on loopback addresses of their own with one port for all, and a gateway in front of their name.

    Only DNS is fake: a file has the addresses of the name.
    """

    HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")

    def __init__(self, gateway: Gateway, folder: Path) -> None:
        self._gateway = gateway
        self._file = folder / "addresses"
        self.name = Name("backends", _common_port(self.HOSTS), _common_port(self.HOSTS))
        self.peers: list[Peer] = []
        self.resolve_to()

    def resolve_to(self, *hosts: str) -> None:
        """Let the name stand for these from now on; with `away` DNS does not answer."""
        draft = self._file.with_suffix(".tmp")
        draft.write_text("\n".join(hosts))
        draft.replace(self._file)

    def backend(self, host: str, **changes: Any) -> Site:
        """Start a real gateway in front of a stand-in for a server."""
        management = Address(host, self.name.management_port)
        return self._gateway(listen=(Address(host, self.name.port),), management=management, **changes)

    def peer(self, host: str) -> Peer:
        """Start a stand-in for such a gateway."""
        self.peers.append(Peer(host, self.name.port))
        return self.peers[-1]

    def gateway(self, wait: bool = True, **changes: Any) -> Site:
        """Start the gateway in front of the name."""
        module = ("tests.serve.gateway.fake_dns", self.name.host, str(self._file))
        return self._gateway(backends=0, wait=wait, module=module, **{"name": self.name, "store": None, **changes})


def hosts(site: Site) -> list[str]:
    """Return the hosts that share the load by nginx's configuration."""
    return [each.partition(":")[0] for each in site.members()]


def _common_port(hosts: Sequence[str]) -> int:
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(BeelineError):
            settle([(Address(host, port), "") for host in hosts])
            return port
    raise AssertionError(f"no port is free on all of {hosts}")


@pytest.fixture
def cluster(gateway: Gateway, tmp_path: Path) -> Iterator[Cluster]:
    """Backends behind a name."""
    found = Cluster(gateway, tmp_path)
    yield found
    for peer in found.peers:
        peer.stop()

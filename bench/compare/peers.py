"""Every server that can be compared: how it runs and is asked, in two classes, as documented and with our engine."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError, did_you_mean
from bench.pictures import Pictures
from host import ROOT, environments
from serve import servers
from serve.gateway.nginx import choose as choose_gateway
from serve.servers import java
from serve.servers.protocol import Say

DOCUMENTED, OURS = "as documented", "our engine"
ONE_THREAD, BEFORE_OURS = "-one-thread", "ours-"
FOLDER = ROOT / "bench" / "peers"
HOME = ROOT / ".beeline" / "peers"
# What the lock files are resolved for.
_PYTHON = (3, 11)
# Queues are long where a server is slow; no default time-out of a framework shall turn that into failures.
_SECONDS = 60
_BOUNDARY = "beeline-bench-picture"
# Triton's binary form: JSON of a length that the header tells, then the tensor's bytes.
_TRITON_JSON = 256


def _best(answer: dict[str, float]) -> str:
    """Return the most probable label; not every server keeps the order (Flask sorts by name)."""
    return str(max(answer, key=lambda label: float(answer[label])))


@dataclass(frozen=True)
class Wire:
    """One protocol: path, headers, a picture's bytes to a request's body, an answer's JSON to its first label."""

    path: str
    headers: Mapping[str, str]
    encode: Callable[[bytes], bytes]
    label: Callable[[Any], str] = field(default=_best)

    def pictures(self, pictures: Pictures) -> Pictures:
        """Return the pictures as request bodies."""
        return Pictures(pictures.source, pictures.names, tuple(map(self.encode, pictures.bodies)))

    def read(self, body: bytes) -> str:
        """Return an answer's first label.

        Raises:
            ValueError: when the answer has none.
        """
        try:
            return self.label(json.loads(body))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"an answer without a label: {body[:200]!r}") from error


def raw(path: str) -> Wire:
    """The picture itself as the body."""
    return Wire(path, {"Content-Type": "application/octet-stream"}, bytes)


def base64_json(path: str, key: str) -> Wire:
    """The picture in base64 under a key of a JSON object."""

    def encode(data: bytes) -> bytes:
        return json.dumps({key: base64.b64encode(data).decode()}).encode()

    return Wire(path, {"Content-Type": "application/json"}, encode)


def form(path: str, name: str, in_list: bool = False) -> Wire:
    """The picture as a browser uploads a file; `in_list` where the answer is a list of one."""
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="picture.jpg"'
    head = f"--{_BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n".encode()
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    return Wire(path, headers, lambda data: head + data + tail, (lambda answer: _best(answer[0])) if in_list else _best)


def triton(model: str) -> Wire:
    """KServe's second protocol with Triton's binary extension, as Triton's own client speaks it."""

    def encode(data: bytes) -> bytes:
        tensor = len(data).to_bytes(4, "little") + data
        size = {"binary_data_size": len(tensor)}
        inputs = [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": size}]
        return json.dumps({"inputs": inputs}).encode().ljust(_TRITON_JSON) + tensor

    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(_TRITON_JSON)}
    return Wire(f"/v2/models/{model}/infer", headers, encode, lambda answer: str(answer["outputs"][0]["data"][0]))


@dataclass(frozen=True)
class Numbers:
    """How a server runs: requests a batch, processes or instances, milliseconds, threads of PyTorch in each.

    `threads` is None where the server's documentation sets none: then PyTorch's default holds.
    """

    batch: int
    workers: int
    delay_ms: int
    threads: int | None = None


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        name: as `--servers` has it; one of ours begins with `ours-`.
        pattern: in a line what it is and after which page.
        numbers: that it runs with.
        wire: how it is asked; it is ready when a picture is answered.
        command: its command line; `server.Server` fills in the fields.
        variables: of its environment, likewise.
        lock: the folder in `bench/peers` that has its packages and its code; None for Beeline's own environment.
        pack: a command that runs once, before the first start and untimed.
        server: one of Beeline's own, with its gateway: `torchserve/nginx`.
        batches: whether it gathers batches at all.
        own_delay: whether it finds its delay by itself.
        ours: the wire with our decoder, where that is another.
    """

    name: str
    pattern: str
    numbers: Numbers
    wire: Wire
    command: tuple[str, ...] = ("{python}", "{folder}/server.py")
    variables: Mapping[str, str] = field(default_factory=dict)
    lock: str | None = None
    pack: tuple[str, ...] = ()
    server: str = ""
    batches: bool = True
    own_delay: bool = False
    ours: Wire | None = None

    @property
    def kind(self) -> str:
        """`DOCUMENTED` or `OURS`: the class that it is compared within."""
        return OURS if self.name.startswith(BEFORE_OURS) else DOCUMENTED

    @property
    def environment(self) -> environments.Environment | None:
        """What is made of its lock file, with hashes enforced, the first time and whenever that changes."""
        if self.lock is None:
            return None
        version = sys.executable if sys.version_info[:2] == _PYTHON else ".".join(map(str, _PYTHON))
        lock_file = FOLDER / self.lock / "requirements.txt"
        return environments.Environment(f"the environment of {self.lock}", HOME / self.lock, lock_file, version)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.environment.python if self.environment else Path(sys.executable)

    def prepare(self, say: Say) -> None:
        """Make its environment; not timed.

        Raises:
            BeelineError: why it cannot run here.
        """
        if self.environment:
            self.environment.prepare(say)
        if self.server:
            server, gateway = self.server.split("/")
            servers.named(server).prepare(say)
            choose_gateway(gateway, os.environ)
        if "JAVA_HOME" in self.variables:
            java.find_java(os.environ)

    def pinned(self) -> dict[str, str]:
        """Return the versions that its `requirements.in` asks for, by package."""
        if self.lock is None:
            return {}
        lines = (FOLDER / self.lock / "requirements.in").read_text(encoding="utf-8").splitlines()
        pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        return {name.partition("[")[0].strip(): version.strip() for name, version in pairs}


def documented(cores: int) -> tuple[Peer, ...]:
    """Return the servers that people would take instead, as their documentation has them on so many cores."""
    uvicorn = "{python} -m uvicorn server:app --host 127.0.0.1 --port {port} --app-dir {folder} --workers {workers}"
    gunicorn = f"{{python}} -m gunicorn -w {{workers}} --bind 127.0.0.1:{{port}} --pythonpath {{folder}} -t {_SECONDS}"
    bentoml = "{bin}/bentoml serve server:Classifier --host 127.0.0.1 --port {port} --working-dir {folder}"
    return (
        Peer(
            "torchserve",
            "TorchServe's stock image_classifier as shipped: batch 8, 50 ms as on its page on batches, a worker a core "
            "(a model of fewer than five labels needs its set_max_result_classes, or every batch fails)",
            Numbers(8, cores, 50),
            raw("/predictions/classifier"),
            # Nothing of this repository.
            variables={"JAVA_HOME": "{java}", "PYTHONPATH": ""},
            pack=(
                *("{bin}/torch-model-archiver", "--model-name", "classifier", "--version", "1.0", "--force"),
                *("--serialized-file", "{model}/documented.pt", "--handler", "{handler}"),
                *("--extra-files", "{model}/index_to_name.json", "--export-path", "{model}"),
            ),
        ),
        Peer(
            "litserve",
            "LitServe's guide to faster serving: base64 in JSON, max_batch_size, a worker a core",
            Numbers(8, cores, 10),
            base64_json("/predict", "image_data"),
        ),
        Peer(
            "mosec",
            "Mosec's ResNet example: stages that decode and infer, batches of 16, two of the latter",
            Numbers(16, 2, 10),
            raw("/inference"),
            variables={
                "MOSEC_ADDRESS": "127.0.0.1",
                "MOSEC_PORT": "{port}",
                "MOSEC_PATH": "{scratch}/mosec",
                "MOSEC_TIMEOUT": str(1000 * _SECONDS),
            },
        ),
        Peer(
            "fastapi",
            "FastAPI's tutorial on Uvicorn: an uploaded file, a plain function, a worker a core, no batches",
            Numbers(1, cores, 0),
            form("/predict", "file"),
            (*uvicorn.split(), "--no-access-log"),
            batches=False,
        ),
        Peer(
            "flask",
            "PyTorch's Flask tutorial on Gunicorn: an uploaded file, two workers a core, no batches",
            Numbers(1, 2 * cores, 0),
            form("/predict", "file"),
            (*gunicorn.split(), "server:app"),
            batches=False,
        ),
        Peer(
            "pytriton",
            "PyTriton's ResNet examples: Triton's dynamic batcher, 32 pictures, 5 ms, two instances",
            Numbers(32, 2, 5),
            triton("classifier"),
            # Triton finds this interpreter's own library, as PyTriton's installation page says, and not the system's.
            variables={"LD_LIBRARY_PATH": "{libraries}"},
        ),
        Peer(
            "bentoml",
            "BentoML's page on adaptive batching: a batchable API, 32 pictures, a worker a core, no 503 for being late",
            # No delay but the latency over which it sends requests away; it finds its delay itself.
            Numbers(32, cores, 1000 * _SECONDS),
            form("/classify", "images", in_list=True),
            tuple(bentoml.split()),
            {"BENTOML_HOME": "{scratch}/bentoml"},
            own_delay=True,
            ours=form("/classify_files", "files", in_list=True),
        ),
        Peer(
            "ray",
            "Ray Serve's guide to batching: serve.batch of 8, 100 ms, a replica of one CPU a core",
            Numbers(8, cores, 100),
            raw("/"),
            # As a node of a cluster, which Linux is by default, its processes listen everywhere.
            variables={"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"},
        ),
    )


def everything(model: str, cores: int, ours: Numbers) -> tuple[Peer, ...]:
    """Return all servers: as documented first, then with our engine.

    Args:
        model: the archive's name.
        cores: that may be used.
        ours: the numbers that every server with our engine runs with, as far as it has them.
    """
    first = [dataclasses.replace(peer, lock=peer.name) for peer in documented(cores)]
    one_thread = [
        dataclasses.replace(
            peer,
            name=peer.name + ONE_THREAD,
            pattern=f"the same with OMP_NUM_THREADS=1: {peer.pattern}",
            numbers=dataclasses.replace(peer.numbers, threads=1),
        )
        for peer in first
    ]
    own = [
        _own(server, title, gateway, model, ours)
        for server, title in {"torchserve": "TorchServe", "mms": "Multi Model Server"}.items()
        for gateway in ("none", "nginx")
    ]
    # Stock TorchServe with our engine is our own.
    return (*first, *one_thread, *own, *(_with_ours(peer, ours) for peer in first[1:]))


def choose(peers: Iterable[Peer], names: Iterable[str]) -> list[Peer]:
    """Return the named servers in their order here, or those compared by default.

    Raises:
        BeelineError: for a name that is none.
    """
    by_name = {peer.name: peer for peer in peers}
    # By default, of the peers limited to one thread only TorchServe, whose documentation recommends it.
    chosen = list(names) or [
        name for name in by_name if not name.endswith(ONE_THREAD) or name == f"torchserve{ONE_THREAD}"
    ]
    for name in chosen:
        if name not in by_name:
            raise BeelineError(f"--servers has {name!r}{did_you_mean(name, by_name)}")
    return [peer for name, peer in by_name.items() if name in chosen]


def _own(server: str, title: str, gateway: str, model: str, numbers: Numbers) -> Peer:
    options = (
        f"--server {server} --gateway {gateway} --name compare --port {{port}} --management-port 0 --metrics-port 0 "
        f"--batch-size {numbers.batch} --workers {numbers.workers} --max-batch-delay {numbers.delay_ms}"
    )
    behind = "behind its gateway (nginx)" if gateway == "nginx" else "no gateway"
    return Peer(
        f"{BEFORE_OURS}{server}" + ("-nginx" if gateway == "nginx" else ""),
        f"beeline serve up on {title}, {behind}",
        numbers,
        raw(f"/predictions/{model}"),
        ("{bin}/beeline", "serve", "up", "--mar", "{archive}", "--config", "{config}", *options.split()),
        {"BEELINE_STATE": "{scratch}", "BEELINE_DEVICE": "cpu"},
        server=f"{server}/{gateway}",
    )


def _with_ours(peer: Peer, numbers: Numbers) -> Peer:
    """Return the same server around our decoder and engine, with the numbers that all of that class have."""
    if not peer.batches:
        numbers = dataclasses.replace(numbers, batch=1, delay_ms=0)
    elif peer.own_delay:
        numbers = dataclasses.replace(numbers, delay_ms=peer.numbers.delay_ms)
    return dataclasses.replace(
        peer,
        name=f"{BEFORE_OURS}{peer.name}",
        pattern=f"{peer.name} around Beeline's decoder and engine",
        numbers=numbers,
        wire=peer.ours or peer.wire,
    )

"""Every server that can be compared, as one record each: environment, command, numbers, and how it is asked.

There are two classes: servers as their documentation has them, and servers with our engine.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from urllib3.filepost import encode_multipart_formdata

from beeline.errors import BeelineError, did_you_mean
from host import ROOT, environments
from serve import servers
from serve.servers.protocol import Say

DOCUMENTED, OURS = "as documented", "our engine"
ONE_THREAD, BEFORE_OURS = "-one-thread", "ours-"
FOLDER = ROOT / "bench" / "peers"
HOME = ROOT / ".beeline" / "peers"
# The Python of the lock files.
_PYTHON = "3.11"
# A slow server has a long queue, and no framework's default time-out may turn that into failures.
_SECONDS = 60
_BOUNDARY = "beeline-bench-picture"
# Bytes of the JSON at the start of a request to Triton; the rest is the tensor.
_TRITON_JSON = 256


def _best(answer: Any) -> str:
    """Return the most probable label of `{label: probability}` in any order (Flask sorts by name), or of a list of one.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: when the answer has none.
    """
    labels = answer[0] if isinstance(answer, list) else answer
    return str(max(labels, key=labels.get))


@dataclass(frozen=True)
class Wire:
    """One protocol: path, headers, a picture's bytes to a request's body, an answer's JSON to its first label."""

    path: str
    headers: Mapping[str, str]
    encode: Callable[[bytes], bytes]
    label: Callable[[Any], str] = _best


def raw(path: str) -> Wire:
    """The picture itself as the body."""
    return Wire(path, {"Content-Type": "application/octet-stream"}, bytes)


def base64_json(path: str, key: str) -> Wire:
    """The picture in base64 under a key of a JSON object."""
    headers = {"Content-Type": "application/json"}
    return Wire(path, headers, lambda data: json.dumps({key: base64.b64encode(data).decode()}).encode())


def form(path: str, name: str) -> Wire:
    """The picture as a browser uploads a file."""

    def encode(data: bytes) -> bytes:
        return encode_multipart_formdata({name: ("picture.jpg", data, "image/jpeg")}, _BOUNDARY)[0]

    return Wire(path, {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}, encode)


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
    """One server: its name in `--servers`, its numbers, how it is asked, and what it is and after which page.

    It is ready when it has answered a picture. `server.fields` has the names in braces in `command` and `variables`.
    `lock` is the folder in `bench/peers` with its packages and code; None is Beeline's own environment. `server` is
    `torchserve` or `mms` if `beeline serve up` starts it.
    """

    name: str
    numbers: Numbers
    wire: Wire
    command: str = "{python} {folder}/server.py"
    variables: Mapping[str, str] = field(default_factory=dict)
    pattern: str = ""
    lock: str | None = None
    server: str = ""

    @property
    def kind(self) -> str:
        """`DOCUMENTED` or `OURS`: the class that it is compared within."""
        return OURS if self.name.startswith(BEFORE_OURS) else DOCUMENTED

    @property
    def environment(self) -> environments.Environment | None:
        """The environment of its lock file."""
        if self.lock is None:
            return None
        version = sys.executable if sys.version.startswith(f"{_PYTHON}.") else _PYTHON
        lock_file = FOLDER / self.lock / "requirements.txt"
        return environments.Environment(f"the environment of {self.lock}", HOME / self.lock, lock_file, version)

    def prepare(self, say: Say) -> None:
        """Install its environment if the lock file is new or has changed; this is not timed."""
        if self.environment:
            self.environment.prepare(say)
        if self.server:
            servers.named(self.server).prepare(say)

    def pinned(self) -> dict[str, str]:
        """Return the versions that its `requirements.in` asks for, by package."""
        if self.lock is None:
            return {}
        text = (FOLDER / self.lock / "requirements.in").read_text(encoding="utf-8")
        return dict(re.findall(r"(?m)^([\w.-]+)(?:\[.*\])?==(\S+)", text))


def documented(cores: int) -> tuple[Peer, ...]:
    """Return the servers that people would use instead, as their documentation has them, for so many cores.

    The docstring of a server's code says which page that is.
    """
    uvicorn = (
        "{python} -m uvicorn server:app --host 127.0.0.1 --port {port} --app-dir {folder} --workers {numbers.workers}"
    )
    gunicorn = (
        f"{{python}} -m gunicorn -w {{numbers.workers}} --bind 127.0.0.1:{{port}} --pythonpath {{folder}} -t {_SECONDS}"
    )
    bentoml = "{python.parent}/bentoml serve server:Classifier --host 127.0.0.1 --port {port} --working-dir {folder}"
    # It imports nothing of this repository.
    torchserve = {"JAVA_HOME": "{java}", "PYTHONPATH": ""}
    mosec = {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": "{port}", "MOSEC_PATH": "{scratch}/mosec"}
    mosec["MOSEC_TIMEOUT"] = str(1000 * _SECONDS)
    # So Triton loads this interpreter's library instead of the system's, as PyTriton's installation page says.
    pytriton = {"LD_LIBRARY_PATH": "{libraries}"}
    # Else Ray's processes are a node of a cluster, which on Linux is the default, and listen on every address.
    ray = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}
    peers = (
        Peer("torchserve", Numbers(8, cores, 50), raw("/predictions/classifier"), variables=torchserve),
        Peer("litserve", Numbers(8, cores, 10), base64_json("/predict", "image_data")),
        Peer("mosec", Numbers(16, 2, 10), raw("/inference"), variables=mosec),
        Peer("fastapi", Numbers(1, cores, 0), form("/predict", "file"), f"{uvicorn} --no-access-log"),
        Peer("flask", Numbers(1, 2 * cores, 0), form("/predict", "file"), f"{gunicorn} server:app"),
        Peer("pytriton", Numbers(32, 2, 5), triton("classifier"), variables=pytriton),
        # BentoML chooses its delay itself; the number is the latency above which it refuses requests.
        Peer(
            "bentoml",
            Numbers(32, cores, 1000 * _SECONDS),
            form("/classify", "images"),
            bentoml,
            {"BENTOML_HOME": "{scratch}/bentoml"},
        ),
        Peer("ray", Numbers(8, cores, 100), raw("/"), variables=ray),
    )
    return tuple(replace(peer, lock=peer.name, pattern=_docstring(peer.name)) for peer in peers)


def _docstring(name: str) -> str:
    code = (FOLDER / name / "server.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(code)) or "").split())


def everything(model: str, cores: int, ours: Numbers) -> tuple[Peer, ...]:
    """Return all servers: as documented first, then with our engine.

    Args:
        model: the archive's name.
        cores: that may be used.
        ours: the numbers of every server with our engine, as far as the server has them.
    """
    first = documented(cores)
    one_thread = [
        replace(
            peer,
            name=peer.name + ONE_THREAD,
            pattern=f"the same with OMP_NUM_THREADS=1: {peer.pattern}",
            numbers=replace(peer.numbers, threads=1),
        )
        for peer in first
    ]
    own = [_own(server, gateway, model, ours) for server in ("torchserve", "mms") for gateway in ("none", "nginx")]
    # TorchServe with our engine is our own server.
    return (*first, *one_thread, *own, *(_with_ours(peer, ours) for peer in first[1:]))


def choose(peers: Iterable[Peer], names: Iterable[str]) -> list[Peer]:
    """Return the named servers in their order here, or the default ones; raise `BeelineError` for an unknown name."""
    by_name = {peer.name: peer for peer in peers}
    # By default, of those with one thread only TorchServe, whose documentation recommends it.
    left_out = {name for name in by_name if name.endswith(ONE_THREAD) and name != f"torchserve{ONE_THREAD}"}
    chosen = list(names) or by_name.keys() - left_out
    for name in chosen:
        if name not in by_name:
            raise BeelineError(f"--servers has {name!r}{did_you_mean(name, by_name)}")
    return [peer for name, peer in by_name.items() if name in chosen]


def _own(server: str, gateway: str, model: str, numbers: Numbers) -> Peer:
    """Return one of Beeline's own servers, as `beeline serve up` starts it."""
    command = (
        f"{{python.parent}}/beeline serve up --server {server} --gateway {gateway} --name compare --port {{port}} "
        "--management-port 0 --metrics-port 0 --mar {setup.archive} --config {setup.config_file} "
        "--batch-size {numbers.batch} --workers {numbers.workers} --max-batch-delay {numbers.delay_ms}"
    )
    ending, words = {"none": ("", "no gateway"), "nginx": ("-nginx", "behind its gateway (nginx)")}[gateway]
    title = {"torchserve": "TorchServe", "mms": "Multi Model Server"}[server]
    variables = {"BEELINE_STATE": "{scratch}", "BEELINE_DEVICE": "cpu"}
    pattern = f"beeline serve up on {title}, {words}"
    name, wire = f"{BEFORE_OURS}{server}{ending}", raw(f"/predictions/{model}")
    return Peer(name, numbers, wire, command, variables, pattern, server=server)


def _with_ours(peer: Peer, numbers: Numbers) -> Peer:
    """Return the same server around our decoder and engine, with the numbers of all servers of that class."""
    if peer.numbers.batch == 1:
        # It gathers no batches.
        numbers = replace(numbers, batch=1, delay_ms=0)
    elif peer.name == "bentoml":
        numbers = replace(numbers, delay_ms=peer.numbers.delay_ms)
    pattern = f"{peer.name} around Beeline's decoder and engine"
    return replace(peer, name=f"{BEFORE_OURS}{peer.name}", pattern=pattern, numbers=numbers)

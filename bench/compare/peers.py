"""Every server that can be compared: its environment, command and settings, and how it is asked."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from urllib3.filepost import encode_multipart_formdata

from beeline import formats
from beeline.errors import BeelineError, did_you_mean
from bench.tune.grid import Settings
from host import ROOT, environments
from serve import servers
from serve.servers.protocol import Say

# The two classes: servers as their documentation has them, and servers with our engine.
DOCUMENTED, OURS = "as documented", "our engine"
ONE_THREAD, BEFORE_OURS = "-one-thread", "ours-"
FOLDER = ROOT / "bench" / "peers"
# As in docker-compose.yml.
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=1g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
# As many threads as PyTorch takes by default, for servers whose documentation sets none.
DEFAULT = 0
# The Python of the lock files.
_PYTHON = "3.11"
# A time-out for every framework: a slow server has a long queue, and that must not become failures.
_SECONDS = 60
_BOUNDARY = "beeline-bench-picture"
# Bytes of the JSON at the start of a request to Triton; the rest is the tensor.
_TRITON_JSON = 256


def _best(answer: Any) -> str:
    """Return the most probable label of `{label: probability}`, in any order (Flask sorts by name); or of its list."""
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
        kind = (formats.kind_of(data) or "jpeg").lower()
        return encode_multipart_formdata({name: (f"picture.{kind}", data, f"image/{kind}")}, _BOUNDARY)[0]

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
class Peer:
    """One server; it is ready when it has answered a picture."""

    name: str  # in `--servers`
    settings: Settings
    wire: Wire
    # `server.start` knows the names in braces in `command` and `variables`.
    command: str = "{python} {folder}/server.py"
    variables: Mapping[str, str] = field(default_factory=dict)
    pattern: str = ""  # the page of documentation that it follows
    lock: str | None = None  # the folder in `bench/peers` of its packages and code; None is Beeline's environment
    server: str = ""  # a name of `serve.servers` if `beeline serve up` starts it

    @property
    def kind(self) -> str:
        """`DOCUMENTED` or `OURS`: the class that it is compared within."""
        return OURS if self.name.startswith(BEFORE_OURS) else DOCUMENTED

    @property
    def environment(self) -> environments.Environment | None:
        """The environment of its lock file, if it has one."""
        if self.lock is None:
            return None
        version = sys.executable if sys.version.startswith(f"{_PYTHON}.") else _PYTHON
        folder, lock_file = ROOT / ".beeline" / "peers" / self.lock, FOLDER / self.lock / "requirements.txt"
        return environments.Environment(f"the environment of {self.lock}", folder, lock_file, version)

    def prepare(self, say: Say) -> None:
        """Install its environment if the lock file is new or has changed; this is not timed."""
        if self.environment:
            self.environment.prepare(say)
        if self.server:
            servers.named(self.server).prepare(say, os.environ)

    def pinned(self) -> dict[str, str]:
        """Return the versions that its `requirements.in` asks for, by package."""
        if self.lock is None:
            return {}
        text = (FOLDER / self.lock / "requirements.in").read_text(encoding="utf-8")
        return dict(re.findall(r"(?m)^([\w.-]+)(?:\[.*\])?==(\S+)", text))


def documented(cores: int) -> list[Peer]:
    """Return the servers that people would use instead, set up as the documentation named in their code has them."""
    uvicorn = "{python} -m uvicorn server:app --host 127.0.0.1 --port {port} --app-dir {folder} --no-access-log"
    gunicorn = f"{{python}} -m gunicorn server:app --bind 127.0.0.1:{{port}} --pythonpath {{folder}} -t {_SECONDS}"
    bentoml = "{python.parent}/bentoml serve server:Classifier --host 127.0.0.1 --port {port} --working-dir {folder}"
    # Uvicorn and Gunicorn read it.
    workers = {"WEB_CONCURRENCY": "{settings.workers}"}
    # It imports nothing of this repository.
    torchserve = {"JAVA_HOME": "{java}", "PYTHONPATH": ""}
    mosec = {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": "{port}", "MOSEC_PATH": "{scratch}/mosec"}
    mosec["MOSEC_TIMEOUT"] = str(1000 * _SECONDS)
    # So Triton loads this interpreter's library instead of the system's, as PyTriton's installation page says.
    pytriton = {"LD_LIBRARY_PATH": "{libraries}"}
    # Without these, Ray starts a node of a cluster, its default on Linux, and listens on every address.
    ray = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}
    # BentoML chooses its delay itself; the number is the latency above which it refuses requests.
    patient = Settings(32, cores, 1000 * _SECONDS, DEFAULT)
    home = {"BENTOML_HOME": "{scratch}/bentoml"}
    peers = (
        Peer("torchserve", Settings(8, cores, 50, DEFAULT), raw("/predictions/classifier"), variables=torchserve),
        Peer("litserve", Settings(8, cores, 10, DEFAULT), base64_json("/predict", "image_data")),
        Peer("mosec", Settings(16, 2, 10, DEFAULT), raw("/inference"), variables=mosec),
        Peer("fastapi", Settings(1, cores, 0, DEFAULT), form("/predict", "file"), uvicorn, workers),
        Peer("flask", Settings(1, 2 * cores, 0, DEFAULT), form("/predict", "file"), gunicorn, workers),
        Peer("pytriton", Settings(32, 2, 5, DEFAULT), triton("classifier"), variables=pytriton),
        Peer("bentoml", patient, form("/classify", "images"), bentoml, home),
        Peer("ray", Settings(8, cores, 100, DEFAULT), raw("/"), variables=ray),
    )
    codes = [(FOLDER / peer.name / "server.py").read_text(encoding="utf-8") for peer in peers]
    patterns = [" ".join(code.split('"""')[1].split()) for code in codes]
    return [replace(peer, lock=peer.name, pattern=text) for peer, text in zip(peers, patterns, strict=True)]


def everything(model: str, cores: int, ours: Settings) -> list[Peer]:
    """Return all servers: first as documented, then with our engine and those of the settings `ours` that they have."""
    first, one_thread, others = documented(cores), [], []
    for peer in first:
        settings, pattern = replace(peer.settings, threads=1), f"the same with OMP_NUM_THREADS=1: {peer.pattern}"
        one_thread.append(replace(peer, name=peer.name + ONE_THREAD, settings=settings, pattern=pattern))
        settings = ours
        if peer.settings.batch_size == 1:
            # It gathers no batches.
            settings = replace(ours, batch_size=1, max_batch_delay=0)
        elif peer.name == "bentoml":
            settings = replace(ours, max_batch_delay=peer.settings.max_batch_delay)
        pattern = f"{peer.name} around Beeline's decoder and engine"
        others.append(replace(peer, name=BEFORE_OURS + peer.name, settings=settings, pattern=pattern))
    own = [_own(server, gateway, model, ours) for server in ("torchserve", "mms") for gateway in ("none", "nginx")]
    # TorchServe with our engine is our own server.
    return [*first, *one_thread, *own, _container(model, ours), *others[1:]]


def _own(server: str, gateway: str, model: str, settings: Settings) -> Peer:
    """Return one of Beeline's own servers, as `beeline serve up` starts it."""
    command = (
        f"{{python.parent}}/beeline serve up --server {server} --gateway {gateway} --name compare --port {{port}} "
        "--management-port 0 --metrics-port 0 --mar {setup.archive} --config {setup.config_file} --batch-size "
        "{settings.batch_size} --workers {settings.workers} --max-batch-delay {settings.max_batch_delay}"
    )
    ending, words = ("", "no gateway") if gateway == "none" else ("-nginx", "behind its gateway (nginx)")
    title = {"torchserve": "TorchServe", "mms": "Multi Model Server"}[server]
    name, pattern = f"{BEFORE_OURS}{server}{ending}", f"beeline serve up on {title}, {words}"
    variables = {"BEELINE_STATE": "{scratch}", "BEELINE_DEVICE": "cpu"}
    return Peer(name, settings, raw(f"/predictions/{model}"), command, variables, pattern, server=server)


def _container(model: str, settings: Settings) -> Peer:
    """Return our image with the store of the archive, whose index must list the archive."""
    # Where this machine sees the processes in the container, they are weighed and stopped by the mark of `running`.
    command = (
        f"docker run --rm {' '.join(CONFINED)} --publish=127.0.0.1:{{port}}:8080 --env=BEELINE_PEER={{scratch}} "
        "--env=BATCH_SIZE={settings.batch_size} --env=WORKERS={settings.workers} "
        "--env=LINGER_MS={settings.max_batch_delay} --volume={setup.archive.parent}:/model_store:ro "
        f"beeline-cpu:0.1.0 --mar {model}"
    )
    pattern = "the image beeline-cpu:0.1.0 on Docker, with TorchServe, its gateway (nginx) and Pillow-SIMD"
    return Peer(f"{BEFORE_OURS}container", settings, raw(f"/predictions/{model}"), command, pattern=pattern)


def choose(peers: Iterable[Peer], names: Sequence[str]) -> list[Peer]:
    """Return the named servers in their order here, or the default ones; raise `BeelineError` for an unknown name."""
    by_name = {peer.name: peer for peer in peers}
    for name in names:
        if name not in by_name:
            raise BeelineError(f"--servers has {name!r}{did_you_mean(name, by_name)}")
    # By default no container, and of those with one thread only TorchServe, whose documentation recommends it.
    left_out = {f"{peer.lock}{ONE_THREAD}" for peer in by_name.values() if peer.lock != "torchserve"}
    chosen = names or by_name.keys() - left_out - {f"{BEFORE_OURS}container"}
    return [peer for name, peer in by_name.items() if name in chosen]

"""Every server that can be compared, in two classes, with its numbers and the page that they are from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from beeline.errors import BeelineError, did_you_mean
from bench.compare import own, stock
from bench.compare.environment import Environment
from bench.compare.own import Own
from bench.compare.peer import DOCUMENTED, OURS, Bench, Numbers, Peer
from bench.compare.process import Command, Place, Process, Variables
from bench.compare.wire import Wire, base64_json, form, raw, triton

ONE_THREAD, BEFORE_OURS = "-one-thread", "ours-"
# Queues are long where a server is slow; no default time-out of a framework shall turn that into failures.
_SECONDS = 60


def _script(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
    return [str(place.python), str(place.folder / "server.py")]


def _uvicorn(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(place.port), "--app-dir", str(place.folder)]
    return [
        str(place.python),
        "-m",
        "uvicorn",
        "server:app",
        *where,
        "--workers",
        str(numbers.workers),
        "--no-access-log",
    ]


def _gunicorn(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
    where = ["--bind", f"127.0.0.1:{place.port}", "--pythonpath", str(place.folder)]
    return [str(place.python), "-m", "gunicorn", "-w", str(numbers.workers), *where, "-t", str(_SECONDS), "server:app"]


def _bentoml(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(place.port), "--working-dir", str(place.folder)]
    return [place.tool("bentoml"), "serve", "server:Classifier", *where]


def _bentoml_home(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    return {"BENTOML_HOME": str(place.scratch / "bentoml")}


def _no_cluster(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    """Keep Ray on loopback: as a node of a cluster, which Linux is by default, its processes listen everywhere."""
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}


def _libpython(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    """Let Triton find this interpreter's own library, as PyTriton's installation page says, and not the system's."""
    return {"LD_LIBRARY_PATH": str(place.python.resolve().parents[1] / "lib")}


def _mosec(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    return {
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": str(place.port),
        "MOSEC_PATH": str(place.scratch / "mosec"),
        "MOSEC_TIMEOUT": str(1000 * _SECONDS),
    }


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One peer in both classes.

    `numbers` are its documentation's; `ours` is its wire with our decoder, where that is another; `batches` says
    whether it gathers batches at all, `adaptive` whether it finds their delay by itself.
    """

    name: str
    pattern: str
    numbers: Numbers
    wire: Wire
    command: Command = _script
    variables: Variables | None = None
    ours: Wire | None = None
    batches: bool = True
    adaptive: bool = False


def _kinds(cores: int) -> tuple[_Kind, ...]:
    """Return the peers with what their documentation says for a machine of so many cores."""
    return (
        _Kind(
            "litserve",
            "LitServe's guide to faster serving: base64 in JSON, max_batch_size, a worker a core",
            Numbers(8, cores, 10),
            base64_json("/predict", "image_data"),
        ),
        _Kind(
            "mosec",
            "Mosec's ResNet example: stages that decode and infer, batches of 16, two of the latter",
            Numbers(16, 2, 10),
            raw("/inference"),
            variables=_mosec,
        ),
        _Kind(
            "fastapi",
            "FastAPI's tutorial on Uvicorn: an uploaded file, a plain function, a worker a core, no batches",
            Numbers(1, cores, 0),
            form("/predict", "file"),
            _uvicorn,
            batches=False,
        ),
        _Kind(
            "flask",
            "PyTorch's Flask tutorial on Gunicorn: an uploaded file, two workers a core, no batches",
            Numbers(1, 2 * cores, 0),
            form("/predict", "file"),
            _gunicorn,
            batches=False,
        ),
        _Kind(
            "pytriton",
            "PyTriton's ResNet examples: Triton's dynamic batcher, 32 pictures, 5 ms, two instances",
            Numbers(32, 2, 5),
            triton("classifier"),
            variables=_libpython,
        ),
        _Kind(
            "bentoml",
            "BentoML's page on adaptive batching: a batchable API, 32 pictures, a worker a core, no 503 for being late",
            # No delay but the latency over which it sends requests away; it finds its delay itself.
            Numbers(32, cores, 1000 * _SECONDS),
            form("/classify", "images", in_list=True),
            _bentoml,
            _bentoml_home,
            ours=form("/classify_files", "files", in_list=True),
            adaptive=True,
        ),
        _Kind(
            "ray",
            "Ray Serve's guide to batching: serve.batch of 8, 100 ms, a replica of one CPU a core",
            Numbers(8, cores, 100),
            raw("/"),
            variables=_no_cluster,
        ),
    )


def everything(model: str, cores: int, ours: Numbers) -> tuple[Peer, ...]:
    """Return all servers: as documented first, then with our engine.

    Args:
        model: the archive's name.
        cores: that may be used.
        ours: the numbers that every server with our engine runs with, as far as it has them.
    """
    documented: list[Peer] = [stock.torchserve(cores)]
    documented += [_documented(kind) for kind in _kinds(cores)]
    documented += [_one_thread(peer) for peer in documented if isinstance(peer, Process)]
    return (*documented, *_own(model, ours), *(_with_ours(kind, ours) for kind in _kinds(cores)))


def choose(peers: Iterable[Peer], names: Iterable[str]) -> list[Peer]:
    """Return the named servers in the catalog's order, or those compared by default.

    Raises:
        BeelineError: for a name that is none.
    """
    by_name = {peer.name: peer for peer in peers}
    wanted = list(names)
    for name in wanted:
        if name not in by_name:
            raise BeelineError(f"--servers has {name!r}{did_you_mean(name, by_name)}")
    if not wanted:
        # Of the peers limited to one thread only TorchServe, whose documentation recommends it.
        wanted = [name for name in by_name if not name.endswith(ONE_THREAD) or name == f"torchserve{ONE_THREAD}"]
    return [peer for name, peer in by_name.items() if name in wanted]


def _own(model: str, numbers: Numbers) -> list[Peer]:
    titles = {"torchserve": "TorchServe", "mms": "Multi Model Server"}
    return [
        Own(
            f"{BEFORE_OURS}{server}" + ("-nginx" if gateway == "nginx" else ""),
            OURS,
            f"beeline serve up on {title}, " + ("behind its gateway (nginx)" if gateway == "nginx" else "no gateway"),
            numbers,
            own.wire(model),
            server,
            gateway,
        )
        for server, title in titles.items()
        for gateway in ("none", "nginx")
    ]


def _documented(kind: _Kind) -> Process:
    made = Process(kind.name, DOCUMENTED, kind.pattern, kind.numbers, kind.wire, Environment(kind.name), kind.command)
    return made if kind.variables is None else dataclasses.replace(made, variables=kind.variables)


def _one_thread(peer: Process) -> Process:
    return dataclasses.replace(
        peer,
        name=peer.name + ONE_THREAD,
        pattern=f"the same with OMP_NUM_THREADS=1: {peer.pattern}",
        numbers=dataclasses.replace(peer.numbers, threads=1),
    )


def _with_ours(kind: _Kind, numbers: Numbers) -> Process:
    """Return the same server around our decoder and engine, with the numbers that all of that class have."""
    if not kind.batches:
        numbers = dataclasses.replace(numbers, batch=1, delay_ms=0)
    elif kind.adaptive:
        numbers = dataclasses.replace(numbers, delay_ms=kind.numbers.delay_ms)
    return dataclasses.replace(
        _documented(kind),
        name=f"{BEFORE_OURS}{kind.name}",
        kind=OURS,
        pattern=f"{kind.name} around Beeline's decoder and engine",
        numbers=numbers,
        wire=kind.ours or kind.wire,
    )

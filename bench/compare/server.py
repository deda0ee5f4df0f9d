"""A running peer: processes in a session of their own that are asked, weighed and stopped with all they started."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from beeline.errors import BeelineError, Undetermined, short
from bench.compare.peers import DEFAULT, FOLDER, OURS, Peer
from bench.pictures import Pictures
from host import ROOT, processes
from serve import ports
from serve.instance import logs
from serve.ports import Address
from serve.servers import java
from serve.servers.protocol import MALLOC, clean

MARK = "BEELINE_PEER"
# Seconds that a server may take until its first answer, and that one answer may take.
_PATIENCE, _ANSWER_SECONDS = 240.0, 60.0
# Seconds that the processes of a server have to end after SIGTERM.
_GRACE = 10.0
# A server's folder begins with this and the id of the comparison's process. It is short, because a socket's path has at
# most 108 bytes, and Ray adds over 60.
_SCRATCH = "bp-"
# No peer reports its use to anybody.
_QUIET = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}
_QUIET |= {"DO_NOT_TRACK": "1", "OTEL_SDK_DISABLED": "true"}
# A peer does not inherit these from the shell.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BEELINE_THREADS", "BEELINE_LONE_THREADS")


@dataclass(frozen=True)
class Setup:
    """What all servers of a comparison share."""

    archive: Path
    config_file: Path
    model: Path  # the folder of the unpacked archive and its TorchScript
    precision: str
    pictures: Pictures
    clients: int
    seconds: float
    agreement: Pictures | None = None
    labels: Sequence[str] = ()  # of `agreement`, by the fp32 reference


@dataclass(frozen=True)
class Server:
    """A peer that was started, the address of its predictions, its folder and its first process."""

    peer: Peer
    url: str
    scratch: Path
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raise `BeelineError` with its last words if it has ended."""
        if (code := self.process.poll()) is not None:
            log = [" ".join(line.split()) for line in logs.tail(self.scratch / "peer.log", 30) if line.strip()]
            errors = [line for line in log if "Error" in line or "error:" in line]
            words = (errors or log or ["nothing"])[-1][:300]
            raise BeelineError(f"{self.peer.name} ended with exit code {code}; its log says: {words}")

    def wait(self, picture: bytes) -> None:
        """Wait for one answer, then for as many at once as all workers take; raise `BeelineError` if none comes."""
        deadline = time.monotonic() + _PATIENCE
        for count in (1, max(2, 2 * self.peer.settings.workers)):
            while words := [words for label, words in ask(self, [picture] * count, count) if label is None]:
                self.check()
                if time.monotonic() > deadline:
                    raise Undetermined(f"{self.peer.name} answers no picture after {_PATIENCE:g} s but {words[-1]!r}")
                time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Return everything that it started and that lives."""
        return processes.marked(MARK, str(self.scratch), self.scratch)

    def memory_mb(self) -> float:
        """Return the memory of its processes in MB: each page once, shared ones in parts (PSS)."""
        total = 0
        for process in self.processes():
            # It may have ended meanwhile.
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return round(total / 1e6, 1)

    def threads(self) -> int | None:
        """Return how many threads PyTorch has in a worker, as the worker says; else how many were set, if any."""
        with suppress(OSError, ValueError):
            return int((self.scratch / "threads").read_text(encoding="utf-8"))
        return self.peer.settings.threads or None


@contextmanager
def running(peer: Peer, setup: Setup) -> Iterator[Server]:
    """Start a peer, which need not answer yet, and stop it at the end; raise `BeelineError` if it does not start."""
    (address,) = ports.settle([(Address("127.0.0.1", 0), "--servers")])
    with ExitStack() as stack:
        prefix = f"{_SCRATCH}{os.getpid()}-"
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
        scratch = Path(folder)
        # If root starts nginx, its workers run as `nobody` and must be able to enter this folder.
        scratch.chmod(0o711)
        command, environ = start(peer, setup, address.port, scratch)
        try:
            with (scratch / "peer.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=environ,
                    # Ray's workers write a title over their environment, so they are found by their folder.
                    cwd=scratch,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=processes.ending_with_parent(signal.SIGTERM),
                )
        except OSError as error:
            raise BeelineError(f"{peer.name}: {command[0]} does not start ({error.strerror})") from error
        stack.callback(processes.end_group, process)
        stack.callback(processes.stop_marked, MARK, folder, _GRACE, scratch)
        yield Server(peer, f"http://{address.host}:{address.port}{peer.wire.path}", scratch, process)


def start(peer: Peer, setup: Setup, port: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of one start: without telemetry, with the peer's own number of threads."""
    python = peer.environment.python if peer.environment else Path(sys.executable)
    home = java.find_java(os.environ).command.parents[1] if "JAVA_HOME" in peer.variables else None
    folder, libraries = FOLDER / (peer.lock or ""), python.resolve().parents[1] / "lib"
    values: dict[str, Any] = {"python": python, "java": home, "folder": folder, "libraries": libraries}
    values |= {"scratch": scratch, "port": port, "settings": peer.settings, "setup": setup}
    variables = {key: value for key, value in clean(os.environ).items() if peer.server or key not in _THREADS}
    variables |= {**dict.fromkeys(("TMPDIR", "TEMP", MARK), str(scratch)), "CUDA_VISIBLE_DEVICES": "", **_QUIET}
    if not peer.server:
        engine = "beeline" if peer.kind == OURS else "documented"
        asked = {"engine": engine, "model": str(setup.model), "scratch": str(scratch), "port": port}
        variables |= {
            "PATH": os.pathsep.join([str(python.parent), variables.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(map(str, (FOLDER, ROOT / "handlers"))),
            "HOME": str(scratch),
            "PEER": json.dumps(asked | asdict(peer.settings)),
        }
        if peer.settings.threads != DEFAULT:
            variables |= dict.fromkeys(("OMP_NUM_THREADS", "BEELINE_THREADS"), str(peer.settings.threads))
        # As in the workers of `serve up`.
        variables |= MALLOC if peer.kind == OURS else {}
    variables |= {key: value.format_map(values) for key, value in peer.variables.items()}
    return [word.format_map(values) for word in peer.command.split()], variables


def ask(server: Server, pictures: Sequence[bytes], clients: int) -> list[tuple[str | None, str]]:
    """Return the label of each picture, asked by so many clients at once; without one, None and the answer."""
    wire = server.peer.wire

    def one(picture: bytes) -> tuple[str | None, str]:
        try:
            answer = session.post(server.url, wire.encode(picture), headers=wire.headers, timeout=_ANSWER_SECONDS)
        except requests.RequestException as error:
            return None, error_text(error)
        if answer.status_code == 200:
            with suppress(LookupError, TypeError, ValueError, AttributeError):
                return wire.label(json.loads(answer.content)), ""
        return None, f"{answer.status_code} {answer.text[:160]}"

    with requests.Session() as session, ThreadPoolExecutor(clients) as pool:
        session.trust_env = False
        return list(pool.map(one, pictures))


def stop_leftovers() -> list[int]:
    """Stop what killed comparisons have left, and remove its files; return the ids of the stopped processes."""
    stopped: list[int] = []
    for scratch in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        # If another process has the same id now, a later comparison removes it.
        owner = re.fullmatch(rf"{_SCRATCH}(\d+)-\w{{8}}", scratch.name)
        if owner and scratch.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner[1])):
            stopped += processes.stop_marked(MARK, str(scratch), _GRACE, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
    return sorted(stopped)


def error_text(error: Exception) -> str:
    """Return an error in one line, without the path of this repository."""
    text = short(error, 2_000).replace(f"{ROOT}{os.sep}", "")
    return text if isinstance(error, BeelineError) else f"{type(error).__name__}: {text}"

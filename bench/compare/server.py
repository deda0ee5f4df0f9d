"""A peer that runs: processes of its own in one session; asked, weighed, stopped, and nothing of it outlives that."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import requests

from beeline.errors import BeelineError, Undetermined
from bench.compare.peers import FOLDER, OURS, Peer, Wire
from host import ROOT, processes
from serve import ports
from serve.ports import Address
from serve.servers import java
from serve.servers.protocol import MALLOC, clean

MARK = "BEELINE_PEER"
# Seconds that a server may take until its first answer, and that one answer may take.
PATIENCE, _ANSWER_SECONDS = 240.0, 60.0
# Seconds to end by itself after SIGTERM, then for what it left behind.
_GRACE, _REST = 15.0, 3.0
_PAUSE = 0.1
_TAIL, _SHOWN = 30, 160
# Short: a socket's path has 108 bytes at most, and Ray makes a long one of it.
_SCRATCH = "bp-"
# Seconds by which a process's time of birth may move with the clock.
_SAME_BIRTH = 2.0
# The stock handler asks for the five best labels and fails every batch of a model with fewer.
_STOCK_TOP = 5
# No peer tells anybody that it runs.
QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
}
# What would set threads that no documentation sets.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BEELINE_THREADS", "BEELINE_LONE_THREADS")


@dataclass(frozen=True)
class Bench:
    """What all servers of a comparison get: the archive, and the folder with the model in each form."""

    archive: Path
    name: str
    precision: str
    labels: int
    model: Path
    config_file: Path


class Server:
    """A peer that was started; as a context manager it is stopped at the end, whatever happened."""

    def __init__(self, peer: Peer, bench: Bench) -> None:
        """Start it; it need not answer yet.

        Raises:
            BeelineError: when there is no such command.
        """
        (address,) = ports.settle([(Address("127.0.0.1", 0), "--servers")])
        self.peer = peer
        self.url = f"http://127.0.0.1:{address.port}{peer.wire.path}"
        self.scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        # nginx's workers, who are nobody where root starts it, pass through here.
        self.scratch.chmod(0o711)
        me = psutil.Process()
        # The folder's name is nobody else's; who started it is known from this after a kill.
        self._token = f"{me.pid}-{me.create_time():.1f}:{self.scratch}"
        self._log = self.scratch / "peer.log"
        values = fields(peer, bench, address.port, self.scratch)
        command = [word.format_map(values) for word in peer.command]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env={**environ(peer, bench, values), MARK: self._token},
                    # A process that writes a title over its environment, as Ray's workers do, is known by its folder.
                    cwd=self.scratch,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=processes.ending_with_parent(signal.SIGTERM),
                )
        except BaseException as error:
            _remove(self.scratch)
            if isinstance(error, OSError):
                raise BeelineError(f"{peer.name}: {command[0]} does not start ({error.strerror})") from error
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `BeelineError` with its last words when it has ended by itself."""
        code = self._process.poll()
        if code is not None:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
            log = [" ".join(line.split()) for line in lines if line.strip()]
            errors = [line for line in log if "Error" in line or "error:" in line]
            words = (errors or log or ["nothing"])[-1][:300]
            raise BeelineError(f"{self.peer.name} ended with exit code {code}; its log says: {words}")

    def wait(self, data: bytes, patience: float = PATIENCE) -> None:
        """Wait until a picture is answered, then until as many at once are as workers can take.

        Raises:
            BeelineError: when the server ends before that. Undetermined: when it takes longer than `patience` seconds.
        """
        deadline = time.monotonic() + patience
        for count in (1, max(2, 2 * self.peer.numbers.workers)):
            while words := [text for label, text in ask(self.url, self.peer.wire, (data,) * count, count) if not label]:
                self.check()
                if time.monotonic() > deadline:
                    message = f"{self.peer.name} answers no picture after {patience:g} s but {words[-1]!r}"
                    raise Undetermined(message)
                time.sleep(_PAUSE)

    def processes(self) -> list[psutil.Process]:
        """Return everything that it started and that lives."""
        return processes.marked(MARK, self._token, self.scratch)

    def memory_mb(self) -> float:
        """Return the memory of its processes in MB: each page once, shared ones in parts (PSS)."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                # It ended meanwhile.
                continue
        return round(total / 1e6, 1)

    def threads(self) -> int | None:
        """Return how many threads PyTorch has in a worker, as the worker itself says; else what was asked for."""
        try:
            return int((self.scratch / "threads").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self.peer.numbers.threads

    def stop(self) -> None:
        """Ask it to end, end what is left of it, and remove its files."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                deadline = time.monotonic() + _GRACE
                # Not waited for: while it is a zombie, its group's id is nobody else's.
                kind = os.WEXITED | os.WNOHANG | os.WNOWAIT
                while os.waitid(os.P_PID, self._process.pid, kind) is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                processes.end_group(self._process)
        finally:
            processes.stop_marked(MARK, self._token, _REST, self.scratch)
            self._process.wait()
            _remove(self.scratch)


def fields(peer: Peer, bench: Bench, port: int, scratch: Path) -> dict[str, str]:
    """Return what a peer's command and variables may name in braces."""
    folder = FOLDER / (peer.lock or "")
    few = bench.labels < _STOCK_TOP
    return {
        "python": str(peer.python),
        "bin": str(peer.python.parent),
        "libraries": str(peer.python.resolve().parents[1] / "lib"),
        "java": str(java.find_java(os.environ).command.parent.parent) if "JAVA_HOME" in peer.variables else "",
        "port": str(port),
        "workers": str(peer.numbers.workers),
        "scratch": str(scratch),
        "folder": str(folder),
        "model": str(bench.model),
        "handler": str(folder / "few_labels.py") if few else "image_classifier",
        "archive": str(bench.archive.resolve()),
        "config": str(bench.config_file),
    }


def environ(peer: Peer, bench: Bench, values: dict[str, str]) -> dict[str, str]:
    """Return the environment of one start: nothing is reported to anybody, no threads that nobody set."""
    numbers, scratch = peer.numbers, values["scratch"]
    made = {key: value for key, value in clean(os.environ).items() if peer.server or key not in _THREADS}
    made |= {"TMPDIR": scratch, "TEMP": scratch, "CUDA_VISIBLE_DEVICES": "", **QUIET}
    if not peer.server:
        made |= {
            "PATH": os.pathsep.join([values["bin"], made.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(map(str, (FOLDER, ROOT / "handlers"))),
            "HOME": scratch,
            "PEER_PORT": values["port"],
            "PEER_BATCH_SIZE": str(numbers.batch),
            "PEER_WORKERS": str(numbers.workers),
            "PEER_DELAY_MS": str(numbers.delay_ms),
            "PEER_MODEL": str(bench.model),
            "PEER_ENGINE": "beeline" if peer.kind == OURS else "documented",
            "PEER_SCRATCH": scratch,
            "PEER_THREADS_FILE": f"{scratch}/threads",
        }
        if numbers.threads is not None:
            made["OMP_NUM_THREADS"] = made["BEELINE_THREADS"] = str(numbers.threads)
        if peer.kind == OURS:
            # As `serve up` gives its workers.
            made |= MALLOC
    return made | {key: value.format_map(values) for key, value in peer.variables.items()}


def pack(peer: Peer, bench: Bench) -> None:
    """Run the command of a peer that prepares what it serves.

    Raises:
        BeelineError: with the command's last words when it fails.
    """
    if not peer.pack:
        return
    values = fields(peer, bench, 0, bench.model)
    command = [word.format_map(values) for word in peer.pack]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=bench.model)
    except (OSError, subprocess.CalledProcessError) as error:
        words = " ".join(str(getattr(error, "stderr", None) or error).split())[-300:]
        raise BeelineError(f"{Path(command[0]).name} does not pack the archive of {peer.name} ({words})") from error


def ask(url: str, wire: Wire, bodies: Sequence[bytes], clients: int) -> list[tuple[str | None, str]]:
    """Return the label of each picture, asked by so many clients at once; without one, None and what was said."""

    def one(data: bytes) -> tuple[str | None, str]:
        try:
            answer = session.post(url, wire.encode(data), headers=wire.headers, timeout=_ANSWER_SECONDS)
            if answer.status_code == 200:
                return wire.read(answer.content), ""
            return None, f"{answer.status_code} {answer.text[:_SHOWN]}"
        except (requests.RequestException, ValueError) as error:
            return None, error_text(error)

    with requests.Session() as session, ThreadPoolExecutor(clients) as pool:
        session.trust_env = False
        return list(pool.map(one, bodies))


def stop_leftovers() -> list[int]:
    """Stop what a comparison that was killed has left, and remove its files; return the ids of those processes."""
    marks = set()
    for process in psutil.process_iter():
        try:
            marks.add(process.environ().get(MARK, ""))
        except (psutil.Error, OSError):
            # It ended meanwhile, or is somebody else's.
            continue
    stopped: list[int] = []
    for mark in marks:
        owner, _, scratch = mark.partition(":")
        if scratch and not _lives(owner):
            stopped += processes.stop_marked(MARK, mark, _REST, Path(scratch))
            _remove(Path(scratch))
    return sorted(stopped)


def error_text(error: Exception) -> str:
    """Return one line for a row, without where this machine keeps the repository."""
    text = " ".join(str(error).split()).replace(f"{ROOT}{os.sep}", "") or type(error).__name__
    return text if isinstance(error, BeelineError) else f"{type(error).__name__}: {text}"


def _lives(owner: str) -> bool:
    """Whether the comparison with this process id lives, and is none that got the id later."""
    pid, _, born = owner.partition("-")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(born)) < _SAME_BIRTH
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def _remove(scratch: Path) -> None:
    """Remove a folder of ours, and nothing else."""
    if scratch.name.startswith(_SCRATCH):
        shutil.rmtree(scratch, ignore_errors=True)

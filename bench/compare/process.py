"""A peer as processes of its own: environment, command line, session; nothing of it outlives its stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from beeline.errors import BeelineError
from bench.compare.environment import PEERS, Environment
from bench.compare.peer import OURS, Bench, Numbers, Peer
from host import ROOT, processes
from serve import ports
from serve.ports import Address
from serve.servers.protocol import MALLOC, Say, clean

MARK = "BEELINE_PEER"
# Seconds to end by itself after SIGTERM, then for what it left behind.
_GRACE, _REST = 15.0, 3.0
_TAIL = 30
_SCRATCH = "bp-"
# Seconds by which a process's time of birth may move with the clock.
_SAME_BIRTH = 2.0
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
class Place:
    """Where one start happens: the environment's Python, a free port, a scratch folder, the server's folder."""

    python: Path
    port: int
    scratch: Path
    folder: Path

    def tool(self, name: str) -> str:
        """Return a command of the environment."""
        return str(self.python.with_name(name))


Command = Callable[[Place, Numbers, Bench], list[str]]
Variables = Callable[[Place, Numbers, Bench], Mapping[str, str]]


def _no_variables(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Process(Peer):
    """A peer that is one command line; see `Peer`.

    `environment` names the folder in `bench/peers` and the environment; `command` and `variables` are of one start.
    """

    environment: Environment
    command: Command
    variables: Variables = _no_variables
    stated: str = "fp32 TorchScript"
    folder: Path = field(default=PEERS)

    def precision(self, bench: Bench) -> str:
        """Return the archive's precision with our engine, else what the documentation's pattern has."""
        return bench.precision if self.kind == OURS else self.stated

    def prepare(self, bench: Bench, say: Say) -> None:
        """Install; see `Peer`."""
        self.environment.prepare(say)

    def start(self, bench: Bench) -> Session:
        """Start it in a session of its own; see `Peer`."""
        (address,) = ports.settle([(Address("127.0.0.1", 0), "--servers")])
        # Short: a socket's path has 108 bytes at most, and Ray makes a long one of it.
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        place = Place(self.environment.python, address.port, scratch, self.folder / self.environment.name)
        try:
            return Session(self.name, self.command(place, self.numbers, bench), self.environ(place, bench), place)
        except BaseException:
            _remove(scratch)
            raise

    def environ(self, place: Place, bench: Bench) -> dict[str, str]:
        """Return the environment of one start: nothing is reported to anybody, no threads that nobody set."""
        numbers = self.numbers
        environ = {key: value for key, value in clean(os.environ).items() if key not in _THREADS}
        environ |= QUIET
        environ |= {
            "PATH": os.pathsep.join([str(place.python.parent), environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(map(str, (self.folder, ROOT / "handlers"))),
            "TMPDIR": str(place.scratch),
            "TEMP": str(place.scratch),
            "HOME": str(place.scratch),
            "CUDA_VISIBLE_DEVICES": "",
            "PEER_PORT": str(place.port),
            "PEER_BATCH_SIZE": str(numbers.batch),
            "PEER_WORKERS": str(numbers.workers),
            "PEER_DELAY_MS": str(numbers.delay_ms),
            "PEER_MODEL": str(bench.model),
            "PEER_ENGINE": "beeline" if self.kind == OURS else "documented",
            "PEER_SCRATCH": str(place.scratch),
            "PEER_THREADS_FILE": str(place.scratch / "threads"),
        }
        if numbers.threads is not None:
            environ["OMP_NUM_THREADS"] = environ["BEELINE_THREADS"] = str(numbers.threads)
        if self.kind == OURS:
            # As `serve up` gives its workers.
            environ |= MALLOC
        return environ | dict(self.variables(place, numbers, bench))


def sweep() -> list[int]:
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


class Session:
    """A started `Process`; see `Started`."""

    def __init__(self, name: str, command: list[str], environ: Mapping[str, str], place: Place) -> None:
        """Start it.

        Raises:
            BeelineError: when there is no such command.
        """
        self.name = name
        self.url = f"http://127.0.0.1:{place.port}"
        self.scratch = place.scratch
        me = psutil.Process()
        # The folder's name is nobody else's; who started it is known from this after a kill.
        self._token = f"{me.pid}-{me.create_time():.1f}:{self.scratch}"
        self._log = self.scratch / "peer.log"
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    env={**environ, MARK: self._token},
                    # Who writes a title over its environment, as Ray's workers do, is known by its folder.
                    cwd=self.scratch,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=processes.ending_with_parent(signal.SIGTERM),
                )
            except OSError as error:
                raise BeelineError(f"{name}: {command[0]} does not start ({error.strerror})") from error

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """See `Started`."""
        code = self._process.poll()
        if code is not None:
            raise BeelineError(f"{self.name} ended with exit code {code}; its log says: {self.last_words()}")

    def processes(self) -> list[psutil.Process]:
        """See `Started`."""
        return processes.marked(MARK, self._token, self.scratch)

    def threads(self) -> int | None:
        """See `Started`."""
        try:
            return int((self.scratch / "threads").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def last_words(self) -> str:
        """Return the log's last line that says what went wrong, else its last one."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        said = [" ".join(line.split()) for line in lines if line.strip()]
        told = [line for line in said if "Error" in line or "error:" in line]
        return (told or said or ["nothing"])[-1][:300]

    def stop(self) -> None:
        """Ask it to end, end what is left of it, and remove its files."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self._await_end()
                processes.end_group(self._process)
        finally:
            processes.stop_marked(MARK, self._token, _REST, self.scratch)
            self._process.wait()
            _remove(self.scratch)

    def _await_end(self) -> None:
        """Wait until it has ended, at most as long as it may take to end by itself."""
        deadline = time.monotonic() + _GRACE
        kind = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, self._process.pid, kind) is None and time.monotonic() < deadline:
            time.sleep(0.05)

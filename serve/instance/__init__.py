"""One server on this machine: its folder, its lock, its state file.

The supervisor holds the lock while it lives, and the kernel releases it however the supervisor ends. So a free lock
means a dead instance, and any command may stop the processes that it left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from beeline.errors import BeelineError, Undetermined, did_you_mean, short
from host import ROOT, processes
from host.files import is_locked, try_lock, write_json

DEFAULT_NAME = "default"
# The variable that marks every process of an instance; its value is `<folder>:<token>`.
MARK = "BEELINE_INSTANCE"
# The changes to an instance, in its folder. No start and no rotation removes it; the gateway writes to it too.
AUDIT = "audit.log"
_SCRATCH = "beeline-"


@dataclass(frozen=True)
class State:
    """The state of a running instance; JSON in `instance.json`.

    `temporary` is the folder of all its files, and `short` a path of it for those with sockets in their names.
    `inference` is the clients' address, `backend` the server's own; `addresses` holds all. `gateway` is the command of
    the gateway process, empty without one; `gateway_program` is its nginx, for people. `environment` holds the server's
    own variables, `archives` the paths of the served archives by file name. Each process gets `grace` seconds to end. A
    server whose management does not answer for `silence` seconds is started again; with `revive`, so is a model that
    has no living worker.
    """

    name: str
    server: str
    mark: str
    inference: str
    management: str
    temporary: str
    short: str
    command: list[str]
    environment: dict[str, str]
    archives: dict[str, str]
    configuration: dict[str, Any]
    started: float
    backend: str = ""
    addresses: dict[str, str | None] = field(default_factory=dict)
    gateway_kind: str = "none"
    gateway_program: str = ""
    gateway: list[str] = field(default_factory=list)
    supervisor: int | None = None
    server_process: int | None = None
    gateway_process: int | None = None
    ready: bool = False
    grace: float = 10.0
    silence: float = 30.0
    revive: bool = False

    @property
    def store(self) -> Path:
        """The folder with the served archives, as they were when the server started."""
        return Path(self.temporary) / "store"


class Instance:
    """A server's folder under the state folder; the server may be running or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        # Of server, workers, gateway and supervisor.
        self.logs = folder / "logs"
        # By MODEL/VERSION, why a model was not started; there is no such file where all were.
        self.failed = folder / "failed.json"
        self.scale_lock = folder / "scale.lock"
        self._state = folder / "instance.json"

    def new_mark(self) -> str:
        """Return the value that will mark this start's processes."""
        return f"{self.folder}:{secrets.token_hex(8)}"

    def lock(self, patience: float = 1.0) -> int | None:
        """Take the lock and return its file descriptor; None when a supervisor holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        # Another command's `alive` holds it for an instant.
        while (descriptor := try_lock(self.folder / "lock", 0o600)) is None and time.monotonic() <= deadline:
            time.sleep(0.05)
        return descriptor

    def alive(self) -> bool:
        """Whether a supervisor holds the lock."""
        return is_locked(self.folder / "lock")

    def write(self, state: State) -> None:
        """Write the state file atomically."""
        write_json(self._state, dataclasses.asdict(state))

    def read(self) -> State | None:
        """Return the state; None if there is none, or if another version of this code wrote it."""
        values = _read_json(self._state) or {}
        known = {field.name for field in dataclasses.fields(State)}
        try:
            return State(**{key: value for key, value in values.items() if key in known})
        except TypeError:
            return None

    def end(self, reason: str, failed: bool) -> None:
        """Record why the instance ended, and remove its state."""
        write_json(self.folder / "end.json", {"reason": reason, "failed": failed, "time": time.time()})
        self._state.unlink(missing_ok=True)

    def last_end(self) -> tuple[str, bool] | None:
        """Return why the last run ended, and whether it failed; None if no run has ended."""
        values = _read_json(self.folder / "end.json")
        return None if values is None else (str(values["reason"]), bool(values["failed"]))

    def clear(self) -> None:
        """Prepare for a new start; the last run's logs stay as `logs.previous`."""
        previous = self.folder / "logs.previous"
        if self.logs.exists():
            shutil.rmtree(previous, ignore_errors=True)
            self.logs.rename(previous)
        self.logs.mkdir(parents=True)
        for path in (self.folder / "end.json", self.failed, self.scale_lock):
            path.unlink(missing_ok=True)
        # Made by the server's user, since the first who scales may be root.
        self.scale_lock.touch()

    @contextmanager
    def audited(self, what: str) -> Iterator[None]:
        """Add a line of JSON to `audit.log` at the end of the block: when, who, from where, what, and its result."""
        result, lesser = "done", []
        try:
            yield
        except BaseException as error:
            # An error of the file must not hide it.
            result, lesser = short(error, 300), [OSError]
            raise
        finally:
            at = os.environ.get("SSH_CONNECTION", "").partition(" ")[0] or "this machine"
            # Anybody can set the variable.
            before = os.environ.get("SUDO_USER") if os.geteuid() == 0 else None
            who = before or psutil.Process().username()
            values = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "who": who, "from": at}
            # One write at its end, so that lines of several processes do not mix.
            with suppress(*lesser), (self.folder / AUDIT).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**values, "what": what, "result": result}) + "\n")

    def sweep(self) -> list[int]:
        """Stop what a dead supervisor left and remove its files; return the process ids. Call it with the lock held."""
        state = self.read()
        scratch = Path(state.temporary) if state is not None else None
        stopped = processes.stop_marked(MARK, f"{self.folder}:", folder=scratch)
        if state is not None and scratch is not None:
            remove_scratch(scratch, Path(state.short))
            self.end("its supervisor was killed; the processes that it left are stopped now", failed=True)
        return stopped

    def sweep_dead(self, patience: float = 0.0) -> list[int]:
        """Sweep, unless a supervisor holds the lock; return the ids of the stopped processes."""
        lock = self.lock(patience)
        if lock is None:
            return []
        try:
            return self.sweep()
        finally:
            os.close(lock)


def failures(path: Path | str) -> dict[str, str]:
    """Return by MODEL/VERSION why it was not started, from the file `failed` of an instance."""
    return {str(name): str(reason) for name, reason in (_read_json(Path(path)) or {}).items()}


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of all instances: `BEELINE_STATE`, else `.beeline/serve` in the repository."""
    given = environ.get("BEELINE_STATE")
    return Path(given).resolve() if given else ROOT / ".beeline" / "serve"


def named(home: Path, name: str) -> Instance:
    """Return the instance of that name, running or not; raise BeelineError for a name that is not allowed."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise BeelineError(f"--name is {name!r}; allowed: up to 64 letters, digits, '_' and '-'")
    return Instance(home / name)


def known(home: Path) -> list[Instance]:
    """Return every instance that has ever run here, by name."""
    return [Instance(path.parent) for path in sorted(home.glob("*/lock"))]


def running(home: Path, name: str | None = None) -> tuple[Instance, State]:
    """Return the running instance of that name, or the only one; raise BeelineError if there is none, or several."""
    alive = {instance.name: instance for instance in known(home) if instance.alive()}
    if not alive:
        raise BeelineError("no server is running; start one with `beeline serve up`")
    if name is None and len(alive) > 1:
        raise BeelineError(f"{len(alive)} servers are running ({', '.join(alive)}); name one with --name")
    chosen = next(iter(alive.values())) if name is None else alive.get(named(home, name).name)
    if chosen is None:
        raise BeelineError(f"no server named {name!r} is running{did_you_mean(str(name), alive)}")
    state = chosen.read()
    if state is None:
        raise BeelineError(f"the server {chosen.name!r} is just starting or stopping; try again in a moment")
    return chosen, state


def to_read(home: Path, name: str | None = None) -> Instance:
    """Return the instance whose logs to read: the named one, else the only running one, else the last one.

    Raise BeelineError if none has ever run, or if several run and `name` is None.
    """
    if name is not None:
        return named(home, name)
    if any(instance.alive() for instance in known(home)):
        return running(home)[0]
    ends = list(home.glob("*/end.json"))
    if not ends:
        raise BeelineError("no server has run here yet; start one with `beeline serve up`")
    return Instance(max(ends, key=lambda end: end.stat().st_mtime).parent)


def sweep_dead(home: Path) -> dict[str, list[int]]:
    """Sweep every instance whose supervisor is dead; return the ids of the stopped processes by name."""
    return {instance.name: stopped for instance in known(home) if (stopped := instance.sweep_dead())}


def down(home: Path, name: str | None = None, every: bool = False) -> dict[str, list[int]]:
    """Stop the server of that name, or the only one, or every one, and what dead servers left.

    Return by name the ids of the processes that a dead server had left. Raise BeelineError if there is nothing to stop,
    or if several run and neither `name` nor `every` is given; Undetermined if one does not end.
    """
    swept = sweep_dead(home)
    targets = [instance for instance in known(home) if instance.alive()]
    if not every and (targets or not any(name in (None, dead) for dead in swept)):
        targets = [running(home, name)[0]]
    for target in targets:
        with target.audited("down"):
            _stop(target)
    return swept | {target.name: [] for target in targets}


def _stop(target: Instance) -> None:
    # A supervisor kills the server after ten seconds, and workers after five.
    deadline = time.monotonic() + 30
    has_signalled = False
    while target.alive():
        state = target.read()
        # The supervisor writes its own id; before that, the id may be another process'.
        if not has_signalled and state is not None and state.supervisor is not None:
            # It may just have ended; `alive` will say so.
            with suppress(ProcessLookupError):
                os.kill(state.supervisor, signal.SIGTERM)
                has_signalled = True
        if time.monotonic() > deadline:
            raise Undetermined(
                f"the server {target.name!r} does not end (supervisor {state.supervisor if state else 'unknown'}); "
                f"see {target.logs / 'supervisor.log'}"
            )
        time.sleep(0.05)


def short_path(mark: str) -> Path:
    """Return the short path of a mark's folder: a link to `scratch`, or that folder itself.

    A socket's path has at most 108 bytes, so `TMPDIR` does not count; and the runtime folder of a user goes at logout.
    """
    return Path("/tmp") / f"{_SCRATCH}{mark.rpartition(':')[2]}"


def scratch(mark: str) -> Path:
    """Return the temporary folder of a mark: in the instance's own, since systems remove old files from /tmp.

    If root starts nginx, its workers run as nobody; where those may not enter the
    instance's folder, it is the short one.
    """
    folder, name = Path(mark.rpartition(":")[0]), short_path(mark).name
    is_open = os.geteuid() != 0 or all(each.stat().st_mode & 0o001 for each in (folder, *folder.parents))
    return folder / name if is_open else short_path(mark)


def link(short: Path, scratch: Path) -> None:
    """Make the short path, unless it is there; raise BeelineError if something else is, which another user may own."""
    if short == scratch:
        return
    with suppress(FileExistsError):
        short.symlink_to(scratch)
    if not short.is_symlink() or short.readlink() != scratch or short.lstat().st_uid != os.geteuid():
        raise BeelineError(f"{short} is not this server's link to {scratch}; remove it, and start the server again")


def remove_scratch(path: Path, short: Path) -> None:
    """Remove an instance's temporary folder and its short path, and nothing else."""
    if path.name.startswith(_SCRATCH):
        shutil.rmtree(path, ignore_errors=True)
    if short.name.startswith(_SCRATCH) and short.is_symlink():
        with suppress(PermissionError):  # Another user's.
            short.unlink()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None

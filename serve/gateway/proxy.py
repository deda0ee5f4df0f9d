"""What listens in public: nginx as a child process, or the development proxy in a thread; told alike."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil

from beeline.errors import BeelineError
from host import processes
from serve.gateway import nginx
from serve.gateway.settings import Backend, Settings
from serve.instance import logs

# Beyond what requests on their way are given when the gateway ends; and for the proxy's thread to start. Seconds.
_SPARE = 1.0
_PATIENCE = 8.0
_RELOAD = 5.0
logger = logging.getLogger("gateway")


class Proxy(Protocol):
    """What the gateway process needs of it."""

    def start(self) -> None:
        """Listen."""

    def check(self) -> None:
        """Do nothing while it runs.

        Raises:
            BeelineError: when it ended by itself.
        """

    def share(self, members: Sequence[str], known: Sequence[Backend]) -> bool:
        """Send predictions to these backends from now on; `known` are those that are not ready too.

        Returns:
            Whether that is so; otherwise it goes on as before, and is to be told again.
        """

    def reopen_logs(self) -> None:
        """Go on in new log files: the old ones were renamed."""

    def stop(self) -> None:
        """Take no more requests, answer those on their way, end."""


class Nginx:
    """nginx's master process; it ends with this process, however that ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: list[psutil.Process] = []

    def start(self) -> None:
        """Start it; see `Proxy`."""
        # SIGTERM, with which its master ends its workers too.
        end = processes.ending_with_parent(signal.SIGTERM)
        self._process = subprocess.Popen(nginx.command(self._settings), cwd=self._settings.folder, preexec_fn=end)
        # Before it has workers it would die of a signal to reload, or forget it.
        self._wait_for_others([])

    def check(self) -> None:
        """Raise when it ended; see `Proxy`."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            self._workers = self._children()
            return
        self._end_workers()
        raise BeelineError(f"nginx ended by itself (exit code {code}); its log says: {self._last_word()}")

    def share(self, members: Sequence[str], known: Sequence[Backend]) -> bool:
        """Write the group anew and reload; requests on their way are answered by the old workers; see `Proxy`."""
        nginx.write_backends(self._settings, members, known)
        before = self._children()
        self._signal(signal.SIGHUP)
        # Whoever opens the door next must find the new group behind it.
        if self._wait_for_others(before):
            return True
        logger.error("nginx has not taken its new configuration after %g s: %s", _RELOAD, self._last_word())
        return False

    def reopen_logs(self) -> None:
        """See `Proxy`."""
        self._signal(signal.SIGUSR1)

    def stop(self) -> None:
        """Let it finish what it has; see `Proxy`."""
        if self._process is None:
            return
        self._signal(signal.SIGQUIT)
        try:
            self._process.wait(self._settings.stop + _SPARE)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._end_workers()

    def _last_word(self) -> str:
        log = self._settings.logs / nginx.ERROR_LOG
        lines = logs.tail(log, 1) if log.is_file() else []
        return lines[-1] if lines else "nothing"

    def _children(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _wait_for_others(self, before: Sequence[psutil.Process]) -> bool:
        """Wait until only others than these workers take requests, and return whether that came true.

        Where nginx ended instead, `check` finds that out.

        Its master lets those of before go on for a tenth of a second when the new ones are there.
        """
        assert self._process is not None
        deadline = time.monotonic() + _RELOAD
        while self._process.poll() is None and time.monotonic() < deadline:
            children = self._children()
            if any(child not in before for child in children) and not any(map(_listening, before)):
                return True
            time.sleep(0.01)
        return self._process.poll() is not None

    def _end_workers(self) -> None:
        """A killed master leaves its workers listening."""
        for worker in self._workers:
            try:
                worker.kill()
            except psutil.NoSuchProcess:
                continue

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)


def _listening(worker: psutil.Process) -> bool:
    """Whether a worker takes new requests; one that only ends those it has says so in its title."""
    try:
        return worker.status() != psutil.STATUS_ZOMBIE and "shutting down" not in " ".join(worker.cmdline())
    except psutil.Error:
        return False


class DevelopmentThread:
    """The development proxy with an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        from serve.gateway.development import Development

        self._stop = settings.stop
        self._members: list[str] = [backend.inference for backend in settings.backends]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="development", daemon=True)
        self._proxy = Development(
            listen=tuple((address.host, address.port) for address in settings.listen),
            backends=lambda: self._members,
            web=settings.web,
            ready=settings.ready_file,
            unready=settings.unready_file,
            opened=settings.open_file,
            closed=settings.closed_folder,
            max_bytes=settings.max_body,
            in_flight=settings.in_flight,
            deadline=settings.deadline,
            stop=settings.stop,
            access_log=settings.logs / nginx.ACCESS_LOG,
            max_image=settings.max_image,
            management=(at.host, at.port) if (at := settings.management) else None,
            control=settings.backends[0].management if settings.backends else "",
        )

    def start(self) -> None:
        """Start it; see `Proxy`."""
        self._thread.start()
        self._run(self._proxy.start, _PATIENCE)

    def check(self) -> None:
        """Raise when its thread ended; see `Proxy`."""
        if not self._thread.is_alive():
            raise BeelineError("the development proxy ended by itself; see supervisor.log")

    def share(self, members: Sequence[str], known: Sequence[Backend]) -> bool:
        """See `Proxy`."""
        self._members = list(members)
        return True

    def reopen_logs(self) -> None:
        """Do nothing: it opens its log for each line; see `Proxy`."""

    def stop(self) -> None:
        """See `Proxy`."""
        self._run(self._proxy.stop, self._stop + _SPARE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)

    def _run(self, what: Callable[[], object], patience: float) -> None:
        asyncio.run_coroutine_threadsafe(what(), self._loop).result(patience)  # type: ignore[arg-type]

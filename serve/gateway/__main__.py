"""The gateway process: nginx, which listens in public, the prober behind `/ping`, and the exporter of `/metrics`.

Where something is configured that nginx cannot answer, the adapter of `serve.gateway.adapter` runs too.

Run as `python -m serve.gateway FOLDER`, where FOLDER is the runtime folder that `serve.gateway.runtime` made. On
SIGTERM `/ping` answers 503, the gateway answers the requests that it has, and the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from archive import store
from beeline.errors import BeelineError
from host import processes
from serve import metrics
from serve.gateway import catalog, runtime
from serve.gateway.discovery import Discovery
from serve.gateway.nginx import Nginx
from serve.gateway.prober import Probe, Prober, closed_together, together
from serve.gateway.settings import Settings
from serve.instance.logs import Followed, rotate

logger = logging.getLogger("gateway")
# As nginx writes it; nginx escapes quotes that a client sends.
_OWN = re.compile(r'"status":(\d{3}),"from":"gateway"')


class ErrorCounts(Collector):
    """Counts the errors that the gateway itself answers, from its access log, through rotation.

    Lines that exist at the start do not count: an earlier gateway has counted them. `/ping` is not in the log, so its
    503 does not count.
    """

    def __init__(self, log: Path) -> None:
        # A renamed log may still get lines, since nginx buffers them for a second.
        self.log = Followed(log, late=3.0)
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def read(self) -> None:
        """Count the lines that are new since the last call."""
        with self._lock:
            self._counts.update(int(own[1]) for line in self.log.added() if (own := _OWN.search(line)))

    def collect(self) -> Iterator[Metric]:
        """Yield the one metric; any thread may call it."""
        self.read()
        text = "Errors that the gateway itself answered, by HTTP status."
        family = CounterMetricFamily("beeline_gateway_answers", text, labels=["status"])
        for status in runtime.ERRORS:
            family.add_metric([str(status)], self._counts[status])
        yield family


class Adapter:
    """The process of `serve.gateway.adapter`; it ends when this process ends.

    This process holds its socket, so that requests wait while it starts, or starts again.
    """

    command: tuple[str, ...] = (sys.executable, "-m", "serve.gateway.adapter")

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.folder
        (settings.folder / runtime.ADAPTER_SOCKET).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        folder = os.open(settings.folder, os.O_PATH)
        # A socket's path has at most 108 characters.
        self._socket.bind(f"/proc/self/fd/{folder}/{runtime.ADAPTER_SOCKET}")
        os.close(folder)
        # Started by root, nginx's workers are nobody.
        (settings.folder / runtime.ADAPTER_SOCKET).chmod(0o666)
        self._socket.listen(1024)
        self._start()

    def _start(self) -> None:
        number, end = self._socket.fileno(), processes.ending_with_parent(signal.SIGTERM)
        command = [*self.command, str(self._folder), str(number)]
        self._process = subprocess.Popen(command, pass_fds=(number,), preexec_fn=end)

    def check(self) -> None:
        """Start it again where it has ended."""
        if (code := self._process.poll()) is not None:
            logger.error("the adapter ended by itself (exit code %d); it starts again", code)
            self._start()

    def stop(self, seconds: float) -> None:
        """Take no more requests, and answer those under way, for at most so many seconds."""
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Gateway:
    """One gateway from start to end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._woken = threading.Event()
        self._stopping = False
        self._ping = self._state = ""
        self._shared = ([backend.inference for backend in settings.backends], list(settings.backends))
        if settings.name is not None:
            self.prober: Prober = Discovery(settings.name, self._woken.set)
        else:
            archives = store.find_archives(settings.store) if settings.store else ()
            probes = [Probe(backend, archives, settings) for backend in settings.backends]
            self.prober = Prober(probes, self._woken.set)
        self._begun = time.monotonic()
        self.error_counts = ErrorCounts(settings.access_log)
        self.collector = metrics.Collector(settings.worker_metrics) if settings.worker_metrics else None

    def run(self) -> None:
        """Run until a signal asks to stop; raise BeelineError when nginx ends by itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        with ExitStack() as stack:
            stack.callback(self.error_counts.log.close)
            if at := self.settings.metrics:
                counters = [self.error_counts, *([self.collector] if self.collector else [])]
                stack.enter_context(metrics.serve_metrics((at.host, at.port), *counters))
            self._run()

    def _run(self) -> None:
        # Before nginx listens, because a killed gateway leaves its state behind.
        runtime.write_state(self.settings, ready=False, text=json.dumps(together(self.prober.seen())))
        self.adapter = Adapter(self.settings) if self.settings.adapter else None
        self.nginx = Nginx(self.settings)
        try:
            self.tell()
            self.prober.start()
            while not self._stopping:
                self._woken.wait(1.0)
                self._woken.clear()
                self.nginx.check()
                if self.adapter is not None:
                    self.adapter.check()
                try:
                    self.tell()
                    self.keep()
                except (OSError, ValueError):
                    # A full disk must cost nobody an answer; the next round tries again.
                    logger.exception("the gateway's files cannot be written")
        finally:
            # Only `/ping` changes: predictions pass until nginx stops.
            gone = json.dumps({"status": "Unhealthy", "reason": "the gateway is stopping", "models": {}})
            try:
                runtime.write_ping(self.settings, ready=False, text=gone)
            except OSError:
                # On a full disk a file can still be removed.
                logger.exception("/ping cannot say that the gateway stops")
                (self.settings.state / "ready").unlink(missing_ok=True)
            if self._stopping:
                # Meanwhile a load balancer in front sees /ping and sends its requests elsewhere.
                time.sleep(self.settings.drain)
            until = time.monotonic() + self.settings.stop
            if self.adapter is not None:
                # Before nginx, which it asks for its predictions.
                self.adapter.stop(self.settings.stop / 2)
            self.nginx.stop(until - time.monotonic() + 1.0)
            self.prober.stop()

    def tell(self) -> None:
        """Write what `/ping` answers and which backends share the load, where either has changed."""
        seen = self.prober.seen()
        values = together(seen)
        text = json.dumps(values)
        known = [one.backend for one in self.prober.watched]
        # With no ready backend nginx keeps the last group, for requests under way; the state refuses new ones.
        shared = (self.prober.members() or self._shared[0], known)
        has_changed = shared != self._shared and (self.settings.name is not None or len(known) > 1)
        # Where nginx does not take the change, the next round tries again.
        if has_changed and self.nginx.share(*shared):
            self._shared = shared
        closed, is_ready = closed_together(seen), values["status"] == "Healthy"
        if lost := text == self._ping and runtime.lost(self.settings, is_ready, bool(closed)):
            logger.error("%s was removed; it is made again", lost)
            # nginx makes the folders of its bodies when it reads its configuration.
            (self.settings.folder / "temporary").mkdir(mode=0o755, exist_ok=True)
            self.nginx.share(*self._shared)
        if text != self._ping or lost:
            runtime.write_state(self.settings, is_ready, text, closed)
            if self.collector is not None:
                models = values["models"].items()
                wanted = {(name, version): one["workers"] for name, found in models for version, one in found.items()}
                self.collector.expect(wanted)
            self._ping = text
        state = values.get("reason", values["status"])
        if state != self._state:
            logger.info("%s, after %.1f s", state, time.monotonic() - self._begun)
            self._state = state

    def keep(self) -> None:
        """Rotate logs, fold the counts of workers that have ended, and put the others' choices into the cards."""
        self.error_counts.read()
        size, files = self.settings.log_megabytes * 1_000_000, self.settings.log_files
        if any(rotate(path, size, files) for path in (self.settings.access_log, self.settings.error_log)):
            self.nginx.reopen_logs()
        if self.collector is not None:
            catalog.add_choices(self.settings, self.collector.keep().choices())

    def _asked(self, number: int, frame: object) -> None:
        self._stopping = True
        self._woken.set()


def main(arguments: list[str]) -> int:
    """Run the gateway whose folder is the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    try:
        Gateway(Settings.load(Path(arguments[0]))).run()
    except BeelineError as error:
        logger.error("the gateway failed: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

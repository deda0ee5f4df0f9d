"""What a server must provide so that `serve` can run it, and what all have in common."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from archive.mar import Archive
from archive.store import check_signature
from beeline.errors import Undetermined
from beeline.metrics import FOLDER
from host import machine
from serve import counts, instance
from serve.addresses import Addresses
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.gateway.settings import CLASSES

# Unless these thresholds are set, glibc raises them and keeps the memory of a burst. These values also avoid page
# faults: a forward pass of ResNet-18, batch 8, one thread, took 169-189 ms with them, 203-209 without, and 296-331 with
# thresholds of 128 KiB to 4 MiB.
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}

# Packages whose modules have another name.
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}

Say = Callable[[str], None]


class Places:
    """An instance's files: served archives, metrics, gateway, and the configuration that the server reads.

    `short` is a path of `temporary` for sockets.
    """

    def __init__(self, temporary: Path, logs: Path, short: Path | None = None) -> None:
        self.temporary, self.logs, self.short = temporary, logs, short or temporary
        self.store = temporary / "store"
        self.gateway = temporary / "gateway"
        self.properties = temporary / "config.properties"
        self.metrics = logs.parent / "metrics"


@dataclass(frozen=True)
class Runtime:
    """What a start runs: the Python of the workers, the first words of the server's command, and both for people."""

    python: Path
    program: tuple[str, ...]
    sentence: str


class Server(ABC):
    """One kind of server: it is installed, told what to serve, and commanded through its management API.

    It is one process that the supervisor starts. On `addresses.backend` it answers `POST /predictions/MODEL`, on
    `addresses.control` the part of TorchServe's management API that `ManagementClient` uses. A worker is its child,
    runs in the folder of its unpacked archive, and logs to `worker.log`; from these `serve.ready` learns of its death.

    Attributes:
        versions: whether it serves several versions of one model.
        installs: whether it can install the requirements of an archive.
        highest_port: the largest port that it takes.
        patient: whether it waits ever longer before it starts dead workers again, so that the supervisor does.
        synchronous: whether only its answer to a synchronous request says that workers are loaded (MMS lists them as
            READY from the start).
        lock_file: the packages of its Python.
    """

    name: str
    title: str
    versions: bool
    installs: bool = False
    highest_port: int = 65_535
    synchronous: bool = False
    patient: bool = False
    lock_file: Path

    @abstractmethod
    def prepare(self, say: Say, environ: Mapping[str, str]) -> Runtime:
        """Return what runs the server; install it first if its lock file has changed.

        Raise Undetermined if something is missing.
        """

    @abstractmethod
    def command(self, runtime: Runtime, places: Places, vmargs: str) -> list[str]:
        """Return the command line that starts the server; it runs in `places.temporary` and logs to `places.logs`."""

    @abstractmethod
    def write(self, configuration: Configuration, addresses: Addresses, places: Places) -> None:
        """Write the configuration that the server reads at its start, to `places.properties`."""

    def environment(self, python: Path) -> dict[str, str]:
        """Return this server's own variables, for itself and its workers, in addition to `environment` below."""
        return {}

    def path(self, model: ModelSettings) -> str:
        """Return the part of the API's paths that names a model, with its version where the server knows any."""
        return f"{model.model}/{model.version}" if self.versions else model.model

    def register(self, management: ManagementClient, model: ModelSettings) -> None:
        """Start a model's workers once the API answers; raise BeelineError as `revive`."""
        management.scale(self.path(model), model.min_workers.value, model.max_workers.value)

    def advice(self, archive: Archive, python: Path, why: str) -> str:
        """Return what helps if workers of an archive die for the reason `why`: mostly a package that is missing."""
        handler = archive.handler
        name = handler.partition(":")[0].removesuffix(".py")
        if "logged no reason" in why:
            # MMS often loses the end of a dead worker's traceback, so import the handler once more, from the zip file.
            code = "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2])"
            words = [str(python), "-I", "-c", code, str(archive.path), name]
            with suppress(subprocess.TimeoutExpired):  # Then nothing more is known.
                why = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stderr
        match = re.search(r"No module named '(\w+)", why)
        if match is None:
            return "see `beeline serve logs`, or run the archive alone with `beeline archive run`"
        module = match[1]
        if module == name:
            return f"its handler {handler!r} is neither in {archive.path.name} nor one of {self.title}'s"
        package = _PACKAGES.get(module, module)
        fix = (
            f"its handler {handler} imports {module}, which {python} lacks: put it into the archive if it is a file of "
            f"yours, else install it with `uv pip install --python {python} --constraint {self.lock_file} {package}`"
        )
        if self.installs:
            brought = f"its {archive.requirements}" if archive.requirements else "a requirements.txt in the archive"
            fix += f", or let {self.title} install {brought}: install_py_dep_per_model=true in config.properties"
        return fix

    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        """Give a model new workers, whatever became of the old ones; requests under way may be lost.

        Raise BeelineError if they do not start, and Undetermined after `patience` seconds.
        """
        # On TorchServe, scaling to 0 removes dead workers from its list too.
        management.scale(self.path(model), 0, 0)
        deadline = time.monotonic() + patience
        while (now := management.describe(self.path(model))) is not None and now.workers:
            if time.monotonic() > deadline:
                raise Undetermined(f"{model.model} still has workers after {patience:g} s; see `beeline serve logs`")
            time.sleep(0.1)
        management.scale(self.path(model), low, high)


def queue(configuration: Configuration, addresses: Addresses) -> int:
    """Return how many requests of a model the server itself may hold."""
    size = configuration.numbers["job_queue_size"].value
    # A gateway lets in at most as many requests of each class of size. After a deadline or a reload more may wait here
    # for a while, and a server answers 503 both for a full queue and if it is not ready.
    return size if addresses.metrics is None else (len(CLASSES) + 1) * size


def environment(server: Server, python: Path, configuration: Configuration, places: Places) -> dict[str, str]:
    """Return the variables of the server's processes, in addition to `clean`."""
    threads, wait = str(configuration.threads.value), "OMP_WAIT_POLICY"
    numbers, has_quota = configuration.numbers, machine.cores() < len(os.sched_getaffinity(0))
    return {
        "TMPDIR": str(places.short),
        "TEMP": str(places.short),
        "LOG_LOCATION": str(places.logs),
        "METRICS_LOCATION": str(places.logs),
        "BEELINE_LOG_MEGABYTES": str(numbers["beeline_log_megabytes"].value),
        "BEELINE_LOG_FILES": str(numbers["beeline_log_files"].value),
        "BEELINE_MAX_BYTES": str(numbers["beeline_max_image_bytes"].value),
        "BEELINE_MAX_PIXELS": str(numbers["beeline_max_image_pixels"].value),
        "BEELINE_DEADLINE": str(numbers["beeline_deadline_seconds"].value),
        FOLDER: str(places.metrics),
        "BEELINE_THREADS": threads,
        "BEELINE_LONE_THREADS": str(numbers["beeline_lone_threads"].value),
        "OMP_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        **MALLOC,
        # Threads that spin use up a quota: PyTorch on a part of a core answered 1.5 to 4 pictures a second, or 12 to 16
        # with threads that sleep.
        **({wait: os.environ.get(wait, "PASSIVE")} if has_quota else {}),
        **server.environment(python),
    }


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what overrides the servers' files, adds code of no archive, or is a secret."""
    of_python = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")
    dropped = (*of_python, "TS_", "MMS_", "MODEL_SERVER_HOME", "BEELINE_MANAGEMENT_TOKEN", "BEELINE_FEEDBACK_TOKEN")
    return {key: value for key, value in environ.items() if not key.startswith(dropped)}


def lay_out(
    server: Server, configuration: Configuration, addresses: Addresses, archives: Sequence[Archive], places: Places
) -> None:
    """Make the temporary folder with archives and configuration, and an empty folder for metrics, as `counts.empty`."""
    # nginx's workers, which run as nobody if root starts it, must pass through here; they can list and read nothing.
    places.temporary.mkdir(mode=0o700)
    places.temporary.chmod(0o711)
    instance.link(places.short, places.temporary)
    places.store.mkdir(mode=0o700)
    counts.empty(places.metrics)
    for archive in archives:
        keep(archive.path, places.store / archive.path.name, configuration.beeline_trusted_key)
    server.write(configuration, addresses, places)


def keep(source: Path, target: Path, trusted: str = "") -> None:
    """Keep an archive as it is now; raise `ArchiveError` where a key is `trusted` and did not sign it."""
    with suppress(OSError):  # On another file system, or another user's file.
        # A later build replaces the file; who rewrites it in place would change what was checked.
        if not trusted:
            target.hardlink_to(source.resolve())
            return
    shutil.copyfile(source, target)
    if trusted:
        shutil.copyfile(f"{source}.minisig", f"{target}.minisig")
        check_signature(target, trusted)

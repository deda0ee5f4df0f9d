"""What a server must provide so that `serve` can run it, and what TorchServe and MMS have in common."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import javaproperties

from archive.mar import Archive
from beeline.metrics import FOLDER
from host import ROOT, machine
from serve import counts
from serve.addresses import Addresses
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.servers.java import Java, options

# Unless these thresholds are set, glibc raises them and keeps the memory of a burst. These values also avoid page
# faults: a forward pass of ResNet-18, batch 8, one thread, took 169-189 ms with them, 203-209 without, and 296-331 with
# thresholds of 128 KiB to 4 MiB.
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}

# Packages whose modules have another name.
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}

Say = Callable[[str], None]


class Places:
    """An instance's files: served archives, metrics, gateway, and the configuration that the server reads."""

    def __init__(self, temporary: Path, logs: Path) -> None:
        self.temporary, self.logs = temporary, logs
        self.store = temporary / "store"
        self.gateway = temporary / "gateway"
        self.properties = temporary / "config.properties"
        # Not in the temporary folder, because a system may remove old files from /tmp.
        self.metrics = logs.parent / "metrics"


class Server(ABC):
    """One kind of server.

    Attributes:
        main: Java's entry class.
        package: the Python package that has the jars in its folder `frontend`.
        arguments: its own options, in addition to `command` below.
        versions: whether it serves several versions of one model, and can install the requirements of an archive.
        highest_port: the largest port that it takes.
        synchronous: whether only its answer to a synchronous request says that workers are loaded (MMS lists them as
            READY from the start).
        lock_file: the packages of its Python.
    """

    name: str
    title: str
    main: str
    package: str
    arguments: Sequence[str] = ()
    versions: bool
    highest_port: int
    synchronous: bool
    lock_file: Path

    @abstractmethod
    def prepare(self, say: Say) -> Path:
        """Return the Python that runs the workers; install it first if its lock file has changed.

        Raise Undetermined if the server's package is missing.
        """

    @abstractmethod
    def site(self, python: Path) -> Path:
        """Return the folder that holds the server's package."""

    @abstractmethod
    def environment(self, python: Path) -> dict[str, str]:
        """Return this server's own variables for Java and the workers, in addition to `environment` below."""

    @abstractmethod
    def properties(self, configuration: Configuration, places: Places) -> dict[str, str]:
        """Return this server's own configuration, in addition to `write_properties` below."""

    def path(self, model: ModelSettings) -> str:
        """Return the part of the API's paths that names a model, with its version where the server knows any."""
        return f"{model.model}/{model.version}" if self.versions else model.model

    @abstractmethod
    def register(self, management: ManagementClient, model: ModelSettings) -> None:
        """Start a model's workers once the API answers; raise BeelineError as `revive`."""

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
        if self.versions:
            brought = f"its {archive.requirements}" if archive.requirements else "a requirements.txt in the archive"
            fix += f", or let {self.title} install {brought}: install_py_dep_per_model=true in config.properties"
        return fix

    @abstractmethod
    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        """Give a model new workers, whatever became of the old ones; requests under way may be lost.

        Raise BeelineError if they do not start, and Undetermined after `patience` seconds.
        """


def command(server: Server, java: Java, python: Path, places: Places, vmargs: str) -> list[str]:
    """Return the command line that starts the server, as its own launcher would.

    Beeline does not use the launcher: it has one process id file for all servers of a user, leaves Java running when it
    is stopped, and prints what it should log.
    """
    site = server.site(python)
    # Java reads options from these variables too.
    variables = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
    user_options = shlex.split(" ".join([vmargs, *(os.environ.get(name, "") for name in variables)]))
    return [
        str(java.command),
        f"-Dmodel_server_home={site}",
        f"-Djava.io.tmpdir={places.temporary}",
        f"-Dlog4j.configurationFile={(ROOT / 'config' / 'log4j2.xml').as_uri()}",
        # Without memory Java shall end, which the supervisor sees, and not half work.
        "-XX:+ExitOnOutOfMemoryError",
        # A killed Java would leave its performance file in the system's temporary folder.
        "-XX:-UsePerfData",
        # Newer Javas warn about what Netty does for speed.
        *(("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow") if java.major >= 24 else ()),
        *options(machine.cores(), user_options),
        *shlex.split(vmargs),
        *("-cp", str(site / server.package / "frontend" / "*"), server.main),
        *("--python", str(python), "-f", str(places.properties), "-s", str(places.store)),
        *server.arguments,
    ]


def write_properties(server: Server, configuration: Configuration, addresses: Addresses, places: Places) -> None:
    """Write the runtime configuration: the keys that both servers have, then the server's own."""
    numbers = configuration.numbers
    common = {
        "inference_address": str(addresses.backend),
        "management_address": str(addresses.control),
        "model_store": str(places.store),
        "max_request_size": str(configuration.max_request_size),
        # The handler parses bodies, because in the server's parser one bad body would fail its whole batch.
        "decode_input_request": "false",
    }
    for key in ("job_queue_size", "max_response_size", "number_of_netty_threads", "netty_client_threads"):
        common[key] = str(numbers[key].value)
    if addresses.metrics is not None:
        # A gateway lets in as many requests as the server should hold. After a deadline or a reload more may wait here
        # for a while, and a server answers 503 both for a full queue and if it is not ready.
        common["job_queue_size"] = str(2 * numbers["job_queue_size"].value)
    with places.properties.open("w", encoding="utf-8") as file:
        javaproperties.dump({**common, **server.properties(configuration, places)}, file, timestamp=False)


def environment(server: Server, python: Path, configuration: Configuration, places: Places) -> dict[str, str]:
    """Return the variables of the server's processes, in addition to `clean`."""
    threads = str(configuration.threads.value)
    numbers = configuration.numbers
    return {
        "TMPDIR": str(places.temporary),
        "TEMP": str(places.temporary),
        "LOG_LOCATION": str(places.logs),
        "METRICS_LOCATION": str(places.logs),
        "BEELINE_LOG_MEGABYTES": str(numbers["beeline_log_megabytes"].value),
        "BEELINE_LOG_FILES": str(numbers["beeline_log_files"].value),
        "BEELINE_MAX_BYTES": str(numbers["beeline_max_image_bytes"].value),
        "BEELINE_MAX_PIXELS": str(numbers["beeline_max_image_pixels"].value),
        FOLDER: str(places.metrics),
        "BEELINE_THREADS": threads,
        "BEELINE_LONE_THREADS": str(numbers["beeline_lone_threads"].value),
        "OMP_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        **MALLOC,
        **server.environment(python),
    }


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without variables that override the servers' files, or add code that is in no archive."""
    dropped = ("TS_", "MMS_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "MODEL_SERVER_HOME")
    return {key: value for key, value in environ.items() if not key.startswith(dropped)}


def lay_out(
    server: Server, configuration: Configuration, addresses: Addresses, archives: Sequence[Archive], places: Places
) -> None:
    """Make the temporary folder with archives and configuration, and an empty folder for metrics, as `counts.empty`."""
    # nginx's workers, which run as nobody if root starts it, must pass through here; they can list and read nothing.
    places.temporary.mkdir(mode=0o700)
    places.temporary.chmod(0o711)
    places.store.mkdir(mode=0o700)
    counts.empty(places.metrics)
    for archive in archives:
        keep(archive.path.resolve(), places.store / archive.path.name)
    write_properties(server, configuration, addresses, places)


def keep(source: Path, target: Path) -> None:
    """Keep an archive as it is now: a later build replaces the file and never rewrites it."""
    try:
        target.hardlink_to(source)
    except OSError:
        # On another file system, or another user's file.
        shutil.copyfile(source, target)

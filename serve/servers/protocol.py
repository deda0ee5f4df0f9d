"""What this room must know of a server to run it, and what TorchServe and MMS have in common."""

from __future__ import annotations

import os
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

# Unless these thresholds are set, glibc moves them, and keeps the memory of a burst. These values also spare page
# faults: a forward pass of ResNet-18, batch 8, one thread, took 169-189 ms with them, 203-209 without, and 296-331 with
# thresholds of 128 KiB to 4 MiB.
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}

Say = Callable[[str], None]
LOG_CONFIG = ROOT / "config" / "log4j2.xml"


@dataclass(frozen=True)
class Places:
    """An instance's folders: its temporary one, the store inside it, its logs."""

    temporary: Path
    logs: Path

    @property
    def store(self) -> Path:
        """The served archives and nothing else."""
        return self.temporary / "store"

    @property
    def metrics(self) -> Path:
        """The workers' counts; in the instance's folder, since a system may remove old files of /tmp."""
        return self.logs.parent / "metrics"

    @property
    def gateway(self) -> Path:
        """The gateway's runtime folder."""
        return self.temporary / "gateway"

    @property
    def properties(self) -> Path:
        """The runtime configuration that the server reads."""
        return self.temporary / "config.properties"


class Server(ABC):
    """One kind of server.

    Attributes:
        main: Java's entry class.
        package: the Python package that has the jars in its folder `frontend`.
        versions: whether it serves several versions of one model.
        highest_port: the largest port that it takes.
        synchronous: whether only its answer to a synchronous request says that workers are loaded (MMS calls them
            READY from the beginning).
    """

    name: str
    title: str
    main: str
    package: str
    versions: bool
    highest_port: int
    synchronous: bool

    @abstractmethod
    def prepare(self, say: Say) -> Path:
        """Return the Python that runs the workers; where the lock file has changed, install it first.

        Raises:
            Undetermined: when the server's package is missing.
        """

    @abstractmethod
    def site(self, python: Path) -> Path:
        """Return the folder in which the server's package is installed."""

    @abstractmethod
    def environment(self, python: Path) -> dict[str, str]:
        """Return the server's own variables for Java and the workers, besides those of `environment` below."""

    def arguments(self) -> Sequence[str]:
        """Return the server's own options, besides those of `command`."""
        return ()

    @abstractmethod
    def properties(self, configuration: Configuration, places: Places) -> dict[str, str]:
        """Return the server's own configuration, besides that of `write_properties`."""

    def register(self, management: ManagementClient, configuration: Configuration) -> None:  # noqa: B027
        """Load the models, once the API answers, where the server does not load them by itself.

        Raises:
            BeelineError: when a model's workers do not start.
        """

    @abstractmethod
    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        """Give a model new workers, whatever became of the old ones; requests under way may be lost.

        Raises:
            BeelineError: when they do not start.
            Undetermined: when it takes longer than `patience` seconds.
        """


def command(server: Server, java: Java, python: Path, places: Places, vmargs: str) -> list[str]:
    """Return the command line that starts the server, as its own launcher would.

    The launcher is not used: it has one process id file for all servers of a user, leaves Java behind when it is
    stopped, and prints what it should log.
    """
    site = server.site(python)
    # Java reads options from these variables too.
    variables = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
    theirs = shlex.split(" ".join([vmargs, *(os.environ.get(name, "") for name in variables)]))
    return [
        str(java.command),
        f"-Dmodel_server_home={site}",
        f"-Djava.io.tmpdir={places.temporary}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
        # Out of memory, a server that half works is worse than one that ends, which the supervisor sees.
        "-XX:+ExitOnOutOfMemoryError",
        # A killed Java would leave its performance file in the system's temporary folder.
        "-XX:-UsePerfData",
        # Newer Javas warn of what Netty does for speed.
        *(("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow") if java.major >= 24 else ()),
        *options(machine.cores(), theirs),
        *shlex.split(vmargs),
        "-cp",
        str(site / server.package / "frontend" / "*"),
        server.main,
        "--python",
        str(python),
        "-f",
        str(places.properties),
        "-s",
        str(places.store),
        *server.arguments(),
    ]


def write_properties(server: Server, configuration: Configuration, addresses: Addresses, places: Places) -> None:
    """Write the runtime configuration: the keys that both servers have, then the server's own."""
    numbers = configuration.numbers
    common = {
        "inference_address": str(addresses.backend),
        "management_address": str(addresses.control),
        "model_store": str(places.store),
        "max_request_size": str(configuration.max_request_size),
        # The handler parses bodies; in the server's parser one bad body would fail its whole batch.
        "decode_input_request": "false",
    }
    for key in ("job_queue_size", "max_response_size", "number_of_netty_threads", "netty_client_threads"):
        common[key] = str(numbers[key].value)
    if addresses.metrics is not None:
        # Behind a gateway, which lets in as many requests as the server should hold. After a deadline or a reload more
        # may wait here for a while; for a full queue the server's answer would be 503, as for one that is not ready.
        common["job_queue_size"] = str(2 * numbers["job_queue_size"].value)
    with places.properties.open("w", encoding="utf-8") as file:
        javaproperties.dump({**common, **server.properties(configuration, places)}, file, timestamp=False)


def environment(server: Server, python: Path, configuration: Configuration, places: Places) -> dict[str, str]:
    """Return the variables of the server's processes, besides those of `clean`."""
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
    """Return the environment without the variables that would change a server or its workers.

    Both servers let variables override their configuration file; Python's would add code that is in no archive.
    """
    dropped = ("TS_", "MMS_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "MODEL_SERVER_HOME")
    return {key: value for key, value in environ.items() if not key.startswith(dropped)}


def lay_out(
    server: Server, configuration: Configuration, addresses: Addresses, archives: Sequence[Archive], places: Places
) -> None:
    """Make the temporary folder with the archives and the runtime configuration, and an empty folder for metrics.

    Raises:
        BeelineError: where an earlier worker still counts.
    """
    # nginx's workers pass through here, as nobody where root starts it; they can list and read nothing else.
    places.temporary.mkdir(mode=0o700)
    places.temporary.chmod(0o711)
    places.store.mkdir(mode=0o700)
    counts.empty(places.metrics)
    for archive in archives:
        keep(archive.path.resolve(), places.store / archive.path.name)
    write_properties(server, configuration, addresses, places)


def keep(source: Path, target: Path) -> None:
    """Keep an archive as it is now, whatever is built later: a build replaces the file and never rewrites it."""
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or a file that is not this user's.
        shutil.copyfile(source, target)

"""What a server must say of itself to be run here; TorchServe and MMS differ in nothing else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import javaproperties

from archive.mar import Archive
from beeline.metrics import FOLDER
from host import ROOT, machine
from serve import counts
from serve.addresses import Addresses
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.servers.java import Java, options

# glibc moves these thresholds by itself unless they are set, so memory of a burst stays. These values
# also spare page faults: ResNet-18, batch 8, one thread took 169-189 ms a forward with them, 203-209
# without, and 296-331 with thresholds of 128 KiB to 4 MiB.
MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}

Say = Callable[[str], None]
LOG_CONFIG = ROOT / "config" / "log4j2.xml"


@dataclass(frozen=True)
class Places:
    """An instance's folders: its temporary one, the store inside it, its logs."""

    temporary: Path
    logs: Path

    @property
    def store(self) -> Path:
        """The served archives, and nothing else."""
        return self.temporary / "store"

    @property
    def metrics(self) -> Path:
        """What each worker counts; in the instance's own folder, since a system may remove old files of /tmp."""
        return self.logs.parent / "metrics"

    @property
    def gateway(self) -> Path:
        """The gateway's runtime folder."""
        return self.temporary / "gateway"

    @property
    def properties(self) -> Path:
        """The runtime configuration that the server reads."""
        return self.temporary / "config.properties"


class Server(Protocol):
    """One kind of server.

    `main` is Java's entry class; `package` the Python package beside whose `frontend` folder it lies;
    `versions` says whether it serves several of one model; `synchronous` whether only its answer to a
    synchronous request tells when workers are loaded (MMS calls them READY from the beginning).
    """

    name: str
    title: str
    main: str
    package: str
    versions: bool
    highest_port: int
    synchronous: bool

    def prepare(self, say: Say) -> Path:
        """Return the Python that runs the workers, installing what it needs first where it can.

        Raises:
            Undetermined: when the server's package is missing.
        """

    def site(self, python: Path) -> Path:
        """Return the folder into which the server's package is installed."""

    def environment(self, python: Path) -> dict[str, str]:
        """Return what Java and the workers need in their environment, beyond `environment` below."""

    def arguments(self) -> Sequence[str]:
        """Return options of the entry class beyond those both have."""

    def properties(self, configuration: Configuration, places: Places) -> dict[str, str]:
        """Return the runtime configuration beyond what both have."""

    def register(self, management: ManagementClient, configuration: Configuration) -> None:
        """Load the models where the server does not do that itself; called once its API answers."""

    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        """Give a model new workers whatever became of the old ones; in-flight requests may be lost.

        Raises:
            BeelineError: when they do not start.
            Undetermined: when it takes longer than `patience` seconds.
        """


def _from_environment(environ: Mapping[str, str]) -> list[str]:
    """Return the options that Java takes from variables of its own."""
    names = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
    return [word for name in names for word in shlex.split(environ.get(name, ""))]


def command(server: Server, java: Java, python: Path, places: Places, vmargs: str) -> list[str]:
    """Return the command line that starts the server.

    It is what the server's own launcher would run. That is not used: it writes one process id file for
    all servers of a user, dies without its Java, and prints where it should log.
    """
    site = server.site(python)
    return [
        str(java.command),
        f"-Dmodel_server_home={site}",
        f"-Djava.io.tmpdir={places.temporary}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
        # Out of memory, a server that half works is worse than one that the supervisor sees ending.
        "-XX:+ExitOnOutOfMemoryError",
        # Its performance file in the system's temporary folder outlives a kill.
        "-XX:-UsePerfData",
        # What Netty does for speed, newer Javas warn of.
        *(("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow") if java.major >= 24 else ()),
        *options(machine.cores(), [*shlex.split(vmargs), *_from_environment(os.environ)]),
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
    """Write the runtime configuration: what both servers read under the same name, then the server's own."""
    numbers = configuration.numbers
    common = {
        "inference_address": str(addresses.backend),
        "management_address": str(addresses.control),
        "model_store": str(places.store),
        "max_request_size": str(configuration.max_request_size),
        # The handler parses bodies itself: in the servers' own parser one bad body fails its whole batch.
        "decode_input_request": "false",
    }
    for key in ("job_queue_size", "max_response_size", "number_of_netty_threads", "netty_client_threads"):
        common[key] = str(numbers[key].value)
    if addresses.guarded:
        # The gateway lets in what the server is to hold. After a deadline or a reload more may be here for a
        # while, and the server's own words for a full queue would be those for one that is not ready.
        common["job_queue_size"] = str(2 * numbers["job_queue_size"].value)
    with places.properties.open("w", encoding="utf-8") as file:
        javaproperties.dump({**common, **server.properties(configuration, places)}, file, timestamp=False)


def environment(server: Server, python: Path, configuration: Configuration, places: Places) -> dict[str, str]:
    """Return what the server's processes get on top of the environment of `clean`."""
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
    """Return the environment without what would lead a server or its workers astray.

    Both servers let variables override their configuration file; Python's would bring in code that is
    in no archive.
    """
    dropped = ("TS_", "MMS_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "MODEL_SERVER_HOME")
    return {key: value for key, value in environ.items() if not key.startswith(dropped)}


def lay_out(
    server: Server, configuration: Configuration, addresses: Addresses, archives: Sequence[Archive], places: Places
) -> None:
    """Make the temporary folder, with the archives and the runtime configuration, and an empty place for metrics.

    Raises:
        BeelineError: where a worker of before still counts.
    """
    # nginx's workers, who are nobody where root starts it, pass through here and see nothing else.
    places.temporary.mkdir(mode=0o700)
    places.temporary.chmod(0o711)
    places.store.mkdir(mode=0o700)
    counts.empty(places.metrics)
    for archive in archives:
        keep(archive.path.resolve(), places.store / archive.path.name)
    write_properties(server, configuration, addresses, places)


def keep(source: Path, target: Path) -> None:
    """Keep what is served as it is now, whatever is built meanwhile: archives are replaced, never rewritten."""
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or a file that is not this user's.
        shutil.copyfile(source, target)


def models_json(configuration: Configuration) -> str:
    """Return TorchServe's `models` value with the resolved numbers."""
    models: dict[str, dict[str, dict[str, object]]] = {}
    for model in configuration.models:
        models.setdefault(model.model, {})[model.version] = {
            "defaultVersion": model.default_version,
            "marName": model.archive,
            "minWorkers": model.min_workers.value,
            "maxWorkers": model.max_workers.value,
            "batchSize": model.batch_size.value,
            "maxBatchDelay": model.max_batch_delay.value,
            "responseTimeout": model.response_timeout.value,
            "startupTimeout": model.startup_timeout.value,
        }
    return json.dumps(models)

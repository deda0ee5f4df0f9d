"""LitServe: the program `serve/worker/litapi.py` gives it TorchServe's API, and archives' handlers to its workers."""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from archive import mar
from beeline.errors import Undetermined
from host import ROOT, machine
from host.files import write_json
from serve.addresses import Addresses
from serve.config import Configuration
from serve.servers.protocol import Places, Runtime, Say, Server, queue

_WORKER = ROOT / "serve" / "worker"


class LitServe(Server):
    """Runs from this environment."""

    name = "litserve"
    title = "LitServe"
    versions = True
    lock_file = ROOT / "requirements" / "main.txt"

    def prepare(self, say: Say, environ: Mapping[str, str]) -> Runtime:
        try:
            version = metadata.version("litserve")
        except metadata.PackageNotFoundError as error:
            raise Undetermined("the package litserve is not installed here; run `make setup`") from error
        return Runtime(Path(sys.executable), (sys.executable, str(_WORKER / "litapi.py")), f"LitServe {version}")

    def command(self, runtime: Runtime, places: Places, vmargs: str) -> list[str]:
        return [*runtime.program, str(places.temporary / "litserve.json")]

    def environment(self, python: Path) -> dict[str, str]:
        # The folder hides this repository. The gateway has no key, and nothing shall be sent anywhere.
        return {"PYTHONPATH": str(_WORKER), "LIT_SERVER_API_KEY": "", "OTEL_SDK_DISABLED": "true"}

    def write(self, configuration: Configuration, addresses: Addresses, places: Places) -> None:
        models = []
        for model in sorted(configuration.models, key=lambda model: not model.default_version):
            folder = str(places.temporary / "archives" / model.archive)
            mar.unpack(places.store / model.archive, Path(folder))
            numbers = {name: getattr(model, name).value for name in ("batch_size", "max_batch_delay")}
            models.append({"model": model.model, "version": model.version, "folder": folder, **numbers})
        settings = {
            "models": models,
            "backend": (addresses.backend.host, addresses.backend.port),
            "control": (addresses.control.host, addresses.control.port),
            "queue": queue(configuration, addresses),
            "silence": max(model.response_timeout.value for model in configuration.models),
            "deadline": configuration.numbers["beeline_deadline_seconds"].value,
            "max_request_size": configuration.max_request_size,
            "gpus": len(machine.gpus()),
            "log": str(places.logs / "worker.log"),
            "log_bytes": configuration.numbers["beeline_log_megabytes"].value * 10**6,
            "log_files": configuration.numbers["beeline_log_files"].value,
        }
        write_json(places.temporary / "litserve.json", settings)

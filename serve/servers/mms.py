"""Multi Model Server: its configuration cannot list models, so Beeline registers them through its API."""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import os
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from host.environments import Environment
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.servers.java import JavaServer
from serve.servers.protocol import Places, Say

# Its archiver is the same module as TorchServe's, so the two cannot share an environment.
VENV = ROOT / ".venv-mms"
LOCK_FILE = ROOT / "requirements" / "mms.txt"


class Mms(JavaServer):
    """Runs from its own environment, made from its lock file the first time."""

    name = "mms"
    title = "Multi Model Server"
    main = "com.amazonaws.ml.mms.ModelServer"
    package = "mms"
    versions = False
    highest_port = 32_767
    synchronous = patient = True

    def __init__(self, venv: Path = VENV, lock_file: Path = LOCK_FILE) -> None:
        self.venv = venv
        self.lock_file = lock_file

    def install(self, say: Say) -> Path:
        # Set in its image, where nothing is to be installed.
        if given := os.environ.get("BEELINE_MMS_PYTHON"):
            python = Path(given)
            if not python.is_absolute() or not python.is_file() or not self._sites(python):
                raise Undetermined(
                    f"BEELINE_MMS_PYTHON is {given!r}, which is no Python with multi-model-server; name the path of "
                    "one, such as /opt/mms/bin/python, or unset it"
                )
            return python
        python = Environment(self.title, self.venv, self.lock_file).prepare(say)
        self.site(python)
        return python

    def site(self, python: Path) -> Path:
        sites = self._sites(python)
        if not sites:
            raise Undetermined(
                f"the package multi-model-server is not in {python.parents[1]}; remove that folder, then try again"
            )
        return sites[0].parent

    def _sites(self, python: Path) -> list[Path]:
        return sorted((python.parents[1] / "lib").glob(f"python3*/site-packages/{self.package}"))

    def environment(self, python: Path) -> dict[str, str]:
        # It runs the first `python3` on the PATH, because that is the runtime that archives name.
        return {"PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])}

    def values(self, configuration: Configuration, places: Places) -> dict[str, str]:
        slowest = max(model.response_timeout.value for model in configuration.models)
        # The older key, `default_response_timeout`, counts minutes. Its own metrics come once a day, nearly never.
        return {"default_response_timeout_seconds": str(slowest), "metric_time_interval": "86400"}

    def register(self, management: ManagementClient, model: ModelSettings) -> None:
        self._register(management, model, model.min_workers.value, model.max_workers.value)

    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        # With its last worker, MMS ends the process that forks workers and never starts another: it does not even
        # answer a request to scale up from 0. So the model is registered again. MMS itself unregisters a model whose
        # workers fail to start.
        if management.describe(model.model) is not None:
            management.unregister(model.model, patience)
        self._register(management, model, low, high)

    def _register(self, management: ManagementClient, model: ModelSettings, low: int, high: int) -> None:
        parameters: dict[str, str | int] = {
            "url": model.archive,
            "model_name": model.model,
            "batch_size": model.batch_size.value,
            "max_batch_delay": model.max_batch_delay.value,
            "initial_workers": low,
            "response_timeout": model.response_timeout.value,
        }
        management.register(parameters, timeout=model.startup_timeout.value)
        if high > low:
            management.scale(model.model, low, high)

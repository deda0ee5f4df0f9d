"""TorchServe: it loads its models by itself and reads their numbers from its configuration."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.servers.protocol import Places, Say, models_json

_WORKER_PATH = ROOT / "serve" / "worker"


class TorchServe:
    """Runs from this environment."""

    name = "torchserve"
    title = "TorchServe"
    main = "org.pytorch.serve.ModelServer"
    package = "ts"
    versions = True
    highest_port = 65_535
    synchronous = False

    def prepare(self, say: Say) -> Path:
        """Return this Python; see `Server`."""
        self.site(Path(sys.executable))
        return Path(sys.executable)

    def site(self, python: Path) -> Path:
        """Return the folder with the package `ts`, found without importing it; see `Server`."""
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            raise Undetermined("the package torchserve is not installed here; run `make setup`")
        return Path(found.submodule_search_locations[0]).parent

    def environment(self, python: Path) -> dict[str, str]:
        """Hide this repository from the workers; see `Server`."""
        return {"PYTHONPATH": str(_WORKER_PATH)}

    def arguments(self) -> Sequence[str]:
        """Return no snapshots, no token: the management address is loopback's; see `Server`."""
        return ("-ncs", "--disable-token-auth")

    def properties(self, configuration: Configuration, places: Places) -> dict[str, str]:
        """Return the models with their numbers, and everything off that is not used; see `Server`."""
        return {
            "load_models": ",".join(model.archive for model in configuration.models),
            "models": models_json(configuration),
            "allowed_urls": f"{places.store.as_uri()}/.*",
            "enable_model_api": "false",
            "enable_metrics_api": "false",
            "install_py_dep_per_model": "false",
            "disable_system_metrics": "true",
            # Both take a free port of loopback, so that two servers never meet there.
            "metrics_address": "http://127.0.0.1:0",
            "grpc_inference_address": "127.0.0.1",
            "grpc_inference_port": "0",
            "grpc_management_address": "127.0.0.1",
            "grpc_management_port": "0",
        }

    def register(self, management: ManagementClient, configuration: Configuration) -> None:
        """Do nothing: `load_models` did it; see `Server`."""

    def revive(self, management: ManagementClient, model: ModelSettings, low: int, high: int, patience: float) -> None:
        """Scale to 0, which removes dead workers from the list too, then up; see `Server`."""
        management.scale(model.model, 0, 0)
        deadline = time.monotonic() + patience
        while (now := management.describe(model.model)) is not None and now.workers:
            if time.monotonic() > deadline:
                raise Undetermined(f"{model.model} still has workers after {patience:g} s; see `beeline serve logs`")
            time.sleep(0.1)
        management.scale(model.model, low, high)

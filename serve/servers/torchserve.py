"""TorchServe: it loads its models itself and reads their numbers from its configuration."""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from pydantic.alias_generators import to_camel

from beeline.errors import Undetermined
from host import ROOT
from serve.config import Configuration, Setting
from serve.servers.java import JavaServer
from serve.servers.protocol import Places, Say


class TorchServe(JavaServer):
    """Runs from this environment."""

    name = "torchserve"
    title = "TorchServe"
    main = "org.pytorch.serve.ModelServer"
    package = "ts"
    # No snapshots; and no token, because only this machine reaches the management address.
    arguments = ("-ncs", "--disable-token-auth")
    versions = installs = True
    lock_file = ROOT / "requirements" / "main.txt"

    def install(self, say: Say) -> Path:
        self.site(Path(sys.executable))
        return Path(sys.executable)

    def site(self, python: Path) -> Path:
        # Found without importing it.
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise Undetermined("the package torchserve is not installed here; run `make setup`")
        return Path(spec.submodule_search_locations[0]).parent

    def environment(self, python: Path) -> dict[str, str]:
        # It hides this repository from the workers.
        return {"PYTHONPATH": str(ROOT / "serve" / "worker")}

    def values(self, configuration: Configuration, places: Places) -> dict[str, str]:
        # The first version of a model is its default, whatever `models` says (pytorch/serve#2744).
        models = sorted(configuration.models, key=lambda model: not model.default_version)
        return {
            "load_models": ",".join(model.archive for model in models),
            "models": models_json(configuration),
            # For `minWorkers` of 0: no worker yet, where 0 would mean one for each core.
            "default_workers_per_model": "-1",
            "allowed_urls": f"{places.store.as_uri()}/.*",
            "enable_model_api": "false",
            "enable_metrics_api": "false",
            "install_py_dep_per_model": configuration.install_py_dep_per_model,
            "disable_system_metrics": "true",
            # Metrics and gRPC get free ports on loopback, so that two servers never want the same one.
            "metrics_address": "http://127.0.0.1:0",
            "grpc_inference_address": "127.0.0.1",
            "grpc_inference_port": "0",
            "grpc_management_address": "127.0.0.1",
            "grpc_management_port": "0",
        }


def models_json(configuration: Configuration) -> str:
    """Return TorchServe's `models` value with the resolved numbers."""
    models: dict[str, dict[str, dict[str, object]]] = {}
    for model in configuration.models:
        numbers = {to_camel(name): each.value for name, each in vars(model).items() if isinstance(each, Setting)}
        # Each gets its workers in its turn, from `register`.
        entry = {"defaultVersion": model.default_version, "marName": model.archive, **numbers, "minWorkers": 0}
        models.setdefault(model.model, {})[model.version] = entry
    return json.dumps(models)

"""NVIDIA Triton: the tritonserver of PyTriton's wheel on an exported repository, behind a translator."""

# ruff: noqa: D102 - an override is documented where it is declared

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from beeline.errors import Undetermined
from host import ROOT
from host.environments import Environment
from serve.addresses import Addresses
from serve.client import ManagementClient
from serve.config import Configuration, ModelSettings
from serve.servers import protocol
from serve.servers.protocol import Places, Runtime, Say, Server

# Its workers need NumPy 1, so it has an environment of its own.
VENV = ROOT / ".venv-triton"
# NumPy 1 has no wheels for newer Pythons.
_VERSION = sys.executable if sys.version_info < (3, 13) else "3.11"
_OPTIONS = ["--model-control-mode=explicit", "--exit-on-error=false", "--exit-timeout-secs=5", "--allow-grpc=false"]
_OPTIONS += ["--allow-metrics=false", "--http-address=127.0.0.1"]


class Triton(Server):
    """Runs from its own environment, made from its lock file the first time."""

    name = "triton"
    title = "Triton"
    versions = False
    lock_file = ROOT / "requirements" / "triton.txt"

    def prepare(self, say: Say, environ: Mapping[str, str]) -> Runtime:
        python = Environment(self.title, VENV, self.lock_file, _VERSION).prepare(say)
        package = _site(python) / "pytriton" / "tritonserver"
        stub = (
            package
            / "python_backend_stubs"
            / _site(python).parent.name.removeprefix("python")
            / "triton_python_backend_stub"
        )
        # The wheel has a worker for each Python; Triton looks for one in the folder of its Python backend.
        folder = VENV / "backends" / "python"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*(package / "backends" / "python").glob("*triton*"), stub):
            # Another Python has another stub.
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
        # Without arguments it ends at once; 127 is the loader's.
        ended = subprocess.run(
            [stub], env={**environ, **self.environment(python)}, capture_output=True, text=True, check=False
        )
        if ended.returncode == 127:
            raise Undetermined(f"Triton's worker cannot be run ({ended.stderr.strip()}); install that library")
        program = (str(package / "bin" / "tritonserver"), *_OPTIONS, f"--backend-directory={folder.parent}")
        return Runtime(python, program, f"the tritonserver in {VENV.name}")

    def command(self, runtime: Runtime, places: Places, vmargs: str) -> list[str]:
        shared = f"--backend-config=python,shm-region-prefix-name={places.temporary.name}"
        words = [*runtime.program, f"--model-repository={places.temporary / 'repository'}", shared]
        return [sys.executable, "-m", "serve.gateway.translator", str(places.properties), *words]

    def environment(self, python: Path) -> dict[str, str]:
        # A worker finds its packages by the first `python3` on the PATH, and not by PYTHONPATH.
        libraries = f"{python.resolve().parents[1] / 'lib'}:{_site(python) / 'nvidia_pytriton.libs'}"
        path = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
        # A change in a model's folder, as by bytecode, would make Triton replace all workers instead of adding one.
        return {"PATH": path, "LD_LIBRARY_PATH": libraries, "PYTHONDONTWRITEBYTECODE": "1"}

    def write(self, configuration: Configuration, addresses: Addresses, places: Places) -> None:
        # Only here does this room write something of an archive.
        from archive import triton

        models, queue = {}, protocol.queue(configuration, addresses)
        for model in configuration.models:
            size, delay = model.batch_size.value, model.max_batch_delay.value
            numbers = triton.Numbers(size, delay, queue=queue)
            triton.export(places.store / model.archive, places.temporary / "repository", numbers)
            models[model.model] = {"modelVersion": model.version, "batchSize": size, "maxBatchDelay": delay}
        at = {key: [one.host, one.port] for key, one in (("api", addresses.backend), ("control", addresses.control))}
        plan = {**at, "models": models, "max_request_size": configuration.max_request_size}
        places.properties.write_text(json.dumps(plan), "utf-8")

    def register(self, management: ManagementClient, model: ModelSettings) -> None:
        workers = (model.min_workers.value, model.max_workers.value)
        management.scale(model.model, *workers, wait=model.startup_timeout.value)


def _site(python: Path) -> Path:
    """Return the folder of the environment's packages; raise Undetermined if PyTriton is not there."""
    sites = sorted((python.parents[1] / "lib").glob("python3*/site-packages/pytriton"))
    if not sites:
        folder = python.parents[1]
        raise Undetermined(f"the package nvidia-pytriton is not in {folder}; remove that folder, then try again")
    return sites[0].parent

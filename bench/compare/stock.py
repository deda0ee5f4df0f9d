"""TorchServe as it comes: its own launcher, its stock image classifier, the batching of its documentation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import BeelineError
from bench.compare.environment import Environment
from bench.compare.peer import DOCUMENTED, Bench, Numbers
from bench.compare.process import Place, Process
from bench.compare.torchscript import FILE, TOLD
from bench.compare.wire import raw
from serve import ports
from serve.ports import Address
from serve.servers import java
from serve.servers.protocol import Say

MAR, MODEL = "classifier.mar", "classifier"
# The stock handler asks for the five best labels and fails every batch of a model with fewer.
_STOCK_TOP = 5


@dataclass(frozen=True)
class Stock(Process):
    """The stock server; see `Peer`."""

    def prepare(self, bench: Bench, say: Say) -> None:
        """Install, and pack the archive with TorchServe's own archiver; see `Peer`."""
        python = self.environment.prepare(say)
        java.find_java(os.environ)
        if (bench.model / MAR).exists():
            return
        labels = json.loads((bench.model / TOLD).read_text(encoding="utf-8"))["labels"]
        index = bench.model / "index_to_name.json"
        index.write_text(json.dumps({str(i): label for i, label in enumerate(labels)}), encoding="utf-8")
        command = pack(python, bench, self.folder / self.environment.name)
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=bench.model)
        except (OSError, subprocess.CalledProcessError) as error:
            said = " ".join(str(getattr(error, "stderr", None) or error).split())[-300:]
            raise BeelineError(f"torch-model-archiver does not pack the stock archive ({said})") from error


def torchserve(cores: int) -> Stock:
    """Return it with the numbers of its page on batch inference, and a worker a core, which is its default."""
    return Stock(
        "torchserve",
        DOCUMENTED,
        "TorchServe's stock image_classifier as shipped: batch 8, 50 ms as on its page on batches, a worker a core "
        "(a model of fewer than five labels needs its set_max_result_classes, or every batch fails)",
        Numbers(8, cores, 50),
        raw(f"/predictions/{MODEL}"),
        Environment("torchserve"),
        _command,
        _variables,
    )


def pack(python: Path, bench: Bench, folder: Path) -> list[str]:
    """Return the archiver's command line; a model of fewer than five labels gets the handler that asks for fewer."""
    handler = "image_classifier" if bench.labels >= _STOCK_TOP else str(folder / "few_labels.py")
    return [
        str(python.with_name("torch-model-archiver")),
        *("--model-name", MODEL, "--version", "1.0", "--force"),
        *("--serialized-file", str(bench.model / FILE), "--handler", handler),
        *("--extra-files", str(bench.model / "index_to_name.json"), "--export-path", str(bench.model)),
    ]


def _command(place: Place, numbers: Numbers, bench: Bench) -> list[str]:
    """Lay out store and configuration, and return the launcher's command line."""
    store = place.scratch / "store"
    store.mkdir()
    shutil.copy(bench.model / MAR, store / MAR)
    config = place.scratch / "config.properties"
    config.write_text("".join(f"{key}={value}\n" for key, value in properties(place, numbers).items()))
    options = ("--start", "--foreground", "--ncs", "--disable-token-auth", "--ts-config", str(config))
    return [place.tool("torchserve"), *options, "--model-store", str(store)]


def properties(place: Place, numbers: Numbers) -> dict[str, str]:
    """Return its configuration: everything on loopback, the model's numbers, otherwise its defaults."""
    free = ports.settle([(Address("127.0.0.1", 0), "--servers")] * 4)
    management, metrics, grpc, grpc_management = (str(each.port) for each in free)
    served = {
        "defaultVersion": True,
        "marName": MAR,
        "minWorkers": numbers.workers,
        "maxWorkers": numbers.workers,
        "batchSize": numbers.batch,
        "maxBatchDelay": numbers.delay_ms,
        "responseTimeout": 120,
    }
    return {
        "inference_address": f"http://127.0.0.1:{place.port}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": grpc,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": grpc_management,
        "load_models": MAR,
        "number_of_gpu": "0",
        "models": json.dumps({MODEL: {"1.0": served}}),
    }


def _variables(place: Place, numbers: Numbers, bench: Bench) -> Mapping[str, str]:
    found = java.find_java(os.environ)
    return {
        "JAVA_HOME": str(found.command.parent.parent),
        "LOG_LOCATION": str(place.scratch / "logs"),
        "METRICS_LOCATION": str(place.scratch / "logs"),
        # Nothing of this repository.
        "PYTHONPATH": "",
    }

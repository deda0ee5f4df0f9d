"""TorchServe as its pages have it, with its own launcher: everything on loopback, the model's numbers, its defaults."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

MAR = "classifier.mar"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


def properties() -> dict[str, str]:
    """Return its configuration."""
    management, metrics, grpc, grpc_management = free_ports(4)
    workers = int(os.environ["PEER_WORKERS"])
    served = {
        **{"defaultVersion": True, "marName": MAR, "minWorkers": workers, "maxWorkers": workers},
        **{"batchSize": int(os.environ["PEER_BATCH_SIZE"]), "maxBatchDelay": int(os.environ["PEER_DELAY_MS"])},
        "responseTimeout": 120,
    }
    return {
        "inference_address": f"http://127.0.0.1:{os.environ['PEER_PORT']}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": str(grpc),
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": str(grpc_management),
        "load_models": MAR,
        "number_of_gpu": "0",
        "models": json.dumps({"classifier": {"1.0": served}}),
    }


if __name__ == "__main__":
    scratch = Path(os.environ["PEER_SCRATCH"])
    store, config = scratch / "store", scratch / "config.properties"
    store.mkdir()
    shutil.copy(Path(os.environ["PEER_MODEL"]) / MAR, store / MAR)
    config.write_text("".join(f"{key}={value}\n" for key, value in properties().items()))
    os.environ["LOG_LOCATION"] = os.environ["METRICS_LOCATION"] = str(scratch / "logs")
    launcher = str(Path(sys.executable).with_name("torchserve"))
    options = ["--start", "--foreground", "--ncs", "--disable-token-auth", "--ts-config", str(config)]
    os.execv(launcher, [launcher, *options, "--model-store", str(store)])

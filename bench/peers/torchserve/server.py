"""TorchServe's stock image_classifier as shipped: batch 8, 50 ms as on its page on batches, a worker a core."""

import json
import os
import socket
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

MAR = "classifier.mar"


def write_archive(model: Path, target: Path) -> None:
    """Write the archive of the stock handler, as torch-model-archiver does."""
    labels = json.loads((model / "index_to_name.json").read_text())
    # The stock handler asks for the five best labels and fails every batch of a model with fewer.
    handler = "image_classifier" if len(labels) >= 5 else "few_labels.py"
    about = {"modelName": "classifier", "modelVersion": "1.0", "serializedFile": "documented.pt", "handler": handler}
    manifest = {"createdOn": "01/01/2000 00:00:00", "runtime": "python", "model": about, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for file in (model / "documented.pt", model / "index_to_name.json", Path(__file__).with_name("few_labels.py")):
            archive.write(file, file.name)


def properties(asked: dict[str, int]) -> dict[str, str]:
    """Return the configuration: four free ports next to the one asked for, and the model's numbers."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        management, metrics, grpc, grpc_management = (str(each.getsockname()[1]) for each in sockets)
    served = {
        **{"defaultVersion": True, "marName": MAR, "minWorkers": asked["workers"], "maxWorkers": asked["workers"]},
        **{"batchSize": asked["batch_size"], "maxBatchDelay": asked["max_batch_delay"], "responseTimeout": 120},
    }
    return {
        "inference_address": f"http://127.0.0.1:{asked['port']}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": grpc,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": grpc_management,
        "load_models": MAR,
        "number_of_gpu": "0",
        "models": json.dumps({"classifier": {"1.0": served}}),
    }


if __name__ == "__main__":
    asked = json.loads(os.environ["PEER"])
    scratch = Path(asked["scratch"])
    store, config = scratch / "store", scratch / "config.properties"
    store.mkdir()
    write_archive(Path(asked["model"]), store / MAR)
    config.write_text("".join(f"{key}={value}\n" for key, value in properties(asked).items()))
    os.environ["LOG_LOCATION"] = os.environ["METRICS_LOCATION"] = str(scratch / "logs")
    launcher = str(Path(sys.executable).with_name("torchserve"))
    options = ["--start", "--foreground", "--ncs", "--disable-token-auth", "--ts-config", str(config)]
    os.execv(launcher, [launcher, *options, "--model-store", str(store)])

"""Thirty models on one server: a store of small networks with seeded weights, and what each costs."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from archive.store import STORE, find_archives
from beeline.errors import BeelineError
from bench.record import machine, utc
from host.files import write_json
from serve.addresses import Ports
from serve.client import InferenceClient
from serve.config import Overrides
from serve.instance.child import Running
from serve.ready import model_in, try_golden
from serve.status import status
from serve.up import Request, up

# By torchvision's names, the number of labels.
ARCHITECTURES = {
    **{"squeezenet1_1": 5, "resnet18": 6, "shufflenet_v2_x0_5": 8, "mnasnet0_5": 9, "squeezenet1_0": 10},
    "mobilenet_v3_small": 7,
}
COPIES, _CROP, _REQUESTS, _CLIENTS, _IDLE_SECONDS = 5, 96, 1000, 8, 30.0
app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def make(store: Annotated[Path, typer.Option(help="The new folder of archives.")]) -> None:
    """Make `COPIES` archives of each architecture, in OpenVINO's fp32, each under a name of its own."""
    import numpy as np

    from archive import variants
    from archive.build import build
    from archive.export import ExportRequest, export_folder
    from archive.graph import Preprocessing
    from archive.variants.agreement import Gate, Pictures
    from beeline.spec import FILE_NAME, Geometry

    noise = np.random.default_rng(0).integers(0, 256, (20, _CROP, _CROP, 3), np.uint8)
    geometry = Geometry(resize=108, crop=_CROP)
    pictures = Pictures(noise[:0], noise, noise, geometry, "noise")
    preprocessing = Preprocessing(geometry, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for architecture, classes in ARCHITECTURES.items():
        labels = tuple(f"{architecture} {number}" for number in range(classes))
        # With seeded weights some cannot tell a picture from a turned one.
        request = ExportRequest(architecture, "1.0", labels, preprocessing, architecture, blind_to=("exif",))
        with tempfile.TemporaryDirectory() as scratch:
            export, variant = Path(scratch) / "export", Path(scratch) / "variant"
            export_folder(_network(architecture, classes), request, export)
            spec = variants.make(export, variant, variants.Variant("openvino", "fp32"), pictures, Gate())
            for number in range(COPIES):
                dataclasses.replace(spec, name=f"{architecture}-{number}").save(variant / FILE_NAME)
                typer.echo(build(variant, store, check=not number).path.name)


def _network(architecture: str, classes: int) -> Any:
    """Return a network with seeded weights, whose statistics and last layer make it sure of some pictures."""
    import torch
    import torchvision

    torch.manual_seed(classes - 5)
    # As many threads, the same sums.
    torch.set_num_threads(1)
    network = torchvision.models.get_model(architecture, num_classes=classes).train()
    pictures = torch.randn(16, 3, _CROP, _CROP)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        network(pictures)
        spread = network.eval()(pictures).std()
        for parameter in list(network.parameters())[-2:]:
            parameter *= 4 / spread
    return network


@app.command()
def serve(
    out: Annotated[Path, typer.Option(help="Write the table here as JSON.")],
    store: Annotated[Path, typer.Option(help="The folder that `make` has made.")] = STORE,
    server: Annotated[str, typer.Option(help="The kind of server, as docs/operate.md names it.")] = "torchserve",
) -> None:
    """Serve the store with one worker a model: megabytes, seconds to ready and idle CPU of each; then ask them all."""
    said: dict[str, float] = {}

    def say(line: str) -> None:
        said.setdefault(line.partition(":")[0], time.time())

    with tempfile.TemporaryDirectory(prefix="beeline-study-") as home:
        request = Request(server, store=store.resolve(), name="thirty", overrides=Overrides(workers=1), ports=Ports(0))
        environ = {**os.environ, "BEELINE_STATE": home}
        with up(request, say, environ) as running:
            models, others = _costs(running, said)
            wrong = _ask(running, store)
            values = {"seconds": round(running.seconds, 1), "requests": _REQUESTS, "wrong": wrong}
    table = {"server": server, **values, "megabytes": round(sum(row["pss_mb"] for row in [*models, *others]))}
    write_json(out, {"at": utc(), "machine": machine(), **table, "models": models, "others": others})
    for row in [*models, *others]:
        typer.echo("  ".join(f"{value:>24}" for value in row.values()))
    typer.echo(json.dumps(table))


def _costs(running: Running, said: dict[str, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each worker with a model, and one for each other process; idle CPU is of one core."""
    listed = status(running.instance.folder.parent, running.instance.name)["servers"][0]["processes"]
    processes = [(each["kind"], psutil.Process(each["pid"])) for each in listed]
    before = [sum(process.cpu_times()[:2]) for _, process in processes]
    time.sleep(_IDLE_SECONDS)
    models, others = [], []
    for (kind, process), used in zip(processes, before, strict=True):
        idle = (sum(process.cpu_times()[:2]) - used) / _IDLE_SECONDS
        memory = process.memory_full_info()
        row = {
            "pss_mb": round(memory.pss / 1e6),
            "rss_mb": round(memory.rss / 1e6),
            "idle_percent": round(100 * idle, 2),
        }
        try:
            name = model_in(Path(process.cwd()))[0]
            models.append({"model": name, "start_s": round(said[name] - process.create_time(), 1), **row})
        except (OSError, KeyError):
            others.append({"process": kind, "start_s": "", **row})
    return sorted(models, key=lambda row: str(row["model"])), others


def _ask(running: Running, store: Path) -> int:
    """Send golden pictures to all models in turn, by several clients; return how many answers are wrong."""
    archives = find_archives(store)

    def client(first: int) -> int:
        wrong = 0
        with InferenceClient(running.state.inference) as inference:
            for number in range(first, _REQUESTS, _CLIENTS):
                try:
                    try_golden(inference, archives[number % len(archives)], None)
                except BeelineError:
                    wrong += 1
        return wrong

    with ThreadPoolExecutor(_CLIENTS) as pool:
        return sum(pool.map(client, range(_CLIENTS)))


if __name__ == "__main__":
    app()

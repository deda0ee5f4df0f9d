"""What a container costs: the same archive in the CPU image and under bare `serve up`, in turns.

Needs `ab` on the PATH, a container engine, and the image built (docker-compose.yml). Both serve the same archive with
the same numbers. Their libraries are not the same: the image has Pillow-SIMD.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Annotated

import PIL
import typer

from beeline.errors import Undetermined
from bench.load.crosscheck import ab
from bench.studies import Clients, Mar, Out, Picture, Rounds, in_turns, interval, job, served
from host.files import sha256
from serve.client import InferenceClient
from serve.config import Overrides

# What a container may cost of the bare server's throughput.
MOST = 0.05
# As docker-compose.yml confines it.
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=1g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def main(
    mar: Mar,
    picture: Picture,
    image: Annotated[str, typer.Option(help="The CPU image.")] = "beeline-cpu:0.1.0",
    rounds: Rounds = 7,
    requests: Annotated[int, typer.Option(help="Requests a turn.")] = 400,
    clients: Clients = 50,
    out: Out = None,
) -> None:
    """Measure and print a table."""
    numbers = {"BATCH_SIZE": "16", "WORKERS": "2", "LINGER_MS": "5"}
    about = {"archive": sha256(mar), "numbers": numbers, "picture_bytes": picture.stat().st_size, "requests": requests}
    about["image"] = image
    with job("containers", out, {**about, "clients": clients}) as journal, contextlib.ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="containers-"))) / "store"
        _only(mar, store)
        options = (*(f"--env={name}={value}" for name, value in numbers.items()), f"--volume={store}:/model_store:ro")
        container = _docker("run", "--detach", *CONFINED, *options, "--publish=127.0.0.1::8080", image)
        stack.callback(_docker, "rm", "--force", container)
        running, path = stack.enter_context(served(store / mar.name, Overrides(16, 2, 5), "nginx"))
        urls = {"bare": running.state.inference, "container": f"http://{_docker('port', container, '8080')}"}
        with InferenceClient(urls["container"]) as client:
            client.predict(Path(path).name, picture.read_bytes())

        def turn(url: str) -> float:
            measured = ab(url + path, picture, requests, clients)
            if measured.failed:
                raise Undetermined(f"{measured.failed} of {requests} requests failed, so this is no measurement")
            return measured.per_second

        rates = in_turns(journal, {name: partial(turn, url) for name, url in urls.items()}, rounds)
        pillow = _docker("exec", container, "python", "-c", "import PIL; print(PIL.__version__)")
        ratios = sorted(inside / bare for bare, inside in zip(rates["bare"], rates["container"], strict=True))
        low, high = interval(ratios)
        values = {
            **{f"{name}_per_second": statistics.median(own) for name, own in rates.items()},
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "interval": [low, high] if math.isfinite(low) else None,
            "costs_at_most_5_percent": low >= 1 - MOST,
            "pillow": {"bare": PIL.__version__, "container": pillow},
        }
        typer.echo(json.dumps(values, indent=1))
        journal.add("result", {**values, "rounds": rates})


def _only(mar: Path, store: Path) -> None:
    """Make a store of one archive, which a container's user may read; it serves what an index lists."""
    try:
        index = json.loads((mar.parent / "index.json").read_text(encoding="utf-8"))
        listed = {**index, "archives": {mar.name: index["archives"][mar.name]}}
    except (OSError, ValueError, KeyError) as error:
        raise Undetermined(f"{mar} is not listed in the index.json beside it ({error}); build it there") from error
    store.mkdir(mode=0o755)
    copyfile(mar, store / mar.name)
    (store / "index.json").write_text(json.dumps(listed), encoding="utf-8")


def _docker(*words: str) -> str:
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError as error:
        raise Undetermined("docker is not installed") from error
    except subprocess.CalledProcessError as error:
        raise Undetermined(f"docker {' '.join(words)}: {error.stderr.strip()}") from error


if __name__ == "__main__":
    typer.run(main)

"""What a container costs: the same archive in the CPU image and under bare `serve up`, in turns.

Run as `python -m bench.containers --picture ant.jpg`, with `ab` on the PATH, a container engine, and the image
built (docker-compose.yml). Both serve the archive that is in the image, or `--mar`, with the same numbers;
one is idle while the other is asked, each goes first as often as the other, and a turn of each before does not count.
Their libraries are not the same: the image has Pillow-SIMD.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Annotated

import PIL
import typer

from beeline.errors import Undetermined
from bench import machine
from bench.load.crosscheck import ab
from serve.addresses import Ports
from serve.client import InferenceClient
from serve.config import Overrides
from serve.up import Request, up

# What a container may cost of the bare server's throughput.
MOST = 0.05
_PILLOW = "import PIL; print(PIL.__version__)"
_STORE = "/opt/beeline/model_store"
# As docker-compose.yml confines it.
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=1g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def main(
    picture: Annotated[Path, typer.Option(help="What is sent.")],
    image: Annotated[str, typer.Option(help="The CPU image.")] = "beeline-cpu:0.1.0",
    mar: Annotated[Path | None, typer.Option(help="The archive to serve. [default: the image's own]")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 7,
    requests: Annotated[int, typer.Option(help="Requests a turn.")] = 400,
    clients: Annotated[int, typer.Option(help="Keep-alive clients.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure and print a table."""
    numbers = {"BATCH_SIZE": "16", "WORKERS": "2", "LINGER_MS": "5"}
    options = [f"--env={name}={value}" for name, value in numbers.items()]
    with tempfile.TemporaryDirectory(prefix="containers-") as folder, contextlib.ExitStack() as stack:
        store = Path(folder) / "store"
        if mar is not None:
            _only(mar, store)
            options.append(f"--volume={store}:/model_store:ro")
        container = _docker("run", "--detach", *CONFINED, *options, "--publish=127.0.0.1::8080", image)
        stack.callback(_docker, "rm", "--force", container)
        if mar is None:
            _docker("cp", f"{container}:{_STORE}", str(store))
        asked = Request(
            store=store,
            name="bench-bare",
            overrides=Overrides(16, 2, 5),
            ports=Ports(0),
            gateway="nginx",
        )
        with up(asked, typer.echo, {**os.environ, "BEELINE_STATE": folder}) as running:
            model = str(running.state.configuration["models"][0]["model"])
            urls = {"bare": running.state.inference, "container": f"http://{_docker('port', container, '8080')}"}
            with InferenceClient(urls["container"]) as client:
                client.predict(model, picture.read_bytes())
            found: dict[str, list[float]] = {name: [] for name in urls}
            for number in range(rounds + 1):
                # What a turn leaves behind, warm or hot, is there for the second one of a pair.
                for name in sorted(urls, reverse=bool(number % 2)):
                    found[name].append(_turn(f"{urls[name]}/predictions/{model}", picture, requests, clients))
            # What comes first finds Java cold.
            found = {name: rates[1:] for name, rates in found.items()}
            pillow = {"bare": PIL.__version__, "container": _docker("exec", container, "python", "-c", _PILLOW)}
    ratios = sorted(inside / bare for bare, inside in zip(found["bare"], found["container"], strict=True))
    low, high = interval(ratios)
    cheap = low >= 1 - MOST
    values = {
        "bare_per_second": statistics.median(found["bare"]),
        "container_per_second": statistics.median(found["container"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "interval": [low, high] if math.isfinite(low) else None,
        "costs_at_most_5_percent": cheap,
        "pillow": pillow,
        "model": model,
        "numbers": numbers,
        "picture_bytes": picture.stat().st_size,
        "clients": clients,
        "requests": requests,
        "machine": machine.summary(),
        "rounds": found,
    }
    typer.echo(
        f"{model}, {values['picture_bytes']} bytes a request, {clients} clients\n"
        f"  bare `serve up`   {values['bare_per_second']:8.1f} requests/s\n"
        f"  in a container    {values['container_per_second']:8.1f} requests/s "
        f"({values['ratio']:.3f} of it; {ratios[0]:.2f} to {ratios[-1]:.2f} in {rounds} pairs)\n"
        f"  the ratio lies in {low:.3f} to {high:.3f} with 95 % confidence: that a container costs at most {MOST:.0%} "
        f"is {'' if cheap else 'not '}shown"
    )
    if out is not None:
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return where the median of what was drawn from lies with 95 % confidence, by rank: no shape is assumed.

    Args:
        ratios: sorted; of fewer than six nothing can be said with that confidence, so it lies anywhere.
    """
    count, cut, tail = len(ratios), 0, 0.5 ** len(ratios)
    while 2 * (tail + math.comb(count, cut + 1) * 0.5**count) <= 0.05:
        cut += 1
        tail += math.comb(count, cut) * 0.5**count
    known = 2 * tail <= 0.05
    return (ratios[cut], ratios[-1 - cut]) if known else (-math.inf, math.inf)


def _turn(url: str, picture: Path, requests: int, clients: int) -> float:
    """Return requests a second of one turn, none of which may fail."""
    turn = ab(url, picture, requests, clients)
    if turn.failed:
        raise Undetermined(f"{turn.failed} of {requests} requests failed, so this is no measurement")
    return turn.per_second


def _docker(*words: str) -> str:
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError as error:
        raise Undetermined("docker is not installed") from error
    except subprocess.CalledProcessError as error:
        raise Undetermined(f"docker {' '.join(words)}: {error.stderr.strip()}") from error


if __name__ == "__main__":
    typer.run(main)

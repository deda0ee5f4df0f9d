"""`beeline quickstart`, which is `make serve`: every stage from pictures to a running server.

It skips a stage whose input has not changed: training by the fingerprint of configuration, pictures, weights and code,
the archive by the digests of its parts. Training and building run as one other command, so that PyTorch loads once, and
not in the process that stays in the foreground.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.errors import BeelineError, Undetermined
from cli.console import Json, result, say
from host import ROOT, signals

SAMPLES = ROOT / ".beeline" / "samples"
# A copy of one of them; its name does not depend on labels or format.
SAMPLE = ROOT / ".beeline" / "sample"


def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for training, as seed=1")] = None,
    server: Annotated[str, typer.Option(help="The kind of server, as docs/operate.md names it.")] = "torchserve",
    data: Annotated[str | None, typer.Option(help="A folder, one a label; a CSV; a zip's URL. [BEELINE_DATA]")] = None,
    weights: Annotated[Path | None, typer.Option(help="A state dict to start from. [BEELINE_WEIGHTS]")] = None,
    port: Annotated[int | None, typer.Option(help="Port for predictions; 0 for free ones.")] = None,
    management_port: Annotated[int | None, typer.Option(help="Port for management; 0 for a free one.")] = None,
    setup_seconds: Annotated[float, typer.Option(help="How long the set-up before this took.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Find pictures, train, export, archive, verify, serve; Ctrl-C stops everything it started."""
    from archive.inspect import card
    from host import processes
    from serve.addresses import Ports
    from serve.instance.child import summary
    from serve.up import Request, check_ports, up

    processes.end_with(os.getppid(), signal.SIGTERM)
    stages: list[tuple[str, float, str]] = [("set-up", setup_seconds, "the environment in .venv")]
    options = [f"--{name}={path}" for name, path in (("data", data), ("weights", weights)) if path]
    with signals.as_exceptions():
        try:
            request = Request(server, ports=Ports(port, management_port), card=lambda mar: card(mar).to_dict())
            # Check now, so that hours of training do not end with "port 8080 is taken".
            check_ports(request)
            words = (*(overrides or []), *options)
            begun = time.monotonic()
            trained = _beeline("train", *words, "--quick", "--archive", "--reuse")
            # The start of the command counts too.
            trained["stages"]["data"] += time.monotonic() - begun - sum(trained["stages"].values())
            built = trained["archive"]
            stages += [(name, trained["stages"][name], what) for name, what in _trained(trained).items()]
            with up(replace(request, wanted=(built["archive"],)), say) as running:
                sample = _samples(trained["samples"], running.state.inference, built["name"])
                stages.append(("serve", running.seconds, f"{server}: workers READY, a golden picture answered"))
                values = {
                    **summary(running),
                    "stages": {name: round(took, 1) for name, took, _ in stages},
                    "accuracy": trained["accuracy"],
                    "recipe": trained["recipe"],
                    "sample": str(sample),
                }
                result(values, as_json, _greeting(stages, values, trained, words))
                running.wait()
        except signals.Interrupted as end:
            say(f"stopped ({end})")
            raise typer.Exit(end.exit_code) from end


def _beeline(*words: str) -> dict[str, Any]:
    """Run another `beeline` command with its progress on stderr; return its JSON."""
    from host import processes

    say(f"\n$ beeline {' '.join(words)}")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *words, "--json"],
        # PyTorch's threads wait in a loop by default: beside other work a fit then took 322 s in place of 25 to 55.
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=processes.ending_with_parent(signal.SIGTERM),
    )
    try:
        out, _ = process.communicate()
    except BaseException:
        # A terminal's Ctrl-C may have reached it already; give it time to clean up.
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    if process.returncode:
        # The command has already printed its error.
        kind = BeelineError if process.returncode == 1 else Undetermined
        raise kind(f"`beeline {' '.join(words)}` failed with exit code {process.returncode}; its reason is above")
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    return values


def _samples(candidates: dict[str, list[str]], url: str, model: str) -> Path:
    """Copy one validation picture of each label to a short name for curl; return the last label's.

    Of a few pictures, take the first that gets its own label, so that the first answer that a newcomer sees is right.
    """
    from serve.client import InferenceClient

    shutil.rmtree(SAMPLES, ignore_errors=True)
    SAMPLES.mkdir(parents=True)
    with InferenceClient(url) as client:
        for label, names in candidates.items():
            paths = [Path(name) for name in names]
            answers = ((path, client.predict(model, path.read_bytes())) for path in paths)
            right = (path for path, answer in answers if answer.status == 200 and next(iter(answer.json())) == label)
            chosen = next(right, paths[0])
            sample = SAMPLES / f"{label}{chosen.suffix.lower()}"
            shutil.copyfile(chosen, sample)
    shutil.copyfile(sample, SAMPLE)
    return sample


def _trained(values: dict[str, Any]) -> dict[str, str]:
    """Return one line on the result of each stage of training."""
    how = values["recipe"] or f"all epochs, which took {values['seconds']:.0f} s"
    how = f"unchanged ({how})" if values["reused"] else how
    return {
        "data": f"{values['data']}, labels {', '.join(values['labels'][:5])}; starting from {values['weights']}",
        "fit": f"{how}: accuracy {values['accuracy']:.3f} on {values['pictures']} validation pictures",
        "export": f"uint8 graph, spec and golden pictures, {values['model_fingerprint'][:12]}",
        "archive": _built(values["archive"]),
    }


def _built(values: dict[str, Any]) -> str:
    how = "unchanged" if values["reused"] else "built and verified"
    made = f"{Path(values['archive']).name} for {values['engine']} in {values['precision']}"
    return f"{how}: {made}, {values['bytes'] / 1e6:.0f} MB, {values['fingerprint'][:12]}"


def _greeting(
    stages: list[tuple[str, float, str]], values: dict[str, Any], trained: dict[str, Any], words: Sequence[str]
) -> str:
    model = values["models"][0]["model"]
    sample = os.path.relpath(values["sample"])
    note = f"These are GENERATED pictures ({trained['data']}), no photographs: name yours with --data."
    whole = (
        "to train all epochs, which takes minutes; the next `make serve` serves that run:",
        f"  .venv/bin/beeline {shlex.join(['train', *words])}",
    )
    lines = [
        "",
        *(f"{name:<8} {seconds:7.1f} s  {what}" for name, seconds, what in stages),
        "",
        *([note, ""] if trained["generated"] else []),
        f"ready: {values['page']} in the browser, {values['url']} for programs",
        "",
        "try:",
        f"  curl -s {values['url']}/predictions/{model} -T {sample}",
        f"  .venv/bin/beeline predict --url {values['url']} --model {model} {os.path.relpath(SAMPLES)}",
        f'  curl -X PUT "{values["management"]}/models/{model}?min_worker=2&synchronous=true"',
        "  .venv/bin/beeline serve status",
        "",
        *([*whole, ""] if trained["recipe"] else []),
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)

"""What a SageMaker endpoint asks of its container: AWS's limits, its environment variables, its folder of the model.

The contract is AWS's "Custom Inference Code with Hosting Services"; payloads are those of InvokeEndpoint in botocore.
"""

from __future__ import annotations

import dataclasses
import gzip
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from archive import mar as reader
from beeline.errors import BeelineError, ConfigError
from serve import properties
from serve.servers.protocol import Say
from serve.up import Request

# AWS's limits. Bytes of a request: to an endpoint of instances, and to a serverless one.
PAYLOAD, SERVERLESS_PAYLOAD = 6_291_456, 4_194_304
# Seconds for an answer; for an answer to /ping, which must be 200 within START of the start of a serverless container;
# from SIGTERM to SIGKILL.
ANSWER, PING, START, STOP = 60, 2, 180, 30
# What of `config.properties` is lower here: AWS hears of a late answer before it gives up itself, and the server ends
# some seconds after its last answer.
_MOST = {
    "beeline_url_seconds": 20,
    "beeline_max_image_bytes": PAYLOAD,
    "beeline_deadline_seconds": ANSWER - 5,
    "beeline_drain_seconds": 2,
    "beeline_stop_seconds": STOP - 10,
}
# The variables of AWS's own images of TorchServe, in the order in which they win, and ours.
_TAKEN = {
    "SAGEMAKER_TS_BATCH_SIZE": "BATCH_SIZE",
    "SAGEMAKER_TS_MAX_BATCH_DELAY": "LINGER_MS",
    "SAGEMAKER_TS_MIN_WORKERS": "WORKERS",
    "SAGEMAKER_MODEL_SERVER_WORKERS": "WORKERS",
}


def contract(request: Request, folder: Path, environ: Mapping[str, str], say: Say) -> tuple[Request, dict[str, str]]:
    """Return the request and the environment that keep the contract for the model in `folder` (/opt/ml/model).

    A missing or empty folder means the archive of `request.store`. Lower limits in the file or the environment stay;
    our variables win over AWS's names for them.

    Raises:
        BeelineError: for a folder that cannot be read, or does not hold one archive.
        ConfigError: for a port or a range of ports that is none, or several models in one container.
    """
    changed = dict(environ)
    if environ.get("SAGEMAKER_MULTI_MODEL", "").lower() == "true":
        raise ConfigError(
            "SAGEMAKER_MULTI_MODEL is 'true'; this image serves one model: make the model's Mode SingleModel"
        )
    if request.gateway == "none":
        raise ConfigError("--gateway is 'none', and /invocations is a route of nginx; leave --gateway out")
    for name, ours in _TAKEN.items():
        if (value := environ.get(name, "").strip()) and not changed.get(ours, "").strip():
            changed[ours] = value
            say(f"{ours} is {value}, from {name}")
    read = properties.load(request.config_file, environ)
    for key, most in _MOST.items():
        if key == "beeline_deadline_seconds" and read.texts.get("beeline_url_hosts"):
            # Fetching a picture comes before its prediction.
            seconds = int(read.numbers.get("beeline_url_seconds", properties.DEFAULTS["beeline_url_seconds"]))
            most -= min(seconds, _MOST["beeline_url_seconds"])
        number = read.numbers.get(key, properties.DEFAULTS[key])
        if number > most:
            changed[next(name for name, meant in properties.VARIABLES.items() if meant == key)] = str(most)
            say(f"{key} is {most} instead of {number}, for SageMaker's limit")
    free, given = request.free, request.ports
    text = environ.get("SAGEMAKER_BIND_TO_PORT", "").strip() or str(properties.DEFAULTS["inference_address"].port)
    if not re.fullmatch(r"\d{1,5}", text) or not 1 <= int(text) <= 65_535:
        raise ConfigError(f"SAGEMAKER_BIND_TO_PORT is {text!r}; allowed: a port, 1 to 65535")
    port = int(text) if given.inference is None else given.inference
    if text := environ.get("SAGEMAKER_SAFE_PORT_RANGE", "").strip():
        match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
        free = range(int(match[1]), int(match[2]) + 1) if match else range(0)
        # The server, its management, the gateway's management and metrics.
        if len(free) < 4:
            raise ConfigError(f"SAGEMAKER_SAFE_PORT_RANGE is {text!r}; allowed: at least four ports, as 21000-22000")
    # No second port for the page; management and metrics get free ones, since other containers share the network.
    ports = dataclasses.replace(given, inference=port, management=given.management or 0, page=None)
    archive = _archive(folder) or _only(request.store, sorted(request.store.glob("*.mar")))
    return dataclasses.replace(request, wanted=(str(archive),), ports=ports, free=free, invocations=True), changed


def export(mar: Path, out: Path) -> Path:
    """Write model.tar.gz with an archive into the folder `out`, the same bytes for the same archive; return its path.

    Raise ArchiveError for an archive that Beeline has not built, or that was changed.
    """
    reader.check(mar)
    out.mkdir(parents=True, exist_ok=True)
    target, draft = out / "model.tar.gz", out / ".model.tar.gz.tmp"
    try:
        # Quickly, since what is large in an archive is compressed or weights.
        with mar.open("rb") as archive, draft.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            # Without this machine's times and users, readable by all.
            entry = tarfile.TarInfo(mar.name)
            entry.size = mar.stat().st_size
            with tarfile.open(fileobj=packed, mode="w") as tar:
                tar.addfile(entry, archive)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def _archive(folder: Path) -> Path | None:
    """Return the one archive in SageMaker's folder; None where the folder is missing or empty."""
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        archive = _only(folder, sorted(folder.glob("*.mar")))
        archive.open("rb").close()
        return archive
    except OSError as error:
        fix = "files of model.tar.gz must be readable by all"
        raise BeelineError(f"{folder} cannot be read ({error}); {fix}") from error


def _only(folder: Path, archives: Sequence[Path]) -> Path:
    if len(archives) != 1:
        names = ", ".join(path.name for path in archives) or "none"
        fix = "make model.tar.gz with `beeline archive export MAR --to sagemaker`"
        raise BeelineError(f"{folder} must hold one archive, and holds {len(archives)} ({names}); {fix}")
    return archives[0].resolve()

"""Downloads: one file over HTTP, resumable, verified, and quick to give up without a network; the ants and bees."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import requests

from beeline.errors import short
from host import Say, files, zips
from train.errors import DownloadError, Unavailable
from train.progress import progress

# Until the first byte of the answer's head; a machine without a network must not wait longer than this.
REACH_SECONDS = 6.0
# Between two pieces of the body: a stalled line counts as a cut.
STALL_SECONDS = 20.0
MAX_BYTES = 4 << 30
_FRUITLESS_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_PIECE = 1 << 16
# Weights and pictures come from the same host: one wait for it is enough.
_REMEMBERED_SECONDS = 60.0
_silent_until: dict[str, float] = {}

# The ants and bees of PyTorch's transfer-learning tutorial.
NAME = "hymenoptera_data"
_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
# No digest of the archive is published, so its content is pinned: the sha256 over the sorted lines `<sha256>  <path>`
# of the 397 photographs in train/ and val/, from an independent copy.
PICTURES = 397
PICTURES_SHA256 = "955d7639c0d6034bccaed03d441288f4e9e4e9362cf0801abfb34f7020de6c21"
_ZIP_BYTES = 200 << 20
# Photographs hardly shrink; deflate's own ceiling is 1032.
RULES = zips.Rules(
    DownloadError, "delete it and download it again", max_files=200_000, max_bytes=10 * _ZIP_BYTES, max_ratio=200
)


def hymenoptera(cache: Path, say: Say, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the ants and bees, as `pictures` does.

    `BEELINE_DATA_URL` names another address; without a digest the pictures themselves must be the known ones.
    """
    return pictures(environ.get("BEELINE_DATA_URL") or _URL, cache, say, environ, NAME, _ZIP_BYTES)


def pictures(
    url: str,
    cache: Path,
    say: Say,
    environ: Mapping[str, str] = os.environ,
    name: str | None = None,
    max_bytes: int = RULES.max_bytes,
) -> Path:
    """Return the folder `NAME-DIGEST` under `cache` of an unpacked zip file, and download it if it is not there.

    `BEELINE_DATA_SHA256` is the digest of the archive. It raises as `fetch`, and `DownloadError` for an unsafe archive.
    """
    sha256 = environ.get("BEELINE_DATA_SHA256") or None
    identity = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:8]
    folder = cache / f"{name or Path(urlsplit(url).path).stem}-{identity}"
    if folder.is_dir():
        return folder
    archive = folder.with_name(f"{folder.name}.zip")
    if not archive.exists():
        say(f"downloading {url}")
        fetch(url, archive, say, sha256, max_bytes)
    with files.whole_folder(folder) as fresh:
        try:
            zips.unpack(archive, fresh, RULES)
            if name == NAME and sha256 is None and (found := digest(fresh)) != PICTURES_SHA256:
                why = f"their digest is {found[:12]}, expected {PICTURES_SHA256[:12]}"
                fix = f"to use them anyway, set BEELINE_DATA_SHA256={files.sha256(archive)}"
                raise DownloadError(f"the pictures from {url} are not the known {PICTURES} of {NAME} ({why}); {fix}")
        except DownloadError:
            # Such as a login page with status 200: with it here, no later run would download the archive.
            archive.unlink()
            raise
    archive.unlink(missing_ok=True)
    return folder


def digest(folder: Path) -> str:
    """Return the digest of all photographs (`.jpg`, `.jpeg`) by path below the folder that holds `train/`."""
    holders = [path.parent for path in sorted(folder.rglob("train")) if path.is_dir()]
    root = holders[0] if holders else folder
    paths = (path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    lines = [f"{files.sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in paths if path.name[0] != "."]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fetch(url: str, target: Path, say: Say, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> Path:
    """Download `url` to `target` and return it; a download that was cut off continues from there.

    Bytes go to `<target>.part`, which is renamed when it is complete and, with `sha256` (the digest in hexadecimal, or
    its first eight digits or more), verified. A part continues only under the server's own validator (`If-Range`); from
    a server that ignores `Range` the download starts again. Raise `Unavailable` if the server could not be reached in
    time or has no such file, `DownloadError` for a file that is cut off for good, too large, or not the expected one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two writers would mix their bytes.
    lock = files.try_lock(target.with_name(f".{target.name}.lock"))
    if lock is None:
        raise DownloadError(f"another process is downloading {target}; wait until it is done")
    try:
        part = _Part(url, target)
        _complete(part, say, max_bytes)
        actual = files.sha256(part.path)
        if sha256 is not None and not actual.startswith(sha256.lower()):
            part.discard()
            why = f"expected {sha256.lower()}: the file changed or was damaged on its way"
            fix = "download it yourself and name it, or correct the checksum"
            raise DownloadError(f"{url} has the sha256 {actual}, {why}; {fix}")
        # The part is the draft: several runs may have written it, piece by piece.
        part.path.replace(target)
        part.notes.unlink(missing_ok=True)
    finally:
        os.close(lock)
    return target


class _Part:
    """What is already here of a file: bytes on disk, and the validator that the server gave for them."""

    def __init__(self, url: str, target: Path) -> None:
        self.url = url
        self.path, self.notes = (target.with_name(f"{target.name}{end}") for end in (".part", ".part.json"))

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> str | None:
        """Return the ETag or date under which the bytes on disk may continue, if they came from `url`."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return notes.get("validator") if notes.get("url") == self.url else None

    def note(self, answer: requests.Response) -> None:
        etag = answer.headers.get("ETag", "")
        # A weak ETag does not promise identical bytes, so nothing may be appended under it.
        validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        self.notes.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")

    def discard(self) -> None:
        self.notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _complete(part: _Part, say: Say, max_bytes: int) -> None:
    """Ask until the part is the whole file, or nothing more comes."""
    started, fruitless = False, 0
    while True:
        before = part.size()
        try:
            return _pull(part, say, max_bytes)
        except (Unavailable, requests.RequestException) as error:
            if isinstance(error, Unavailable) and not started:
                raise
            fruitless = 0 if part.size() > before else fruitless + 1
            if fruitless == _FRUITLESS_ATTEMPTS:
                what = f"the download of {part.url} broke off after {part.size()} bytes ({_first_line(error)})"
                raise DownloadError(f"{what}; run the same command again to continue it") from error
            say(f"the download broke off after {part.size() / 1e6:.1f} MB; trying to continue")
            time.sleep(_PAUSE_SECONDS * fruitless)
        started = True


def _pull(part: _Part, say: Say, max_bytes: int) -> None:
    """Ask once, from where the part ends, and append what comes."""
    headers = {"Accept-Encoding": "identity"}
    have, validator = part.size(), part.validator()
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with _first_answer(part.url, headers) as answer:
        if answer.status_code == 416:  # Nothing comes after the part: it is the whole file, or not of this file.
            if answer.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.discard()
            raise requests.ConnectionError(f"the server has fewer than the {have} bytes already here")
        if answer.status_code not in (200, 206):
            raise Unavailable(f"{part.url} answers {answer.status_code} {answer.reason}; check the address")
        resumed = answer.status_code == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.discard()
            raise requests.ConnectionError("the server sent another range than the one asked for")
        done = have if resumed else 0
        length = answer.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else 0
        if resumed:
            say(f"continuing the download at {done / 1e6:.1f} MB")
        else:
            part.note(answer)
        with part.path.open("ab" if resumed else "wb") as file, progress("download", total, say, "MB", 1e6) as step:
            for piece in answer.iter_content(_PIECE):
                done += len(piece)
                if max(done, total) > max_bytes:
                    part.discard()
                    raise DownloadError(f"{part.url} is larger than the limit of {max_bytes} bytes; it was not kept")
                file.write(piece)
                step(done)
        if total and done != total:
            raise requests.ConnectionError(f"{total - done} bytes are missing")


def _first_answer(url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer's head within REACH_SECONDS, or give up.

    The time limit of `requests` covers neither the resolution of the name nor the number of addresses that are tried in
    turn, so the wait happens in a thread that may be left behind.
    """
    host = urlsplit(url).netloc
    if time.monotonic() < _silent_until.get(host, 0.0):
        raise Unavailable(f"{url} cannot be reached: {host} did not answer a moment ago")
    box: queue.Queue[requests.Response | Exception] = queue.Queue()

    def ask() -> None:
        try:
            box.put(requests.get(url, headers=headers, stream=True, timeout=(REACH_SECONDS, STALL_SECONDS)))
        except Exception as error:  # noqa: BLE001 - handed to the waiting thread, which raises it
            box.put(error)

    threading.Thread(target=ask, name="download", daemon=True).start()
    try:
        answer = box.get(timeout=REACH_SECONDS)
    except queue.Empty:
        _silent_until[host] = time.monotonic() + _REMEMBERED_SECONDS
        raise Unavailable(f"{url} cannot be reached: no answer in {REACH_SECONDS:.0f} seconds") from None
    if isinstance(answer, Exception):
        # Without a network each look-up of the name may take seconds.
        if "NameResolutionError" in repr(answer):
            _silent_until[host] = time.monotonic() + _REMEMBERED_SECONDS
        raise Unavailable(f"{url} cannot be reached ({_first_line(answer)})") from answer
    return answer


def _first_line(error: BaseException) -> str:
    """Return the innermost cause in one line: urllib3 wraps it in three layers of addresses."""
    while isinstance(cause := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = cause
    return short(error, 160)

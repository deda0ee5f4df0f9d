"""Fetch one file over HTTP: resumable, verified, and quick to give up on a machine without a network."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from host import files
from train.errors import DownloadError, Unavailable
from train.progress import Say, progress

# Until the first byte of the answer's head; a machine without a network must not wait longer than this.
REACH_SECONDS = 6.0
# Between two pieces of the body: a stalled line counts as a cut.
STALL_SECONDS = 20.0
MAX_BYTES = 4 << 30
_FRUITLESS_ATTEMPTS = 3
# Weights and pictures come from the same host: one wait for it is enough.
_REMEMBERED_SECONDS = 60.0
_silent_until: dict[str, float] = {}
_PAUSE_SECONDS = 0.5
_PIECE = 1 << 16


@dataclass(frozen=True)
class _Part:
    """What is already here of a file: bytes on disk, and the validator that the server gave for them."""

    path: Path

    @property
    def notes(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self, url: str) -> str | None:
        """Return the ETag or date under which the bytes on disk may be continued, if they came from `url`."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return notes.get("validator") if notes.get("url") == url else None

    def note(self, url: str, answer: requests.Response) -> None:
        etag = answer.headers.get("ETag", "")
        # A weak ETag does not promise identical bytes, so nothing may be appended under it.
        validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        self.notes.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")

    def discard(self) -> None:
        self.notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def fetch(url: str, target: Path, say: Say, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> Path:
    """Download `url` to `target` and return it; a cut download continues where it broke off.

    Bytes go to `<target>.part` and are renamed when they are complete and, with `sha256` (the digest
    in hexadecimal, or its first eight digits or more), verified. A part is continued only under the
    server's own validator (`If-Range`); a server that ignores `Range` starts anew.

    Raises:
        Unavailable: the server could not be reached in time, or has no such file.
        DownloadError: broken off for good, too large, or not the file that was expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two writers would mix their bytes.
    lock = files.try_lock(target.with_name(f".{target.name}.lock"))
    if lock is None:
        raise DownloadError(f"another process is downloading {target}; wait until it is done")
    try:
        part = _Part(target.with_name(target.name + ".part"))
        _complete(url, part, say, max_bytes)
        _verify(url, part, sha256)
        # The part is the draft: written piece by piece over several runs, it is no `write_whole`.
        part.path.replace(target)
        part.notes.unlink(missing_ok=True)
    finally:
        os.close(lock)
    return target


def _complete(url: str, part: _Part, say: Say, max_bytes: int) -> None:
    """Ask until the part is the whole file, or nothing more comes."""
    started, fruitless = False, 0
    while True:
        before = part.size()
        try:
            return _pull(url, part, say, max_bytes)
        except (Unavailable, requests.RequestException) as error:
            if isinstance(error, Unavailable) and not started:
                raise
            fruitless = 0 if part.size() > before else fruitless + 1
            if fruitless == _FRUITLESS_ATTEMPTS:
                raise DownloadError(
                    f"the download of {url} broke off after {part.size()} bytes ({_first_line(error)}); "
                    "run the same command again to continue it"
                ) from error
            say(f"the download broke off after {part.size() / 1e6:.1f} MB; trying to continue")
            time.sleep(_PAUSE_SECONDS * fruitless)
        started = True


def _pull(url: str, part: _Part, say: Say, max_bytes: int) -> None:
    """Ask once, from where the part ends, and append what comes."""
    headers = {"Accept-Encoding": "identity"}
    have, validator = part.size(), part.validator(url)
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with _first_answer(url, headers) as answer:
        if answer.status_code == 416:  # nothing beyond what is here: either all of it, or not of this file
            if answer.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.discard()
            raise requests.ConnectionError(f"the server has fewer than the {have} bytes already here")
        if answer.status_code not in (200, 206):
            raise Unavailable(f"{url} answers {answer.status_code} {answer.reason}; check the address")
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
            part.note(url, answer)
        with part.path.open("ab" if resumed else "wb") as file, progress("download", total, say, "MB", 1e6) as step:
            for piece in answer.iter_content(_PIECE):
                done += len(piece)
                if max(done, total) > max_bytes:
                    part.discard()
                    raise DownloadError(f"{url} is larger than the limit of {max_bytes} bytes; it was not kept")
                file.write(piece)
                step(done)
        if total and done != total:
            raise requests.ConnectionError(f"{total - done} bytes are missing")


def _first_answer(url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer's head within REACH_SECONDS, or give up.

    The time limit of `requests` covers neither the name's resolution nor the number of addresses that
    are tried one after the other, so the wait happens in a thread that may be left behind.
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
        raise Unavailable(f"{url} cannot be reached ({_first_line(answer)})") from answer
    return answer


def _verify(url: str, part: _Part, sha256: str | None) -> None:
    if sha256 is None:
        return
    actual = files.sha256(part.path)
    if not actual.startswith(sha256.lower()):
        part.discard()
        raise DownloadError(
            f"{url} has the sha256 {actual}, expected {sha256.lower()}: the file changed or was damaged on its way; "
            "download it yourself and name it, or correct the checksum"
        )


def _first_line(error: BaseException) -> str:
    """Return the innermost cause in one line: urllib3 wraps it in three layers of addresses."""
    while isinstance(cause := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = cause
    return " ".join(str(error).split())[:160] or type(error).__name__

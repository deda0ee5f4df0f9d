"""Clients of a running server: predictions, and its management API, the same for TorchServe and MMS."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import requests

from beeline.errors import BeelineError, Undetermined
from serve.ports import Address

if TYPE_CHECKING:
    from typing_extensions import Self

    from beeline.answer import Answer

READY = "READY"


class _Http:
    """One keep-alive session to one address."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()
        # The environment's proxy cannot reach this machine's own ports.
        self._session.trust_env = not Address(urlsplit(url).hostname or "", 0).loopback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def request(self, method: str, path: str, timeout: float | None = None, **options: Any) -> requests.Response:
        """Send one request; raise Undetermined if nothing answers there, or not in time.

        A GET or a prediction changes nothing: if the connection breaks, it is sent once more.
        """
        timeout = timeout or self.timeout

        def send() -> requests.Response:
            return self._session.request(method, f"{self.url}{path}", timeout=timeout, **options)

        is_repeatable = method == "GET" or path.startswith("/predictions/")
        if not is_repeatable:
            # A new connection, because the server may just be closing a kept one.
            self._session.close()
        try:
            try:
                return send()
            except requests.ConnectionError as error:
                # Both servers close the connection after every answer of 400 or more. A request that arrives at that
                # moment fails; the second one opens a new connection.
                if not is_repeatable or isinstance(error, requests.Timeout):
                    raise
                return send()
        except requests.Timeout as error:
            raise Undetermined(f"{self.url} did not answer within {timeout:g} s; see `beeline serve logs`") from error
        except requests.ConnectionError as error:
            raise Undetermined(
                f"nothing answers at {self.url}; start a server with `beeline serve up`, or give another URL"
            ) from error
        except requests.RequestException as error:
            raise Undetermined(f"{self.url} cannot be asked ({error}); give a URL like http://HOST:PORT") from error


class InferenceClient(_Http):
    """Asks a server, or its gateway, for predictions; each thread needs its own client.

    After 429, or 503 with Retry-After, it waits as long as the answer says and asks again, for `patience` seconds from
    the first refusal. Then a refusal is the answer, until the server accepts a picture again. One request may take
    `timeout` seconds.
    """

    def __init__(self, url: str, timeout: float = 120.0, patience: float = 60.0) -> None:
        super().__init__(url, timeout)
        self.patience = patience
        self._refused: float | None = None

    def predict(self, model: str, data: bytes, version: str | None = None) -> Answer:
        """Send one picture's bytes; return the last answer, whatever its status is. Raise Undetermined as `request`."""
        path = f"/predictions/{quote(model)}" + (f"/{quote(version)}" if version else "")
        # It needs numpy, which is not in the gateway's image.
        from beeline.answer import Answer

        while True:
            response = self.request("POST", path, data=data, headers={"Content-Type": "application/octet-stream"})
            pause = self._pause(response)
            if pause is None:
                return Answer(response.status_code, response.reason or "", response.text, dict(response.headers))
            time.sleep(pause)

    def served(self) -> list[str] | None:
        """Return the names of the models that the gateway serves; None if it has no catalog. Raise as `request`."""
        response = self.request("GET", "/catalog.json")
        try:
            return sorted({str(model["name"]) for model in response.json()["models"]}) if response.ok else None
        except (ValueError, KeyError, TypeError):
            return None

    def unready(self) -> str | None:
        """Return why the gateway refuses predictions, as it says at /ping; None if it is ready."""
        try:
            response = self.request("GET", "/ping")
            return None if response.status_code == 200 else str(response.json()["reason"])
        except (Undetermined, ValueError, KeyError, TypeError) as error:
            return f"the gateway does not answer: {error}"

    def _pause(self, response: requests.Response) -> float | None:
        """Return how many seconds to wait before the next try; None if this is the answer."""
        after = response.headers.get("Retry-After")
        if response.status_code != 429 and (response.status_code != 503 or after is None):
            self._refused = None
            return None
        now = time.monotonic()
        self._refused = now if self._refused is None else self._refused
        # HTTP also allows a date; the gateway never sends one. It is a second then, and never over ten.
        seconds = min(float(after), 10.0) if after is not None and after.strip().isdecimal() else 1.0
        # A random part, so that clients that were refused together do not come back together.
        seconds += random.uniform(0, max(seconds, 1.0) / 2)
        return seconds if now + seconds - self._refused <= self.patience else None


@dataclass(frozen=True)
class WorkerStatus:
    """One worker as the server describes it; MMS gives no `pid`."""

    id: str
    status: str
    pid: int | None = None


@dataclass(frozen=True)
class Model:
    """One version of a model as the server describes it; `max_batch_delay` in milliseconds."""

    name: str
    version: str
    min_workers: int
    max_workers: int
    batch_size: int
    max_batch_delay: int
    workers: tuple[WorkerStatus, ...]

    @property
    def ready(self) -> int:
        """How many workers are READY."""
        return sum(worker.status == READY for worker in self.workers)


class ManagementClient(_Http):
    """Commands a server through its management API."""

    def list(self) -> list[str]:
        """Return the names of the registered models."""
        response = self._ask("GET", "/models", params={"limit": "100"})
        return [str(entry["modelName"]) for entry in response.json()["models"]]

    def unready(self) -> str | None:
        """Return why the server cannot be commanded yet; None if it can."""
        try:
            self.list()
        except Undetermined as error:
            return str(error)
        return None

    def describe(self, model: str, version: str | None = None) -> Model | None:
        """Return a model, in its default version unless one is given; None if it is not registered."""
        path = f"/models/{quote(model)}" + (f"/{quote(version)}" if version else "")
        response = self.request("GET", path)
        if response.status_code == 404:
            return None
        return parse_describe(_json(response))

    def scale(self, model: str, low: int, high: int, wait: float | None = None) -> int:
        """Ask for `low` to `high` workers; return the status at once, or after at most `wait` seconds.

        MMS answers a request that waits 200 if so many run, else 210. Raise BeelineError with the server's message.
        """
        query = {"min_worker": str(low), "max_worker": str(high), "synchronous": "false" if wait is None else "true"}
        return self._ask("PUT", f"/models/{quote(model)}", timeout=wait, params=query).status_code

    def register(self, parameters: dict[str, str | int], timeout: float) -> None:
        """Register a model and wait for its workers; raise BeelineError with the server's message if it fails."""
        self._ask("POST", "/models", timeout=timeout, params={**parameters, "synchronous": "true"})

    def unregister(self, model: str, timeout: float) -> None:
        """Remove a model and its workers."""
        self._ask("DELETE", f"/models/{quote(model)}", timeout=timeout)

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        response = self.request(method, path, **options)
        values = _json(response)
        if response.status_code >= 400:
            raise BeelineError(
                f"{method} {response.url} is answered {response.status_code}: {values.get('message', values)}; "
                "see `beeline serve logs`"
            )
        return response


def parse_describe(values: Any) -> Model:
    """Read a DESCRIBE of one version: TorchServe's is a list with one object, MMS's the object; else Undetermined."""
    try:
        (entry,) = values if isinstance(values, list) else [values]
        return Model(
            name=str(entry["modelName"]),
            version=str(entry.get("modelVersion", "")),
            # Of TorchServe's -1 while a model waits for its turn to start.
            min_workers=max(0, int(entry["minWorkers"])),
            max_workers=int(entry["maxWorkers"]),
            batch_size=int(entry["batchSize"]),
            max_batch_delay=int(entry["maxBatchDelay"]),
            workers=tuple(
                WorkerStatus(str(each["id"]), str(each["status"]), each["pid"] if each.get("pid", -1) > 0 else None)
                for each in entry.get("workers", [])
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Undetermined(f"the server describes a model in an unknown form: {values!r}") from error


def _json(response: requests.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise Undetermined(
            f"{response.url} answers {response.status_code} without JSON; is that a management address?"
        ) from error

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
# Seconds to wait where a refusal names no time, and the longest wait whatever it names.
_PAUSE, _LONGEST_PAUSE = 1.0, 10.0


class _Http:
    """One keep-alive session to one address."""

    def __init__(self, url: str, timeout: float) -> None:
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
        """Send one request; where the connection breaks, a GET or a prediction, which change nothing, is sent again.

        Raises:
            Undetermined: when nothing answers there, or not in time.
        """
        timeout = timeout or self.timeout
        is_repeatable = method == "GET" or path.startswith("/predictions/")
        if not is_repeatable:
            # A new connection: the server may be closing a kept one at this moment.
            self._session.close()
        try:
            try:
                return self._session.request(method, f"{self.url}{path}", timeout=timeout, **options)
            except requests.ConnectionError as error:
                # Both servers close the connection after every answer of 400 or more; a request that is sent at that
                # moment fails, and another one opens a new connection.
                if not is_repeatable or isinstance(error, requests.Timeout):
                    raise
                return self._session.request(method, f"{self.url}{path}", timeout=timeout, **options)
        except requests.Timeout as error:
            raise Undetermined(f"{self.url} did not answer within {timeout:g} s; see `beeline serve logs`") from error
        except requests.ConnectionError as error:
            raise Undetermined(
                f"nothing answers at {self.url}; start a server with `beeline serve up`, or give another URL"
            ) from error
        except requests.RequestException as error:
            raise Undetermined(f"{self.url} cannot be asked ({error}); give a URL like http://HOST:PORT") from error


class InferenceClient(_Http):
    """Asks a server, or its gateway, for predictions; each thread needs a client of its own.

    After 429, or 503 with Retry-After, it waits for as long as the answer says and asks again.

    Args:
        url: the server's address.
        timeout: seconds that one request may take.
        patience: seconds for which it asks again, counted from the first refusal. Then a refusal is the answer, until
            the server takes a picture again.
    """

    def __init__(self, url: str, timeout: float = 120.0, patience: float = 60.0) -> None:
        super().__init__(url, timeout)
        self.patience = patience
        self._refused: float | None = None

    def predict(self, model: str, data: bytes, version: str | None = None) -> Answer:
        """Send one picture's bytes; return the last answer, whatever its status is.

        Raises:
            Undetermined: when nothing answers.
        """
        path = f"/predictions/{quote(model)}" + (f"/{quote(version)}" if version else "")
        # It needs numpy, which the gateway's image does not have.
        from beeline.answer import Answer

        while True:
            response = self.request("POST", path, data=data, headers={"Content-Type": "application/octet-stream"})
            pause = self._pause(response)
            if pause is None:
                return Answer(response.status_code, response.reason or "", response.text, dict(response.headers))
            time.sleep(pause)

    def served(self) -> list[str] | None:
        """Return the names of the models that the gateway serves; None where there is no catalog.

        Raises:
            Undetermined: when nothing answers.
        """
        response = self.request("GET", "/catalog.json")
        try:
            return sorted({str(model["name"]) for model in response.json()["models"]}) if response.ok else None
        except (ValueError, KeyError, TypeError):
            return None

    def _pause(self, response: requests.Response) -> float | None:
        """Return how many seconds to wait before asking again; None when this is the answer."""
        after = response.headers.get("Retry-After")
        if response.status_code != 429 and (response.status_code != 503 or after is None):
            self._refused = None
            return None
        if self.patience <= 0:
            return None
        now = time.monotonic()
        self._refused = now if self._refused is None else self._refused
        # HTTP also allows a date, which the gateway never sends.
        seconds = float(after) if after is not None and after.strip().isdecimal() else _PAUSE
        seconds = min(seconds, _LONGEST_PAUSE)
        # Clients that were refused together must not come back together.
        seconds += random.uniform(0, max(seconds, _PAUSE) / 2)
        return seconds if now + seconds - self._refused <= self.patience else None


@dataclass(frozen=True)
class WorkerStatus:
    """One worker as the server describes it; `pid` is None where it does not say (MMS)."""

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

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        super().__init__(url, timeout)

    def list(self) -> list[str]:
        """Return the names of the registered models."""
        return [str(entry["modelName"]) for entry in self._ask("GET", "/models", params={"limit": "100"})["models"]]

    def describe(self, model: str, version: str | None = None) -> Model | None:
        """Return one model, the default version without `version`; None when it is not registered."""
        path = f"/models/{quote(model)}" + (f"/{quote(version)}" if version else "")
        response = self.request("GET", path)
        if response.status_code == 404:
            return None
        return parse_describe(_json(response))

    def scale(self, model: str, low: int, high: int, wait: float | None = None) -> int:
        """Ask for `low` to `high` workers; return the status at once, or after `wait` seconds at most.

        MMS's answer to a request that waits says whether so many run: 200 or 210.

        Raises:
            BeelineError: with the server's own message when it cannot.
        """
        query = {"min_worker": str(low), "max_worker": str(high), "synchronous": "false" if wait is None else "true"}
        response = self.request("PUT", f"/models/{quote(model)}", timeout=wait, params=query)
        self._check(response)
        return response.status_code

    def register(self, parameters: dict[str, str | int], timeout: float) -> None:
        """Register a model and wait for its workers, at most `timeout` seconds.

        Raises:
            BeelineError: with the server's own message when it does not.
        """
        self._ask("POST", "/models", timeout=timeout, params={**parameters, "synchronous": "true"})

    def unregister(self, model: str, timeout: float) -> None:
        """Remove a model and its workers."""
        self._ask("DELETE", f"/models/{quote(model)}", timeout=timeout)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        return self._check(self.request(method, path, **options))

    def _check(self, response: requests.Response) -> Any:
        values = _json(response)
        if response.status_code >= 400:
            raise BeelineError(
                f"{response.request.method} {response.url} is answered {response.status_code}: "
                f"{values.get('message', values)}; see `beeline serve logs`"
            )
        return values


def parse_describe(values: Any) -> Model:
    """Read a DESCRIBE of one version: TorchServe answers a list with one object, MMS the object itself.

    Raises:
        Undetermined: when it is neither.
    """
    try:
        (entry,) = values if isinstance(values, list) else [values]
        return Model(
            name=str(entry["modelName"]),
            version=str(entry.get("modelVersion", "")),
            min_workers=int(entry["minWorkers"]),
            max_workers=int(entry["maxWorkers"]),
            batch_size=int(entry["batchSize"]),
            max_batch_delay=int(entry["maxBatchDelay"]),
            workers=tuple(
                WorkerStatus(
                    str(worker["id"]), str(worker["status"]), worker["pid"] if worker.get("pid", -1) > 0 else None
                )
                for worker in entry.get("workers", [])
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

"""The contexts that a handler gets where no server brings one: in a sandbox, on LitServe and on Triton.

They have the methods and arguments of `ts/context.py` (TorchServe 0.12) and `mms/context.py` (Multi Model Server 1.1);
tests compare them. Standard library only, like `archive.sandbox_worker`.
"""
# ruff: noqa: D102 - both servers document these methods

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VERSION = "fake, by beeline archive"


class FakeRequest:
    """One request: its headers, and the status and the headers of the answer."""

    def __init__(self, request_header: dict[str, Any]) -> None:
        self._status_code = 200
        self._reason_phrase: str | None = None
        self._response_header: dict[str, str] = {}
        self._request_header = request_header

    def get_request_property(self, key: str) -> Any:
        return self._request_header.get(key)

    def get_request_properties(self) -> dict[str, Any]:
        return self._request_header

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        self._status_code = code
        self._reason_phrase = reason_phrase

    def get_response_status_code(self) -> int:
        return self._status_code

    def get_response_status_phrase(self) -> str | None:
        return self._reason_phrase

    def add_response_property(self, key: str, value: str) -> None:
        self._response_header[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response_header

    def get_response_header(self, key: str) -> str | None:
        return self._response_header.get(key)


class FakeMetrics:
    """Metrics that are not kept: the methods that both servers have."""

    request_ids: dict[int, str] | None = None

    def add_counter(self, name: str, value: float, idx: Any = None, dimensions: Any = None) -> None: ...

    def add_time(self, name: str, value: float, idx: Any = None, unit: str = "ms", dimensions: Any = None) -> None: ...

    def add_size(self, name: str, value: float, idx: Any = None, unit: str = "MB", dimensions: Any = None) -> None: ...

    def add_percent(self, name: str, value: float, idx: Any = None, dimensions: Any = None) -> None: ...

    def add_error(self, name: str, value: Any, dimensions: Any = None) -> None: ...


class FakeContext:
    """Multi Model Server's context; TorchServe's has the same and more."""

    server = "mms"

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: dict[str, Any],
        batch_size: int,
        gpu: int | None,
        mms_version: str = VERSION,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self._system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            "gpu_id": gpu,
            "batch_size": batch_size,
            # The name in both servers.
            "server_name": "MMS",
            "server_version": mms_version,
        }
        self.request_ids: dict[int, str] | None = None
        self._request_processor: list[FakeRequest] | None = None
        self._metrics: FakeMetrics | None = None

    @property
    def system_properties(self) -> dict[str, Any]:
        return self._system_properties

    @property
    def request_processor(self) -> Any:
        return self._request_processor

    @request_processor.setter
    def request_processor(self, request_processor: Any) -> None:
        self._request_processor = request_processor

    @property
    def metrics(self) -> Any:
        """None on Multi Model Server until the first batch."""
        return self._metrics

    @metrics.setter
    def metrics(self, metrics: Any) -> None:
        self._metrics = metrics

    def get_request_id(self, idx: int = 0) -> str | None:
        return None if self.request_ids is None else self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> Any:
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        headers: dict[str, Any] = self.request_processor[idx].get_request_properties()
        return headers

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self.get_response_headers(idx).get("content-type")

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        request = self.request_processor[idx]
        return request.get_response_status_code(), request.get_response_status_phrase()

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        if self.request_processor is not None and self.request_processor[idx] is not None:
            self.request_processor[idx].report_status(code, reason_phrase=phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        for request in self._request_processor or ():
            request.report_status(code, reason_phrase=phrase)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        headers: dict[str, str] = self.request_processor[idx].get_response_headers()
        return headers

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.request_processor[idx].add_response_property(key, value)

    def begin_batch(self, headers: Iterable[dict[str, Any]]) -> None:
        """Set the requests of a batch, as the servers do before they call the handler."""
        self.request_processor = [FakeRequest(dict(header)) for header in headers]
        self.request_ids = {index: f"fake-{index}" for index in range(len(self.request_processor))}
        if self.metrics is None:
            self.metrics = FakeMetrics()
        self.metrics.request_ids = self.request_ids


class FakeTorchServeContext(FakeContext):
    """TorchServe's context, with a model configuration, sequence ids, and metrics from the start."""

    server = "torchserve"

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: dict[str, Any],
        batch_size: int,
        gpu: int | None,
        mms_version: str = VERSION,
        limit_max_image_pixels: bool = True,
        metrics: Any = None,
        model_yaml_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model_name, model_dir, manifest, batch_size, gpu, mms_version)
        self._system_properties["limit_max_image_pixels"] = limit_max_image_pixels
        self.metrics = metrics or FakeMetrics()
        self.model_yaml_config = model_yaml_config or {}
        self.stopping_criteria = None

    def get_sequence_id(self, idx: int) -> Any:
        # There are no sequences here.
        return self.get_request_header(idx, "ts_request_sequence_id")


def new_handler(manifest: dict[str, Any]) -> Any:
    """Import the handler's module, whose folder is on the path, and return an instance of its only class.

    Raise ValueError if it defines more than one, or none.
    """
    name = manifest["model"]["handler"].partition(":")[0]
    module = importlib.import_module(Path(name).stem)
    members: list[Any] = [member for _, member in inspect.getmembers(module, inspect.isclass)]
    classes = [member for member in members if member.__module__ == module.__name__]
    if len(classes) != 1:
        names = ", ".join(each.__name__ for each in classes) or "none"
        raise ValueError(f"{name} defines the classes {names}; the servers want exactly one")
    return classes[0]()


CONTEXTS = {context.server: context for context in (FakeTorchServeContext, FakeContext)}

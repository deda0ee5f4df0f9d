"""How one server takes a picture and gives its labels: request body, headers, path, answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.pictures import Pictures

_BOUNDARY = "beeline-bench-picture"
# Triton's binary form: JSON of a length that the header tells, then the tensor's bytes.
_TRITON_JSON = 256


def _best(answer: dict[str, float]) -> str:
    """Return the most probable label; not every server keeps the order (Flask sorts by name)."""
    return str(max(answer, key=lambda label: float(answer[label])))


@dataclass(frozen=True)
class Wire:
    """One protocol: path, headers, a picture's bytes to a request's body, an answer's JSON to its first label."""

    path: str
    headers: Mapping[str, str]
    encode: Callable[[bytes], bytes]
    label: Callable[[Any], str] = field(default=_best)

    def pictures(self, pictures: Pictures) -> Pictures:
        """Return the pictures as request bodies."""
        return Pictures(pictures.source, pictures.names, tuple(map(self.encode, pictures.bodies)))

    def read(self, body: bytes) -> str:
        """Return an answer's first label.

        Raises:
            ValueError: when the answer has none.
        """
        try:
            return self.label(json.loads(body))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"an answer without a label: {body[:200]!r}") from error


def raw(path: str) -> Wire:
    """The picture itself as the body."""
    return Wire(path, {"Content-Type": "application/octet-stream"}, bytes)


def base64_json(path: str, key: str) -> Wire:
    """The picture in base64 under a key of a JSON object."""

    def encode(data: bytes) -> bytes:
        return json.dumps({key: base64.b64encode(data).decode()}).encode()

    return Wire(path, {"Content-Type": "application/json"}, encode)


def form(path: str, name: str, in_list: bool = False) -> Wire:
    """The picture as a browser uploads a file; `in_list` where the answer is a list of one."""
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="picture.jpg"'
    head = f"--{_BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n".encode()
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    return Wire(path, headers, lambda data: head + data + tail, (lambda answer: _best(answer[0])) if in_list else _best)


def triton(model: str) -> Wire:
    """KServe's second protocol with Triton's binary extension, as Triton's own client speaks it."""

    def encode(data: bytes) -> bytes:
        tensor = len(data).to_bytes(4, "little") + data
        size = {"binary_data_size": len(tensor)}
        inputs = [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": size}]
        return json.dumps({"inputs": inputs}).encode().ljust(_TRITON_JSON) + tensor

    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(_TRITON_JSON)}
    return Wire(f"/v2/models/{model}/infer", headers, encode, lambda answer: str(answer["outputs"][0]["data"][0]))

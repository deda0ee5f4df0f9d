"""The adapter: what nginx cannot answer: pictures by URL, the KServe protocols, and keeping what was answered wrongly.

Run by the gateway as `python -m serve.gateway.adapter FOLDER SOCKET`, where FOLDER is its runtime folder and SOCKET the
number of the open socket on which nginx passes such requests. Predictions go back to nginx, on a socket of its own in
FOLDER, so that its queue, its deadline and its answers hold for them. The plain API never comes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from yarl import URL

from host.files import is_hidden, write_whole
from serve.gateway.runtime import ERRORS, GATEWAY_SOCKET
from serve.gateway.settings import Settings
from serve.gateway.urls import Fetcher, Refused

logger = logging.getLogger("adapter")
# A longer body is no URL's. Of more brackets and commas, JSON would become gigabytes.
_SHORT, _MARKS = 10_000, 2_000
# Bytes of bodies and fetched pictures that are held at a time; pictures of one request, and those asked for at a time.
_HELD, _MOST, _TOGETHER = 256_000_000, 128, 16
# Of the gateway's answer, for the client; nginx adds its own to all answers.
_PASSED = ("Content-Type", "X-Batch-Size", "Server-Timing")
_HEAD = "Inference-Header-Content-Length"
_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"
_V1 = f"/v1/models/{{model:{_NAME}}}"
_V2 = f"/v2/models/{{model:{_NAME}}}{{version:(/versions/{_NAME})?}}"
_SERVER = {"name": "beeline", "version": "0.1.0", "extensions": ["binary_tensor_data"]}
_OUTPUTS = {"answer": "BYTES", "status": "INT32"}
# A label is the name of a folder. A file takes a block of the disk at least.
_LABEL, _BLOCK = re.compile(r"\w[^/]{0,99}"), 4096
# A browser on this machine: nginx's $remote_addr and $host; a site whose name leads here has another host.
_HERE = re.compile(r"(127\.\S*|::1) (localhost|127\.0\.0\.1|\[::1\])")
_HELP = 'allowed: {"instances": [{"b64": "<base64>"}]}, or in version 2 one input of BYTES'


class Adapter:
    """The application for one gateway."""

    def __init__(self, settings: Settings, fetcher: Callable[[Settings], Fetcher] = Fetcher) -> None:
        self.settings = settings
        self._new_fetcher = fetcher
        self._free = max(_HELD, 4 * settings.max_body)
        self._keeping = asyncio.Lock()

    def application(self) -> web.Application:
        """Return the application for `aiohttp.web`."""
        application = web.Application(client_max_size=self.settings.max_body, middlewares=[self._guard])
        application.cleanup_ctx.append(self._sessions)
        if self.settings.kserve:
            application.router.add_get("/{what:v1/models|v2|v2/health/live|v2/health/ready}", self._server)
            application.router.add_get(_V1, self._model)
            application.router.add_get(f"{_V2}{{what:(/ready)?}}", self._model)
            application.router.add_post(f"{_V1}:predict", self._predict)
            application.router.add_post(f"{_V2}/infer", self._infer)
        if self.settings.feedback:
            application.router.add_post(f"/feedback/{{model:{_NAME}}}", self._keep)
        if self.settings.url_hosts:
            application.router.add_route("*", "/{path:(?!v[12](/|$)).*}", self._pass)
        return application

    async def _sessions(self, application: web.Application) -> AsyncIterator[None]:
        self._fetcher = self._new_fetcher(self.settings)
        # A new connection for each request: nginx closes kept ones when it likes.
        connector = aiohttp.UnixConnector(GATEWAY_SOCKET, limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self.settings.deadline + 2)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._gateway:
            yield
        await self._fetcher.close()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer errors as the gateway does, and refuse a request for which there is no room."""
        try:
            self._hold(request, request.content_length or 0)
            return await handler(request)
        except Refused as error:
            values = error.values
        except web.HTTPException as error:
            kind, sentence = ERRORS.get(error.status, ERRORS[500])
            values = Refused(error.status, kind, sentence.format(max_image=self.settings.max_image)).values
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            values = Refused(500, *ERRORS[500]).values
        finally:
            self._free += request.get("held", 0)
        # Where clients of KServe look.
        more = {"error": values["message"]} if request.path.startswith(("/v1/", "/v2/")) else {}
        return web.json_response({**values, **more}, status=values["code"])

    def _hold(self, request: web.Request, size: int) -> None:
        """Count more bytes that a request holds until its end."""
        if size > self._free:
            raise Refused(429, *ERRORS[429])
        request["held"], self._free = request.get("held", 0) + size, self._free - size

    async def _fetch(self, request: web.Request, url: object) -> bytes:
        return await self._fetcher.fetch(url, partial(self._hold, request))

    async def _ask(self, client: web.Request, method: str, path: str, body: bytes | None = None) -> web.Response:
        """Send a request to nginx for a client and return its answer, whatever its status is; `path` is encoded."""
        own = {name: client.headers[name] for name in ("Accept", "X-Deadline-Ms") if name in client.headers}
        headers = {"Content-Type": "application/octet-stream", **own}
        try:
            to = URL(f"http://beeline{path}", encoded=True)
            async with self._gateway.request(method, to, data=body, headers=headers, allow_redirects=False) as answer:
                passed = {name: answer.headers[name] for name in _PASSED if name in answer.headers}
                return web.Response(status=answer.status, headers=passed, body=await answer.read())
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.error("nginx does not answer %s %s: %r", method, path, error)
            raise Refused(503, *ERRORS[503]) from error

    async def _pass(self, request: web.Request) -> web.Response:
        """Answer a prediction: of the picture at the URL in its body, else of the body as it is."""
        body = await request.read()
        values = _object(body) if len(body) < _SHORT else {}
        if "url" in values:
            body = await self._fetch(request, values["url"])
        return await self._ask(request, request.method, request.rel_url.raw_path, body)

    async def _keep(self, request: web.Request) -> web.Response:
        """Keep a picture below the folders of its model and of its right label, which the header X-Label has."""
        if token := self.settings.feedback_token:
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            may_tell = hmac.compare_digest(given, f"Bearer {token}".encode())
        else:
            may_tell = _HERE.fullmatch(request.headers.get("X-From", "")) is not None
        if not may_tell:
            raise Refused(403, *ERRORS[403])
        # The header also keeps out other sites' pages in a browser here, which cannot send one of their own.
        body, label = await request.read(), unquote(request.headers.get("X-Label", "")).strip()
        if not (_LABEL.fullmatch(label) and label.isprintable() and len(label.encode()) <= 200) or is_hidden(label):
            allowed = "at most 100 characters in UTF-8, percent-encoded, a letter or digit first, and no /"
            raise Refused(400, "BadLabel", f"X-Label is {label[:100]!r}; allowed: {allowed}")
        from beeline.formats import HEAD, kind_of  # It imports Pillow, which nothing else needs here.

        # A prediction takes base64, JSON and forms too.
        if kind_of(body[:HEAD]) is None:
            raise Refused(415, "NotAnImage", "the body is no picture; send the picture's bytes as they are")
        # It judges the model's name and all of the picture.
        answer = await self._ask(request, "POST", f"/predictions/{request.match_info['model']}", body)
        if answer.status != 200:
            return answer
        async with self._keeping:
            kept = await asyncio.to_thread(self._write, request.match_info["model"], label, body)
        return web.json_response({"label": label, "kept": kept})

    def _write(self, model: str, label: str, body: bytes) -> str:
        """Write a picture into the folder, within its bound; of the same bytes the last label stays."""
        folder, name = Path(self.settings.feedback) / model, hashlib.sha256(body).hexdigest()
        before, held = set(folder.glob(f"*/{name}")), max(_BLOCK, len(body))
        for path in (Path(at, each) for at, _, names in os.walk(folder.parent) for each in names):
            # A person may remove pictures meanwhile.
            with suppress(FileNotFoundError):
                held += 0 if path in before else max(_BLOCK, path.stat().st_size)
        if held > self.settings.feedback_megabytes * 1_000_000:
            most = f"its {self.settings.feedback_megabytes} MB (beeline_feedback_megabytes)"
            raise Refused(507, "FeedbackFull", f"the folder of such pictures has {most}; nothing was kept")
        (folder / label).mkdir(parents=True, exist_ok=True)
        write_whole(folder / label / name, body)
        for path in before:
            if path.parent.name != label:
                path.unlink(missing_ok=True)
                # Others may be in it. Without end, folders of labels would fill the disk too.
                with suppress(OSError):
                    path.parent.rmdir()
        return name

    async def _server(self, request: web.Request) -> web.Response:
        answer, what = await self._ask(request, "GET", "/ping"), request.match_info["what"]
        values = {
            "v1/models": {"models": sorted(_values(answer)["models"])},
            "v2": _SERVER,
            "v2/health/live": {"live": True},
            "v2/health/ready": {"ready": answer.status == 200},
        }
        return web.json_response(values[what], status=answer.status if what.endswith("/ready") else 200)

    async def _model(self, request: web.Request) -> web.Response:
        """Answer whether a model is ready, or which versions and tensors it has."""
        answer, name, version = await self._ask(request, "GET", "/ping"), request.match_info["model"], _version(request)
        known = _values(answer)
        versions = known["models"].get(name, {})
        if not versions or (version and version not in versions):
            raise Refused(404, *ERRORS[404])
        if request.match_info.get("what") == "":
            inputs, *outputs = (
                {"name": tensor, "datatype": kind, "shape": [-1]}
                for tensor, kind in {"picture": "BYTES", **_OUTPUTS}.items()
            )
            values = {"name": name, "versions": sorted(versions), "platform": "beeline"}
            return web.json_response({**values, "inputs": [inputs], "outputs": outputs})
        is_ready = answer.status == 200 and f"{name}@{version}" not in known.get("closed", ())
        return web.json_response({"name": name, "ready": is_ready}, status=200 if is_ready else 503)

    async def _predict(self, request: web.Request) -> web.Response:
        """Answer version 1: one prediction an instance, or its error in its place."""
        judged = await self._judge(request, _object(await request.read()).get("instances"))
        return web.json_response({"predictions": [value for _, value in judged]})

    async def _infer(self, request: web.Request) -> web.Response:
        """Answer version 2: two tensors with an element for each picture, its answer in JSON and its status."""
        body = await request.read()
        try:
            head = int(request.headers.get(_HEAD, len(body)))
            values = _object(body[:head])
            (tensor,) = values["inputs"]
            size = tensor.get("parameters", {}).get("binary_data_size")
            pictures = tensor["data"] if size is None else _split(body[head : head + size])
            default = values.get("parameters", {}).get("binary_data_output", False)
            outputs = values.get("outputs") or [{"name": name} for name in _OUTPUTS]
            binary = {each["name"]: each.get("parameters", {}).get("binary_data", default) for each in outputs}
            if tensor["datatype"] != "BYTES" or not binary.keys() <= _OUTPUTS.keys():
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise Refused(400, "BadEncoding", f"the body is no request of version 2; {_HELP}") from error
        judged = await self._judge(request, pictures)
        texts, count, tensors, raw = [json.dumps(value) for _, value in judged], len(judged), [], b""
        for name, is_binary in binary.items():
            data: list[Any] = texts if name == "answer" else [status for status, _ in judged]
            # JSON is ASCII.
            parts = [struct.pack("<i", each if name == "status" else len(each)) for each in data]
            more = b"".join(parts if name == "status" else (a + b.encode() for a, b in zip(parts, data, strict=True)))
            form = {"parameters": {"binary_data_size": len(more)}} if is_binary else {"data": data}
            tensors.append({"name": name, "datatype": _OUTPUTS[name], "shape": [count], **form})
            raw += more if is_binary else b""
        names = {"model_name": request.match_info["model"], "model_version": _version(request), "id": values.get("id")}
        text = json.dumps({**{key: name for key, name in names.items() if name}, "outputs": tensors}).encode()
        headers = {_HEAD: str(len(text))} if raw else {}
        return web.Response(
            body=text + raw, headers=headers, content_type=f"application/{'octet-stream' if raw else 'json'}"
        )

    async def _judge(self, request: web.Request, pictures: object) -> list[tuple[int, Any]]:
        """Return the status and the answer of each picture, each asked for alone; raise the first error if all fail."""
        if not isinstance(pictures, list) or not 1 <= len(pictures) <= _MOST:
            count = len(pictures) if isinstance(pictures, list) else "no list"
            raise Refused(400, "BadEncoding", f"the request holds {count}, and not 1 to {_MOST} pictures; {_HELP}")
        gate, version, name = asyncio.Semaphore(_TOGETHER), _version(request), request.match_info["model"]

        async def one(picture: object) -> tuple[int, Any]:
            try:
                async with gate:
                    if isinstance(picture, dict) and "url" in picture and self.settings.url_hosts:
                        picture = await self._fetch(request, picture["url"])
                    if not isinstance(picture, bytes):
                        picture = json.dumps(picture if isinstance(picture, dict) else {"b64": picture}).encode()
                    path = f"/predictions/{name}/{version}".rstrip("/")
                    answer = await self._ask(request, "POST", path, picture)
                    return answer.status, _values(answer)
            except Refused as error:
                return error.values["code"], error.values

        judged = await asyncio.gather(*map(one, pictures))
        if all(status != 200 for status, _ in judged):
            status, first = judged[0]
            values = first if isinstance(first, dict) else {}
            raise Refused(status, str(values.get("type")), str(values.get("message", first)))
        return judged


def _object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is, an empty one if it is none."""
    try:
        values = json.loads(body) if sum(map(body.count, (b"{", b"[", b","))) < _MARKS else None
    except (ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {}


def _values(answer: web.Response) -> Any:
    """Return the JSON of an answer; of a handler that answers another form, the text."""
    assert isinstance(answer.body, bytes)
    try:
        return json.loads(answer.body)
    except ValueError:
        return answer.body.decode(errors="replace")


def _version(request: web.Request) -> str:
    return request.match_info.get("version", "").removeprefix("/versions/")


def _split(raw: bytes) -> list[bytes]:
    """Return the elements of a tensor of BYTES: each follows its length."""
    elements, start = list[bytes](), 0
    while start < len(raw) and len(elements) <= _MOST:
        (size,) = struct.unpack_from("<I", raw, start)
        elements.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return elements


def main(arguments: list[str], **options: Any) -> None:
    """Answer on the socket until SIGTERM, then what is under way; `options` are those of `Adapter`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    settings = Settings.load(Path(arguments[0]))
    # A socket's path has at most 108 characters; nginx is started here too.
    os.chdir(settings.folder)
    application, listening = Adapter(settings, **options).application(), socket.socket(fileno=int(arguments[1]))
    web.run_app(application, sock=listening, print=None, access_log=None, shutdown_timeout=settings.stop)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The adapter: what nginx cannot answer, namely pictures by URL and the KServe protocols.

Run by the gateway as `python -m serve.gateway.adapter FOLDER SOCKET`, where FOLDER is its runtime folder and SOCKET the
number of the open socket on which nginx passes such requests. Predictions go back to nginx, on a socket of its own in
FOLDER, so that its queue, its deadline and its answers hold for them. The plain API never comes here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

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
_INPUTS = [{"name": "picture", "datatype": "BYTES", "shape": [-1]}]
_OUTPUTS = {"answer": "BYTES", "status": "INT32"}
_HELP = 'allowed: {"instances": [{"b64": "<base64>"}]}, or of version 2 one input of BYTES'


class Adapter:
    """The application for one gateway."""

    def __init__(self, settings: Settings, fetcher: Callable[[Settings], Fetcher] = Fetcher) -> None:
        self.settings = settings
        self._new_fetcher = fetcher
        self._free = max(_HELD, 4 * settings.max_body)

    def application(self) -> web.Application:
        """Return the application for `aiohttp.web`."""
        application = web.Application(client_max_size=self.settings.max_body, middlewares=[self._guard])
        application.cleanup_ctx.append(self._sessions)
        if self.settings.kserve:
            application.router.add_get("/v1/models", self.models)
            application.router.add_get(_V1, self.ready)
            application.router.add_post(f"{_V1}:predict", self.predict)
            application.router.add_get("/v2{what:(/health/(live|ready))?}", self.health)
            application.router.add_get(_V2, self.metadata)
            application.router.add_get(f"{_V2}/ready", self.ready)
            application.router.add_post(f"{_V2}/infer", self.infer)
        if self.settings.url_hosts:
            application.router.add_route("*", "/{path:(?!v[12](/|$)).*}", self.pass_on)
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
            with self._share() as request["hold"]:
                request["hold"](request.content_length or 0)
                return await handler(request)
        except Refused as error:
            refused = error
        except web.HTTPException as error:
            kind, sentence = ERRORS.get(error.status, ERRORS[500])
            refused = Refused(error.status, kind, sentence.format(max_image=self.settings.max_image))
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            refused = Refused(500, *ERRORS[500])
        values = dict(refused.values)
        if request.path.startswith(("/v1/", "/v2/")):
            # Where its clients look.
            values["error"] = values["message"]
        return web.json_response(values, status=refused.status)

    @contextmanager
    def _share(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of one request among those that are held; at its end they are free again."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if size > self._free:
                raise Refused(429, *ERRORS[429])
            held, self._free = held + size, self._free - size

        try:
            yield hold
        finally:
            self._free += held

    async def _ask(self, method: str, path: str, body: bytes | None = None, accept: str = "*/*") -> web.Response:
        """Send a request to nginx and return its answer, whatever its status is; `path` is encoded."""
        headers = {"Content-Type": "application/octet-stream", "Accept": accept}
        try:
            to = URL(f"http://beeline{path}", encoded=True)
            async with self._gateway.request(method, to, data=body, headers=headers, allow_redirects=False) as answer:
                passed = {name: answer.headers[name] for name in _PASSED if name in answer.headers}
                return web.Response(status=answer.status, headers=passed, body=await answer.read())
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.error("nginx does not answer %s %s: %r", method, path, error)
            raise Refused(503, *ERRORS[503]) from error

    async def pass_on(self, request: web.Request) -> web.Response:
        """Answer a prediction: of the picture at the URL in its body, else of the body as it is."""
        body = await request.read()
        values = _object(body) if len(body) < _SHORT else None
        if values and "url" in values:
            body = await self._fetcher.fetch(values["url"], request["hold"])
        return await self._ask(request.method, request.rel_url.raw_path, body, request.headers.get("Accept", "*/*"))

    async def models(self, request: web.Request) -> web.Response:
        """Answer the names of the models."""
        return web.json_response({"models": sorted(_values(await self._ask("GET", "/ping"))["models"])})

    async def health(self, request: web.Request) -> web.Response:
        """Answer whether the gateway runs, whether a model is ready, or what this server is."""
        what = request.match_info["what"].removeprefix("/health/")
        if not what:
            return web.json_response({"name": "beeline", "version": "0.1.0", "extensions": ["binary_tensor_data"]})
        status = 200 if what == "live" else (await self._ask("GET", "/ping")).status
        return web.json_response({what: status == 200}, status=status)

    async def ready(self, request: web.Request) -> web.Response:
        """Answer whether a model is ready: 200 or 503."""
        _, is_ready = await self._state(request)
        values = {"name": request.match_info["model"], "ready": is_ready}
        return web.json_response(values, status=200 if is_ready else 503)

    async def metadata(self, request: web.Request) -> web.Response:
        """Answer the versions and the tensors of a model."""
        versions, _ = await self._state(request)
        outputs = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in _OUTPUTS.items()]
        values = {"name": request.match_info["model"], "versions": sorted(versions), "platform": "beeline"}
        return web.json_response({**values, "inputs": _INPUTS, "outputs": outputs})

    async def _state(self, request: web.Request) -> tuple[Mapping[str, Any], bool]:
        """Return the versions of the model in the path, and whether it takes pictures; raise Refused for another."""
        answer = await self._ask("GET", "/ping")
        values, model, version = _values(answer), request.match_info["model"], _version(request)
        versions = values["models"].get(model, {})
        if not versions or (version and version not in versions):
            raise Refused(404, *ERRORS[404])
        return versions, answer.status == 200 and f"{model}@{version}" not in values.get("closed", ())

    async def predict(self, request: web.Request) -> web.Response:
        """Answer version 1: one prediction an instance, or its error in its place."""
        instances = (_object(await request.read()) or {}).get("instances")
        judged = await self._judge(request, instances)
        return web.json_response({"predictions": [value for _, value in judged]})

    async def infer(self, request: web.Request) -> web.Response:
        """Answer version 2: two tensors with an element for each picture, its answer in JSON and its status."""
        body = await request.read()
        try:
            head = int(request.headers.get(_HEAD, len(body)))
            values = _object(body[:head]) or {}
            (tensor,) = values["inputs"]
            size = tensor.get("parameters", {}).get("binary_data_size")
            pictures = tensor["data"] if size is None else _split(body[head : head + size])
            outputs = values.get("outputs") or [{"name": name} for name in _OUTPUTS]
            wanted = {each["name"]: each.get("parameters", {}).get("binary_data") for each in outputs}
            if tensor["datatype"] != "BYTES" or not wanted.keys() <= _OUTPUTS.keys():
                raise ValueError
            everything = values.get("parameters", {}).get("binary_data_output", False)
        except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise Refused(400, "BadEncoding", f"the body is no request of version 2; {_HELP}") from error
        judged = await self._judge(request, pictures)
        answers = [json.dumps(value) for _, value in judged]
        data: dict[str, list[Any]] = {"answer": answers, "status": [status for status, _ in judged]}
        tensors, raw = [], b""
        for name, is_binary in wanted.items():
            out: dict[str, Any] = {"name": name, "datatype": _OUTPUTS[name], "shape": [len(judged)]}
            if everything if is_binary is None else is_binary:
                more = _joined(answers) if name == "answer" else struct.pack(f"<{len(judged)}i", *data[name])
                tensors.append({**out, "parameters": {"binary_data_size": len(more)}})
                raw += more
            else:
                tensors.append({**out, "data": data[name]})
        names = {"model_name": request.match_info["model"], "model_version": _version(request), "id": values.get("id")}
        text = json.dumps({**{key: name for key, name in names.items() if name}, "outputs": tensors}).encode()
        headers = {_HEAD: str(len(text)), "Content-Type": "application/octet-stream"} if raw else {}
        return web.Response(body=text + raw, headers=headers or {"Content-Type": "application/json"})

    async def _judge(self, request: web.Request, pictures: object) -> list[tuple[int, Any]]:
        """Return the status and the answer of each picture, each asked for alone; raise the first error if all fail."""
        if not isinstance(pictures, list) or not 1 <= len(pictures) <= _MOST:
            count = len(pictures) if isinstance(pictures, list) else "no list"
            raise Refused(400, "BadEncoding", f"the request holds {count}, and not 1 to {_MOST} pictures; {_HELP}")
        gate, version = asyncio.Semaphore(_TOGETHER), _version(request)
        path = f"/predictions/{request.match_info['model']}" + (f"/{version}" if version else "")

        async def one(picture: object) -> tuple[int, Any]:
            async with gate:
                try:
                    if isinstance(picture, dict) and "url" in picture and self.settings.url_hosts:
                        picture = await self._fetcher.fetch(picture["url"], request["hold"])
                    if not isinstance(picture, bytes):
                        picture = json.dumps(picture if isinstance(picture, dict) else {"b64": picture}).encode()
                    answer = await self._ask("POST", path, picture, request.headers.get("Accept", "*/*"))
                    return answer.status, _values(answer)
                except Refused as error:
                    return error.status, error.values

        judged = await asyncio.gather(*map(one, pictures))
        if all(status != 200 for status, _ in judged):
            status, first = judged[0]
            values = first if isinstance(first, dict) else {}
            raise Refused(status, str(values.get("type")), str(values.get("message", first)))
        return judged


def _object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a body is, None if it is none."""
    try:
        values = json.loads(body) if sum(map(body.count, (b"{", b"[", b","))) < _MARKS else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


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
    elements, start = [], 0
    while start < len(raw) and len(elements) <= _MOST:
        (size,) = struct.unpack_from("<I", raw, start)
        elements.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return elements


def _joined(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(each.encode())) + each.encode() for each in texts)


def main(arguments: list[str], **options: Any) -> None:
    """Answer on the socket until SIGTERM, then what is under way; `options` are those of `Adapter`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    settings = Settings.load(Path(arguments[0]))
    # A socket's path has at most 108 characters; nginx is started here too.
    os.chdir(settings.folder)
    listening = socket.socket(fileno=int(arguments[1]))
    application = Adapter(settings, **options).application()
    web.run_app(application, sock=listening, print=None, access_log=None, shutdown_timeout=settings.stop)


if __name__ == "__main__":
    main(sys.argv[1:])

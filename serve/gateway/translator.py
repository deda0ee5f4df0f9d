"""The process between the gateway and tritonserver, which speaks only its own protocol.

A picture becomes a request `infer`, and its outputs the answer with status and headers; management is the part of
TorchServe's API that `serve.client` uses. tritonserver starts again after it died, and so do its workers, which it
leaves dead itself. Run as `python -m serve.gateway.translator FILE TRITONSERVER OPTION...`; `triton.py` writes FILE.
"""

# ruff: noqa: D102 - the handlers are named as what they answer

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from beeline.metrics import identity
from host import processes
from serve import ports
from serve.ports import Address

logger = logging.getLogger("translator")
# Seconds between two looks at the processes, and until what died is started again: doubled each time.
_LOOK, _LONGEST_PAUSE = 0.5, 30.0
# Seconds for the last answers of workers that were replaced.
_GRACE = 2.0
# Of the header with which it calls what tritonserver keeps from others.
_TOKEN = "beeline-token"
_OUTPUTS, _LENGTH = [{"name": "answer"}, {"name": "http"}], "Inference-Header-Content-Length"
_COUNT = re.compile(r"(?m)^  count: \d+$")


class Translator:
    """One tritonserver and its models; `plan` is the file, `command` starts tritonserver."""

    def __init__(self, plan: dict[str, Any], command: list[str]) -> None:
        self.plan, self.command = plan, command
        self.models: dict[str, dict[str, Any]] = plan["models"]
        self.repository = Path.cwd() / "repository"
        self.locks = {name: asyncio.Lock() for name in self.models}
        # By model: how many workers were asked for, and the process ids of those that have loaded.
        self.asked: dict[str, tuple[int, int]] = dict.fromkeys(self.models, (0, 0))
        self.loaded: dict[str, set[int]] = {name: set() for name in self.models}

    async def run(self) -> None:
        """Serve until a signal; raise SystemExit if tritonserver does not start."""
        predict = [web.route("*", f"/predictions/{{model}}{rest}", self.predict) for rest in ("", "/{version}")]
        manage = [web.get("/models", self.listing), web.get("/models/{model}", self.describe)]
        # Whoever may load a model runs code: any page in a browser here can send a request to this port.
        self.token = secrets.token_urlsafe()
        options: Any = {"connector": TCPConnector(limit=0), "timeout": ClientTimeout(), "headers": {_TOKEN: self.token}}
        async with ClientSession(**options) as self.session:
            await self.start()
            for key, routes in (("api", predict), ("control", [*manage, web.put("/models/{model}", self.scale)])):
                app = web.Application(client_max_size=self.plan["max_request_size"])
                app.add_routes(routes)
                runner = web.AppRunner(app, access_log=None, handle_signals=True)
                await runner.setup()
                await web.TCPSite(runner, *self.plan[key], backlog=1024).start()
            try:
                await self.keep()
            finally:
                with suppress(ProcessLookupError):
                    self.process.terminate()
                await self.process.wait()
                self.sweep()

    async def start(self) -> None:
        """Start tritonserver and wait until it answers."""
        self.sweep()
        (address,) = ports.settle([(Address("127.0.0.1", 0), "")])
        self.url = str(address)
        closed = f"--http-restricted-api=model-repository,shared-memory,trace,logging:{_TOKEN}={self.token}"
        words = [*self.command, f"--http-port={address.port}", closed]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "limit": 1 << 20}
        ending = processes.ending_with_parent(signal.SIGTERM)
        self.process = await asyncio.create_subprocess_exec(*words, **pipes, preexec_fn=ending)
        self.log = asyncio.create_task(self.copy_log())
        while self.process.returncode is None:
            with suppress(ClientError):
                if (await self.session.get(f"{self.url}/v2/health/live")).status == 200:
                    return
            await asyncio.sleep(0.05)
        raise SystemExit(f"tritonserver ended at its start ({self.process.returncode}); see worker.log")

    def sweep(self) -> None:
        """Remove what a tritonserver that was killed leaves: workers and shared memory."""
        processes.stop_marked("", "-", grace=0.0, folder=self.repository)
        for path in Path("/dev/shm").glob(f"{self.repository.parent.name}*"):
            path.unlink(missing_ok=True)

    async def copy_log(self) -> None:
        """Copy what tritonserver and its workers print."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            logger.info("%s", line.decode(errors="replace").rstrip())

    async def keep(self) -> None:
        """Start again what has died: tritonserver, or workers, for which their model is loaded again."""
        pause = _LOOK
        while True:
            await asyncio.sleep(pause)
            has_died = self.process.returncode is not None
            lacking = [
                name
                for name, lock in self.locks.items()
                if self.asked[name][0] and not lock.locked() and (has_died or self.loaded[name] - self.alive(name))
            ]
            pause = min(2 * pause, _LONGEST_PAUSE) if has_died or lacking else _LOOK
            with suppress(SystemExit, ClientError):
                if has_died:
                    logger.error("tritonserver ended (%s); starting it again", self.process.returncode)
                    await self.start()
                await asyncio.gather(*(self.load(name, heal=True) for name in lacking))

    async def load(self, name: str, heal: bool = False) -> str | None:
        """Give a model as many workers as were asked for, all new to `heal`; return Triton's reason if it fails."""
        async with self.locks[name]:
            count, folder = self.asked[name][0], self.repository / name
            old = self.alive(name) if heal else set()
            if heal:
                # Triton loads a model again only if a file has changed.
                (folder / "1" / "model.py").touch()
            config = (folder / "config.pbtxt").read_text("utf-8")
            (folder / "config.pbtxt").write_text(_COUNT.sub(f"  count: {max(1, count)}", config), "utf-8")
            verb = "load" if count else "unload"
            answer = await self.session.post(f"{self.url}/v2/repository/models/{name}/{verb}", json={})
            if answer.status != 200:
                # To heal is tried again, since these workers stay lost; what never loaded is not.
                return str((await answer.json(content_type=None))["error"]).partition("\n")[0]
            if old:
                # Where one worker is dead, Triton never ends the others that it replaces.
                await asyncio.sleep(_GRACE)
                for pid in old:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            # Workers that are replaced first answer what they have.
            for _ in range(600):
                self.loaded[name] = {each.pid for each in processes.marked(folder=folder)}
                if len(self.loaded[name]) <= count:
                    break
                await asyncio.sleep(0.1)
            return None

    def alive(self, name: str) -> set[int]:
        """Return the ids of a model's workers that have loaded and live."""
        return {pid for pid in self.loaded[name] if identity(pid)}

    def named(self, request: web.Request) -> str:
        """Return the model of a path; raise the answer 404 for another one."""
        name = request.match_info["model"]
        if name not in self.models:
            raise web.HTTPNotFound(text=_error(404, f"no model is named {name}").text, content_type="application/json")
        return name

    async def listing(self, request: web.Request) -> web.Response:
        return web.json_response({"models": [{"modelName": name} for name in self.models]})

    async def describe(self, request: web.Request) -> web.Response:
        name = self.named(request)
        low, high = self.asked[name]
        # Those beyond are about to end.
        alive = sorted(self.alive(name))[:high]
        workers: list[dict[str, object]] = [{"id": str(pid), "status": "READY", "pid": pid} for pid in alive]
        workers += [{"id": f"new {number}", "status": "LOADING"} for number in range(low - len(alive))]
        numbers = {"minWorkers": low, "maxWorkers": high, "workers": workers}
        return web.json_response([{"modelName": name, **self.models[name], **numbers}])

    async def scale(self, request: web.Request) -> web.Response:
        name, query = self.named(request), request.query
        low = int(query.get("min_worker", 1))
        self.asked[name] = (low, max(low, int(query.get("max_worker", low))))
        self.loading = asyncio.create_task(self.load(name))
        if query.get("synchronous") != "true":
            return web.json_response({"status": f"{name} gets {low} workers"}, status=202)
        reason = await self.loading
        return _error(500, reason) if reason else web.json_response({"status": f"{name} has {low} workers"})

    async def predict(self, request: web.Request) -> web.Response:
        name, body = self.named(request), await request.read()
        size = {"binary_data_size": len(body) + 4}
        inputs = [{"name": "picture", "shape": [1, 1], "datatype": "BYTES", "parameters": size}]
        # As one text, since Triton has names of its own for parameters, such as `priority`.
        asked = {"inputs": inputs, "outputs": _OUTPUTS, "parameters": {"http": json.dumps(dict(request.headers))}}
        head = json.dumps(asked).encode()
        data, headers = head + len(body).to_bytes(4, "little") + body, {_LENGTH: str(len(head))}
        try:
            answer = await self.session.post(f"{self.url}/v2/models/{name}/infer", data=data, headers=headers)
            # Triton does not call all of its errors JSON.
            values = await answer.json(content_type=None)
        except (ClientError, ValueError):
            return _error(503, "tritonserver has ended and starts again; send it once more")
        if answer.status != 200:
            # Every request is well formed: 400 means that the model has no worker, and 500 that one has died.
            return _error(503 if answer.status == 400 else answer.status, str(values["error"]))
        texts = {output["name"]: output["data"][0] for output in values["outputs"]}
        http, data = json.loads(texts["http"]), texts["answer"].encode()
        return web.Response(body=data, status=http["status"], reason=http["phrase"], headers=http["headers"])


def _error(status: int, message: str) -> web.Response:
    kind = {404: "ModelNotFoundException", 503: "ServiceUnavailableException"}.get(status, "InternalServerException")
    return web.json_response({"code": status, "type": kind, "message": message}, status=status)


def main(file: str, *command: str) -> None:
    """Run the translator that the file describes."""
    plan = json.loads(Path(file).read_text("utf-8"))
    size, files = (int(os.environ[f"BEELINE_LOG_{name}"]) for name in ("MEGABYTES", "FILES"))
    path = Path(os.environ["LOG_LOCATION"], "worker.log")
    handler = RotatingFileHandler(path, maxBytes=size * 1_000_000, backupCount=files)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    asyncio.run(Translator(plan, list(command)).run())


if __name__ == "__main__":
    main(*sys.argv[1:])

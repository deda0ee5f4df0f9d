"""The program of `--server litserve`: LitServe's front end and batches, with an archive's handler in each worker.

LitServe cannot scale, and its monitor leaves a dead worker's requests without an answer if it has several APIs. So this
program starts and watches the workers, and describes them like TorchServe's management API. Its argument is the file of
settings that `serve.servers.litserve` writes. It runs by path, since `sitecustomize` hides this repository.
"""
# ruff: noqa: D102 - LitServe documents these methods

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty
from typing import Any

import uvicorn
import uvloop
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from litserve import LitAPI, LitServer
from litserve.loops import inference_worker
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import LitAPIStatus, LoopResponseType, WorkerSetupStatus

# Not an import, since a worker sees nothing of this repository but this file.
_HANDLERS = Path(__file__).resolve().parents[2] / "archive" / "sandbox_context.py"
# Seconds between two looks at the workers, and of a wait for a request, in which one that was killed still takes one. A
# batch's further requests are waited for in tenths of it.
_LOOK, _WAIT = 0.1, 0.05
# Seconds until a worker is started again that has died before it was ready, doubled each time up to the second.
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class Loop(BatchedLoop):  # type: ignore[misc]
    """LitServe's loop for batches, which does not ask for the first request a thousand times a second.

    A worker that shall end does so between two batches: the manager would give a request to one that ended in a `get`.
    """

    ends = False

    def get_batch_requests(self, lit_api: LitAPI, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        batch: list[Any] = []
        end = 0.0
        while len(batch) < lit_api.max_batch_size:
            if self.ends and not batch:
                sys.exit()
            try:
                wait = min(_WAIT / 10, max(0.0, end - time.monotonic())) if batch else _WAIT
                front, uid, _, payload = request_queue.get(timeout=wait)
            except Empty:
                if not batch or time.monotonic() >= end:
                    break
                continue
            end = end or time.monotonic() + lit_api.batch_timeout
            self.put_response(transport, front, uid, (), LitAPIStatus.START, LoopResponseType.REGULAR)
            batch.append((front, uid, payload))
        return batch, []


class Api(LitAPI):  # type: ignore[misc]
    """One archive: its handler answers a batch, each request with a status and headers of its own."""

    def __init__(self, model: str, version: str, folder: str, batch_size: int, max_batch_delay: int) -> None:
        self.model, self.version, self.folder, self.delay = model, version, folder, max_batch_delay
        # What LitServe calls this API in its workers' states.
        self.name = f"{model}@{version}"
        super().__init__(batch_size, max_batch_delay / 1000, f"/predictions/{self.name}", loop=Loop())

    def setup(self, device: str | None) -> None:
        """Load the handler, the only class of its module, for the GPU of that number."""
        sys.path.insert(0, self.folder)
        manifest = json.loads(Path(self.folder, "MAR-INF", "MANIFEST.json").read_text(encoding="utf-8"))
        shared, gpu = runpy.run_path(str(_HANDLERS)), None if device is None else int(device)
        context = shared["CONTEXTS"]["torchserve"]
        self.context = context(self.model, self.folder, manifest, self.max_batch_size, gpu)
        self.handler = shared["new_handler"](manifest)
        self.handler.initialize(self.context)
        warm = getattr(getattr(self.handler, "engine", None), "warm", None)
        if warm is not None:
            warm(self.max_batch_size)
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self.loop, "ends", True))

    def predict(self, x: list[dict[str, Any]]) -> list[Response]:
        self.context.begin_batch([one["headers"] for one in x])
        bodies = self.handler.handle([{"body": one["body"]} for one in x], self.context)
        answers = []
        for index, body in enumerate(bodies):
            status, headers = self.context.get_response_status(index)[0], self.context.get_response_headers(index)
            answers.append(Response(body if isinstance(body, (str, bytes)) else json.dumps(body), status, headers))
        return answers


def work(log: str, api: Api, *arguments: Any) -> None:
    """Run a worker; its log has the form of TorchServe's."""
    handler = WatchedFileHandler(log)
    text = f"%(asctime)s W-{os.getpid()}-{api.model}_{api.version}-stdout %(message)s"
    handler.setFormatter(logging.Formatter(text, "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("litserve").handlers = [handler]
    inference_worker(api, *arguments)


@dataclass
class Model:
    """One version of a model: how many workers it should have, those that it has by number, and its open requests.

    After a worker's death no other starts before `due`, which was `pause` seconds later.
    """

    api: Api
    low: int = 0
    high: int = 0
    workers: dict[int, SpawnProcess] = field(default_factory=dict)
    held: int = 0
    pause: float = 0.0
    due: float = 0.0


class Server(LitServer):  # type: ignore[misc]
    """All archives, their workers, and their management, which the second address is for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.numbers, self.lost = settings, itertools.count(), set[int]()
        # Workers that were told to end, and when they are killed.
        self.ending: dict[int, tuple[SpawnProcess, float]] = {}
        # When a request was first seen that a worker has begun, by both.
        self.begun: dict[tuple[int, Any], float] = {}
        self.versions = [Model(Api(**one)) for one in settings["models"]]
        # The first version is the default one.
        self.models = {one.api.model: one for one in self.versions[::-1]}
        self.models |= {f"{one.api.model}/{one.api.version}": one for one in self.versions}
        size, apis = settings["max_request_size"], [one.api for one in self.versions]
        super().__init__(apis, accelerator="cpu", timeout=False, max_payload_size=size, disable_openapi_url=True)
        self.app.add_api_route("/predictions/{name:path}", self.predict, methods=["POST", "PUT"])
        self.app.add_api_route("/models", lambda: {"models": [{"modelName": api.model} for api in apis]})
        self.app.add_api_route("/models/{name:path}", self.describe)
        self.app.add_api_route("/models/{name:path}", self.scale, methods=["PUT"])

    def find(self, name: str) -> Model:
        if name not in self.models:
            raise HTTPException(404, f"{name} is not served")
        return self.models[name]

    async def predict(self, name: str, request: Request) -> Response:
        """Answer by LitServe's own handler of requests, which would parse the body as JSON or as a form."""
        model, queue = self.find(name), self.settings["queue"]
        if model.held >= queue:
            return failure("QueueFull", f"{queue} requests wait already; try again")
        model.held += 1
        try:
            payload = {"body": await request.body(), "headers": dict(request.headers)}
            handled = RegularRequestHandler(model.api, self).handle_request(payload, dict)
            answer: Response = await asyncio.wait_for(handled, self.settings["deadline"])
            return answer
        except asyncio.TimeoutError:
            # A worker that was killed in the moment it took the request; nobody else has it.
            return failure("NoAnswer", "no worker has answered in time; try again")
        finally:
            model.held -= 1

    def is_ready(self, model: Model, number: int) -> bool:
        return bool(self.workers_setup_status[f"{model.api.name}_{number}"] == WorkerSetupStatus.READY)

    def states(self, model: Model) -> dict[int, str]:
        """Return the workers' states in TorchServe's words; one that has just died is not yet replaced."""
        living = [number for number, process in model.workers.items() if process.exitcode is None]
        return {number: "READY" if self.is_ready(model, number) else "LOADING" for number in living}

    async def describe(self, name: str) -> list[dict[str, Any]]:
        api, model = self.find(name).api, self.find(name)
        states = self.states(model).items()
        workers = [{"id": str(number), "status": state, "pid": model.workers[number].pid} for number, state in states]
        names = {"modelName": api.model, "modelVersion": api.version}
        numbers = {"minWorkers": model.low, "maxWorkers": model.high, "batchSize": api.max_batch_size}
        return [{**names, **numbers, "maxBatchDelay": api.delay, "workers": workers}]

    async def scale(self, name: str, min_worker: int = 1, max_worker: int = 0, synchronous: bool = False) -> Response:
        """Start or end workers; answer 202 at once, or 200 when it is done, or 206 when a worker has died meanwhile."""
        model = self.find(name)
        model.low, model.high, model.pause, model.due = min_worker, max(min_worker, max_worker), 0.0, 0.0
        for number in list(model.workers)[model.high :]:
            self.end(model, number)
        while synchronous and not model.pause:
            states = list(self.states(model).values())
            if model.low <= states.count("READY") == len(states):
                return JSONResponse({"status": "done"})
            await asyncio.sleep(_LOOK)
        return JSONResponse({"status": "scaling"}, 206 if synchronous else 202)

    def end(self, model: Model, number: int) -> None:
        """Let a worker end after its batch. A look after its end its open requests are answered."""
        process = model.workers.pop(number)
        process.terminate()
        self.ending[number] = process, time.monotonic() + self.settings["deadline"]

    def start(self, model: Model) -> None:
        """Start a worker, in the folder of its archive and for the GPU with the fewest."""
        number, used = next(self.numbers), [one.name for one in model.workers.values()]
        gpu = min(map(str, range(self.settings["gpus"])), key=used.count, default=None)
        states, queue = self.workers_setup_status, self._get_request_queue(model.api.api_path)
        states[f"{model.api.name}_{number}"] = WorkerSetupStatus.STARTING
        # True: it says which requests it has begun.
        arguments = (model.api, gpu, number, queue, self._transport, states, self._callback_runner, True)
        process = multiprocessing.get_context("spawn").Process(None, work, gpu, (self.settings["log"], *arguments))
        before = Path.cwd()
        os.chdir(model.api.folder)
        try:
            process.start()
        finally:
            os.chdir(before)
        model.workers[number] = process

    def look(self) -> None:
        """Replace dead workers, and answer the requests that they had begun."""
        for item in self.response_buffer.values():
            if item.worker_id in self.lost and not item.event.is_set():
                item.response = failure("WorkerDied", "the worker ended before it had answered; try again"), "OK"
                item.event.set()
        now = time.monotonic()
        begun = [(one.worker_id, uid) for uid, one in self.response_buffer.items() if not one.event.is_set()]
        self.begun = {key: self.begun.get(key, now) for key in begun if key[0] is not None}
        silent = {number for (number, _), since in self.begun.items() if now - since > self.settings["silence"]}
        for model in self.versions:
            for number in silent & model.workers.keys():
                model.workers[number].kill()
            for number in [number for number, process in model.workers.items() if process.exitcode is not None]:
                model.pause = 0.0 if self.is_ready(model, number) else min(_LONGEST_PAUSE, 2 * model.pause or _PAUSE)
                model.due = now + model.pause
                self.end(model, number)
            while len(model.workers) < model.low and now >= model.due:
                try:
                    self.start(model)
                except OSError as error:
                    # No memory or no process number now is no reason to end the workers that run.
                    logging.getLogger("litserve").error("a worker of %s does not start: %s", model.api.name, error)
                    model.due = now + _LONGEST_PAUSE
        for number, (process, due) in list(self.ending.items()):
            if process.exitcode is not None:
                del self.ending[number]
                self.lost.add(number)
            elif now > due:
                process.kill()
        log = Path(self.settings["log"])
        if log.exists() and log.stat().st_size > self.settings["log_bytes"]:
            RotatingFileHandler(log, backupCount=self.settings["log_files"], delay=True).doRollover()

    async def serve(self) -> None:
        """Serve until a signal; raise RuntimeError if the process that holds LitServe's queues ends."""
        # Before any worker: its folder must not be an archive's.
        resource_tracker.ensure_running()
        manager = self._init_manager(1)
        self.app.response_queue_id = 0
        # uvicorn raises the signal again when it has ended; this process must first end the others.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        http = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", access_log=False, server_header=False))
        sockets = [socket.create_server(tuple(self.settings[name]), backlog=2048) for name in ("backend", "control")]
        served = asyncio.create_task(http.serve(sockets))
        try:
            while not served.done():
                if not manager._process.is_alive() and not http.should_exit:
                    raise RuntimeError("the process that holds LitServe's queues ended")
                self.look()
                await asyncio.wait([served], timeout=_LOOK)
            await served
        finally:
            ending = [process for process, _ in self.ending.values()]
            for process in (*ending, *(process for model in self.versions for process in model.workers.values())):
                process.kill()
            manager.shutdown()


def failure(kind: str, message: str) -> Response:
    """Return an error in the shape of the servers' own."""
    return JSONResponse({"code": 503, "type": kind, "message": message}, 503)


if __name__ == "__main__":
    uvloop.run(Server(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).serve())

"""VisionHandler: the one class that TorchServe and Multi Model Server load.

It has three stages, each of which a subclass may override: `preprocess`, `inference`, `postprocess`. `handle` joins
them and keeps the contract: it never raises, and returns exactly one answer a request, in order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beeline import engines, formats, golden, tasks
from beeline.answer import Answer, check_answers, failure
from beeline.batch import Batch
from beeline.decoder import Decoder, jpegs_for
from beeline.errors import DeadlineExceeded, ModelError, RequestError
from beeline.metrics import Metrics
from beeline.servers import deadline, header, keep_answers_whole, queue_milliseconds, send, swallows_errors
from beeline.settings import Limits
from beeline.spec import ModelSpec

logger = logging.getLogger(__name__)
About = tuple[str | None, float | None]
_LATE = "its deadline passed before its turn came; try again when the server is less busy, or allow more time"


class VisionHandler:
    """Answers pictures by the archive's task, a batch at a time. A worker has one instance, and one batch at a time."""

    def initialize(self, context: Any) -> None:
        """Load the archive in `context`'s model folder and let it prove itself.

        Raises:
            BeelineError: why this worker must not serve. On MMS, which ignores exceptions here and serves anyway,
                SystemExit with the same text.
        """
        # Both servers parse JSON and text bodies before the handler sees them, and on MMS one unparsable body kills
        # the worker and its batch. The servers read this on each request; `payload.extract` parses itself.
        os.environ["TS_DECODE_INPUT_REQUEST"] = os.environ["MMS_DECODE_INPUT_REQUEST"] = "false"
        try:
            properties = context.system_properties
            self.load(Path(properties["model_dir"]), properties.get("gpu_id"))
            if {"ts.service", "mms.service"} & sys.modules.keys():
                self.engine.warm(int(properties.get("batch_size") or 1))
            if "mms.service" in sys.modules:
                keep_answers_whole()
        except Exception as error:
            logger.error("this worker refuses to serve: %s", error)
            if swallows_errors(context):
                raise SystemExit(str(error)) from error
            raise

    def load(self, folder: Path, gpu_id: int | None = None) -> None:
        """Read the spec, check every file, load the engine and replay the golden pictures.

        Raises:
            BeelineError: naming what is missing, changed or answers differently.
        """
        start = time.perf_counter()
        self.spec = spec = ModelSpec.load(folder)
        self.limits = Limits.from_environment()
        golden.check_files(folder, spec)
        self.engine = engines.load(folder, spec, gpu_id=gpu_id)
        self.task = tasks.of(spec)
        self.task.load(folder, self.engine)
        replayed = golden.replay(folder, spec, self.task.forward)
        choice = self.engine.choice
        jpegs, decoding = jpegs_for(spec.geometry, choice["device"].value, self.limits.max_pixels)
        self.decoder = Decoder(spec.geometry, self.limits, int(choice["threads"].value), jpegs)
        made = {**choice, "decoding": decoding}
        self.metrics = Metrics(spec.name, spec.version, {name: vars(each) for name, each in made.items()})
        ready = f"{spec.name} {spec.version} ({spec.fingerprint()[:12]}) ready in {time.perf_counter() - start:.1f} s"
        reasons = ", ".join(f"{name} {each.value} ({each.reason})" for name, each in made.items())
        logger.info("%s: %d golden pictures agree; %s; Pillow %s", ready, replayed, reasons, formats.pillow_version())

    def preprocess(self, rows: Sequence[object]) -> Batch:
        """Decode each request's row by itself; a row that cannot be decoded becomes a `Failed` with its 4xx."""
        return self.decoder.decode(rows)

    def inference(self, batch: Batch) -> Any:
        """Run the model over the good rows; a classifier's logits are float32 `[len(batch.good), classes]`."""
        return self.task.run(batch)

    def postprocess(self, results: Any, batch: Batch) -> list[Answer]:
        """Turn what `inference` returned into one answer a request, in the batch's order."""
        return batch.scatter(self.task.answers(results, batch), lambda row: failure(row.error))

    def handle(self, data: Sequence[object] | None, context: Any) -> list[str]:
        """Answer a batch with one row a request; called by the server.

        Return one body a request, in order, also after errors; statuses and headers go to `context`.
        """
        rows = list(data or [])
        # Measured first, or the batch's own time would count as the queue's.
        queues = [queue_milliseconds(header(context, i, "x-request-start")) for i in range(len(rows))]
        own = [header(context, i, "x-deadline-ms") for i in range(len(rows))]
        ends = [deadline(*each, self.limits.seconds) for each in zip(queues, own, strict=True)]
        about = [(header(context, i, "accept"), end) for i, end in enumerate(ends)]
        spans: dict[str, float] = {}
        late = [end is not None and time.time() > end for _, end in about]
        timely = [(row, each) for row, each, skip in zip(rows, about, late, strict=True) if not skip]
        computed = iter(self._answer([row for row, _ in timely], [each for _, each in timely], spans))
        answers = [failure(DeadlineExceeded(_LATE)) if skip else next(computed) for skip in late]
        for i, (answer, queue) in enumerate(zip(answers, queues, strict=True)):
            times = {**({} if queue is None else {"queue": queue}), **spans}
            timing = ", ".join(f"{name};dur={milliseconds:.2f}" for name, milliseconds in times.items())
            headers = {"Server-Timing": timing, "X-Batch-Size": str(len(rows))}
            # A user's subclass of Answer may have a constructor of its own.
            answers[i] = Answer(answer.status, answer.phrase, answer.body, {**answer.headers, **headers}, answer.reason)
        self.metrics.count(answers, queues, spans)
        return [send(context, i, answer) for i, answer in enumerate(answers)]

    def _answer(self, rows: list[object], about: list[About], spans: dict[str, float]) -> list[Answer]:
        """Run the three stages; if one raises, answer each request alone, so that only the culprit fails.

        `about` has the `Accept` header and the deadline of each request. The milliseconds of each stage are added to
        `spans`.
        """
        try:
            with _measured(spans, "decode"):
                accepts, ends = (tuple(each) for each in zip(*about, strict=True)) if about else ((), ())
                batch = dataclasses.replace(self.preprocess(rows), accepts=accepts, ends=ends)
            with _measured(spans, "forward"):
                results = self.inference(batch)
            with _measured(spans, "encode"):
                return check_answers(self.postprocess(results, batch), len(rows))
        except Exception as error:
            logger.exception("a batch of %d failed", len(rows))
            self._retire_if_lost(error)
            if len(rows) > 1:
                return [self._answer([row], [each], spans)[0] for row, each in zip(rows, about, strict=True)]
            if not isinstance(error, RequestError):
                kind = type(error).__name__
                error = ModelError(f"the model failed on this picture ({kind}); see the worker's log")
            return [failure(error)]

    def _retire_if_lost(self, error: Exception) -> None:
        """If the CUDA context is lost, end this worker after a second, when its answers have left.

        After an assertion or an illegal access on the device every later call fails, and neither server restarts a
        worker for that. A worker recovers from running out of memory.
        """
        if "CUDA error" in str(error) and "out of memory" not in str(error):
            logger.error("the CUDA context is lost; this worker ends and the server starts another")
            timer = threading.Timer(1.0, os._exit, args=(1,))
            timer.daemon = True
            timer.start()


@contextmanager
def _measured(spans: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        spans[name] = spans.get(name, 0.0) + (time.perf_counter() - start) * 1000

"""Triton's Python backend around the archive's handler; `archive.triton` copies this file beside the unpacked archive.

A call gets the requests of one dynamic batch, and each has one or more pictures. The handler answers all pictures as
one batch. A request fails, as a `TritonError` with the handler's JSON, only if each of its pictures does. A client that
sends its headers, as JSON in the parameter `http`, gets a failure as an answer too: the output `http` has its status.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

# The header in which the scores of one answer travel through the handler.
_SCORES = "x-scores"


class TritonPythonModel:
    """One instance: a handler of its own. Triton knows these methods by their names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the archive as a server does; what the handler raises is Triton's reason why the model is not ready."""
        version = Path(args["model_repository"], args["model_version"])
        folder = version / "archive"
        config, is_gpu = json.loads(args["model_config"]), args["model_instance_kind"] == "GPU"
        if not is_gpu:
            os.environ["BEELINE_DEVICE"] = "cpu"
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        shared = runpy.run_path(str(version / "context.py"))
        self.handler, batch_size = shared["new_handler"](manifest), int(config["max_batch_size"])
        gpu = int(args["model_instance_device_id"]) if is_gpu else None
        self.context = shared["CONTEXTS"]["torchserve"](args["model_name"], str(folder), manifest, batch_size, gpu)
        self.handler.initialize(self.context)
        self._postprocess, self._wants_scores = self.handler.postprocess, False
        self.handler.postprocess = self._with_scores
        self.classes = len(self.handler.spec.labels)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        pictures = [_pictures(request) for request in requests]
        https = [_headers(request) for request in requests]
        self._wants_scores = any("scores" in request.requested_output_names() for request in requests)
        self.context.begin_batch([each or {} for each, many in zip(https, pictures, strict=True) for _ in many])
        rows = [{"body": one} for many in pictures for one in many]
        bodies = iter(enumerate(self.handler.handle(rows, self.context)))
        return [
            self._response([next(bodies) for _ in many], http is not None)
            for many, http in zip(pictures, https, strict=True)
        ]

    def _with_scores(self, logits: Any, batch: Any) -> list[Any]:
        """Let the handler make its answers, and put the probabilities of each into a header of it."""
        answers: list[Any] = self._postprocess(logits, batch)
        if self._wants_scores and batch.good:
            spec = self.handler.spec
            # Older archives have the function in another module, and the oldest one takes no temperature.
            module = sys.modules.get("beeline.classification") or sys.modules["beeline.answer"]
            more = {"temperature": spec.temperature} if getattr(spec, "temperature", None) else {}
            rows = module.probabilities(logits, spec.output, **more).astype("<f4")
            for index, row in zip(batch.good, rows, strict=True):
                headers = {**answers[index].headers, _SCORES: row.tobytes().hex()}
                answers[index] = dataclasses.replace(answers[index], headers=headers)
        return answers

    def _response(self, bodies: list[tuple[int, str]], as_http: bool) -> Any:
        """Make the response of one request of its answers, each with its position in the batch."""
        statuses = [self.context.get_response_status(index) for index, _ in bodies]
        if not as_http and all(status >= 400 for status, _ in statuses):
            code = triton.TritonError.INTERNAL if statuses[0][0] >= 500 else triton.TritonError.INVALID_ARG
            return triton.InferenceResponse(error=triton.TritonError(bodies[0][1], code))
        scores, https = [], []
        for (index, _), (status, phrase) in zip(bodies, statuses, strict=True):
            headers = dict(self.context.get_response_headers(index))
            row = headers.pop(_SCORES, None)
            scores.append(np.frombuffer(bytes.fromhex(row), "<f4") if row else np.full(self.classes, np.nan, "<f4"))
            https.append(json.dumps({"status": status, "phrase": phrase, "headers": headers}))
        outputs = {"answer": _strings([body for _, body in bodies]), "http": _strings(https)}
        # A captioning model has no labels.
        if self.classes:
            outputs["scores"] = np.stack(scores)
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in outputs.items()])


def _headers(request: Any) -> dict[str, str] | None:
    """Return the client's headers, None of one that sends none; what is no object must not fail the others."""
    try:
        values = json.loads(json.loads(request.parameters() or "{}").get("http"))
    except (TypeError, ValueError, RecursionError):
        return None
    return {name: each for name, each in values.items() if isinstance(each, str)} if isinstance(values, dict) else None


def _pictures(request: Any) -> list[bytes]:
    """Return the encoded pictures of a request: BYTES `[n, 1]`, else UINT8 `[n, bytes]`; an empty one without input."""
    tensor = triton.get_input_tensor_by_name(request, "picture")
    if tensor is not None:
        return [bytes(each) for each in tensor.as_numpy().ravel()]
    tensor = triton.get_input_tensor_by_name(request, "bytes")
    return [b""] if tensor is None else [row.tobytes() for row in tensor.as_numpy()]


def _strings(texts: list[str]) -> Any:
    return np.array([[text.encode()] for text in texts], dtype=object)

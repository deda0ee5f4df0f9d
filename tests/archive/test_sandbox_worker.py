"""The contexts that a handler gets are TorchServe's own and one like Multi Model Server's; what is timed."""

from __future__ import annotations

import importlib.util
import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest

from archive.sandbox_worker import VERSION, Worker, context_of, forward_of, out_of_memory
from beeline.settings import Choice
from serve import servers

ROOT = Path(__file__).resolve().parents[2]
TORCHSERVE = importlib.util.find_spec("ts")


def contexts(server: str) -> Worker:
    assert TORCHSERVE is not None
    worker = Worker()
    code = str(Path(str(TORCHSERVE.origin)).with_name("context.py"))
    worker.context, worker.request = context_of(server, code, "model", "/folder", {}, 8)
    return worker


@pytest.mark.server
def test_multi_model_servers_context_is_torchserves_less_some_attributes() -> None:
    servers.named("mms").prepare(print)
    (code,) = ROOT.glob(".venv-mms/lib/python3*/site-packages/mms/context.py")
    # Read and not imported: it lives in another environment.
    real = runpy.run_path(str(code))
    context, request = real["Context"]("model", "/folder", {}, 8, None, VERSION), real["RequestProcessor"]
    worker = contexts("mms")
    left_out = {"get_sequence_id"}
    for fake, theirs in ((worker.context, context), (worker.request({}), request({}))):
        names = {name for name in dir(theirs) if not name.startswith("_")}
        assert {name for name in dir(fake) if not name.startswith(("_", "header_key"))} - left_out == names
        for name in names:
            member = inspect.getattr_static(theirs, name)
            if inspect.isfunction(member):
                assert list(inspect.signature(getattr(fake, name)).parameters) == list(
                    inspect.signature(getattr(theirs, name)).parameters
                ), name
    assert worker.context.system_properties == context.system_properties
    assert (worker.context.metrics, worker.context.request_ids) == (context.metrics, context.request_ids)


@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_a_batch_is_answered_through_the_context(server: str) -> None:
    worker = contexts(server)
    context = worker.context
    assert (context.metrics is None) == (server == "mms")
    assert hasattr(context, "model_yaml_config") == (server == "torchserve")
    worker._begin([{"Accept": "a"}, {"accept": "b"}])
    context.set_response_status(415, "Unsupported Media Type", 1)
    context.set_response_header(0, "X-Batch-Size", "2")
    context.set_response_content_type(0, "application/json")
    assert context.get_response_status(0) == (200, None)
    assert context.get_response_status(1) == (415, "Unsupported Media Type")
    assert context.get_response_headers(0) == {"X-Batch-Size": "2", "content-type": "application/json"}
    assert context.get_request_header(0, "Accept") == "a"
    assert context.get_request_header(1, "Accept") is None
    assert context.metrics.request_ids == context.request_ids
    context.metrics.add_time("forward", 1.5, None, "ms")
    assert "fake" in context.system_properties["server_version"]


class Elsewhere:
    """An engine on a CUDA device that copies there and back by itself; a stand-in where there is no device."""

    def __init__(self, device: str) -> None:
        self.choice = {"device": Choice(device, "asked for")}

    def forward(self, pixels: Any) -> Any:
        return pixels


class OnDevice(Elsewhere):
    """One that can be given what is there already."""

    def on_device(self, pixels: Any) -> Any:
        return pixels


def test_an_engine_that_cannot_be_told_apart_from_its_copies_is_measured_with_them() -> None:
    for engine in (Elsewhere("cuda:0"), Elsewhere("cpu"), OnDevice("cpu")):
        forward, brought = forward_of(engine)
        assert forward == engine.forward
        assert brought(7) == 7


def test_pytorch_on_a_device_is_measured_without_copies() -> None:
    engine = OnDevice("cuda:0")
    assert forward_of(engine)[0] != engine.forward


@pytest.mark.parametrize(
    "text_of",
    [
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_how_libraries_say_that_memory_is_out(text_of: str) -> None:
    assert out_of_memory(RuntimeError(text_of))
    assert not out_of_memory(ValueError(text_of))
    assert not out_of_memory(RuntimeError("shape '[2, 3]' is invalid"))

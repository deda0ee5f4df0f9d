"""The fake contexts offer what both servers' real ones do, with the same arguments, and no more; what is timed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from archive.sandbox_context import CONTEXTS, FakeContext, FakeMetrics, FakeRequest, FakeTorchServeContext
from archive.sandbox_worker import forward_of, out_of_memory
from beeline.settings import Choice
from serve import servers

ROOT = Path(__file__).resolve().parents[2]
OUR_OWN = {"begin_batch"}


def parameters(function: object) -> list[tuple[str, object]]:
    assert callable(function)
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def public(kind: type) -> dict[str, object]:
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


def compare(fake: type, real: type) -> None:
    offered, wanted = public(fake), public(real)
    for name, member in wanted.items():
        assert name in offered, f"the fake lacks {name}"
        if isinstance(member, property):
            assert isinstance(offered[name], property)
        elif callable(member):
            assert parameters(offered[name]) == parameters(member), name
    assert {name for name in offered if callable(offered[name])} - set(wanted) - OUR_OWN == set()


def test_it_has_the_methods_of_torchserves_context() -> None:
    from ts.context import Context, RequestProcessor

    compare(FakeTorchServeContext, Context)
    compare(FakeRequest, RequestProcessor)
    assert [name for name, _ in parameters(FakeTorchServeContext)] == [name for name, _ in parameters(Context)]


def test_it_has_the_attributes_of_torchserves_context() -> None:
    from ts.context import Context

    real = Context("model", "/folder", {}, 8, None, "1")
    fake = FakeTorchServeContext("model", "/folder", {}, 8, None, "1")
    unused = {"header_key_sequence_id", "header_key_sequence_start", "header_key_sequence_end"}
    wanted = {name for name in vars(real) if not name.startswith("_")} - unused
    assert wanted <= {name for name in vars(fake) if not name.startswith("_")}
    assert fake.system_properties == real.system_properties


def test_the_metrics_take_what_torchserves_take() -> None:
    from ts.metrics.metric_cache_abstract import MetricCacheAbstract

    for name, member in public(FakeMetrics).items():
        if callable(member):
            wanted = [key for key, _ in parameters(getattr(MetricCacheAbstract, name))]
            assert [key for key, _ in parameters(member)] == wanted[: len(parameters(member))], name


@pytest.mark.server
def test_it_has_the_methods_of_multi_model_servers_context() -> None:
    servers.named("mms").prepare(print)
    found = sorted(ROOT.glob(".venv-mms/lib/python3*/site-packages/mms/context.py"))
    # Read and not imported: it lives in another environment.
    classes = {node.name: node for node in ast.parse(found[0].read_text()).body if isinstance(node, ast.ClassDef)}
    for fake, name in ((FakeContext, "Context"), (FakeRequest, "RequestProcessor")):
        for node in classes[name].body:
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                member = getattr(fake, node.name)
                function = member.fset if node.decorator_list and len(node.args.args) == 2 else member
                function = function.fget if isinstance(function, property) else function
                assert [key for key, _ in parameters(function)] == [argument.arg for argument in node.args.args], (
                    node.name
                )
    assert not hasattr(FakeContext("model", "/folder", {}, 8, None), "model_yaml_config")


@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_a_batch_is_answered_through_it(server: str) -> None:
    context = CONTEXTS[server]("model", "/folder", {}, 8, None)
    assert (context.metrics is None) == (server == "mms")
    context.begin_batch([{"Accept": "a"}, {"accept": "b"}])
    context.set_response_status(415, "Unsupported Media Type", 1)
    context.set_response_header(0, "X-Batch-Size", "2")
    context.set_response_content_type(0, "application/json")
    assert context.get_response_status(0) == (200, None)
    assert context.get_response_status(1) == (415, "Unsupported Media Type")
    assert context.get_response_headers(0) == {"X-Batch-Size": "2", "content-type": "application/json"}
    assert context.get_request_header(0, "Accept") == "a"
    assert context.get_request_header(1, "Accept") is None
    assert context.metrics.request_ids == context.request_ids
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

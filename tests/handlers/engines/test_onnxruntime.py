"""ONNX Runtime's engine: which provider is taken, and said, for what was asked and what there is."""

from __future__ import annotations

import pytest

from beeline.engines.onnxruntime import CPU, CUDA, TENSORRT, choose, settled
from beeline.errors import ConfigError
from beeline.settings import Choice

EVERYTHING = (TENSORRT, CUDA, CPU)


@pytest.mark.parametrize(
    ("asked", "available", "gpu_id", "device", "names"),
    [
        ("auto", (CPU,), None, "cpu", [CPU]),
        ("auto", EVERYTHING, None, "cuda:0", [TENSORRT, CUDA, CPU]),
        ("auto", (CPU, CUDA), 2, "cuda:2", [CUDA, CPU]),
        ("cpu", EVERYTHING, 1, "cpu", [CPU]),
        ("cuda:3", EVERYTHING, 1, "cuda:3", [TENSORRT, CUDA, CPU]),
    ],
)
def test_tensorrt_then_cuda_then_the_cpu(
    asked: str, available: tuple[str, ...], gpu_id: int | None, device: str, names: list[str]
) -> None:
    choice, providers = choose(asked, available, gpu_id, (224, 192))
    assert choice.value == device
    assert [name for name, _ in providers] == names
    for name, options in providers:
        if name != CPU:
            assert options["device_id"] == int(device.partition(":")[2])


def test_tensorrt_gets_the_range_of_batches() -> None:
    options = dict(choose("cuda", EVERYTHING, None, (224, 192))[1])[TENSORRT]
    shapes = [options[f"trt_profile_{key}_shapes"] for key in ("min", "opt", "max")]
    assert shapes == ["pixels:1x224x192x3", "pixels:16x224x192x3", "pixels:64x224x192x3"]


def test_a_build_for_cpus_refuses_a_cuda_device_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"'cuda:1', and this build .* on CPUs: use auto .*install onnxruntime-gpu"):
        choose("cuda:1", (CPU,), None, (224, 192))


def test_a_provider_that_did_not_start_is_named() -> None:
    wanted = Choice("cuda:0", "this build of ONNX Runtime has CUDA")
    assert settled("auto", wanted, [CUDA, CPU]) == wanted
    assert settled("auto", wanted, [CPU]).value == "cpu"
    assert "did not start" in settled("auto", wanted, [CPU]).reason
    with pytest.raises(ConfigError, match=r"BEELINE_DEVICE is 'cuda', .*did not start"):
        settled("cuda", wanted, [CPU])

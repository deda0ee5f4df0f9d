"""The OpenVINO engine: a lone picture may take more threads than a batch does, and gets the same answer."""

from __future__ import annotations

import dataclasses
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest

from beeline.engines.openvino import OpenVinoEngine, _release
from beeline.errors import ConfigError
from beeline.spec import ModelSpec
from tests.conftest import ROOT


def loaded(openvino_model: Path, **environ: str) -> OpenVinoEngine:
    return OpenVinoEngine(openvino_model, ModelSpec.load(openvino_model), environ=environ)


def threads(request: object) -> int:
    return int(request.get_compiled_model().get_property("INFERENCE_NUM_THREADS"))  # type: ignore[attr-defined]


def test_a_lone_picture_takes_its_own_threads_and_gets_the_same_answer(openvino_model: Path) -> None:
    engine = loaded(openvino_model, BEELINE_THREADS="1", BEELINE_LONE_THREADS="2")
    choice = engine.choice["lone_threads"]
    assert (engine.choice["threads"].value, choice.value, choice.reason) == ("1", "2", "BEELINE_LONE_THREADS")
    assert (threads(engine._request), threads(engine._lone)) == (1, 2)
    crop = engine.spec.geometry.crop
    pixels = np.random.default_rng(0).integers(0, 256, (5, crop, crop, 3), dtype=np.uint8)
    whole = engine.forward(pixels)
    alone = np.concatenate([engine.forward(pixels[i : i + 1]) for i in range(5)])
    assert np.allclose(alone, whole, atol=1e-4)


@pytest.mark.parametrize("environ", [{}, {"BEELINE_LONE_THREADS": "2"}, {"BEELINE_LONE_THREADS": "1"}])
def test_the_model_is_compiled_once_if_a_lone_picture_takes_no_more(
    openvino_model: Path, environ: dict[str, str]
) -> None:
    engine = loaded(openvino_model, BEELINE_THREADS="2", **environ)
    assert engine.choice["lone_threads"].value == "2"
    assert engine._lone is engine._request


def test_wrong_threads_and_a_cuda_device_are_refused_with_the_fix(openvino_model: Path) -> None:
    with pytest.raises(ConfigError, match="BEELINE_LONE_THREADS is 'many'"):
        loaded(openvino_model, BEELINE_LONE_THREADS="many")
    with pytest.raises(ConfigError, match=r"'cuda', and OpenVINO runs on CPUs: use auto or cpu, or .*--engine torch"):
        loaded(openvino_model, BEELINE_DEVICE="cuda")


def test_the_choice_has_the_precision_of_the_computation(openvino_model: Path) -> None:
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    spec = dataclasses.replace(ModelSpec.load(openvino_model), precision="bf16")
    choice = OpenVinoEngine(openvino_model, spec, environ={}).choice["precision"]
    assert choice.value == ("bf16" if has_bf16 else "fp32")
    assert has_bf16 or choice.reason == "this processor has no bf16, which the archive was built for"


def test_a_file_that_was_read_takes_no_memory_after_its_release_and_stays_readable(tmp_path: Path) -> None:
    """As the weights, which the test's model is too small to have."""
    file = tmp_path / "model.bin"
    file.write_bytes(b"7" * (1 << 20))

    def memory() -> int:
        after = Path("/proc/self/smaps").read_text().partition(f" {file.resolve()}\n")[2]
        return int(after.partition("\nRss:")[2].split()[0])

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert (bytes(mapped).count(b"7"), memory()) == (1 << 20, 1024)
        _release(file)
        assert memory() == 0
        assert bytes(mapped).count(b"7") == 1 << 20


def test_what_was_written_into_a_mapped_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(mmap.PAGESIZE))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 7
        _release(file)
        assert mapped[0] == 7


def test_a_signal_after_two_engines_have_ended_does_not_end_the_process(openvino_model: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from beeline.engines import load; "
        "from beeline.spec import ModelSpec; folder = Path(sys.argv[1]); spec = ModelSpec.load(folder); "
        "first, second = load(folder, spec), load(folder, spec); del first; del second; "
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled')); signal.raise_signal(signal.SIGUSR1)"
    )
    line = [sys.executable, "-c", code, str(openvino_model)]
    done = subprocess.run(line, cwd=ROOT / "handlers", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done

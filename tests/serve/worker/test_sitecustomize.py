"""Workers that import only their engine: what stands for PyTorch in TorchServe's protocol, and what a worker holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from archive.build import HANDLERS, build
from beeline.spec import ModelSpec
from host import ROOT
from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.conftest import RED

ENCODE = """
import io, sys
from ts.protocol import otf_message_handler as protocol
encode = lambda answer: bytes(protocol.create_predict_response([answer], {0: "id"}, "Prediction success", 200))
assert b'"red": 1' in encode({"red": 1})
print("torch" in sys.modules)
"""
# Eight threads at once: four answer, and four import PyTorch for an answer that is a tensor.
TENSORS = """
import pickle, threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(8)

def step(index):
    start.wait()
    if index % 2:
        return b'"red"' in encode({"red": index})
    import torch.nn
    from torch import Tensor
    assert torch is sys.modules["torch"] and torch.nn is sys.modules["torch.nn"] and torch.__spec__.name == "torch"
    saved, tensor = io.BytesIO(), pickle.loads(pickle.dumps(torch.nn.Parameter(torch.ones(index + 1))))
    torch.save(tensor, saved)
    return isinstance(tensor, Tensor) and saved.getvalue() in encode(tensor)

with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(step, range(8))))
"""
LOAD = """
from pathlib import Path
sys.path.insert(0, {handlers!r})
from beeline import engines, errors, spec
try:
    engines.load(Path({folder!r}), spec.ModelSpec.load(Path({folder!r})))
except errors.ConfigError as error:
    print(error)
"""
# The headers of its answers name the installed packages that the worker has imported.
LISTS = """
import sys
from vision_handler import VisionHandler

class Lists(VisionHandler):
    def handle(self, data, context):
        files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
        packages = {name.partition(".")[0] for name, file in files.items() if "site-packages" in file}
        context.set_response_header(0, "X-Packages", " ".join(name for name in packages if name[0] != "_"))
        return super().handle(data, context)
"""
ABSENT = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
BROKEN = "raise OSError('libtorch_cpu.so: cannot open shared object file')"


def run(folder: Path, code: str, name: str = "model_service_worker.py") -> list[str]:
    """Return the lines of a program that starts as a worker does, with `folder` on its path too."""
    (folder / name).write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'serve' / 'worker'}{os.pathsep}{folder}"}
    command = [sys.executable, str(folder / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_pytorch_is_imported_when_somebody_imports_it_and_then_it_is_the_real_one(tmp_path: Path) -> None:
    assert run(tmp_path, ENCODE + TENSORS) == ["False", "True"]


@pytest.mark.parametrize(
    ("code", "fact"),
    [(ABSENT, "is not installed"), (BROKEN, "does not load (libtorch_cpu.so: cannot open shared object file)")],
)
def test_an_archive_that_needs_pytorch_is_refused_at_load_where_it_is_missing_or_broken(
    tmp_path: Path, colour_model: Path, code: str, fact: str
) -> None:
    (tmp_path / "torch.py").write_text(code)
    said = run(tmp_path, ENCODE + LOAD.format(handlers=str(HANDLERS), folder=str(colour_model)))
    fix = "install torch (images: --build-arg ENGINES=torch), or build the archive with --engine openvino"
    assert said == ["False", f"colours 1.0 needs the engine torch, and torch {fact} here; {fix}"]


def test_the_sitecustomize_behind_it_runs_too_and_other_programs_get_no_more(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the hidden one')")
    ask = f"import sys; print('ts' in sys.modules, {str(ROOT)!r} in sys.path, sys.modules['sitecustomize'].__file__)"
    assert run(tmp_path, ask, "other.py") == ["the hidden one", f"False False {tmp_path / 'sitecustomize.py'}"]


@pytest.mark.server
@pytest.mark.parametrize(("server", "brought"), [("torchserve", {"ts", "yaml"}), ("mms", {"mms"})])
def test_a_worker_has_its_engine_alone_beside_one_that_needs_pytorch(
    server: str,
    brought: set[str],
    colour_model: Path,
    openvino_model: Path,
    edit_spec: Callable[[Path, dict[str, object]], ModelSpec],
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    lean, handlers = shutil.copytree(openvino_model, tmp_path / "lean"), tmp_path / "handlers"
    edit_spec(lean, {"name": "lean"})
    (tmp_path / "lists.py").write_text(LISTS)
    shutil.copytree(HANDLERS, handlers, ignore=shutil.ignore_patterns("__pycache__"))
    # An archive's folder is on the path before the installed packages.
    (handlers / "torch.py").write_text(ABSENT)
    store = tmp_path / "store"
    build(lean, store, handler=tmp_path / "lists.py", handlers=handlers, check=False)
    build(colour_model, store, check=False)
    asked = Request(server, store=store, name="lean", overrides=Overrides(workers=1), ports=Ports(0), gateway="none")
    with up(asked, print, environ) as running:
        url = f"{running.state.inference}/predictions"
        answers = [requests.post(f"{url}/{model}", data=RED, timeout=60) for model in ("lean", "colours")]
    assert [next(iter(answer.json())) for answer in answers] == ["red", "red"]
    packages = set(answers[0].headers["X-Packages"].split())
    # OpenVINO imports `packaging` where it is installed.
    assert packages - {"packaging"} == {"PIL", "numpy", "openvino", "prometheus_client", "psutil"} | brought

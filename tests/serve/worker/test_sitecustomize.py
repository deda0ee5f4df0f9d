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
from beeline.errors import BeelineError
from beeline.spec import ModelSpec
from host import ROOT
from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.conftest import RED

EditSpec = Callable[[Path, dict[str, object]], ModelSpec]
ENCODE = """
import io, os, sys
from ts.protocol import otf_message_handler as protocol

def encode(answer):
    return bytes(protocol.create_predict_response([answer], {0: "id"}, "Prediction success", 200))

assert b'"red": 1' in encode({"red": 1})
print("torch" in sys.modules)
"""
TENSORS = """
import torch.nn
from torch import Tensor
import pickle, torch
assert torch is sys.modules["torch"] and torch.nn is sys.modules["torch.nn"] and torch.__spec__.origin == torch.__file__
class Own(Tensor): pass
for tensor in (torch.ones(2), torch.ones(3).as_subclass(Own), pickle.loads(pickle.dumps(torch.ones(4)))):
    saved = io.BytesIO()
    torch.save(tensor, saved)
    assert saved.getvalue() in encode(tensor)
"""
THREADS = """
import threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(8)

def step(index):
    start.wait()
    if index % 2:
        return b'"red"' in encode({"red": index})
    import torch
    return len(encode(torch.ones(2))) > 100

with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(step, range(8)))
"""
# Its answers say which installed packages the worker has imported.
LISTS = """
import sys
from vision_handler import VisionHandler

class Lists(VisionHandler):
    def handle(self, data, context):
        files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
        packages = {name.partition(".")[0] for name, file in files.items() if "site-packages" in file}
        context.set_response_header(0, "X-Packages", " ".join(sorted(packages - {"_distutils_hack"})))
        return super().handle(data, context)
"""
# As of a PyTorch that is not installed. The archive's folder is on the path before installed packages.
ABSENT = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
BROKEN = "raise OSError('libtorch_cpu.so: cannot open shared object file')"


def run(folder: Path, code: str, name: str = "model_service_worker.py") -> list[str]:
    """Return the lines of a program that starts as a worker does, with `folder` on its path too."""
    (folder / name).write_text(code)
    path = os.pathsep.join(map(str, (ROOT / "serve" / "worker", folder)))
    done = subprocess.run(
        [sys.executable, folder / name],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("later", [TENSORS, THREADS], ids=["tensors", "threads"])
def test_pytorch_is_imported_when_somebody_imports_it_and_then_it_is_the_real_one(tmp_path: Path, later: str) -> None:
    assert run(tmp_path, ENCODE + later) == ["False"]


def test_without_pytorch_answers_are_encoded_and_an_import_says_that_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(ABSENT)
    ask = "try:\n import torch.nn\nexcept ModuleNotFoundError as error:\n print(error)"
    assert run(tmp_path, ENCODE + ask) == ["False", "No module named 'torch'"]


def test_the_sitecustomize_behind_it_runs_too_and_other_programs_get_no_more(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the hidden one')")
    ask = f"import sys; print('ts' in sys.modules, {str(ROOT)!r} in sys.path, sys.modules['sitecustomize'].__file__)"
    assert run(tmp_path, ask, "other.py") == ["the hidden one", f"False False {tmp_path / 'sitecustomize.py'}"]


def with_torch(code: str, folder: Path) -> Path:
    """Return the handlers with a `torch.py`, which an archive of them has in the place of PyTorch."""
    handlers = shutil.copytree(HANDLERS, folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    (handlers / "torch.py").write_text(code)
    return handlers


def request_for(server: str, store: Path) -> Request:
    return Request(
        server, store=store, name=f"lean-{server}", overrides=Overrides(workers=1), ports=Ports(0), gateway="none"
    )


@pytest.mark.server
@pytest.mark.parametrize(("server", "brought"), [("torchserve", "ts"), ("mms", "mms")])
def test_a_worker_has_its_engine_alone_beside_one_that_needs_pytorch(
    server: str,
    brought: str,
    colour_model: Path,
    openvino_model: Path,
    edit_spec: EditSpec,
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    lean = shutil.copytree(openvino_model, tmp_path / "lean")
    edit_spec(lean, {"name": "lean"})
    (tmp_path / "lists.py").write_text(LISTS)
    store = tmp_path / "store"
    build(lean, store, handler=tmp_path / "lists.py", handlers=with_torch(ABSENT, tmp_path), check=False)
    build(colour_model, store, check=False)
    with up(request_for(server, store), print, environ) as running:
        answers = {}
        for model in ("lean", "colours"):
            answers[model] = requests.post(f"{running.state.inference}/predictions/{model}", data=RED, timeout=60)
    assert [next(iter(answer.json())) for answer in answers.values()] == ["red", "red"]
    assert answers["lean"].headers["X-Packages"] == f"{brought} PIL numpy openvino prometheus_client"


@pytest.mark.server
@pytest.mark.parametrize(
    ("code", "fact"),
    [(ABSENT, "is not installed here"), (BROKEN, r"does not load \(libtorch_cpu.so: cannot open shared object file\)")],
)
def test_an_archive_that_needs_pytorch_is_refused_at_load_where_it_is_missing_or_broken(
    code: str, fact: str, colour_model: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    build(colour_model, tmp_path / "store", handlers=with_torch(code, tmp_path), check=False)
    with pytest.raises(
        BeelineError, match=rf"colours 1\.0 needs the engine torch, and torch {fact}.*install torch, or"
    ):
        up(request_for("torchserve", tmp_path / "store"), print, environ)

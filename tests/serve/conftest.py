"""What the room's tests share: fake archives with a handler of a few lines, and their own state folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from host import processes
from serve.instance import MARK
from tests.conftest import write_archive

# Not the project's handler, so that these tests do not depend on it. It always gives the same answer.
FAKE = """
import importlib.util, json, os

class Fake:
    def initialize(self, context):
        gate = {gate!r}
        if gate and not os.path.exists(gate):
            if hasattr(context, "model_yaml_config"):
                raise RuntimeError("the gate is shut")
            print("this worker refuses to serve: the gate is shut", flush=True)
            raise SystemExit(1)

    def handle(self, data, context):
        ours = sum(importlib.util.find_spec(room) is not None for room in ("beeline", "cli", "train"))
        return [json.dumps({{"{label}": 0.9, "other": 0.1, "ours": ours}}) for _ in data]
"""

MakeArchive = Callable[..., Path]
T = TypeVar("T")


def wait_for(look: Callable[[], T], holds: Callable[[T], object] = bool, seconds: float = 90.0) -> T:
    """Look until what is seen holds, and return it."""
    deadline = time.monotonic() + seconds
    while not holds(seen := look()):
        assert time.monotonic() < deadline, f"still {seen!r} after {seconds:g} s"
        time.sleep(0.05)
    return seen


@pytest.fixture(scope="session")
def make_fake() -> MakeArchive:
    """Write a fake archive. Without the file `gate` its workers die; after `retry` seconds they are given up.

    A worker runs `load` first.
    """

    def make(
        store: Path,
        model: str = "fake",
        label: str = "red",
        gate: Path | None = None,
        retry: int | None = None,
        expected: str | None = None,
        version: str = "1.0",
        load: str = "",
    ) -> Path:
        store.mkdir(parents=True, exist_ok=True)
        source = load + FAKE.format(gate=str(gate) if gate else "", label=label)
        files = {"fake_handler.py": source.encode(), "model.pt": b"no model"}
        if expected is not None:
            top = {"schema": 1, "pictures": [{"file": "0.png", "sha256": "", "top": [[expected, 0.9]]}]}
            files |= {"golden/expected.json": json.dumps(top).encode(), "golden/0.png": b"no picture"}
        if retry is not None:
            files["model-config.yaml"] = f"maxRetryTimeoutInSec: {retry}\n".encode()
        config = "model-config.yaml" if retry is not None else None
        file = f"{model}.mar" if version == "1.0" else f"{model}-{version}.mar"
        return write_archive(store / file, model, files, "fake_handler.py", config, version)

    return make


@pytest.fixture(scope="session")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests' state folder; what a failed test left running is stopped at the end."""
    home = tmp_path_factory.mktemp("state").resolve()
    yield home
    processes.stop_marked(MARK, str(home), grace=0)


@pytest.fixture
def environ(state_home: Path) -> dict[str, str]:
    """The environment without this project's variables, and with the tests' state folder."""
    ours = ("BEELINE_", "BATCH_SIZE", "WORKERS", "LINGER_MS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**kept, "BEELINE_STATE": str(state_home)}

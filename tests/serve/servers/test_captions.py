"""Captions on real TorchServe, Multi Model Server, LitServe and Triton: one archive, the same answers."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from archive import caption
from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.caption_models import drawn, model_folder
from tests.captions import checkpoint
from tests.conftest import pack
from tests.handlers.test_vision_handler import ask, loaded

pytestmark = pytest.mark.server
PICTURES = drawn(12)
BROKEN = {b"": 400, b"no picture": 415, PICTURES[0][:40]: 422, b'{"data": "?"}': 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    blip = caption.load(str(checkpoint(tmp_path_factory.mktemp("blip"))))
    return model_folder(blip, tmp_path_factory.mktemp("model") / "export", "openvino", 3)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    """What a handler in this process answers to each picture alone; test_caption.py compares it with transformers."""
    handler = loaded(folder)
    return [ask(handler, [{"body": data}])[0].json for data in PICTURES]


@pytest.fixture(scope="module", params=["torchserve", "mms", "litserve", "triton"])
def url(request: pytest.FixtureRequest, folder: Path, state_home: Path) -> Iterator[str]:
    archive = pack(folder, folder.parent / f"{request.param}.mar")
    environ = {**os.environ, "BEELINE_STATE": str(state_home)}
    numbers = Overrides(workers=1, batch_size=8, max_batch_delay=100)
    name = f"captions-{request.param}"
    asked = Request(request.param, (str(archive),), name=name, overrides=numbers, ports=Ports(0), gateway="none")
    with up(asked, print, environ) as running:
        yield f"{running.state.inference}/predictions/blip"


def test_each_picture_gets_its_caption_among_broken_ones(url: str, expected: list[Any]) -> None:
    sent = [each for data in PICTURES for each in ((data, 200), *list(BROKEN.items())[:1])] + list(BROKEN.items())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: requests.post(url, data=each[0], timeout=60), sent))
    assert [each.status_code for each in answers] == [status for _, status in sent]
    good = [each.json() for each in answers if each.status_code == 200]
    # A batch of another size rounds differently.
    assert good == [{**each, "score": pytest.approx(each["score"], abs=1e-4)} for each in expected]
    assert any(int(each.headers["X-Batch-Size"]) > 1 for each in answers)


def test_a_prompt_begins_the_caption(url: str) -> None:
    values = {"image": base64.b64encode(PICTURES[0]).decode(), "prompt": "a photo of", "max_tokens": 3}
    answer = requests.post(url, json=values, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["caption"].startswith("a photo of")
    assert answer.json()["tokens"] <= 3
    form = {"files": {"data": ("x.png", PICTURES[0])}, "data": {"prompt": "a photo of", "max_tokens": "3"}}
    assert requests.post(url, **form, timeout=60).json()["caption"] == answer.json()["caption"]  # type: ignore[arg-type]

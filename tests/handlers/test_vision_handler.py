"""The contract: never raises, one answer a request, in order, whatever its neighbours are.

Driven through TorchServe's own `Context` and `RequestProcessor`, with a real exported model; the same
over HTTP to both servers is in test_over_http.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from ts.context import Context, RequestProcessor

from beeline.answer import Answer
from beeline.batch import Batch
from beeline.errors import BeelineError, SelfTestError
from beeline.metrics import FOLDER
from beeline.spec import CHECKSUMS, ModelSpec
from tests.conftest import BLUE, GREEN, RED, picture
from vision_handler import VisionHandler

GOOD = {"red": RED, "green": GREEN, "blue": BLUE}
BROKEN = {b"": 400, b"no picture": 415, RED[:40]: 422, b'{"data": "?"}': 400}


class Reply:
    """One client's view: status, headers, parsed body."""

    def __init__(self, context: Context, index: int, body: str) -> None:
        self.status, self.phrase = context.get_response_status(index)
        self.headers: dict[str, str] = context.get_response_headers(index)
        assert isinstance(body, str)
        self.json: Any = json.loads(body)

    @property
    def top(self) -> str:
        return str(next(iter(self.json)))


def new_context(folder: Path, **options: Any) -> Context:
    return Context("colours", str(folder), {}, 8, None, "0.12.0", **options)


def ask(
    handler: VisionHandler, rows: Sequence[object], headers: Sequence[dict[str, object]] | None = None
) -> list[Reply]:
    context = new_context(Path())
    context.request_processor = [RequestProcessor(h) for h in headers or [{}] * len(rows)]
    bodies = handler.handle(list(rows), context)
    assert isinstance(bodies, list)
    assert len(bodies) == len(rows)
    return [Reply(context, i, body) for i, body in enumerate(bodies)]


@pytest.fixture(scope="module")
def handler(colour_model: Path) -> VisionHandler:
    handler = VisionHandler()
    handler.initialize(new_context(colour_model))
    return handler


@pytest.fixture
def copy(colour_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(colour_model, tmp_path / "model"))


def test_a_prediction(handler: VisionHandler) -> None:
    (reply,) = ask(handler, [{"body": RED}])
    assert reply.status == 200
    assert list(reply.json) == ["red", "blue", "green"]
    assert sum(reply.json.values()) == pytest.approx(1, abs=1e-5)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["X-Batch-Size"] == "1"
    names = [part.split(";")[0] for part in reply.headers["Server-Timing"].split(", ")]
    assert names == ["decode", "forward", "encode"]


def test_all_256_placements_of_broken_pictures_in_a_batch_of_8(handler: VisionHandler) -> None:
    choose = random.Random(0)
    for broken in itertools.product([False, True], repeat=8):
        wanted: list[object] = []
        rows = []
        for flag in broken:
            data, answer = choose.choice(list((BROKEN if flag else {v: k for k, v in GOOD.items()}).items()))
            rows.append({"body": data})
            wanted.append(answer)
        replies = ask(handler, rows)
        assert [reply.top if reply.status == 200 else reply.status for reply in replies] == wanted
        assert all(reply.headers["X-Batch-Size"] == "8" for reply in replies)
        assert all(reply.json["message"] for reply in replies if reply.status != 200)


def test_the_full_answer_is_asked_for_by_accept(handler: VisionHandler) -> None:
    plain, full = ask(handler, [{"body": RED}] * 2, [{}, {"aCCept": "application/vnd.beeline+json"}])
    assert plain.top == "red"
    assert full.json["predictions"][0]["label"] == "red"
    assert full.json["model"] == {"name": "colours", "version": "1.0", "fingerprint": handler.spec.fingerprint()}
    assert "warning" not in full.json
    assert full.headers["content-type"] == "application/vnd.beeline+json"


def test_a_model_of_generated_pictures_says_so(copy: Path, edit_spec: Callable[..., ModelSpec]) -> None:
    edit_spec(copy, {"provenance": {"data": "circles", "generated": True}})
    handler = VisionHandler()
    handler.initialize(new_context(copy))
    (reply,) = ask(handler, [{"body": RED}], [{"Accept": "application/vnd.beeline+json"}])
    assert "generated pictures (circles)" in reply.json["warning"]


@pytest.mark.parametrize("name", ["describe", "explain", "Describe", "Explain"])
def test_headers_that_reach_for_the_neighbours_change_nothing(handler: VisionHandler, name: str) -> None:
    replies = ask(handler, [{"body": RED}, {"body": BLUE}], [{name: "True"}, {}])
    assert [reply.top for reply in replies] == ["red", "blue"]


def test_the_queue_is_shown_only_where_the_gateway_measured_it(handler: VisionHandler) -> None:
    headers: list[dict[str, object]] = [
        {},
        {"X-Request-Start": "t=1.0"},
        {"X-Request-Start": "nonsense"},
        {"x-request-start": {"content-type": ""}},
    ]
    for reply in ask(handler, [{"body": RED}] * 4, headers):
        assert "queue" not in reply.headers["Server-Timing"]
    (reply,) = ask(handler, [{"body": RED}], [{"X-Request-Start": f"t={time.time() - 100:.3f}"}])
    name, _, milliseconds = reply.headers["Server-Timing"].split(", ")[0].partition(";dur=")
    assert name == "queue"
    assert 99_990 < float(milliseconds) < 1_000_000


def test_an_empty_batch(handler: VisionHandler) -> None:
    assert ask(handler, []) == []
    assert handler.handle(None, new_context(Path())) == []


WRONG_ANSWERS: dict[str, Callable[[list[Answer]], object]] = {
    "a dict": lambda answers: [answer.json() for answer in answers],
    "a text": lambda answers: "answers",
    "a tuple of texts": lambda answers: tuple(answer.body for answer in answers),
    "nothing": lambda answers: None,
    "a status that is no number": lambda answers: [
        dataclasses.replace(one, status=cast("int", "no")) for one in answers
    ],
    "headers of none": lambda answers: [
        dataclasses.replace(one, headers=cast("dict[str, str]", None)) for one in answers
    ],
    "a status of none": lambda answers: [dataclasses.replace(one, status=0) for one in answers],
}


class Fragile(VisionHandler):
    """A user's handler with a bug in each stage, triggered by the colour blue."""

    stage = "preprocess"

    def preprocess(self, rows: Sequence[object]) -> Batch:
        if self.stage == "preprocess" and any(isinstance(row, dict) and row.get("body") == BLUE for row in rows):
            raise KeyError("preprocess")
        return super().preprocess(rows)

    def inference(self, batch: Batch) -> NDArray[np.float32]:
        if self.stage == "inference" and any(row[0, 0, 2] > 200 for row in batch.stack()):
            raise RuntimeError("no memory for blue\r\nX-Injected: yes")
        logits = super().inference(batch)
        if self.stage == "nan":
            logits[[row[0, 0, 2] > 200 for row in batch.stack()]] = np.nan
        if self.stage == "shape":
            return logits[:-1]
        return logits

    def postprocess(self, logits: NDArray[np.float32], batch: Batch) -> list[Answer]:
        answers = super().postprocess(logits, batch)
        if self.stage in WRONG_ANSWERS:
            return cast("list[Answer]", WRONG_ANSWERS[self.stage](answers))
        if self.stage == "postprocess":
            return [Answer(299, "a\r\nb", '"x"', {"x-\n": "ü\r\n"}) for _ in answers]
        return answers[:-1] if self.stage == "length" else answers


@pytest.mark.parametrize("stage", ["preprocess", "inference", "nan"])
def test_a_bug_in_one_stage_harms_only_the_picture_that_triggers_it(colour_model: Path, stage: str) -> None:
    handler = Fragile()
    handler.initialize(new_context(colour_model))
    handler.stage = stage
    rows = [{"body": RED}, {"body": BLUE}, {"body": b"junk"}, {"body": GREEN}, {"body": BLUE}]
    replies = ask(handler, rows)
    assert [reply.status for reply in replies] == [200, 500, 415, 200, 500]
    assert [replies[0].top, replies[3].top] == ["red", "green"]
    assert replies[1].json["type"] == "ModelError"


@pytest.mark.parametrize("stage", ["length", "shape", *WRONG_ANSWERS])
def test_a_stage_that_loses_an_answer_never_shifts_the_others(colour_model: Path, stage: str) -> None:
    handler = Fragile()
    handler.initialize(new_context(colour_model))
    handler.stage = stage
    assert [reply.status for reply in ask(handler, [{"body": RED}, {"body": BLUE}])] == [500, 500]


def test_what_could_break_a_response_is_replaced(colour_model: Path) -> None:
    handler = Fragile()
    handler.initialize(new_context(colour_model))
    handler.stage = "postprocess"
    (reply,) = ask(handler, [{"body": RED}])
    assert reply.phrase == "a??b"
    assert reply.headers["x-?"] == "???"


def test_the_queue_ends_where_the_batch_begins(colour_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Noting(VisionHandler):
        def preprocess(self, rows: Sequence[object]) -> Batch:
            order.append("batch")
            return super().preprocess(rows)

    def note(request_start: object) -> float:
        order.append(str(request_start))
        return 1.0

    handler = Noting()
    handler.initialize(new_context(colour_model))
    monkeypatch.setattr("vision_handler.queue_milliseconds", note)
    (reply,) = ask(handler, [{"body": RED}], [{"X-Request-Start": "t=1"}])
    assert order == ["t=1", "batch"]
    assert reply.headers["Server-Timing"].startswith("queue;dur=1.00, decode;dur=")


class OwnAnswer(Answer):
    """A user's answer with a constructor of its own."""

    def __init__(self, body: str) -> None:
        super().__init__(200, "OK", body)


def test_a_users_own_kind_of_answer_gets_the_headers_too(colour_model: Path) -> None:
    class Own(VisionHandler):
        def postprocess(self, logits: NDArray[np.float32], batch: Batch) -> list[Answer]:
            return [OwnAnswer("{}") for _ in super().postprocess(logits, batch)]

    handler = Own()
    handler.initialize(new_context(colour_model))
    replies = ask(handler, [{"body": RED}, {"body": b"junk"}])
    assert [(reply.status, reply.headers["X-Batch-Size"]) for reply in replies] == [(200, "2")] * 2


def test_a_full_disk_costs_no_answer(colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    handler = VisionHandler()
    handler.initialize(new_context(colour_model))
    assert [reply.status for reply in ask(handler, [{"body": RED}, {"body": b"junk"}])] == [200, 415]


def test_a_lost_cuda_context_ends_the_worker_after_its_answers(
    handler: VisionHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake: the fault needs a device that has failed.
    started: list[tuple[float, tuple[int, ...]]] = []

    class FakeTimer:
        def __init__(self, seconds: float, call: Callable[[int], None], args: tuple[int, ...]) -> None:
            started.append((seconds, args))

        def start(self) -> None:
            pass

    monkeypatch.setattr("vision_handler.threading.Timer", FakeTimer)
    for message, ends in (("CUDA error: device-side assert", True), ("CUDA error: out of memory", False), ("x", False)):
        started.clear()
        monkeypatch.setattr(handler.engine, "_model", lambda _, text=message: (_ for _ in ()).throw(RuntimeError(text)))
        assert ask(handler, [{"body": RED}])[0].status == 500
        assert bool(started) is ends


class MmsContext:
    """A fake with the one property that tells MMS apart: it has no model configuration."""

    def __init__(self, folder: Path) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None}


def _tamper(folder: Path, edit_spec: Callable[..., ModelSpec], how: str) -> None:
    spec = ModelSpec.load(folder)
    if how == "labels shifted":
        edit_spec(folder, {"labels": [*spec.labels[1:], spec.labels[0]]})
    elif how == "other geometry code":
        edit_spec(folder, {"geometry_version": 2})
    elif how == "model file swapped":
        (folder / "model.pt2").write_bytes(b"other")
    elif how == "spec edited":
        ModelSpec.from_dict({**spec.to_dict(), "top_k": 1}).save(folder / "model_spec.json")
    elif how == "golden picture swapped":
        (folder / "golden" / "0.png").write_bytes(GREEN)
    elif how == "no golden":
        shutil.rmtree(folder / "golden")
    elif how == "no checksums":
        (folder / CHECKSUMS).unlink()
    elif how == "other answers recorded":
        expected = json.loads((folder / "golden" / "expected.json").read_text())
        expected["pictures"][0]["top"] = [["blue", 0.99], ["red", 0.01]]
        (folder / "golden" / "expected.json").write_text(json.dumps(expected))
        edit_spec(folder, {})
    elif how == "probability moved":
        expected = json.loads((folder / "golden" / "expected.json").read_text())
        expected["pictures"][0]["top"][0][1] -= 0.03
        (folder / "golden" / "expected.json").write_text(json.dumps(expected))
        edit_spec(folder, {})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("labels shifted", "is answered 'green'"),
        ("other geometry code", "the geometry's version in beeline/pixels.py is 1, the model was exported with 2"),
        ("model file swapped", "model.pt2 is"),
        ("spec edited", "the spec's fingerprint"),
        ("golden picture swapped", "golden/0.png is"),
        ("no golden", "golden/0.png is missing"),
        ("no checksums", "checksums.json is missing"),
        ("other answers recorded", "expected 'blue'"),
        ("probability moved", "within 0.02"),
    ],
)
def test_a_model_that_is_not_what_it_was_refuses_to_serve(
    copy: Path, edit_spec: Callable[..., ModelSpec], how: str, words: str
) -> None:
    _tamper(copy, edit_spec, how)
    with pytest.raises(SelfTestError, match=words.replace("(", r"\(")):
        VisionHandler().initialize(new_context(copy))
    with pytest.raises(SystemExit, match=words):
        VisionHandler().initialize(MmsContext(copy))


def test_an_artifact_that_does_not_run_is_an_error_of_ours(copy: Path, edit_spec: Callable[..., ModelSpec]) -> None:
    edit_spec(copy, {"labels": ["red", "green", "blue", "black"]})
    with pytest.raises(BeelineError, match=r"shape \(1, 3\), not \(1, 4\)"):
        VisionHandler().initialize(new_context(copy))


def test_the_worker_imports_nothing_of_the_repository_outside_handlers() -> None:
    rooms = ("archive", "host", "train", "serve", "cli", "torchvision", "matplotlib", "jinja2")
    code = f"import sys, vision_handler; print([room for room in {rooms} if room in sys.modules])"
    root = Path(__file__).resolve().parents[2] / "handlers"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_large_and_small_pictures_share_a_batch(handler: VisionHandler) -> None:
    rows = [{"body": picture((220, 30, 40), (3000, 2000), "JPEG")}, {"body": BLUE}]
    assert [reply.top for reply in ask(handler, rows)] == ["red", "blue"]

"""The contract: never raises, one answer a request, in order, whatever its neighbours are.

Driven through TorchServe's own `Context` and `RequestProcessor`, with a real exported model; the same
over HTTP to both servers is in test_over_http.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import numpy as np
import pytest
from numpy.typing import NDArray
from ts.context import Context, RequestProcessor

from beeline.answer import Answer
from beeline.batch import Batch
from beeline.engines.torch import TorchEngine
from beeline.errors import BeelineError, SelfTestError
from beeline.servers import deadline, queue_milliseconds
from beeline.spec import CHECKSUMS, FILE_NAME, ModelSpec
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


def loaded(folder: Path, kind: type[VisionHandler] = VisionHandler) -> VisionHandler:
    handler = kind()
    handler.initialize(new_context(folder))
    return handler


@pytest.fixture(scope="module")
def handler(colour_model: Path) -> VisionHandler:
    return loaded(colour_model)


@pytest.fixture
def copy(colour_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(colour_model, tmp_path / "model"))


def test_the_largest_batch_has_run_before_the_worker_is_ready(
    colour_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = [], TorchEngine.forward

    def noted(engine: TorchEngine, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(pixels))
        return forward(engine, pixels)

    monkeypatch.setattr(TorchEngine, "forward", noted)
    # Only a server's worker waits for that.
    monkeypatch.delitem(sys.modules, "ts.service", raising=False)
    loaded(colour_model)
    assert max(sizes) < 8
    monkeypatch.setitem(sys.modules, "ts.service", Mock())
    loaded(colour_model)
    assert max(sizes) == new_context(colour_model).system_properties["batch_size"] == 8


def test_a_prediction(handler: VisionHandler) -> None:
    (reply,) = ask(handler, [{"body": RED}])
    assert reply.status == 200
    assert list(reply.json) == ["red", "blue", "green"]
    assert sum(reply.json.values()) == pytest.approx(1, abs=1e-5)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["X-Batch-Size"] == "1"
    names = [part.split(";")[0] for part in reply.headers["Server-Timing"].split(", ")]
    assert names == ["decode", "forward", "encode"]


def check_all_placements(handler: VisionHandler, good: Mapping[str, bytes], broken: Mapping[bytes, int]) -> None:
    """Ask for all 256 placements of broken pictures in a batch of 8: each gets its label, or its status."""
    goods, brokens = itertools.cycle(good.items()), itertools.cycle(broken.items())
    for places in itertools.product([False, True], repeat=8):
        rows, wanted = [], list[object]()
        for is_broken in places:
            answer, data = next(brokens)[::-1] if is_broken else next(goods)
            rows.append({"body": data})
            wanted.append(answer)
        replies = ask(handler, rows)
        assert [reply.top if reply.status == 200 else reply.status for reply in replies] == wanted
        assert all(reply.headers["X-Batch-Size"] == "8" for reply in replies)
        assert all(reply.json["message"] for reply in replies if reply.status != 200)


def test_all_256_placements_of_broken_pictures_in_a_batch_of_8(handler: VisionHandler) -> None:
    check_all_placements(handler, GOOD, BROKEN)


def test_the_full_answer_comes_by_accept(handler: VisionHandler) -> None:
    plain, full = ask(handler, [{"body": RED}] * 2, [{}, {"aCCept": "application/vnd.beeline+json"}])
    assert plain.top == "red"
    assert full.json["predictions"][0]["label"] == "red"
    assert full.json["model"] == {"name": "colours", "version": "1.0", "fingerprint": handler.spec.fingerprint()}
    assert "warning" not in full.json
    assert full.headers["content-type"] == "application/vnd.beeline+json"


def test_a_model_of_generated_pictures_says_so(copy: Path, edit_spec: Callable[..., ModelSpec]) -> None:
    edit_spec(copy, {"provenance": {"data": "circles", "generated": True}})
    (reply,) = ask(loaded(copy), [{"body": RED}], [{"Accept": "application/vnd.beeline+json"}])
    assert "generated pictures (circles)" in reply.json["warning"]


def test_the_queue_is_shown_only_where_the_gateway_measured_it(handler: VisionHandler) -> None:
    headers: list[dict[str, object]] = [{}, {"X-Request-Start": "t=1.0"}, {"x-request-start": {"content-type": ""}}]
    for reply in ask(handler, [{"body": RED}] * 3, headers):
        assert "queue" not in reply.headers["Server-Timing"]
    (reply,) = ask(handler, [{"body": RED}], [{"X-Request-Start": f"t={time.time() - 100:.3f}"}])
    name, _, milliseconds = reply.headers["Server-Timing"].split(", ")[0].partition(";dur=")
    assert name == "queue"
    assert 99_990 < float(milliseconds) < 1_000_000


def test_an_empty_batch(handler: VisionHandler) -> None:
    assert ask(handler, []) == []
    assert handler.handle(None, new_context(Path())) == []


WRONG_ANSWERS: dict[str, Callable[[list[Answer]], object]] = {
    "one too few": lambda answers: answers[:-1],
    "a dict": lambda answers: [answer.json() for answer in answers],
    "a text": lambda answers: "answers",
    "a tuple of texts": lambda answers: tuple(answer.body for answer in answers),
    "nothing": lambda answers: None,
    "a status that is no number": lambda answers: [dataclasses.replace(one, status="no") for one in answers],  # type: ignore[arg-type]
    "headers of none": lambda answers: [dataclasses.replace(one, headers=None) for one in answers],  # type: ignore[arg-type]
    "a status of none": lambda answers: [dataclasses.replace(one, status=0) for one in answers],
}


class Fragile(VisionHandler):
    """A user's handler with a bug in each stage, triggered by the colour blue."""

    stage = ""

    def preprocess(self, rows: Sequence[object]) -> Batch:
        if self.stage == "preprocess" and {"body": BLUE} in rows:
            raise KeyError("preprocess")
        return super().preprocess(rows)

    def inference(self, batch: Batch) -> NDArray[np.float32]:
        blue = [row[0, 0, 2] > 200 for row in batch.stack()]
        if self.stage == "inference" and any(blue):
            raise RuntimeError("no memory for blue\r\nX-Injected: yes")
        logits = super().inference(batch)
        if self.stage == "nan":
            logits[blue] = np.nan
        return logits[:-1] if self.stage == "shape" else logits

    def postprocess(self, logits: NDArray[np.float32], batch: Batch) -> list[Answer]:
        answers = super().postprocess(logits, batch)
        if self.stage == "postprocess":
            return [Answer(299, "a\r\nb", '"x"', {"x-\n": "ü\r\n"}) for _ in answers]
        return cast("list[Answer]", WRONG_ANSWERS.get(self.stage, list)(answers))


@pytest.fixture
def fragile(colour_model: Path, request: pytest.FixtureRequest) -> VisionHandler:
    handler = Fragile()
    handler.initialize(new_context(colour_model))
    handler.stage = request.param
    return handler


@pytest.mark.parametrize("fragile", ["preprocess", "inference", "nan"], indirect=True)
def test_a_bug_in_one_stage_harms_only_the_picture_that_triggers_it(fragile: VisionHandler) -> None:
    rows = [{"body": RED}, {"body": BLUE}, {"body": b"junk"}, {"body": GREEN}, {"body": BLUE}]
    replies = ask(fragile, rows)
    assert [reply.status for reply in replies] == [200, 500, 415, 200, 500]
    assert [replies[0].top, replies[3].top] == ["red", "green"]
    assert replies[1].json["type"] == "ModelError"


@pytest.mark.parametrize("fragile", ["shape", *WRONG_ANSWERS], indirect=True)
def test_a_stage_that_loses_an_answer_never_shifts_the_others(fragile: VisionHandler) -> None:
    assert [reply.status for reply in ask(fragile, [{"body": RED}, {"body": BLUE}])] == [500, 500]


@pytest.mark.parametrize("fragile", ["postprocess"], indirect=True)
def test_characters_that_could_break_a_response_are_replaced(fragile: VisionHandler) -> None:
    (reply,) = ask(fragile, [{"body": RED}])
    assert reply.phrase == "a??b"
    assert reply.headers["x-?"] == "???"


def test_the_queue_ends_where_the_batch_begins(handler: VisionHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Mock()
    calls.queue.return_value = 1.0
    calls.decode.side_effect = handler.decoder.decode
    monkeypatch.setattr("vision_handler.queue_milliseconds", calls.queue)
    monkeypatch.setattr(handler.decoder, "decode", calls.decode)
    (reply,) = ask(handler, [{"body": RED}], [{"X-Request-Start": "t=1"}])
    assert calls.mock_calls == [call.queue("t=1"), call.decode([{"body": RED}])]
    assert reply.headers["Server-Timing"].startswith("queue;dur=1.00, decode;dur=")


class OwnAnswer(Answer):
    """A user's answer with a constructor of its own."""

    def __init__(self, body: str) -> None:
        super().__init__(200, "OK", body)


def test_a_users_own_kind_of_answer_gets_the_headers_too(colour_model: Path) -> None:
    class Own(VisionHandler):
        def postprocess(self, logits: NDArray[np.float32], batch: Batch) -> list[Answer]:
            return [OwnAnswer("{}") for _ in super().postprocess(logits, batch)]

    replies = ask(loaded(colour_model, Own), [{"body": RED}, {"body": b"junk"}])
    assert [(reply.status, reply.headers["X-Batch-Size"]) for reply in replies] == [(200, "2")] * 2


def test_a_lost_cuda_context_ends_the_worker_after_its_answers(
    handler: VisionHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake: the fault needs a device that has failed.
    timer = Mock()
    monkeypatch.setattr("vision_handler.threading.Timer", timer)
    for message, ends in (("CUDA error: device-side assert", 1), ("CUDA error: out of memory", 0), ("x", 0)):
        timer.reset_mock()
        monkeypatch.setattr(handler.engine, "_model", Mock(side_effect=RuntimeError(message)))
        assert ask(handler, [{"body": RED}])[0].status == 500
        assert timer.return_value.start.call_count == ends


def shift_labels(folder: Path) -> dict[str, object]:
    labels = ModelSpec.load(folder).labels
    return {"labels": [*labels[1:], labels[0]]}


def edit_answers(folder: Path, change: Callable[[list[Any]], object]) -> dict[str, object]:
    path = folder / "golden" / "expected.json"
    expected = json.loads(path.read_text())
    change(expected["pictures"][0]["top"][0])
    path.write_text(json.dumps(expected))
    return {}


# What is changed in a model's folder; a dict of changes means that spec and checksums are written again.
TAMPERINGS: list[tuple[Callable[[Path], object], str]] = [
    (shift_labels, "is answered 'green'"),
    (lambda _: {"geometry_version": 2}, r"the geometry's version in beeline/pixels.py is 1, .* exported with 2"),
    (lambda folder: (folder / "model.pt2").write_bytes(b"other"), "model.pt2 is"),
    (lambda folder: dataclasses.replace(ModelSpec.load(folder), top_k=1).save(folder / FILE_NAME), "the spec's finger"),
    (lambda folder: (folder / "golden" / "0.png").write_bytes(GREEN), "golden/0.png is"),
    (lambda folder: shutil.rmtree(folder / "golden"), "golden/0.png is missing"),
    (lambda folder: (folder / CHECKSUMS).unlink(), "checksums.json is missing"),
    (lambda folder: edit_answers(folder, lambda top: top.__setitem__(0, "blue")), "expected 'blue'"),
    (lambda folder: edit_answers(folder, lambda top: top.__setitem__(1, top[1] - 0.03)), "within 0.02"),
]


@pytest.mark.parametrize(("tamper", "words"), TAMPERINGS, ids=[words for _, words in TAMPERINGS])
def test_a_changed_model_refuses_to_serve(
    copy: Path, edit_spec: Callable[..., ModelSpec], tamper: Callable[[Path], object], words: str
) -> None:
    if isinstance(changes := tamper(copy), dict):
        edit_spec(copy, changes)
    with pytest.raises(SelfTestError, match=words):
        loaded(copy)
    # A fake with the one property that distinguishes MMS: its context has no model configuration.
    with pytest.raises(SystemExit, match=words):
        VisionHandler().initialize(SimpleNamespace(system_properties={"model_dir": str(copy)}))


def test_an_artifact_that_does_not_run_is_an_error_of_ours(copy: Path, edit_spec: Callable[..., ModelSpec]) -> None:
    edit_spec(copy, {"labels": ["red", "green", "blue", "black"]})
    with pytest.raises(BeelineError, match=r"shape \(1, 3\), not \(1, 4\)"):
        loaded(copy)


@pytest.mark.parametrize("start", [None, 3, "", "t=", "t=soon", "t=nan", "t=inf", "t=1000", "t=4601", "t=4600000"])
def test_no_queue_without_a_plausible_start(start: object) -> None:
    assert queue_milliseconds(start, now=1000 + 3600) is None


@pytest.mark.parametrize("start", ["t=999.5", "999.5"])
def test_the_queue_is_the_time_since_the_gateway_took_the_request(start: str) -> None:
    assert queue_milliseconds(start, now=1000) == 500


def test_large_and_small_pictures_share_a_batch(handler: VisionHandler) -> None:
    rows = [{"body": picture((220, 30, 40), (3000, 2000), "JPEG")}, {"body": BLUE}]
    assert [reply.top for reply in ask(handler, rows)] == ["red", "blue"]


@pytest.mark.parametrize("late", [[True], [False, True, False], [True, True], [False, False]])
def test_what_is_past_its_deadline_is_answered_504_and_costs_nothing(
    handler: VisionHandler, monkeypatch: pytest.MonkeyPatch, late: list[bool]
) -> None:
    decode = Mock(side_effect=handler.decoder.decode)
    monkeypatch.setattr(handler.decoder, "decode", decode)
    start = f"t={time.time() - 2:.3f}"
    headers: list[dict[str, object]] = [
        {"X-Request-Start": start, "X-Deadline-Ms": "1000" if one else "60000"} for one in late
    ]
    replies = ask(handler, [{"body": RED}] * len(late), headers)
    assert [reply.status for reply in replies] == [504 if one else 200 for one in late]
    assert sum(len(each.args[0]) for each in decode.call_args_list) == late.count(False)
    for reply, one in zip(replies, late, strict=True):
        assert reply.headers["X-Batch-Size"] == str(len(late))
        assert not one or reply.json["type"] == "DeadlineExceeded"


def test_a_deadline_is_at_most_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beeline.servers.time.time", lambda: 0.0)
    assert [deadline(0.0, own, 10) for own in ("250", "9999", "10001", None)] == [0.25, 9.999, 10, 10]


@pytest.mark.parametrize("deadline", ["", "x", "-5", "1.5", "\u0661", "9" * 5000])
def test_a_deadline_that_is_no_whole_number_is_none(handler: VisionHandler, deadline: str) -> None:
    headers: list[dict[str, object]] = [{"X-Request-Start": f"t={time.time() - 2:.3f}", "X-Deadline-Ms": deadline}]
    assert ask(handler, [{"body": RED}], headers)[0].status == 200

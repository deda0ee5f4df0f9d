"""Captions in a worker: the tokens of transformers' `generate`, whatever else is in the batch."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archive import caption
from beeline import pixels
from beeline.caption import Captioning, Sentence
from beeline.errors import ArchiveError, BadEncoding, BeelineError, DeadlineExceeded, SpecError
from beeline.spec import FILE_NAME, ModelSpec
from beeline.wordpiece import WordPiece
from tests.caption_models import drawn, model_folder
from tests.captions import checkpoint
from tests.conftest import ROOT, write_checksums
from tests.handlers.test_vision_handler import ask, loaded
from vision_handler import VisionHandler

PICTURES = drawn(12)
# Kernels for batches of other sizes round differently.
SCORE = partial(pytest.approx, abs=1e-4)
BROKEN = {b"": 400, b"no picture": 415, PICTURES[0][:40]: 422}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> caption.Checkpoint:
    return caption.load(str(checkpoint(tmp_path_factory.mktemp("blip"))))


@pytest.fixture(scope="module", params=[("openvino", 1), ("openvino", 3), ("onnxruntime", 3)], ids=str)
def handler(
    blip: caption.Checkpoint, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> VisionHandler:
    return loaded(model_folder(blip, tmp_path_factory.mktemp("model") / "export", *request.param))


@pytest.fixture(scope="module")
def folder(blip: caption.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(blip, tmp_path_factory.mktemp("one") / "export", "openvino", 3)


def rows_of(handler: VisionHandler) -> Any:
    return np.stack([pixels.decode(data, handler.spec.geometry) for data in PICTURES])


def asked(data: bytes, **more: object) -> dict[str, bytes]:
    return {"body": json.dumps({"image": base64.b64encode(data).decode(), **more}).encode()}


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_tokens_and_scores_are_those_of_generate(handler: VisionHandler, blip: caption.Checkpoint, prompt: str) -> None:
    task, rows = handler.task, rows_of(handler)
    assert isinstance(task, Captioning)
    expected = caption.reference(blip, rows, dataclasses.replace(task.caption, prompt=prompt))
    sentences = task.write(rows, [task.options(prompt, None)] * len(rows))
    assert [list(each.ids) for each in sentences] == [each.ids for each in expected]
    assert [each.score for each in sentences] == [SCORE(each.score) for each in expected]
    assert [task.text(each) for each in sentences] == [each.text.removeprefix("[DEC]") for each in expected]
    assert len({len(each.ids) for each in sentences}) > 1, "captions of several lengths"


def test_a_caption_depends_on_no_neighbour(handler: VisionHandler) -> None:
    bodies = [
        asked(data, **({"prompt": prompt} if prompt else {}), max_tokens=most)
        for data, prompt, most in zip(PICTURES, ["", "a photo of", "two"] * 4, [12, 1, 12, 3, 12, 5] * 2, strict=True)
    ]
    alone = [ask(handler, [body])[0].json for body in bodies]
    broken = [{"body": body} for body in BROKEN]
    replies = ask(handler, [row for body in bodies for row in (broken[0], body, *broken[1:])])
    assert [each.json for each in replies[1::4]] == [{**each, "score": SCORE(each["score"])} for each in alone]
    for place, status in zip((0, 2, 3), BROKEN.values(), strict=True):
        assert {each.status for each in replies[place::4]} == {status}
    assert all(each["tokens"] <= 12 and 0 < each["score"] <= 1 for each in alone)
    assert alone[1]["caption"].startswith("a photo of")


def test_a_form_carries_a_prompt_as_json_does(handler: VisionHandler) -> None:
    form = {"data": PICTURES[3], "prompt": b"a photo of", "max_tokens": b"4"}
    first, second = ask(handler, [form, asked(PICTURES[3], prompt="a photo of", max_tokens=4)])
    assert (first.status, first.json) == (200, {**second.json, "score": SCORE(second.json["score"])})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_tokens": 13}, "max_tokens is 13; allowed: 1 to 12"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 to 12"),
        ({"max_tokens": "many"}, "max_tokens is 'many'; send a whole number"),
        ({"max_tokens": True}, "max_tokens is 'True'; send a whole number"),
        ({"prompt": "red " * 20}, "the prompt has 20 tokens; allowed: 19, with 12 tokens after it"),
        ({"prompt": ["red"]}, "send a text of at most 1000 characters"),
    ],
)
def test_an_impossible_wish_is_one_pictures_400(handler: VisionHandler, more: Any, message: str) -> None:
    good, bad = ask(handler, [{"body": PICTURES[0]}, asked(PICTURES[0], **more)])
    assert (good.status, bad.status) == (200, 400)
    assert message in bad.json["message"]


def test_logits_that_are_no_numbers_fail_one_picture(handler: VisionHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = handler.task
    expected = [each.json for each in ask(handler, [{"body": data} for data in PICTURES[:3]])]
    step, broken = task._step, [True]

    def broken_once(inputs: Any) -> Any:
        logits, present = step(inputs)
        logits[1] = np.nan if broken.pop() else logits[1]
        broken.append(False)
        return logits, present

    monkeypatch.setattr(task, "_step", broken_once)
    replies = ask(handler, [{"body": data} for data in PICTURES[:3]])
    assert [each.status for each in replies] == [200, 500, 200]
    assert [each.json["caption"] for each in replies[::2]] == [each["caption"] for each in expected[::2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [6, 3]}, r"golden/0\.\w+ gets the tokens \[.*\], expected \[6, 3\]"),
        ({"top": [["a", 0.9999]]}, r"gets the score 0\.\d+, expected 1.000 within 0"),
    ],
)
def test_a_model_that_writes_otherwise_does_not_start(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / "golden" / "expected.json").read_text())
    values["pictures"][0] |= change
    (copy / "golden" / "expected.json").write_text(json.dumps(values))
    write_checksums(copy, ModelSpec.load(copy))
    with pytest.raises(ArchiveError, match=message):
        loaded(copy)


@pytest.mark.parametrize("name", ["decoder.bin", "tokenizer.json", "decoder.xml"])
def test_a_file_that_was_changed_does_not_start(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(BeelineError, match=f"{name} is .* it was changed since"):
        loaded(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "caption is None; allowed: a decoder and a tokenizer"),
        ({"labels": ("a", "b")}, "labels is .*; allowed: none where task is 'caption'"),
        ({"engine": "torch"}, "engine is 'torch'; allowed: openvino, onnxruntime for captions"),
        ({"task": "captions"}, "task is 'captions'; did you mean 'caption'"),
        ({"task": "classify"}, "caption is Caption.*; allowed: none where task is 'classify'"),
    ],
)
def test_a_spec_that_cannot_be(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(ModelSpec.load(folder), **change)


@pytest.mark.parametrize("beams", [0, 17])
def test_a_number_of_beams_that_cannot_be(folder: Path, beams: int) -> None:
    spec = ModelSpec.load(folder)
    assert spec.caption is not None
    with pytest.raises(SpecError, match=f"caption.beams is {beams}; allowed: 1 to 16"):
        dataclasses.replace(spec, caption=dataclasses.replace(spec.caption, beams=beams))


def test_a_prompt_has_no_more_tokens_however_many_positions_there_are(
    handler: VisionHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = handler.task
    monkeypatch.setattr(task, "caption", dataclasses.replace(task.caption, positions=512))
    assert len(task.options("red " * 64, None).ids) == 65
    with pytest.raises(BadEncoding, match="the prompt has 65 tokens; allowed: 64"):
        task.options("red " * 65, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beams": 9}, "caption.beams is 9; allowed: at most half of 16"), ({"prompt": "a " * 20}, "at most 19")],
)
def test_an_archive_whose_captions_cannot_be_written_does_not_start(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copy, spec = Path(shutil.copytree(folder, tmp_path / "copy")), ModelSpec.load(folder)
    assert spec.caption is not None
    changed = dataclasses.replace(spec, caption=dataclasses.replace(spec.caption, **change))
    changed.save(copy / FILE_NAME)
    write_checksums(copy, changed)
    with pytest.raises(SpecError, match=message):
        loaded(copy)


def test_a_worker_imports_neither_pytorch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vision_handler import VisionHandler; handler = VisionHandler(); "
        f"handler.load(Path({str(folder)!r})); "
        "sys.exit(', '.join({'torch', 'transformers', 'tokenizers', 'beeline.classification'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "handlers", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_becomes_the_tokens_of_berts_own_tokenizer(blip: caption.Checkpoint, folder: Path) -> None:
    words = WordPiece(folder / "tokenizer.json")
    texts = ["a photo of", "A Réd circle,two!", "reds squares xyz", " \t", "a\u0000b\u4e2d red", "left-two", "##s"]
    texts += ["€5", "°c", "😀a", "man's", "a\ufffdb", "a\U00020000b", "two$a^a", "a\u2028b\u200bc\x1fd"]
    for text in texts:
        assert words.encode(text) == blip.tokenizer(text, add_special_tokens=False).input_ids, text
    assert words.decode([0, 6, 8, 10, 12, 3]) == "a ofs blue"


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "normalizer": {"type": "NFC"}}')
    with pytest.raises(ArchiveError, match=r"tokenizer\.json is no tokenizer that this worker reads .*BPE after NFC"):
        WordPiece(tmp_path / "tokenizer.json")


def test_the_prompt_is_part_of_the_text_and_not_counted(handler: VisionHandler) -> None:
    task: Any = handler.task
    assert task.text(Sentence((6, 7), (8, 3), 0.5)) == "a photo of"


def test_a_request_past_its_deadline_ends_between_steps(handler: VisionHandler) -> None:
    task: Any = handler.task
    crops = np.stack([pixels.decode(PICTURES[0], handler.spec.geometry)] * 2)
    options = task.options("", None)
    late, other = task.write(crops, [dataclasses.replace(options, end=time.time() - 1), options])
    assert isinstance(late, DeadlineExceeded)
    assert "no caption in time, after 0 tokens" in str(late)
    assert other == task.write(crops[:1], [options])[0]

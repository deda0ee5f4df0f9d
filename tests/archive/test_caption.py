"""The graphs of a captioning model write what transformers writes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archive import build, caption, inspect, mar
from archive.export import ExportRequest
from archive.goldens import scenes
from archive.triton import graph
from archive.variants import caption as variants
from archive.variants.agreement import Gate
from beeline.caption import Sentence
from beeline.engines.onnxruntime import INPUT
from beeline.errors import ArchiveError, ConfigError, SpecError
from beeline.spec import EXPECTED, GOLDEN, ModelSpec
from host import silent
from tests.captions import SIDE, checkpoint


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def loaded(blip: Path) -> caption.Checkpoint:
    return caption.load(str(blip))


@pytest.fixture(scope="module")
def exported(loaded: caption.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    request = ExportRequest("tiny", "1.0", (), loaded.preprocessing, "blip")
    caption.export(loaded, request, folder, max_tokens=10)
    return folder


@pytest.fixture(scope="module")
def converted(exported: Path) -> Path:
    """The variant for OpenVINO."""
    out = exported.with_name("openvino")
    variants.make(exported, out, variants.VARIANTS[1], None, Gate())
    return out


def test_a_masked_token_adds_exactly_nothing(exported: Path) -> None:
    from onnxruntime import InferenceSession

    encoder, decoder = (InferenceSession(exported / name) for name in (caption.ENCODER, caption.DECODER))
    (cross,) = encoder.run(None, {INPUT: np.zeros((1, SIDE, SIDE, 3), np.uint8)})
    past = np.zeros((1, 1, *cross.shape[1:3], 2, cross.shape[4]), np.float32)
    ids, mask = np.array([[[5]]]), np.array([[0, 0, 1]], np.float32)
    inputs = {"ids": ids, "positions": np.zeros((1, 1), np.int64), "mask": mask, caption.CROSS: cross}
    first, second = (decoder.run(None, {**inputs, "past": past + each})[0] for each in (0, np.float32(1e3)))
    np.testing.assert_array_equal(first, second)


def test_a_built_archive_is_verified_by_its_captions_and_has_a_card(converted: Path, tmp_path: Path) -> None:
    built = build.build(converted, tmp_path)
    assert built.verified
    assert built.verified.pictures == 4
    rows = dict(inspect.card(built.path).rows())
    assert rows["captions"] == "at most 10 tokens, greedy"
    assert {"channels", "normalisation", "exif"} <= set(rows["they notice"].split(", "))
    golden = json.loads((converted / GOLDEN / EXPECTED).read_text())["pictures"][0]["top"][0][0]
    assert mar.read(built.path).goldens[0].label == golden


def test_another_build_of_the_same_export_has_the_same_bytes(converted: Path, tmp_path: Path) -> None:
    one, other = (build.build(converted, tmp_path / name, check=False).sha256 for name in ("a", "b"))
    assert one == other


def test_captions_agree_by_their_tokens_and_a_failed_one_is_another() -> None:
    one, other, near = Sentence((), (4, 3), 0.5), Sentence((), (5, 3), 0.5), Sentence((), (4, 3), 0.4)
    agreement = variants.compared([one, one, one], [near, other, ModuleNotFoundError()], "drawn")
    assert agreement.top1 == pytest.approx(1 / 3, abs=1e-4)
    assert agreement.moved == 0.5


def test_int8_is_refused_where_captions_or_scores_move_too_far(exported: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(130):
        scenes.draw(random.Random(number), (48, 40))[0].save(pictures / f"{number}.png")
    asked, given = (None, "int8"), (pictures, None)
    with pytest.raises(ArchiveError, match=r"openvino int8 is refused: .*scores? .*moves|refused: .* of the captions"):
        variants.prepare(exported, tmp_path, asked, given, (1.0, 0.0), "full", silent)


@pytest.mark.parametrize(
    ("asked", "given", "decoding", "words"),
    [
        (("torch", None), (None, None), "full", "no torch fp32 of a captioning model"),
        ((None, "int8"), (None, None), "full", "--pictures"),
        (("openvino", None), (Path("x"), None), "full", "leave them out"),
        ((None, None), (None, None), "scaled", "squashed"),
    ],
)
def test_an_impossible_variant_gets_a_sentence(
    asked: Any, given: Any, decoding: str, words: str, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        variants.prepare(exported, tmp_path, asked, given, (1.0, 0.1), decoding, silent)


def test_one_step_for_triton_writes_the_golden_captions(exported: Path, tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    from beeline import pixels

    spec = ModelSpec.load(exported)
    entries = json.loads((exported / GOLDEN / EXPECTED).read_text())["pictures"]
    paths = [exported / GOLDEN / entry["file"] for entry in entries]
    tensors, warmups = graph.write(exported, spec, paths, tmp_path / "model.onnx")
    assert 'name: "input_ids" data_type: TYPE_INT64 dims: -1' in tensors
    assert not warmups
    step = InferenceSession(tmp_path / "model.onnx")
    for path, entry in zip(paths, entries, strict=True):
        crop = pixels.decode(path.read_bytes(), spec.geometry).transpose(2, 0, 1)[None].astype(np.float32)
        ids = [5]
        while len(ids) <= len(entry["ids"]):
            given = np.array([ids], np.int64)
            inputs = {"pixel_values": crop, "input_ids": given, "attention_mask": np.ones_like(given)}
            ids.append(int(step.run(None, inputs)[0][0, -1].argmax()))
        assert ids[1:] == entry["ids"]


@pytest.mark.parametrize(
    ("writing", "words"),
    [
        ({"beams": 9}, "caption.beams is 9; allowed: at most half of 16"),
        ({"beams": 17}, "caption.beams is 17; allowed: 1 to 16"),
        ({"max_tokens": 32}, "caption.max_tokens is 32; allowed: 1 to 31"),
        ({"prompt": "a " * 12}, "caption.prompt is '12 tokens long'; allowed: at most 11"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_exported(
    writing: Any, words: str, loaded: caption.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "write", None)
    request = ExportRequest("tiny", "1.0", (), loaded.preprocessing, "blip")
    with pytest.raises(SpecError, match=words):
        caption.export(loaded, request, tmp_path / "export", **{"max_tokens": 20, **writing})


def test_ones_own_golden_pictures_get_a_turned_one(loaded: caption.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for number in range(2):
        scenes.draw(random.Random(number), (90, 60))[0].save(tmp_path / "own" / f"{number}.png")
    request = ExportRequest("tiny", "1.0", (), loaded.preprocessing, "blip", golden_pictures=tmp_path / "own")
    caption.export(loaded, request, tmp_path / "export", max_tokens=10)
    record = json.loads((tmp_path / "export" / GOLDEN / EXPECTED).read_text())
    assert [entry["file"] for entry in record["pictures"]] == ["0.png", "1.png", "2.jpg"]
    assert "exif" in record["detects"]


def test_a_drawn_picture_is_told_by_its_caption() -> None:
    drawn = [scenes.draw(random.Random(seed), (80, 60))[1] for seed in range(300)]
    assert len(set(drawn)) > 250
    assert {len(words.split()) for words in drawn} >= {3, 5, 7, 13}
    assert scenes.draw(random.Random(1), (80, 60))[0].tobytes() == scenes.draw(random.Random(1), (80, 60))[0].tobytes()


def test_the_licence_is_that_of_the_model_card(tmp_path: Path) -> None:
    assert caption.licence(tmp_path) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# BLIP\n")
    assert caption.licence(tmp_path) == "bsd-3-clause"


def test_bin_weights_load_as_safetensors_do(blip: Path, loaded: caption.Checkpoint, tmp_path: Path) -> None:
    folder = _copied(blip, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(loaded.model.state_dict(), folder / "pytorch_model.bin")
    again = caption.load(str(folder)).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.state_dict().items())


def _copied(blip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(blip, tmp_path / "copy"))


def _replace(name: str, old: str, new: str) -> Any:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def _remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_replace("config.json", "BlipForConditionalGeneration", "BlipForQuestionAnswering"), "QuestionAnswering"),
        (_replace("config.json", '"model_type": "blip"', '"model_type": "bert"'), "BlipForConditionalGeneration"),
        (_remove("config.json"), "no config.json"),
        (_remove("vocab.txt", "tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
        (_remove("preprocessor_config.json"), "no image processor"),
        (_replace("preprocessor_config.json", '"height": 32', '"height": 64'), "resizes to"),
        (_replace("preprocessor_config.json", '"do_normalize": true', '"do_normalize": false'), "normalise"),
        (_cut, "no weights that can be read"),
        (_replace("config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'), "lacks"),
    ],
)
def test_a_bad_checkpoint_gets_a_sentence(spoil: Any, words: str, blip: Path, tmp_path: Path) -> None:
    folder = _copied(blip, tmp_path)
    spoil(folder)
    with pytest.raises(ArchiveError, match=words) as caught:
        caption.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)

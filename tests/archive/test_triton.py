"""A repository for Triton: the form of `config.pbtxt`, the warm-up's files, and the graph with float input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner, Result

from archive.build import build
from archive.export import export_folder
from archive.mar import read
from archive.triton import Numbers, export, graph
from beeline import pixels
from beeline.errors import ArchiveError, BeelineError
from beeline.spec import ModelSpec
from cli import archive
from tests.archive.test_onnx_graph import load_network, model, own_pictures, request, saved

_TOKEN = re.compile(r'\s*([{}]|[\w.-]+:?|"(?:[^"\\]|\\.)*")')


def parsed(path: Path) -> dict[str, list[Any]]:
    """Read the text format of Protocol Buffers: every field is a list."""
    tokens = iter(_TOKEN.findall(path.read_text()))

    def message() -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {}
        for token in tokens:
            if token == "}":
                break
            if token.endswith(":"):
                value = next(tokens)
                fields.setdefault(token[:-1], []).append(value if value[0].isupper() else json.loads(value))
            else:
                assert next(tokens) == "{"
                fields.setdefault(token, []).append(message())
        return fields

    return message()


def test_a_repository_has_the_archive_its_numbers_and_its_goldens(colour_archive: Path, tmp_path: Path) -> None:
    folder = export(colour_archive, tmp_path, Numbers(8, 3, instances=2, preferred=(4, 8), queue=100))
    assert folder == tmp_path / "colours"
    config = parsed(folder / "config.pbtxt")
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["colours"], ["python"], [8])
    (batching,) = config["dynamic_batching"]
    assert batching["preferred_batch_size"] == [4, 8]
    assert batching["max_queue_delay_microseconds"] == [3000]
    assert batching["default_queue_policy"] == [{"max_queue_size": [100]}]
    assert config["instance_group"] == [{"count": [2], "kind": ["KIND_CPU"]}]
    assert config["version_policy"] == [{"all": [{}]}]
    kinds = {each["name"][0]: (each["data_type"][0], each["dims"]) for each in config["input"] + config["output"]}
    assert kinds == {
        "picture": ("TYPE_STRING", [1]),
        "bytes": ("TYPE_UINT8", [-1]),
        "answer": ("TYPE_STRING", [1]),
        "http": ("TYPE_STRING", [1]),
        "scores": ("TYPE_FP32", [3]),
    }
    assert config["input"][1]["allow_ragged_batch"] == [True]
    assert [(each["name"], each["batch_size"]) for each in config["model_warmup"]] == [
        (["0.png x 1"], [1]),
        (["1.png x 1"], [1]),
        (["0.png x 8"], [8]),
    ]
    golden = read(colour_archive).golden_bytes()
    assert (folder / "warmup" / "0.png").read_bytes() == len(golden).to_bytes(4, "little") + golden
    assert (folder / "labels.txt").read_text().split() == ["red", "green", "blue"]
    assert (folder / "1" / "archive" / "golden" / "0.png").read_bytes() == golden
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["archive", "context.py", "model.py"]


def call(*words: object) -> Result:
    return CliRunner().invoke(archive.app, ["export", *map(str, words), "--to", "triton"])


def test_the_command_takes_the_numbers_of_the_configuration(
    colour_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.properties"
    entry = {"minWorkers": 3, "batchSize": 16, "maxBatchDelay": 7}
    file.write_text(f"models={json.dumps({'colours': {'1.0': entry}})}\njob_queue_size=50\n")
    out = tmp_path / "repository"
    monkeypatch.setenv("BATCH_SIZE", "4")
    made = call(colour_archive, "--out", out, "--config", file, "--json")
    values = json.loads(made.stdout)
    assert [values[key] for key in ("batch_size", "delay", "instances", "queue")] == [4, 7, 3, 50]
    # Another version goes beside it; on GPUs one instance each, unless the file has another number.
    again = call(colour_archive, "--out", out, "--number", 2, "--gpus", "1,0", "--preferred", "2")
    assert again.exit_code == 0, again.exception
    config = parsed(out / "colours" / "config.pbtxt")
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "gpus": [0, 1]}]
    assert (out / "colours" / "1" / "model.py").is_file()
    assert (out / "colours" / "2" / "model.py").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "pyton"), r"--backend is 'pyton'; did you mean 'python'\?"),
        (("--preferred", "9"), "--preferred has 9; allowed: 1 to the batch size, which is 8"),
        (("--gpus", "all"), "--gpus is 'all'; allowed: whole numbers with commas"),
        (("--backend", "onnxruntime"), "colours 1.0 is for the engine torch, .*build --engine onnxruntime"),
        (("--to", "trito"), r"--to is 'trito'; did you mean 'triton'\?"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    colour_archive: Path, tmp_path: Path, words: tuple[str, str], message: str
) -> None:
    out = tmp_path / "repository"
    wrong = CliRunner().invoke(
        archive.app, ["export", str(colour_archive), "--to", "triton", "--out", str(out), *words]
    )
    assert isinstance(wrong.exception, BeelineError)
    assert re.search(message, str(wrong.exception))
    assert not list(out.rglob("model.py"))


def test_a_version_that_is_there_is_not_replaced(colour_archive: Path, tmp_path: Path) -> None:
    export(colour_archive, tmp_path, Numbers())
    with pytest.raises(ArchiveError, match=r"colours/1 exists; remove it, or give another --number"):
        export(colour_archive, tmp_path, Numbers())


def test_the_onnx_repository_takes_floats_and_answers_the_goldens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model()
    golden = own_pictures(tmp_path / "golden", made, 8)
    asked = request(golden, blind_to=("exif", "normalisation", "channels"))
    spec = export_folder(load_network(saved(tmp_path, made)), asked, tmp_path / "export")
    mar = build(tmp_path / "export", tmp_path / "store").path
    folder = export(mar, tmp_path / "repository", Numbers(4), graph=graph.write)
    config = parsed(folder / "config.pbtxt")
    high, wide = spec.geometry.shape
    assert config["input"] == [{"name": ["pixel_values"], "data_type": ["TYPE_FP32"], "dims": [3, high, wide]}]
    assert (config["output"][0]["name"], config["output"][0]["dims"]) == (["logits"], [len(spec.labels)])
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixel_values", "tensor(float)", [3, high, wide])
    assert out.name == "logits"
    # The warm-up's file is the first golden picture, as the client has to send it.
    picture = np.frombuffer((folder / "warmup" / "0.png").read_bytes(), np.float32).reshape(1, 3, high, wide)
    first = next(iter((tmp_path / "export" / "golden").glob("0.*")))
    decoded = pixels.decode(first.read_bytes(), ModelSpec.load(tmp_path / "export").geometry)
    np.testing.assert_array_equal(picture[0].transpose(1, 2, 0), decoded)
    (label,) = session.run(None, {"pixel_values": picture})[0].argmax(axis=1)
    assert spec.labels[label] == read(mar).goldens[0].label
    # A graph that answers otherwise is not written.
    monkeypatch.setattr(graph, "_PERMUTATION", [0, 3, 2, 1])
    with pytest.raises(BeelineError):
        export(mar, tmp_path / "other", Numbers(4), graph=graph.write)
    assert not list((tmp_path / "other").rglob("model.onnx"))

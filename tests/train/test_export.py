"""A run's export and its answers: by the exported model, as its checkpoint answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import train.export
from archive.export import ExportRequest
from beeline import golden, pixels
from beeline.errors import SpecError
from beeline.spec import Lineage, ModelSpec
from cli.main import app
from tests import digests
from train.config import ExportConfig
from train.data import labelled_pictures
from train.errors import RunError
from train.evaluate import evaluate, warmed
from train.export import export, network
from train.generate import generate
from train.model import normalised
from train.predictor import RunPredictor
from train.runs import Run, finish, open_run


@pytest.fixture
def copy(exported: Run, tmp_path: Path) -> Run:
    return open_run(Path(shutil.copytree(exported.folder, tmp_path / "run")))


def test_the_export_says_where_the_model_comes_from(exported: Run) -> None:
    spec = ModelSpec.load(exported.export)
    assert (spec.name, spec.version, spec.labels) == ("squeezenet1_1", "1.0", ("circles", "stripes"))
    assert (spec.geometry.resize, spec.geometry.crop) == (72, 64)
    assert spec.model.architecture == "squeezenet1_1"
    assert (spec.provenance.weights, spec.provenance.licence) == ("squeezenet.pth", "unknown")
    assert not spec.provenance.generated
    record = exported.record
    lineage = Lineage(record["data"]["digest"], exported.fingerprint, record["weights"]["sha256"])
    assert spec.provenance.lineage == lineage
    assert str(lineage).startswith(f"data {lineage.data[:12]}, run {lineage.run[:12]}, weights ")
    assert spec.accuracy is not None
    assert (spec.accuracy.top1, spec.accuracy.pictures) == (exported.accuracy, 8)


def test_an_export_is_kept_until_its_version_or_what_it_says_changes(
    copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ExportRequest] = []
    monkeypatch.setattr("archive.export.export_folder", lambda network, request, folder: made.append(request))
    assert export(copy) == ModelSpec.load(copy.export)
    assert made == []
    # The export had no version at first: it was a digest of source files.
    (copy.folder / "exported_by").write_text("0" * 64)
    export(copy)
    monkeypatch.setattr("train.export.EXPORT", train.export.EXPORT + 1)
    # A predictor takes the export that is there.
    assert RunPredictor(copy.folder).spec.name == "squeezenet1_1"
    assert len(made) == 1
    export(copy)
    run = finish(copy.folder, {**copy.record, "data": {**copy.record["data"], "generated": True}})
    export(run, ExportConfig("bees", "2.0", 1))
    assert [request.name for request in made] == ["squeezenet1_1", "squeezenet1_1", "bees"]
    assert (made[2].version, made[2].top_k, made[2].provenance.generated) == ("2.0", 1, True)


def test_the_code_that_makes_an_export_is_the_recorded_one() -> None:
    digests.check("EXPORT")


def test_a_run_answers_as_its_checkpoint(exported: Run, drawn: Path) -> None:
    run, predictor, model = exported, RunPredictor(exported.folder), exported.config().model
    pictures = [picture.path.read_bytes() for picture in labelled_pictures(drawn).pictures]
    crops = np.stack([pixels.decode(data, model.geometry) for data in pictures])
    with torch.inference_mode():
        planes = normalised(torch.from_numpy(crops).permute(0, 3, 1, 2), model.mean, model.std)
        expected = network(run)(planes).softmax(1).numpy()
    for answer, row in zip(predictor.predict(pictures), expected, strict=True):
        assert [answer.json()[label] for label in run.labels] == pytest.approx(row.tolist(), abs=1e-4)
    assert evaluate(predictor.predict, labelled_pictures(drawn)).top1 == run.accuracy
    assert [answer.status for answer in predictor.predict([b"no picture", pictures[0]])] == [415, 200]


def test_a_calibrated_run_is_exported_again_and_answers_at_its_temperature(copy: Run, drawn: Path) -> None:
    pictures = labelled_pictures(drawn)
    before = evaluate(RunPredictor(copy.folder, all_labels=True).predict, pictures)
    assert ModelSpec.load(copy.export).temperature is None
    run = finish(copy.folder, {**copy.record, "temperature": 4.0, "not_sure_under": 0.75})
    spec = export(run)
    assert (spec.temperature, spec.not_sure_under) == (4.0, 0.75)
    predictor = RunPredictor(run.folder)
    assert golden.replay(run.export, spec, predictor.engine.forward) > 0
    expected = warmed(before, 1 / 4)
    after = evaluate(predictor.predict, pictures)
    assert [one.answer for one in after.judged] == [one.answer for one in before.judged]
    for one, other in zip(after.judged, expected.judged, strict=True):
        assert dict(one.answers) == pytest.approx(dict(other.answers), abs=1e-4)


def test_calibrating_by_the_command_leaves_out_what_was_trained_on_and_keeps_what_it_found(
    copy: Run, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.runs.RUNS", copy.folder.parent)
    # All pictures in one folder a label: 16 of the 24 were trained on.
    for half in ("train", "val"):
        for path in (drawn / half).rglob("*.png"):
            (tmp_path / "all" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "all" / path.parent.name / f"{half}-{path.name}")
    few = CliRunner().invoke(app, ["evaluate", "latest", "--data", str(tmp_path / "all"), "--calibrate"]).exception
    assert re.search(r"of 8 answered pictures are right, which shows no temperature; name 20 or more", str(few))
    # 24 more, of which two lie in the other label's folder.
    for path in (generate(tmp_path, 7, 1, 12) / "val").rglob("*.png"):
        label = path.parent.name if path.name != "000.png" else {"circles": "stripes"}.get(path.parent.name, "circles")
        shutil.copy(path, tmp_path / "all" / label / f"more-{path.parent.name}-{path.name}")
    words = ["evaluate", "latest", "--data", str(tmp_path / "all"), "--calibrate", "--json"]
    done = CliRunner().invoke(app, [*words, "--report", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.exception
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["pictures"] == 32
    assert values["notes"][0] == "16 of 48 pictures are left out, since latest was trained on them."
    assert values["notes"][1] == f"latest was trained from {ModelSpec.load(copy.export).provenance.lineage}."
    found = values["calibration"]["temperature"]
    assert ModelSpec.load(copy.export).temperature == open_run(copy.folder).record["temperature"] == found
    assert f"has the temperature {found:g} now" in (tmp_path / "report.html").read_text()
    again = CliRunner().invoke(app, words)
    assert json.loads(again.stdout.splitlines()[-1])["calibration"]["temperature"] == pytest.approx(found, rel=0.02)
    (tmp_path / "all/circles").rename(tmp_path / "all/discs")
    refused = CliRunner().invoke(app, words).exception
    assert "has the label 'discs', which is no label of the model (circles, stripes)" in str(refused)
    words[words.index("--data") + 1] = str(drawn / "train")
    assert "the run was trained on all pictures of" in str(CliRunner().invoke(app, words).exception)


def test_a_folder_that_is_neither_run_nor_export_has_its_sentence(tmp_path: Path, copy: Run) -> None:
    with pytest.raises(RunError, match="was not finished"):
        RunPredictor(tmp_path)
    (copy.export / "model_spec.json").write_text("{")
    with pytest.raises(SpecError, match=r"model_spec\.json cannot be read"):
        RunPredictor(copy.export)


def test_a_lost_or_foreign_checkpoint_has_its_sentence(copy: Run) -> None:
    text = (copy.folder / "config.yaml").read_text()
    (copy.folder / "config.yaml").write_text(text.replace("squeezenet1_1", "resnet18"))
    with pytest.raises(
        RunError, match=r"checkpoint\.pth is damaged or of another architecture \(.* lacks .*; train again"
    ):
        network(copy)
    copy.checkpoint.write_bytes(b"junk")
    with pytest.raises(
        RunError, match=r"checkpoint\.pth is damaged or .*\(.* is no file that torch\.save wrote.*; train again"
    ):
        network(copy)
    copy.checkpoint.unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pth is missing; train again"):
        network(copy)

"""A run's answers: the export's, the checkpoint's, and both the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import train.export
from beeline.errors import SpecError
from beeline.spec import ModelSpec
from tests import digests
from train.config import ExportConfig
from train.data import labelled_pictures
from train.errors import RunError
from train.evaluate import evaluate
from train.export import description, export, network
from train.predictor import RunPredictor
from train.runs import Run, open_run


@pytest.fixture(scope="module")
def exported(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_run(Path(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("exported") / "run")))
    export(run)
    return run


def test_the_export_says_where_the_model_comes_from(exported: Run) -> None:
    spec = ModelSpec.load(exported.export)
    assert (spec.name, spec.version, spec.labels) == ("squeezenet1_1", "1.0", ("circles", "stripes"))
    assert (spec.geometry.resize, spec.geometry.crop) == (72, 64)
    assert spec.model.architecture == "squeezenet1_1"
    assert spec.provenance.weights == "squeezenet.pth"
    assert spec.provenance.licence == "unknown"
    assert not spec.provenance.generated
    assert spec.accuracy is not None
    assert (spec.accuracy.top1, spec.accuracy.pictures) == (exported.accuracy, 8)


def test_an_export_that_says_the_same_is_kept(exported: Run) -> None:
    before = (exported.export / "model_spec.json").stat().st_mtime_ns
    export(exported)
    assert (exported.export / "model_spec.json").stat().st_mtime_ns == before


def test_an_export_of_another_version_of_the_code_is_made_again(
    exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(Path(shutil.copytree(exported.folder, tmp_path / "run")))
    spec = ModelSpec.load(run.export)
    # As it was before the export had a version: a digest of source files.
    (run.folder / "exported_by").write_text("0" * 64)
    (run.export / "golden" / "0.jpg").unlink()
    assert export(run) == spec
    assert (run.export / "golden" / "0.jpg").is_file()
    (run.export / "golden" / "0.jpg").unlink()
    monkeypatch.setattr("train.export.EXPORT", train.export.EXPORT + 1)
    assert export(run) == spec
    assert (run.export / "golden" / "0.jpg").is_file()


def test_the_code_that_makes_an_export_is_the_recorded_one() -> None:
    digests.check("EXPORT")


def test_an_export_under_another_name_replaces_it(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(Path(shutil.copytree(tiny_run.folder, tmp_path / "run")))
    assert export(run).name == "squeezenet1_1"
    assert export(run, ExportConfig("bees", "2.0", 1)).name == "bees"
    spec = ModelSpec.load(run.export)
    assert (spec.name, spec.version, spec.top_k) == ("bees", "2.0", 1)


def test_export_and_checkpoint_answer_alike(exported: Run, drawn: Path) -> None:
    pictures = [picture.path.read_bytes() for picture in labelled_pictures(drawn).pictures]
    first, second = RunPredictor(exported.folder), RunPredictor(exported.folder, checkpoint=True)
    assert (first.source, second.source) == (exported.export, exported.checkpoint)
    for one, two in zip(first.predict(pictures), second.predict(pictures), strict=True):
        assert one.json().keys() == two.json().keys()
        assert np.allclose(list(one.json().values()), list(two.json().values()), atol=1e-4)


def test_the_accuracy_is_the_one_the_fit_measured(tiny_run: Run, drawn: Path) -> None:
    assert evaluate(RunPredictor(tiny_run.folder).predict, labelled_pictures(drawn)).top1 == tiny_run.accuracy


def test_a_bad_picture_among_good_ones_gets_its_own_answer(tiny_run: Run, drawn: Path) -> None:
    good = (drawn / "val/circles/000.png").read_bytes()
    predictor = RunPredictor(tiny_run.folder)
    alone = predictor.predict([good])[0]
    answers = predictor.predict([b"", good, b"no picture", good, good[:500]])
    assert [answer.status for answer in answers] == [400, 200, 415, 200, 422]
    assert answers[1].body == answers[3].body
    assert np.allclose(list(answers[1].json().values()), list(alone.json().values()), atol=1e-4)
    assert predictor.predict([b"no picture"])[0].status == 415


def test_an_exported_folder_alone_answers_too(exported: Run) -> None:
    assert RunPredictor(exported.export).spec.name == "squeezenet1_1"


def test_what_is_neither_run_nor_export_has_its_sentence(tmp_path: Path, exported: Run) -> None:
    with pytest.raises(RunError, match="was not finished"):
        RunPredictor(tmp_path)
    broken = Path(shutil.copytree(exported.export, tmp_path / "export"))
    (broken / "model_spec.json").write_text("{")
    with pytest.raises(SpecError, match=r"model_spec\.json cannot be read"):
        RunPredictor(broken)


def test_a_lost_or_foreign_checkpoint_has_its_sentence(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(Path(shutil.copytree(tiny_run.folder, tmp_path / "run")))
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("squeezenet1_1", "resnet18"))
    with pytest.raises(RunError, match=r"checkpoint\.pth is not of resnet18 \("):
        network(run)
    run.checkpoint.unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pth is missing; train again"):
        network(run)


def test_generated_pictures_are_marked_in_the_spec(tiny_run: Run) -> None:
    record = {**tiny_run.record, "data": {**tiny_run.record["data"], "generated": True}}
    assert description(Run(tiny_run.folder, record))["provenance"].generated

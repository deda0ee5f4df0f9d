"""Metrics against scikit-learn-free arithmetic done by hand, and nothing dropped in silence."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score

from beeline.answer import Answer
from beeline.errors import Undetermined
from train.data import LabelledPictures, Picture, labelled_pictures
from train.errors import DataError
from train.evaluate import FAILED, OTHER, Judged, Report, evaluate
from train.predictor import RunPredictor
from train.report import page, write_report
from train.runs import Run

LABELS = ("ant", "bee", "wasp")


def good(**values: float) -> Answer:
    return Answer(200, "OK", json.dumps(values))


@pytest.fixture
def six(tmp_path: Path) -> LabelledPictures:
    """Two pictures a label; their bytes are their names."""
    pictures = []
    for truth, label in enumerate(LABELS):
        for index in range(2):
            path = tmp_path / f"{label}{index}.jpg"
            path.write_bytes(path.stem.encode())
            pictures.append(Picture(path, truth))
    return LabelledPictures(tmp_path, LABELS, tuple(pictures))


ANSWERS = {
    b"ant0": good(ant=0.9, bee=0.06, wasp=0.04),
    b"ant1": good(bee=0.6, ant=0.3, wasp=0.1),
    b"bee0": good(bee=0.5, ant=0.4, wasp=0.1),
    b"bee1": good(hornet=0.99, bee=0.01),
    b"wasp0": Answer(415, "Unsupported Media Type", '{"code": 415, "type": "NotAnImage", "message": "no picture"}'),
    b"wasp1": good(wasp=0.7, bee=0.2, ant=0.1),
}


@pytest.fixture
def report(six: LabelledPictures) -> Report:
    return evaluate(lambda pictures: [ANSWERS[data] for data in pictures], six, batch=4)


def test_the_numbers(report: Report) -> None:
    assert (report.pictures, report.right) == (6, 3)
    assert report.top1 == 0.5
    assert (report.k, report.topk) == (3, 5 / 6)
    assert report.columns == (*LABELS, OTHER, FAILED)
    assert report.confusion() == [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    ant, bee, wasp = report.scores()
    assert (ant.precision, ant.recall, ant.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (bee.precision, bee.recall, bee.f1) == (0.5, 0.5, 0.5)
    assert (wasp.precision, wasp.recall, wasp.pictures) == (1.0, 0.5, 2)


def test_mistakes_are_the_surest_first_and_failures_are_named(report: Report) -> None:
    assert [(one.path.stem, one.answer) for one in report.mistakes()] == [("bee1", "hornet"), ("ant1", "bee")]
    assert {status: [one.path.stem for one in ones] for status, ones in report.failures().items()} == {415: ["wasp0"]}
    assert report.failures()[415][0].message == "no picture"


def test_every_picture_is_asked_for_once_in_full_batches(six: LabelledPictures) -> None:
    sizes: list[int] = []

    def predict(pictures: list[bytes]) -> list[Answer]:
        sizes.append(len(pictures))
        return [ANSWERS[data] for data in pictures]

    evaluate(predict, six, batch=4)
    assert sizes == [4, 2]


def test_the_metrics_are_those_of_torchmetrics(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    truths, answers = (torch.randint(0, 3, (200,), generator=random) for _ in range(2))
    judged = tuple(
        Judged(tmp_path, LABELS[truth], ((LABELS[answer], 1.0),), 200)
        for truth, answer in zip(truths.tolist(), answers.tolist(), strict=True)
    )
    report = Report("x", LABELS, judged)
    assert report.confusion() == multiclass_confusion_matrix(answers, truths, 3).tolist()
    expected = multiclass_f1_score(answers, truths, 3, average=None).tolist()
    assert [score.f1 for score in report.scores()] == pytest.approx(expected)


def test_the_dictionary_is_json_and_the_text_says_what_failed(report: Report) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["top1"], values["pictures"], values["right"]) == (0.5, 6, 3)
    assert values["failures"]["415"][0]["message"] == "no picture"
    assert values["mistakes"][0]["answer"] == "hornet"
    text = report.text()
    assert text.startswith("3 of 6 right: accuracy 0.5000, top-3 0.8333; 1 without a prediction, counted as wrong")
    assert "no prediction, status 415:" in text


def test_a_label_that_is_never_answered_has_no_precision(tmp_path: Path) -> None:
    judged = (Judged(tmp_path, "ant", (("bee", 1.0),), 200), Judged(tmp_path, "bee", (("bee", 1.0),), 200))
    ant, bee = Report("x", ("ant", "bee"), judged).scores()
    assert (ant.precision, ant.recall, ant.f1) == (0.0, 0.0, 0.0)
    assert (bee.precision, bee.recall) == (0.5, 1.0)


def test_all_failing_is_a_report_too(six: LabelledPictures) -> None:
    report = evaluate(lambda pictures: [Answer(503, "Busy", "try later") for _ in pictures], six)
    assert (report.top1, report.topk, report.k) == (0.0, 0.0, 1)
    assert report.failures()[503][0].message == "try later"
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_too_few_answers_are_noticed(six: LabelledPictures) -> None:
    with pytest.raises(ValueError, match="shorter"):
        evaluate(lambda pictures: [ANSWERS[data] for data in pictures[1:]], six)


@pytest.mark.parametrize("body", ["[]", "{}", "hello", '{"ant": "much"}', '"ant"'])
def test_a_200_that_is_no_prediction_has_its_sentence(six: LabelledPictures, body: str) -> None:
    with pytest.raises(Undetermined, match=r"ant0\.jpg is .*, no labels with probabilities"):
        evaluate(lambda pictures: [Answer(200, "OK", body) for _ in pictures], six)


def test_no_pictures_have_their_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        evaluate(lambda pictures: [], LabelledPictures(tmp_path, LABELS, ()))


class Links(HTMLParser):
    """Collects everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.found.append(value or "")
        self.images += tag == "img"


def test_the_page_is_one_file_that_loads_nothing(tiny_run: Run, drawn: Path, tmp_path: Path) -> None:
    pictures = labelled_pictures(drawn)
    report = evaluate(RunPredictor(tiny_run.folder).predict, pictures)
    wrong = Report(report.data, report.labels, tuple(_wronged(one) for one in report.judged))
    text = write_report(wrong, tmp_path / "out" / "report.html", "the run").read_text()
    links = Links()
    links.feed(text)
    assert links.images == len(wrong.mistakes()) == 8
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.found)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def _wronged(one: Judged) -> Judged:
    other = {"circles": "stripes", "stripes": "circles"}[one.truth]
    return Judged(one.path, one.truth, ((other, 0.9), (one.truth, 0.1)), 200)


def test_names_are_escaped_on_the_page(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script>"
    judged = (
        Judged(tmp_path / nasty.replace("/", "_"), nasty, (("bee", 1.0),), 200),
        Judged(tmp_path, "bee", (), 415, nasty),
    )
    text = page(Report(nasty, (nasty, "bee"), judged), nasty).html()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_many_labels_become_a_list_of_the_most_confused(tmp_path: Path) -> None:
    labels = tuple(f"label{index:02}" for index in range(40))
    judged = tuple(Judged(tmp_path, label, ((labels[0], 1.0),), 200) for label in labels)
    text = page(Report("x", labels, judged), "y").html()
    assert "Most confused" in text
    assert "true label \\ answer" not in text

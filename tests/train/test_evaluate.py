"""Scores against arithmetic by hand and torchmetrics; no picture is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import norm
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from beeline.answer import Answer
from beeline.errors import Undetermined
from train.data import LabelledPictures, Picture, labelled_pictures
from train.errors import DataError
from train.evaluate import (
    FAILED,
    OTHER,
    Judged,
    Report,
    answers,
    check_labels,
    compare,
    evaluate,
    temperature,
    unseen,
    warmed,
)

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
    sizes: list[int] = []

    def predict(pictures: list[bytes]) -> list[Answer]:
        sizes.append(len(pictures))
        return [ANSWERS[data] for data in pictures]

    report = evaluate(predict, six, batch=4)
    assert sizes == [4, 2], "every picture is asked for once, in full batches"
    return report


def test_the_numbers(report: Report) -> None:
    assert (report.right, report.top1) == (3, 0.5)
    assert (report.k, report.topk) == (3, 5 / 6)
    assert report.columns == (*LABELS, OTHER, FAILED)
    rows = [list(row.values()) for row in report.confusion().values()]
    assert rows == [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    scores = [list(row.values()) for row in report.scores().values()]
    assert scores == [[2, 1, 0.5, pytest.approx(2 / 3)], [2, 0.5, 0.5, 0.5], [2, 1, 0.5, pytest.approx(2 / 3)]]


def test_the_metrics_are_those_of_torchmetrics_also_for_a_label_that_is_never_answered(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    truths, answers = (torch.randint(0, labels, (200,), generator=random) for labels in (3, 2))
    judged = tuple(
        Judged(tmp_path, LABELS[truth], ((LABELS[answer], 1.0),), 200)
        for truth, answer in zip(truths.tolist(), answers.tolist(), strict=True)
    )
    report = Report("x", LABELS, judged)
    rows = [list(row.values()) for row in report.confusion().values()]
    assert rows == multiclass_confusion_matrix(answers, truths, 3).tolist()
    expected = multiclass_f1_score(answers, truths, 3, average=None).tolist()
    assert [score["f1"] for score in report.scores().values()] == pytest.approx(expected)
    assert report.scores()["wasp"]["precision"] == 0
    assert report.macro_f1 == pytest.approx(float(multiclass_f1_score(answers, truths, 3, average="macro")))


def drawn_report(sharper: float, count: int = 1000) -> Report:
    """Answers whose logits are `sharper` times those by which the true labels were drawn."""
    random = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(count, 3, generator=random)
    truths = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]
    rows = (sharper * logits).softmax(1).double()
    judged = []
    for row, truth in zip(rows.tolist(), truths.tolist(), strict=True):
        pairs = sorted(zip(LABELS, row, strict=True), key=lambda pair: -pair[1])
        judged.append(Judged(Path("x"), LABELS[truth], tuple(pairs), 200))
    return Report("x", LABELS, tuple(judged))


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    report = drawn_report(2)
    rows = [[dict(one.answers)[label] for label in LABELS] for one in report.judged]
    truths = [LABELS.index(one.truth) for one in report.judged]
    expected = multiclass_calibration_error(torch.tensor(rows), torch.tensor(truths), 3, n_bins=10)
    assert report.calibration_error == pytest.approx(float(expected), abs=1e-6)
    assert sum(row[0] for row in report.bins()) == 1000


def test_the_temperature_that_was_drawn_is_found_and_makes_scores_as_sure_as_they_are_right() -> None:
    for sharper in (0.5, 2):
        report = drawn_report(sharper)
        found = temperature(report)
        assert found == pytest.approx(sharper, rel=0.15)
        assert temperature(report, before=3.0) == pytest.approx(3 * found, rel=0.01)
        after = warmed(report, 1 / found)
        assert after.calibration_error < 0.04
        assert (after.top1, after.right) == (report.top1, report.right)
        assert sum(value for _, value in after.judged[0].answers) == pytest.approx(1)
    assert drawn_report(2).calibration_error > 0.05


def test_the_interval_of_the_accuracy_is_wilsons(report: Report) -> None:
    z, n, share = norm.ppf(0.975), 6, 0.5
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert report.interval == pytest.approx((middle - half, middle + half))


def test_two_results_differ_only_by_more_than_chance(report: Report) -> None:
    """McNemar's exact test counts only pictures that one of the two has right."""

    def result(right: str) -> Report:
        answered = {"1": (("ant", 1.0),), "0": (("bee", 1.0),)}
        return Report("x", LABELS, tuple(Judged(Path("x"), "ant", answered[one], 200) for one in right))

    words, p = compare(result("1" * 20 + "10"), result("1" * 20 + "01"))
    assert p == 1
    assert "no more than chance explains" in words
    words, p = compare(result("1" * 18 + "000000"), result("1" * 10 + "0" * 14))
    assert p == pytest.approx(2 * 0.5**8)
    assert words.startswith("accuracy 0.7500 against 0.4167: 8 pictures are right only in the first, 0 only in the sec")
    assert "more than chance (McNemar" in words
    assert compare(report, report)[1] == 1
    with pytest.raises(ValueError, match=r"longer|shorter"):
        compare(report, result("1"))


def test_pictures_that_were_trained_on_are_left_out(six: LabelledPictures) -> None:
    digests = [Picture(one.path, one.truth, f"{i}") for i, one in enumerate(six.pictures)]
    data = LabelledPictures(six.root, LABELS, tuple(digests))
    left = unseen(data, frozenset("0245"))
    assert [one.sha256 for one in left.pictures] == ["1", "3"]
    assert unseen(data, frozenset()) == data
    with pytest.raises(DataError, match="the run was trained on all pictures of"):
        unseen(data, frozenset("012345"))


def test_a_folder_with_other_labels_is_refused(six: LabelledPictures) -> None:
    with pytest.raises(
        DataError, match=r"has the label 'wasp', which is no label of the model \(ant, bee\); name others"
    ):
        check_labels(six, ("ant", "bee"))
    check_labels(six, (*LABELS, "hornet"))
    with pytest.raises(DataError, match=r"has the labels ant, bee, wasp, which are no label of the model \(cat, dog\)"):
        evaluate(lambda pictures: [good(cat=0.9, dog=0.1) for _ in pictures], six)


def test_a_file_that_cannot_be_read_is_answered_by_why_and_its_neighbours_as_ever(six: LabelledPictures) -> None:
    six.pictures[2].path.unlink()
    sent: list[bytes] = []

    def predict(pictures: list[bytes]) -> list[Answer]:
        sent.extend(pictures)
        return [ANSWERS[data] for data in pictures]

    made = answers(predict, [one.path for one in six.pictures])
    assert sent == [b"ant0", b"ant1", b"bee1", b"wasp0", b"wasp1"]
    assert [answer.status for answer in made] == [200, 200, 0, 200, 415, 200]
    report = evaluate(predict, six)
    assert [one.message for one in report.failures()[0]] == ["the file cannot be read (No such file or directory)"]


def test_the_dictionary_is_json_and_the_text_has_tables_mistakes_and_failures(report: Report) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["top1"], values["pictures"], values["right"], values["k"]) == (0.5, 6, 3, 3)
    assert (values["macro_f1"], values["bins"][0]) == (pytest.approx(11 / 18), [1, 0.5, 1.0])
    assert values["labels"]["bee"] == {"pictures": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert values["confusion"]["columns"] == [*LABELS, OTHER, FAILED]
    assert values["confusion"]["rows"]["bee"] == [0, 1, 0, 1, 0]
    assert [(Path(one["path"]).stem, one["message"]) for one in values["failures"]["415"]] == [("wasp0", "no picture")]
    # The surest comes first.
    mistakes = [(Path(one["path"]).stem, one["answer"]) for one in values["mistakes"]]
    assert mistakes == [("bee1", "hornet"), ("ant1", "bee")]
    text = "\n".join(" ".join(line.split()) for line in report.text().splitlines())
    assert text.startswith(
        "3 of 6 right: accuracy 0.5000 (95 % interval 0.188 to 0.812), top-3 0.8333, macro F1 0.6111, "
    )
    assert text.splitlines()[0].endswith("; 1 without a prediction, counted as wrong")
    for line in ("bee 2 0.500 0.500 0.500", "bee 0 1 0 1 0", "0.990 hornet, truly bee: ", "no prediction, status 415:"):
        assert f"\n{line}" in text


def test_scores_of_independent_labels_say_what_right_means(report: Report, six: LabelledPictures) -> None:
    scores = evaluate(lambda pictures: [good(ant=0.9, bee=0.8, wasp=0.1) for _ in pictures], six)
    assert scores.top1 == 2 / 6
    for text in (scores.text(), scores.page("x").html()):
        assert "scores of independent labels: right means that the true label has the highest one" in text
    assert "of independent labels" not in report.text() + report.page("x").html()


def test_a_report_of_failures_alone(six: LabelledPictures) -> None:
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


def test_the_page_shows_the_mistakes_and_escapes_names(drawn: Path) -> None:
    """That a page loads nothing is in tests/bench/test_report.py."""
    nasty = "<script>alert('x')</script>"
    judged = [Judged(one.path, "bee", ((nasty, 0.9),), 200) for one in labelled_pictures(drawn).pictures]
    report = Report(nasty, (nasty, "bee"), (*judged, Judged(drawn / "gone", "bee", ((nasty, 1.0),), 200)))
    text = report.page(nasty).html()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert text.count('src="data:image/jpeg;base64,') == 8
    assert "No such file" in text


def test_many_labels_become_a_list_of_the_most_confused(tmp_path: Path) -> None:
    labels = tuple(f"label{index:02}" for index in range(40))
    judged = tuple(Judged(tmp_path, label, ((labels[0], 1.0),), 200) for label in labels)
    report = Report("x", labels, judged)
    for text in (report.page("y").html(), report.text()):
        assert "Most confused" in text
        assert "true label \\ answer" not in text

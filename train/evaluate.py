"""How right a classifier is on labelled pictures, whatever answers: a run, an archive or a server."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from beeline import pixels
from beeline.answer import Answer
from beeline.errors import RequestError, Undetermined
from beeline.spec import TEMPERATURES
from host.files import listed
from host.report import Chart, Figures, Page, Pictures, Section, Sentences, Table, terminal
from host.report.charts import Bar, Line, bars, plot
from train.data import LabelledPictures
from train.errors import DataError

Predict = Callable[[list[bytes]], list[Answer]]

_SCORES = "The answers are scores of independent labels: right means that the true label has the highest one."
BATCH = 32
TOP_K = 5
# The answer's column in the confusion matrix for a label that no class folder has, and for no answer.
OTHER, FAILED = "(another label)", "(no answer)"
# Of how many labels a confusion matrix can be read, on a page and on a terminal; of more, the largest cells are listed.
_ON_PAGE, _ON_TERMINAL = 30, 12
_PAIRS, _MISTAKES, _FAILURES = 40, 24, 100
# Of the reliability plot, as in Guo et al., On Calibration of Modern Neural Networks (2017).
_BINS = 10
# Fewer answers show no temperature.
_LEAST = 20


@dataclass(frozen=True)
class Judged:
    """One picture, its true label and what was answered: labels with probabilities, best first.

    `answers` is empty where there was no prediction; then `status` and `message` say why.
    """

    path: Path
    truth: str
    answers: tuple[tuple[str, float], ...]
    status: int
    message: str = ""

    @property
    def answer(self) -> str | None:
        """The best label, None without a prediction."""
        return self.answers[0][0] if self.answers else None

    def within(self, k: int) -> bool:
        """Whether the true label is among the `k` best."""
        return self.truth in [label for label, _ in self.answers[:k]]


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`. A picture without a prediction counts as wrong in every number."""

    data: str
    labels: tuple[str, ...]
    judged: tuple[Judged, ...]

    @property
    def right(self) -> int:
        """The number of pictures whose best label is the true one."""
        return sum(one.within(1) for one in self.judged)

    @property
    def top1(self) -> float:
        """Accuracy, 0 to 1."""
        return self.right / len(self.judged)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson's), if the pictures are a random sample."""
        from scipy.stats import binomtest

        low, high = binomtest(self.right, len(self.judged)).proportion_ci(method="wilson")
        return float(low), float(high)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the labels that have pictures."""
        scores = [score["f1"] for score in self.scores().values() if score["pictures"]]
        return sum(scores) / len(scores)

    def bins(self) -> list[tuple[int, float, float]]:
        """Return for each tenth of the scale that occurs: answers, their mean best score, the share that is right."""
        answered = [(one.answers[0][1], one.within(1)) for one in self.judged if one.answers]
        groups = groupby(sorted(answered), lambda pair: min(math.ceil(pair[0] * _BINS), _BINS))
        columns = [list(zip(*pairs, strict=True)) for _, pairs in groups]
        return [(len(right), sum(scores) / len(right), sum(right) / len(right)) for scores, right in columns]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: how far the best score is from the share that is right, in the mean."""
        rows = self.bins()
        return sum(count * abs(score - share) for count, score, share in rows) / (sum(row[0] for row in rows) or 1)

    @property
    def k(self) -> int:
        """The k of `topk`: five, or fewer where no answer held five labels."""
        return min(TOP_K, max((len(one.answers) for one in self.judged), default=1) or 1)

    @property
    def note(self) -> list[str]:
        """What right means where the answers are scores, which may sum to more than 1."""
        return [_SCORES] * any(sum(value for _, value in one.answers) > 1.01 for one in self.judged)

    @property
    def topk(self) -> float:
        """The share of pictures whose true label is among the `k` best."""
        return sum(one.within(self.k) for one in self.judged) / len(self.judged)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a picture can be answered with: the labels, and if they occur another label, no answer."""
        extra = {self._column(one) for one in self.judged} - set(self.labels)
        return (*self.labels, *(name for name in (OTHER, FAILED) if name in extra))

    def confusion(self) -> dict[str, dict[str, int]]:
        """Return the number of pictures by true label and column."""
        pairs, columns = Counter((one.truth, self._column(one)) for one in self.judged), self.columns
        return {truth: {column: pairs[truth, column] for column in columns} for truth in self.labels}

    def scores(self) -> dict[str, dict[str, float]]:
        """Return pictures, precision, recall and F1 by label; a label that is never answered has precision 0."""
        counts, scores = self.confusion(), {}
        for label, row in counts.items():
            hits, shown = row[label], sum(row.values())
            answered = sum(other[label] for other in counts.values())
            precision, recall = hits / answered if answered else 0.0, hits / shown if shown else 0.0
            f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
            scores[label] = {"pictures": shown, "precision": precision, "recall": recall, "f1": f1}
        return scores

    def mistakes(self) -> list[Judged]:
        """Return the wrong predictions, the surest first."""
        wrong = [one for one in self.judged if one.answers and not one.within(1)]
        return sorted(wrong, key=lambda one: -one.answers[0][1])

    def failures(self) -> dict[int, list[Judged]]:
        """Return the pictures without a prediction by HTTP status."""
        failed = sorted((one for one in self.judged if not one.answers), key=lambda one: one.status)
        return {status: list(ones) for status, ones in groupby(failed, lambda one: one.status)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; paths as text, all mistakes and failures named."""
        return {
            "data": self.data,
            "pictures": len(self.judged),
            "right": self.right,
            "top1": self.top1,
            "interval": list(self.interval),
            "k": self.k,
            "topk": self.topk,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "bins": [list(row) for row in self.bins()],
            "labels": self.scores(),
            "confusion": {
                "columns": list(self.columns),
                "rows": {label: list(row.values()) for label, row in self.confusion().items()},
            },
            "mistakes": [
                {"path": str(one.path), "truth": one.truth, "answer": one.answer, "probability": one.answers[0][1]}
                for one in self.mistakes()
            ],
            "failures": {
                str(status): [{"path": str(one.path), "message": one.message} for one in ones]
                for status, ones in self.failures().items()
            },
        }

    def text(self) -> str:
        """Return the report as plain lines for a terminal."""
        failures, wrong = self.failures(), self.mistakes()
        failed = sum(map(len, failures.values()))
        first = f"{self.right} of {len(self.judged)} right: accuracy {self.top1:.4f} ({self._interval()}), "
        first += f"top-{self.k} {self.topk:.4f}, macro F1 {self.macro_f1:.4f}, ECE {self.calibration_error:.4f}"
        first += f"; {failed} without a prediction, counted as wrong" if failed else ""
        lines = [first, *self.note, "", terminal((self._table(), self._confusion(_ON_TERMINAL)))]
        if wrong:
            lines += ["", "surest mistakes:"]
            lines += [
                f"  {one.answers[0][1]:.3f} {one.answer}, truly {one.truth}: {one.path}" for one in wrong[:_MISTAKES]
            ]
        for status, ones in failures.items():
            lines += ["", f"no prediction, status {status}:", *(f"  {one.path}: {one.message}" for one in ones)]
        return "\n".join(lines)

    def page(self, source: str, notes: Sequence[str] = ()) -> Page:
        """Return the report as a page: figures, labels, confusion, calibration, the surest mistakes.

        `source` says what answered; `notes` are sentences for the top.
        """
        failures, wrong = self.failures(), self.mistakes()
        figures = (
            (f"{self.top1:.1%}", f"accuracy ({self._interval()})"),
            (f"{self.topk:.1%}", f"true label among the best {self.k}"),
            (f"{self.macro_f1:.3f}", "macro F1, the mean of the labels"),
            (f"{self.calibration_error:.3f}", "expected calibration error"),
            (str(len(self.judged)), "pictures"),
            (str(sum(map(len, failures.values()))), "without a prediction, counted as wrong"),
        )
        lowest = sorted((score["f1"], label) for label, score in self.scores().items())[:12]
        drawn = [Bar(label, f1, f"{f1:.3f}") for f1, label in lowest]
        chart = bars("F1", "F1 of the labels, lowest first.", drawn, 1.0)
        many = f"the surest {_MISTAKES} of {len(wrong)}" if len(wrong) > _MISTAKES else f"all {len(wrong)}"
        thumbnails = Pictures(tuple(map(_thumbnail, wrong[:_MISTAKES]))) if wrong else Sentences(("None.",))
        sections = [
            Section("Labels", (Figures(figures), Sentences((*self.note, *notes)), chart, self._table())),
            Section("Confusion", (self._confusion(_ON_PAGE),)),
            Section("Calibration", self._reliability()),
            Section(f"Mistakes, {many}" if wrong else "Mistakes", (thumbnails,)),
        ]
        for status, ones in failures.items():
            lines = tuple(f"{one.path}: {one.message}" for one in ones[:_FAILURES])
            sections.append(Section(f"Without a prediction, status {status}: {len(ones)}", (Sentences(lines),)))
        return Page(f"{self.right} of {len(self.judged)} right", f"{source} on {self.data}", tuple(sections))

    def _interval(self) -> str:
        return "95 % interval {:.3f} to {:.3f}".format(*self.interval)

    def _reliability(self) -> tuple[Chart | Table, ...]:
        rows = self.bins()
        points = [(score, share, f"{count} answers, right") for count, score, share in rows]
        lines = [Line("answers", points, 0), Line("as sure as right", [(0, 0, ""), (1, 1, "")], 1, "--", True)]
        caption = "Share of right answers by their best score: under the dashed line the model is too sure."
        cells = tuple((f"{score:.3f}", f"{share:.3f}", str(count)) for count, score, share in rows)
        table = Table("Best scores by tenths", ("mean score", "share right", "answers"), cells, folded=True)
        return (plot("Reliability", caption, ("best score", None), ("share right", None), lines), table)

    def _column(self, one: Judged) -> str:
        if one.answer is None:
            return FAILED
        return one.answer if one.answer in self.labels else OTHER

    def _table(self) -> Table:
        rows = []
        for label, score in self.scores().items():
            shares = (f"{score[key]:.3f}" for key in ("precision", "recall", "f1"))
            rows.append((label, str(score["pictures"]), *shares))
        return Table("Every label", ("label", "pictures", "precision", "recall", "F1"), tuple(rows))

    def _confusion(self, most: int) -> Table:
        """Return the confusion matrix, or its largest cells if there are more than `most` labels."""
        counts = self.confusion()
        if len(counts) > most:
            cells = [
                (n, truth, name) for truth, row in counts.items() for name, n in row.items() if n and name != truth
            ]
            pairs = tuple((truth, name, str(n)) for n, truth, name in sorted(cells, reverse=True)[:_PAIRS])
            return Table("Most confused", ("true label", "answer", "pictures"), pairs, words=True)
        shades = tuple(
            tuple((1 if name == truth else -1) * n / max(1, sum(row.values())) for name, n in row.items())
            for truth, row in counts.items()
        )
        rows = tuple((truth, *map(str, row.values())) for truth, row in counts.items())
        heads = ("true label \\ answer", *self.columns)
        return Table("Pictures of each true label by answer", heads, rows, shades=shades)


def answers(predict: Predict, paths: Sequence[Path]) -> list[Answer]:
    """Return an answer for each file; one that cannot be read gets status 0 and the reason, and is not asked for."""
    bodies, made = list[bytes](), dict[Path, Answer]()
    for path in paths:
        try:
            bodies.append(path.read_bytes())
        except OSError as error:
            message = {"code": 0, "type": "Unreadable", "message": f"the file cannot be read ({error.strerror})"}
            made[path] = Answer(0, "Unreadable", json.dumps(message))
    asked = [path for path in paths if path not in made]
    made |= dict(zip(asked, predict(bodies) if bodies else [], strict=True))
    return [made[path] for path in paths]


def evaluate(predict: Predict, data: LabelledPictures, batch: int = BATCH) -> Report:
    """Ask for every picture's label, `batch` pictures at a time, and compare.

    Raise `DataError` when there are no pictures or no answer has any of their labels, `Undetermined` for a 200 whose
    body is no prediction.
    """
    if not data.pictures:
        raise DataError(f"{data.root} holds no pictures; name a folder with one folder a class")
    judged: list[Judged] = []
    for start in range(0, len(data.pictures), batch):
        chunk = data.pictures[start : start + batch]
        made = answers(predict, [picture.path for picture in chunk])
        for picture, answer in zip(chunk, made, strict=True):
            judged.append(_judge(picture.path, data.labels[picture.truth], answer))
    known = {label for one in judged for label, _ in one.answers}
    if known and known.isdisjoint(data.labels):
        check_labels(data, sorted(known))
    return Report(str(data.root), data.labels, tuple(judged))


def check_labels(data: LabelledPictures, labels: Iterable[str]) -> None:
    """Raise `DataError` for a folder that is named as no label of the model."""
    if odd := [label for label in data.labels if label not in labels]:
        are = f"the label {odd[0]!r}, which is" if len(odd) == 1 else f"the labels {listed(odd)}, which are"
        known = f"no label of the model ({listed([*labels], 5)})"
        raise DataError(f"{data.root} has {are} {known}; name others, or rename them as the model's labels")


def unseen(data: LabelledPictures, seen: frozenset[str]) -> LabelledPictures:
    """Return the pictures whose bytes were not trained on; raise `DataError` if none is left."""
    left = tuple(picture for picture in data.pictures if picture.sha256 not in seen)
    if data.pictures and not left:
        raise DataError(f"the run was trained on all pictures of {data.root}; name others to evaluate it")
    return replace(data, pictures=left)


def compare(one: Report, other: Report) -> tuple[str, float]:
    """Return in words whether two reports on the same pictures differ, and McNemar's exact p-value, two-sided."""
    from scipy.stats import binomtest

    pairs = Counter((a.within(1), b.within(1)) for a, b in zip(one.judged, other.judged, strict=True))
    first, second = pairs[True, False], pairs[False, True]
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    verdict = "more than chance" if p < 0.05 else "no more than chance explains"
    text = f"accuracy {one.top1:.4f} against {other.top1:.4f}: {first} pictures are right only in the first, {second} "
    return f"{text}only in the second; the difference is {verdict} (McNemar's exact test, p = {p:.3g})", p


def temperature(report: Report, before: float = 1.0) -> float:
    """Return the temperature that makes the true labels likeliest; `before` is the one of these answers.

    The answers must hold all labels. Raise `DataError` for too few, or none wrong: then the likelihood has no maximum.
    Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    from scipy.optimize import minimize_scalar

    answered = [one for one in report.judged if one.answers]
    if len(answered) < _LEAST or all(one.within(1) for one in answered):
        right = sum(one.within(1) for one in answered)
        fix = f"name {_LEAST} or more, of which it gets some wrong"
        raise DataError(f"{right} of {len(answered)} answered pictures are right, which shows no temperature; {fix}")

    def loss(log: float) -> float:
        made = [dict(one.answers).get(one.truth, 1.0) for one in warmed(report, math.exp(-log)).judged]
        return -sum(map(math.log, made))

    low, high = (math.log(edge / before) for edge in TEMPERATURES)
    return round(before * math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x), 4)


def warmed(report: Report, power: float) -> Report:
    """Return the report with each probability to this power, scaled to sum to 1: logits times `power`."""

    def one(judged: Judged) -> Judged:
        powers = {label: max(value, 1e-6) ** power for label, value in judged.answers}
        return replace(judged, answers=tuple((label, each / sum(powers.values())) for label, each in powers.items()))

    return replace(report, judged=tuple(map(one, report.judged)))


def _judge(path: Path, truth: str, answer: Answer) -> Judged:
    if answer.status != 200:
        return Judged(path, truth, (), answer.status, _message(answer))
    try:
        values = {str(label): float(value) for label, value in answer.json().items()}
    except (ValueError, TypeError, AttributeError):
        values = {}
    if not values:
        got = f"the answer for {path} is {answer.body[:80]!r}, no labels with probabilities"
        raise Undetermined(f"{got}; name a model that answers as Beeline's do")
    return Judged(path, truth, tuple(sorted(values.items(), key=lambda pair: -pair[1])), 200)


def _message(answer: Answer) -> str:
    """Return what a failed answer says: its JSON message, or the text itself where it is none."""
    try:
        values = answer.json()
        return str(values["message"]) if isinstance(values, dict) and "message" in values else str(values)
    except ValueError:
        return " ".join(answer.body.split())[:160] or answer.phrase


def _thumbnail(one: Judged) -> tuple[str, str, str]:
    caption = f"answered {one.answer} ({one.answers[0][1]:.3f}), truly {one.truth}"
    try:
        picture = pixels.open_rgb(one.path.read_bytes())
    except (RequestError, OSError) as error:
        return str(error), one.path.name, caption
    picture.thumbnail((180, 180))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", one.path.name, caption

"""How right a classifier is on labelled pictures, whatever answers: run, archive or server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beeline.answer import Answer
from beeline.errors import Undetermined
from train.data import LabelledPictures, labelled_pictures
from train.errors import DataError

__all__ = ["Judged", "LabelScore", "Report", "evaluate", "labelled_pictures"]

Predict = Callable[[list[bytes]], list[Answer]]

BATCH = 32
TOP_K = 5
# The answer's column in the confusion matrix for a label that no class folder has, and for no answer.
OTHER, FAILED = "(another label)", "(no answer)"
_SHOWN = 24


@dataclass(frozen=True)
class Judged:
    """One picture, what it shows and what was answered: labels with probabilities, best first.

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

    @property
    def right(self) -> bool:
        """Whether the best label is the true one."""
        return self.answer == self.truth

    def within(self, k: int) -> bool:
        """Whether the true label is among the `k` best."""
        return self.truth in [label for label, _ in self.answers[:k]]


@dataclass(frozen=True)
class LabelScore:
    """Precision, recall and F1 of one label, 0 to 1; `precision` is 0 for a label that is never answered."""

    label: str
    pictures: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. A picture without a prediction counts as wrong in every number."""

    data: str
    labels: tuple[str, ...]
    judged: tuple[Judged, ...]

    @property
    def pictures(self) -> int:
        """The number of pictures."""
        return len(self.judged)

    @property
    def right(self) -> int:
        """The number of pictures whose best label is the true one."""
        return sum(one.right for one in self.judged)

    @property
    def top1(self) -> float:
        """Accuracy, 0 to 1."""
        return self.right / self.pictures

    @property
    def k(self) -> int:
        """The k of `topk`: five, or fewer where no answer held five labels."""
        return min(TOP_K, max((len(one.answers) for one in self.judged), default=1) or 1)

    @property
    def topk(self) -> float:
        """The share of pictures whose true label is among the `k` best."""
        return sum(one.within(self.k) for one in self.judged) / self.pictures

    @property
    def columns(self) -> tuple[str, ...]:
        """What a picture can be answered with: the labels, and if they occur another label, no answer."""
        extra = {_column(one, self.labels) for one in self.judged} - set(self.labels)
        return (*self.labels, *(name for name in (OTHER, FAILED) if name in extra))

    def confusion(self) -> list[list[int]]:
        """Return counts `[true label][column]`."""
        pairs = Counter((one.truth, _column(one, self.labels)) for one in self.judged)
        return [[pairs[truth, column] for column in self.columns] for truth in self.labels]

    def scores(self) -> list[LabelScore]:
        """Return precision, recall and F1 of each label."""
        matrix = self.confusion()
        scores = []
        for index, label in enumerate(self.labels):
            hits, shown = matrix[index][index], sum(matrix[index])
            answered = sum(row[index] for row in matrix)
            precision, recall = hits / answered if answered else 0.0, hits / shown if shown else 0.0
            f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
            scores.append(LabelScore(label, shown, precision, recall, f1))
        return scores

    def mistakes(self) -> list[Judged]:
        """Return the wrong predictions, the surest first."""
        wrong = [one for one in self.judged if one.answers and not one.right]
        return sorted(wrong, key=lambda one: -one.answers[0][1])

    def failures(self) -> dict[int, list[Judged]]:
        """Return the pictures without a prediction by HTTP status."""
        found: dict[int, list[Judged]] = {}
        for one in self.judged:
            if not one.answers:
                found.setdefault(one.status, []).append(one)
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; paths as text, all mistakes and failures named."""
        scores = {
            one.label: {"pictures": one.pictures, "precision": one.precision, "recall": one.recall, "f1": one.f1}
            for one in self.scores()
        }
        return {
            "data": self.data,
            "pictures": self.pictures,
            "right": self.right,
            "top1": self.top1,
            "k": self.k,
            "topk": self.topk,
            "labels": scores,
            "confusion": {"columns": list(self.columns), "rows": dict(zip(self.labels, self.confusion(), strict=True))},
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
        width = max(len(name) for name in (*self.labels, *self.columns))
        failed = sum(len(ones) for ones in self.failures().values())
        lines = [
            f"{self.right} of {self.pictures} right: accuracy {self.top1:.4f}, top-{self.k} {self.topk:.4f}"
            + (f"; {failed} without a prediction, counted as wrong" if failed else "")
        ]
        lines += ["", f"{'':<{width}}  pictures  precision  recall     f1"]
        lines += [
            f"{one.label:<{width}}  {one.pictures:>8}  {one.precision:>9.3f}  {one.recall:>6.3f}  {one.f1:>5.3f}"
            for one in self.scores()
        ]
        if len(self.labels) <= _SHOWN // 2:
            lines += ["", f"{'true / answered':<{width + 6}}" + "".join(f"  {name:>{width}}" for name in self.columns)]
            for label, row in zip(self.labels, self.confusion(), strict=True):
                lines.append(f"{label:<{width + 6}}" + "".join(f"  {count:>{width}}" for count in row))
        if wrong := self.mistakes():
            lines += ["", "surest mistakes:"]
            lines += [
                f"  {one.answers[0][1]:.3f} {one.answer}, truly {one.truth}: {one.path}" for one in wrong[:_SHOWN]
            ]
        for status, ones in self.failures().items():
            lines += ["", f"no prediction, status {status}:"]
            lines += [f"  {one.path}: {one.message}" for one in ones]
        return "\n".join(lines)


def evaluate(predict: Predict, data: LabelledPictures, batch: int = BATCH) -> Report:
    """Ask for every picture's label, `batch` pictures at a time, and compare.

    Raises:
        DataError: when there are no pictures. Undetermined: for a 200 whose body is no prediction.
    """
    if not data.pictures:
        raise DataError(f"{data.root} holds no pictures; name a folder with one folder a class")
    judged: list[Judged] = []
    for start in range(0, len(data.pictures), batch):
        chunk = data.pictures[start : start + batch]
        answers = predict([picture.path.read_bytes() for picture in chunk])
        for picture, answer in zip(chunk, answers, strict=True):
            judged.append(_judge(picture.path, data.labels[picture.truth], answer))
    return Report(str(data.root), data.labels, tuple(judged))


def _judge(path: Path, truth: str, answer: Answer) -> Judged:
    if answer.status == 200:
        values = _numbers(answer.body)
        if not values:
            raise Undetermined(
                f"the answer for {path} is {answer.body[:80]!r}, no labels with probabilities; "
                "name a model that answers as Beeline's do"
            )
        return Judged(path, truth, tuple(sorted(values.items(), key=lambda pair: -pair[1])), 200)
    return Judged(path, truth, (), answer.status, _message(answer))


def _numbers(body: str) -> dict[str, float]:
    """Return labels with probabilities; nothing where the body is something else."""
    try:
        return {str(label): float(value) for label, value in json.loads(body).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _message(answer: Answer) -> str:
    """Return what a failed answer says: its JSON message, or the text itself where it is none."""
    try:
        values = json.loads(answer.body)
        return str(values["message"]) if isinstance(values, dict) and "message" in values else str(values)
    except ValueError:
        return " ".join(answer.body.split())[:160] or answer.phrase


def _column(one: Judged, labels: tuple[str, ...]) -> str:
    if one.answer is None:
        return FAILED
    return one.answer if one.answer in labels else OTHER

"""The two ladders that users reported, and in which way ours is shaped otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.ladder.climb import NEAR
from bench.ladder.fit import Fit, fit
from bench.ladder.row import Row


@dataclass(frozen=True)
class Reference:
    """Reported milliseconds for one image by batch size; from batch `worse_at` on they rose again."""

    what: str
    points: tuple[tuple[int, float], ...]
    worse_at: int | None = None
    unit: str = "ms per image"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        points = [list(point) for point in self.points]
        return {"what": self.what, "unit": self.unit, "points": points, "worse_at": self.worse_at}


REFERENCES = (
    Reference("ResNet-18, reported by users", ((8, 17.5), (32, 13.75)), worse_at=64),
    Reference("ResNet-101, reported by users", ((1, 2.75), (256, 1.02))),
)


def differences(rows: Sequence[Row], references: Sequence[Reference] = REFERENCES) -> list[str]:
    """Return sentences: one a reference, on its shape beside ours, and one on what batching cannot spread.

    The reason is read from both lines milliseconds(n) = a * n + b: only b, a batch's fixed cost, gets
    cheaper an image as the batch grows. The images' own cost a and their decoding stay.
    """
    good = [row for row in rows if row.error is None]
    line = fit([(row.batch, row.stages["forward"].median_ms) for row in good])
    if line is None:
        return ["Ours has fewer than two batch sizes, so there is no shape to compare."]
    found = [_difference(good, line, reference) for reference in references]
    best = min(good, key=lambda row: row.per_image("handler"))
    rest = best.per_image("handler") - best.per_image("forward")
    share = max(0.0, rest / best.per_image("handler"))
    found.append(
        f"Of our {best.per_image('handler'):.3g} ms per image at batch {best.batch}, {max(0.0, rest):.3g} ms "
        f"({share:.0%}) are outside the forward pass, where a larger batch saves nothing; the references do not say "
        "what theirs include."
    )
    return found


def _difference(good: list[Row], line: Fit, reference: Reference) -> str:
    (small, before), (large, after) = reference.points[0], reference.points[-1]
    theirs = fit([(batch, batch * each) for batch, each in reference.points])
    assert theirs is not None
    shape = f"{reference.what}: an image gets {_times(before / after)} from batch {small} to {large}"
    if reference.worse_at is not None:
        shape += f" and is worse at {reference.worse_at}"
    first = min(good, key=lambda row: abs(row.batch - small))
    last = min(good, key=lambda row: abs(row.batch - large))
    if first.batch == last.batch:
        return f"{shape}; ours has only batch {first.batch} in that range, so the shapes cannot be compared."
    gain = first.per_image("forward") / last.per_image("forward")
    ours = f"our forward pass gets {_times(gain)} from {first.batch} to {last.batch}, {_turn(good)}"
    alone = (line.a_ms + line.b_ms / first.batch) / (line.a_ms + line.b_ms / last.batch)
    return f"{shape}; {ours}. {_why(gain, alone, before / after, line, theirs)}"


def _why(gain: float, alone: float, reported: float, line: Fit, theirs: Fit) -> str:
    """Return the reason for the difference.

    Args:
        gain: how many times faster an image of ours gets.
        alone: how many times it would by its fixed cost alone.
        reported: how many times theirs does.
        line: ours.
        theirs: the reference's.
    """
    costs = f"A batch of theirs costs {_cost(theirs)}, one of ours {_cost(line)}"
    if abs(gain / reported - 1) <= NEAR:
        return f"{costs}: the shapes are alike."
    said = f"{costs}; only that is spread over more images, and it makes ours {_times(alone)}."
    if abs(gain / alone - 1) > NEAR:
        said += (
            f" What is left of the difference changes with the batch size (caches, kernels, noise): our points lie up "
            f"to {line.error:.0%} off their line."
        )
    return said


def _cost(line: Fit) -> str:
    if line.b_ms <= 0:
        return f"nothing fixed that could be seen and {line.a_ms:.3g} ms an image"
    return f"{line.b_ms:.3g} ms fixed (as much as {line.images_lost:.2g} images) and {line.a_ms:.3g} ms an image"


def _times(gain: float) -> str:
    if abs(gain - 1) < 0.01:
        return "no faster"
    return f"{gain:.2f} times faster" if gain > 1 else f"{1 / gain:.2f} times slower"


def _turn(good: list[Row]) -> str:
    """Say where our own ladder is best, and from where it turns worse, if it does."""
    best = min(good, key=lambda row: row.per_image("forward"))
    after = [row for row in good if row.batch > best.batch]
    worse = [row for row in after if row.per_image("forward") > best.per_image("forward") * (1 + NEAR)]
    return f"best at {best.batch}" + (f" and worse at {worse[0].batch}" if worse else "")
